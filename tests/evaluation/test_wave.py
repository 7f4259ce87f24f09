"""What an evaluation reports, against counts made by hand on scripted traces."""

import dataclasses

import pytest
from scripted_sampler import (
    CUT_OFF,
    TOKENIZER,
    InlineVerifier,
    ReadingSampler,
    ScriptedSampler,
    number_task,
    prompt_text,
    scripted_evaluator,
    with_text,
)

from spiral_jax.core.config import ConfigError
from spiral_jax.core.groups import Purpose, Role
from spiral_jax.evaluation.comparison import compare
from spiral_jax.evaluation.results import make_results, read_results, write_results
from spiral_jax.evaluation.tables import evaluation_table
from spiral_jax.objective.subsets import Key, disjoint_subsets, independent_subsets

RIGHT, WRONG, NO_BOX = "\\boxed{7}", "\\boxed{8}", "left=1" + CUT_OFF


def script(role, cursor, k, i):
    """Search: traces 0 and 1 are right, 2 to 6 agree on a wrong answer, 7 has none.

    Aggregation: set 0 of every other problem is right.
    """
    if role is Role.SEARCH:
        return {0: RIGHT, 1: RIGHT, 7: NO_BOX}.get(i, WRONG)
    return RIGHT if k == 0 and cursor % 2 == 0 else "\\boxed{9}"


def in_training(task=None, **overrides):
    return scripted_evaluator(ScriptedSampler(script), task, training=True, **overrides)


def some_of(evaluator, *indices):
    """The held-out problems at these places."""
    everything = evaluator.held_out()
    return [everything[index] for index in indices]


# --- in training --------------------------------------------------------------------------------


def test_measures_are_means_over_problems_of_what_the_traces_say():
    evaluator = in_training(eval__problems=20, eval__subsets=2, eval__traces=3)
    row, full = evaluator.evaluate(None, step=5)
    assert row["step"] == 5 and row["problems"] == 20 and row["too_long"] == 0
    assert row["single"]["mean"] == pytest.approx(2 / 8)
    assert row["pass_at_n"]["mean"] == 1.0
    one_of_two_sets_of_every_other_problem = 0.25
    assert row["aggregated"]["mean"] == pytest.approx(one_of_two_sets_of_every_other_problem)
    assert row["aggregated"]["count"] == 20
    assert row["parse_rate_search"] == pytest.approx(7 / 8)
    assert row["cut_off_search"] == pytest.approx(1 / 8)
    assert row["parse_rate_aggregation"] == 1.0
    keys = {tuple(call.id_Ux6[0, :2].tolist()) for call in evaluator.sampler.calls}
    assert keys == {(Purpose.EVALUATION, 5)}

    measures = full["measures"]
    same_in_both = {
        "single": measures["single"],
        "pass_at_n": measures["pass_at_k"][-1],
        "majority": measures["aggregated_majority"],
        "aggregated": measures["aggregated"],
    }
    for name, of_results in same_in_both.items():
        assert row[name]["mean"] == pytest.approx(of_results["mean"])
    assert len(measures["pass_at_k"]) == 8
    assert [stage["round"] for stage in measures["rsa"]] == [0]
    assert full["settings"]["n"] == 8 and full["counts"]["rsa"]["sampled_tokens"] == 0


def test_partial_credit_is_reported_beside_votes_that_go_by_answer():
    """Search says 7 twice, 8 five times, and is cut off once; only 7 is right, 8 earns a half."""

    def reward(text, problem):
        worth = {RIGHT: (1.0, "seven"), WRONG: (0.5, "eight"), "\\boxed{9}": (0.5, "nine")}
        return worth.get(text, (0.0, ""))

    sizes = {"eval__problems": 4, "eval__subsets": 2, "eval__traces": 3}
    evaluator = dataclasses.replace(in_training(**sizes), verifier=InlineVerifier(reward))
    row, full = evaluator.evaluate(None, step=0)
    assert row["reward_search"] == pytest.approx((2 + 5 / 2) / 8)
    assert row["reward_aggregation"] == pytest.approx(0.25 + 0.75 / 2)
    assert row["single"]["mean"] == pytest.approx(2 / 8)
    assert "mean reward, search" in evaluation_table([row])
    rewards = full["measures"]["rewards"]
    assert rewards["single"]["mean"] == pytest.approx(row["reward_search"])
    assert rewards["aggregated"]["mean"] == pytest.approx(row["reward_aggregation"])
    bits, of_bits = in_training(**sizes).evaluate(None, step=0)
    assert "rewards" not in of_bits["measures"]
    assert "reward_search" not in bits  # it is the share of right answers
    assert full["measures"]["majority_at_k"][0]["mean"] == pytest.approx(2 / 8)
    assert full["measures"]["majority_at_k"][-1]["mean"] == 0.0  # eight has five votes of eight


