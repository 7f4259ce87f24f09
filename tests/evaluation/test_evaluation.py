"""What an evaluation reports, against counts made by hand on scripted traces."""

import dataclasses

import numpy as np
import pytest
from scripted_sampler import TOKENIZER, ReadingSampler, ScriptedSampler, make_actor, number_task

from spiral_jax.core.config import ConfigError, for_evaluation, for_evaluation_in_training
from spiral_jax.core.groups import GroupRequests, Purpose, Role, Stop
from spiral_jax.evaluation.comparison import compare
from spiral_jax.evaluation.results import make_results, read_results, write_results
from spiral_jax.evaluation.settings import for_command
from spiral_jax.evaluation.wave import cut_at, evaluate, evaluate_wave
from spiral_jax.objective.subsets import independent_subsets


def script(role, cursor, k, i):
    """Search: traces 0 and 1 are right, 2 to 6 agree on a wrong answer, 7 has none. Aggregation:
    set 0 right.
    """
    if role is Role.SEARCH:
        return {0: "\\boxed{7}", 1: "\\boxed{7}", 7: "left=1..."}.get(i, "\\boxed{8}")
    return "\\boxed{7}" if k == 0 and cursor % 2 == 0 else "\\boxed{9}"


def in_training(task=None, **overrides):
    actor = make_actor(script, task, **overrides)
    return dataclasses.replace(actor, c=for_evaluation_in_training(actor.c))


def test_measures_are_means_over_problems_of_what_the_traces_say():
    actor = in_training(eval__problems=20, eval__subsets=2, eval__traces=3)
    result, full = evaluate(actor, None, step=5)
    assert result["step"] == 5 and result["problems"] == 20 and result["too_long"] == 0
    assert result["single"]["mean"] == pytest.approx(2 / 8)
    assert result["pass_at_n"]["mean"] == 1.0
    assert result["aggregated"]["mean"] == pytest.approx(
        0.25
    )  # one of two sets, for every other problem
    assert result["aggregated"]["count"] == 20
    assert result["parse_rate_search"] == pytest.approx(7 / 8) and result[
        "cut_off_search"
    ] == pytest.approx(1 / 8)
    assert result["parse_rate_aggregation"] == 1.0
    assert {(int(ids[0]), int(ids[1])) for call in actor.sampler.calls for ids in call.id_Ux6} == {
        (Purpose.EVALUATION, 5)
    }
    measures = full["measures"]
    for mine, of_results in ((result["single"], measures["single"]), (result["pass_at_n"], measures["pass_at_k"][-1]),
                             (result["majority"], measures["aggregated_majority"]),
                             (result["aggregated"], measures["aggregated"])):  # fmt: skip
        assert mine["mean"] == pytest.approx(of_results["mean"])
    assert len(measures["pass_at_k"]) == 8 and [row["round"] for row in measures["rsa"]] == [0]
    assert full["settings"]["n"] == 8 and full["counts"]["rsa"]["sampled_tokens"] == 0


def test_an_evaluation_during_training_can_run_rounds_and_compares_with_the_command(tmp_path):
    actor = in_training(
        eval__problems=3, eval__rounds_in_training=2, eval__population=4, eval__set_size=2
    )
    row, full = evaluate(actor, None, step=0)
    assert [stage["round"] for stage in full["measures"]["rsa"]] == [0, 1, 2]
    assert row["sampled_tokens"] == sum(of["sampled_tokens"] for of in full["counts"].values())
    write_results(tmp_path / "step_000000" / "results.json", full)
    again = read_results(tmp_path / "step_000000" / "results.json")
    command = make_actor(
        script, eval__problems=3, eval__n=8, eval__rounds=2, eval__population=4, eval__set_size=2
    )
    c = for_evaluation(command.c)
    problems = [command.task.held_out(i) for i in range(3)]
    records, counts, _ = evaluate_wave(
        dataclasses.replace(command, c=c), None, problems, np.arange(3)
    )
    found = make_results(for_command(c), "weights", dict(enumerate(problems)), records, counts)
    assert again["measures"] == found["measures"] and again["records"] == found["records"]
    compare(again, found)


def test_an_evaluation_without_an_aggregation_stage_has_a_row_alone():
    row, full = evaluate(in_training(eval__problems=4, loss__estimator="grpo"), None, step=1)
    assert (
        full is None and "aggregated" not in row and row["single"]["mean"] == pytest.approx(2 / 8)
    )