def test_an_evaluation_during_training_can_run_rounds_and_compares_with_the_command(tmp_path):
    sizes = {"eval__problems": 3, "eval__population": 4, "eval__set_size": 2}
    evaluator = in_training(eval__rounds_in_training=2, **sizes)
    row, full = evaluator.evaluate(None, step=0)
    assert [stage["round"] for stage in full["measures"]["rsa"]] == [0, 1, 2]
    counts = full["counts"].values()
    assert row["sampled_tokens"] == sum(of_stage["sampled_tokens"] for of_stage in counts)
    path = tmp_path / "step_000000" / "results.json"
    write_results(path, full)
    in_run = read_results(path)

    command = scripted_evaluator(ScriptedSampler(script), eval__n=8, eval__rounds=2, **sizes)
    asked = command.held_out()
    wave = command.wave(None, asked)
    problems = {each.cursor: each.problem for each in asked}
    results = make_results(command.settings, "weights", problems, wave.records, wave.counts)
    assert in_run["measures"] == results["measures"] and in_run["records"] == results["records"]
    compare(in_run, results)


def test_an_evaluation_without_an_aggregation_stage_has_a_row_alone():
    row, full = in_training(eval__problems=4, loss__estimator="grpo").evaluate(None, step=1)
    assert full is None and "aggregated" not in row
    assert row["single"]["mean"] == pytest.approx(2 / 8)


def test_the_majority_is_that_of_the_aggregated_sets_candidates_and_ties_are_split():
    # The two sets of four hold the two right answers together (2 right, 2 wrong: a tie), or one
    # each (lost).
    evaluator = in_training(eval__problems=40)
    row, _ = evaluator.evaluate(None, step=0)
    votes = []
    for call in evaluator.sampler.calls:
        if call.id_Ux6[0, 4] == Role.AGGREGATION:
            shown = prompt_text(call)
            right, wrong = shown.count(RIGHT), shown.count(WRONG)
            votes.append(1.0 if right > wrong else 0.5 if right == wrong else 0.0)
    assert sum(votes) > 0
    assert row["majority"]["mean"] == pytest.approx(sum(votes) / len(votes))


def test_held_out_problems_that_are_too_long_are_left_out_and_counted():
    def long_every_fourth(cursor, text):
        return "left=" + "1+" * (40 if cursor % 4 == 0 else 1)

    task = with_text(number_task(), long_every_fourth)
    row, full = in_training(task, eval__problems=8).evaluate(None, step=0)
    assert row["problems"] == 6 and row["too_long"] == 2 and row["single"]["count"] == 6
    assert full["problems"]["count"] == 6 and full["problems"]["too_long"] == 2

    too_long = with_text(task, lambda cursor, text: "left=" + "1+" * 40)
    with pytest.raises(ConfigError, match="prompt.max_problem_tokens = 16"):
        in_training(too_long, eval__problems=8).evaluate(None, step=0)


# --- the stages of a wave -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def reading():
    """(evaluator, wave) of problems 4 and 9; trace i answers i, and a reader its largest member."""
    sampler = ReadingSampler(lambda role, cursor, k, i: f"\\boxed{{{i}}}")
    evaluator = scripted_evaluator(
        sampler,
        eval__problems=10,
        eval__n=9,
        eval__population=8,
        eval__set_size=2,
        eval__rounds=3,
        eval__subsets=3,
        eval__traces=2,
        eval__subset_size=3,
    )
    return evaluator, evaluator.wave(None, some_of(evaluator, 4, 9))


def test_plain_aggregation_reads_disjoint_sets_of_the_search_traces(reading):
    evaluator, wave = reading
    for record, index in zip(wave.records, (4, 9), strict=True):
        assert record["index"] == index and record["id"] == f"p{index}"
        # 7 is the answer; wrong ones are numbered in order
        assert record["search"]["answer"] == [1, 2, 3, 4, 5, 6, 7, 0, 8]
        member = record["aggregation"]["member"]
        key = Key(evaluator.settings.seed, int(Purpose.EVALUATION), 0, index, 0)
        assert member == disjoint_subsets(key, 9, 3, 3).tolist()
        assert sorted(sum(member, [])) == list(range(9))
        for k, member_S in enumerate(member):
            pair = record["aggregation"]["answer"][2 * k : 2 * k + 2]
            assert pair[0] == pair[1] and (pair[0] == 0) == (max(member_S) == 7)