def test_the_majority_is_that_of_the_aggregated_sets_candidates_and_ties_are_split():
    # The two sets of four hold the two right answers together (set of 2 right, 2 wrong: a tie), or
    # one each (lost).
    actor = in_training(eval__problems=40)
    result, _ = evaluate(actor, None, step=0)
    together = []
    for call in actor.sampler.calls:
        if call.id_Ux6[0, 4] == Role.AGGREGATION:
            for u in range(len(call)):
                text = actor.scaffold.tokenizer.decode(call.prompt_UxP[u, : call.prompt_len_U[u]])
                right, wrong = text.count("boxed{7}"), text.count("boxed{8}")
                together.append(1.0 if right > wrong else 0.5 if right == wrong else 0.0)
    assert sum(together) > 0
    assert result["majority"]["mean"] == pytest.approx(sum(together) / len(together))


def test_held_out_problems_that_are_too_long_are_left_out_and_counted():
    task = number_task()
    longer = dataclasses.replace(
        task,
        held_out=lambda i: dataclasses.replace(
            task.held_out(i), text="left=" + "1+" * (40 if i % 4 == 0 else 1)
        ),
    )
    result, full = evaluate(in_training(longer, eval__problems=8), None, step=0)
    assert result["problems"] == 6 and result["too_long"] == 2 and result["single"]["count"] == 6
    assert full["problems"]["count"] == 6 and full["problems"]["too_long"] == 2
    nothing = dataclasses.replace(longer, held_out=lambda i: longer.held_out(0))
    with pytest.raises(ConfigError, match="prompt.max_problem_tokens = 16"):
        evaluate(in_training(nothing, eval__problems=8), None, step=0)


def evaluation_actor(script, **overrides):
    actor = make_actor(script, **overrides)
    return dataclasses.replace(actor, c=for_evaluation(actor.c))


def test_each_round_reads_the_population_before_it_and_draws_its_own_sets():
    # Trace i answers i, so the reader's answer to a set is its largest member, and everything can
    # be worked out.
    actor = evaluation_actor(
        lambda role, cursor, k, i: f"\\boxed{{{i}}}",
        eval__n=9, eval__population=8, eval__set_size=2, eval__rounds=3, eval__subsets=3, eval__traces=2,
        eval__subset_size=3,
    )  # fmt: skip
    actor = dataclasses.replace(actor, sampler=ReadingSampler(actor.sampler.script))
    index_B = np.array([4, 9])
    records, counts, rollouts = evaluate_wave(
        actor, None, [actor.task.held_out(i) for i in index_B], index_B
    )
    for record, index in zip(records, index_B, strict=True):
        assert record["index"] == index and record["id"] == f"p{index}"
        assert record["search"]["answer"] == [
            1,
            2,
            3,
            4,
            5,
            6,
            7,
            0,
            8,
        ]  # 7 is the answer; wrong ones in order
        for k, member_S in enumerate(record["aggregation"]["member"]):
            pair = record["aggregation"]["answer"][2 * k : 2 * k + 2]
            assert pair[0] == pair[1] and (pair[0] == 0) == (max(member_S) == 7)
        assert sorted(n for member_S in record["aggregation"]["member"] for n in member_S) == list(
            range(9)
        )
        population = list(range(8))
        for round, found in enumerate(record["rsa"], start=1):
            member = independent_subsets(
                actor.c.seed, int(Purpose.EVALUATION), 0, int(index), round, 8, 2, 8
            )
            population = [max(population[n] for n in member_S) for member_S in member]
            assert [answer == 0 for answer in found["answer"]] == [
                value == 7 for value in population
            ]
            assert len(set(found["answer"])) == len(set(population))
    assert len(rollouts) == 2 and rollouts.rounds[0].reward_BxKxM.shape == (2, 3, 2)
    keys = [tuple(ids[3:]) for call in actor.sampler.calls for ids in call.id_Ux6 if ids[2] == 4]
    assert len(set(keys)) == len(keys)  # no two groups of a problem share random numbers
    assert counts["rsa_candidates"] == 2 * 3 * 8 * 2 and counts["aggregation_candidates"] == 2 * 9
    assert counts["search_sampled_tokens"] == sum(
        sum(record["search"]["length"]) for record in records
    )
    assert sum(counts[f"rsa_{name}"] for name in ("correct", "wrong")) == 2 * 3 * 8