def test_each_round_reads_the_population_before_it_and_draws_its_own_sets(reading):
    evaluator, wave = reading
    for record, index in zip(wave.records, (4, 9), strict=True):
        population = list(range(8))
        assert len(record["rsa"]) == 3
        for round, of_round in enumerate(record["rsa"], start=1):
            key = Key(evaluator.settings.seed, int(Purpose.EVALUATION), 0, index, round)
            member = independent_subsets(key, 8, 2, 8)
            population = [max(population[n] for n in member_S) for member_S in member]
            right = [answer == 0 for answer in of_round["answer"]]
            assert right == [value == 7 for value in population]
            assert len(set(of_round["answer"])) == len(set(population))


def test_a_wave_counts_what_it_sampled_showed_and_verified(reading):
    evaluator, wave = reading
    of_problem = [call for call in evaluator.sampler.calls if call.id_Ux6[0, 2] == 4]
    keys = [tuple(call.id_Ux6[0, 3:].tolist()) for call in of_problem]
    assert len(set(keys)) == len(keys) == 1 + 3 + 3 * 8  # no two share random numbers
    counts = wave.counts
    assert counts["rsa_candidates"] == 2 * 3 * 8 * 2 and counts["aggregation_candidates"] == 2 * 9
    lengths = [sum(record["search"]["length"]) for record in wave.records]
    assert counts["search_sampled_tokens"] == sum(lengths)
    assert counts["rsa_correct"] + counts["rsa_wrong"] == 2 * 3 * 8


def test_smaller_limits_score_prefixes_of_the_same_traces():
    texts = [RIGHT, f"left=1 {WRONG} left {RIGHT}", f"{RIGHT} left=1{CUT_OFF}", "right"]

    def tokens(text):
        return len(TOKENIZER.encode(text, add_special_tokens=False))

    lengths = [tokens(text) + (not text.endswith(CUT_OFF)) for text in texts]
    behind_first_box = tokens(f"left=1 {WRONG}") + 1
    evaluator = scripted_evaluator(
        ScriptedSampler(lambda role, cursor, k, i: texts[i] if role is Role.SEARCH else RIGHT),
        eval__problems=1,
        eval__n=4,
        eval__subsets=1,
        eval__population=2,
        eval__set_size=1,
        eval__rounds=1,
        eval__limits=(2, lengths[0], behind_first_box, 32),
    )
    (record,) = evaluator.wave(None, evaluator.held_out()).records
    assert record["search"]["length"] == lengths and record["search"]["cut_off"] == [0, 0, 1, 0]
    answers = {stage["limit"]: stage["answer"] for stage in record["limits"]}
    assert answers[2] == [None] * 4
    assert answers[lengths[0]][0] == 0  # its stop id is the last token that fits
    assert answers[behind_first_box] == [0, 1, 0, None]  # of trace 1 the first, wrong box alone
    assert answers[32] == record["search"]["answer"]


def test_another_policys_search_is_read_by_this_ones_aggregator_in_all_rounds():
    @dataclasses.dataclass
    class NotingSampler(ScriptedSampler):
        """Notes which weights draw what."""

        drew: set = dataclasses.field(default_factory=set)

        def stream(self, weights, feed):
            self.weights = weights
            return super().stream(weights, feed)

        def write(self, request):
            self.drew.add((self.weights, Role(request.id_Ux6[0, 4])))
            return super().write(request)

    evaluator = scripted_evaluator(NotingSampler(script), eval__problems=1, eval__rounds=2)
    wave = evaluator.wave("mine", evaluator.held_out(), search_policy="other's")
    expected = {("other's", Role.SEARCH), ("mine", Role.AGGREGATION)}
    assert evaluator.sampler.drew == expected
    mine = scripted_evaluator(ScriptedSampler(script), eval__problems=1, eval__rounds=2)
    assert wave.records == mine.wave("mine", mine.held_out()).records  # the same texts


def test_strategies_of_search_traces_are_recorded_where_something_names_them():
    def length_of(text, problem):
        return f"{problem.id} {len(text)}" if "boxed" in text else None

    sizes = {"eval__problems": 2, "eval__n": 8, "eval__rounds": 1}
    evaluator = scripted_evaluator(ScriptedSampler(script), strategy=length_of, **sizes)
    records = evaluator.wave(None, evaluator.held_out()).records
    texts = [script(Role.SEARCH, 0, 0, i).removesuffix(CUT_OFF) for i in range(8)]
    for record in records:
        expected = [f"{record['id']} {len(text)}" if "boxed" in text else None for text in texts]
        assert record["search"]["strategy"] == expected
    nameless = scripted_evaluator(ScriptedSampler(script), **sizes)
    assert "strategy" not in nameless.wave(None, nameless.held_out()).records[0]["search"]