def test_smaller_limits_score_prefixes_of_the_same_traces():
    texts = ["\\boxed{7}", "left=1 \\boxed{8} left \\boxed{7}", "\\boxed{7} left=1...", "right"]
    lengths = [
        len(TOKENIZER.encode(text, add_special_tokens=False)) + (not text.endswith("..."))
        for text in texts
    ]
    first_box = len(TOKENIZER.encode("left=1 \\boxed{8}", add_special_tokens=False))
    limits = (2, lengths[0], first_box + 1, 32)
    actor = evaluation_actor(
        lambda role, cursor, k, i: texts[i] if role is Role.SEARCH else "\\boxed{7}",
        eval__n=4, eval__subsets=1, eval__population=2, eval__set_size=1, eval__rounds=1, eval__limits=limits,
    )  # fmt: skip
    (record,), _, _ = evaluate_wave(actor, None, [actor.task.held_out(0)], np.array([0]))
    assert record["search"]["length"] == lengths and record["search"]["cut_off"] == [0, 0, 1, 0]
    answers = {stage["limit"]: stage["answer"] for stage in record["limits"]}
    assert answers[2] == [None] * 4
    assert answers[lengths[0]][0] == 0  # its stop id is the last token that fits
    assert answers[first_box + 1] == [
        0,
        1,
        0,
        None,
    ]  # of the second trace only the first, wrong box
    assert answers[32] == record["search"]["answer"]


def test_a_cut_keeps_the_stop_of_traces_that_fit():
    requests = GroupRequests(
        np.zeros((1, 1), np.int32), np.ones(1, np.int32), np.zeros((1, 6), np.int32), 3, 12
    )
    texts = ["7", "left=1...", "left=1+2+3"]
    groups = ScriptedSampler(lambda role, cursor, k, i: texts[i]).write(requests)
    length = groups.trace_len_UxC[0]
    cut = cut_at(groups, int(length[1]))
    assert cut.trace_len_UxC[0].tolist() == [length[0], length[1], length[1]]
    assert cut.stop_UxC[0].tolist() == [Stop.STOP, Stop.LENGTH, Stop.LENGTH]
    assert cut.trace_UxCxG.shape == cut.logprob_UxCxG.shape == (1, 3, length[1])
    np.testing.assert_array_equal(cut.trace_ids(0, 2), groups.trace_ids(0, 2)[: length[1]])
    assert cut_at(groups, 12).stop_UxC.tolist() == groups.stop_UxC.tolist()


def test_another_policys_search_is_read_by_this_ones_aggregator_in_all_rounds():
    drew = set()

    class Noting(ScriptedSampler):
        def stream(self, weights, feed):
            self.weights = weights
            return super().stream(weights, feed)

        def write(self, request):
            drew.add((self.weights, Role(request.id_Ux6[0, 4])))
            return super().write(request)

    actor = evaluation_actor(script, eval__rounds=2)
    actor = dataclasses.replace(actor, sampler=Noting(script))
    evaluate_wave(actor, "mine", [actor.task.held_out(0)], np.arange(1), search_weights="other's")
    assert drew == {("other's", Role.SEARCH), ("mine", Role.AGGREGATION)}


def test_strategies_of_search_traces_are_recorded_where_something_names_them():
    actor = evaluation_actor(script, task__strategy="test_evaluation:length_of")
    problems = [actor.task.held_out(i) for i in range(2)]
    records, _, _ = evaluate_wave(actor, None, problems, np.arange(2))
    texts = [script(Role.SEARCH, 0, 0, i).removesuffix("...") for i in range(actor.c.search.traces)]
    for record, problem in zip(records, problems, strict=True):
        assert record["search"]["strategy"] == [
            f"{problem.id} {len(text)}" if "boxed" in text else None for text in texts
        ]
    actor.c.task.strategy = ""
    records, _, _ = evaluate_wave(actor, None, problems, np.arange(2))
    assert "strategy" not in records[0]["search"]


def length_of(text, problem):
    return f"{problem.id} {len(text)}" if "boxed" in text else None
