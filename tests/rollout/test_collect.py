"""Dynamic sampling: which problems are tried and kept, and what their traces weigh."""

import dataclasses

import numpy as np
import pytest
from scripted_sampler import CUT_OFF, InlineVerifier, number_task, scripted_training, with_text

from spiral_jax.core.config import ConfigError
from spiral_jax.core.groups import Role, Stop
from spiral_jax.objective import of_own_answers
from spiral_jax.objective.advantages import (
    Advantages,
    FractionalRewards,
    RoundAdvantages,
    compute_advantages,
)
from spiral_jax.objective.rewards import Rewards
from spiral_jax.rollout.collect import FirstKept, NoSignal, Source
from spiral_jax.rollout.requests import Asked
from spiral_jax.rollout.settings import DynamicSampling
from spiral_jax.rollout.traces import Rollouts
from spiral_jax.verifier.pool import VerifierFailure
from spiral_jax.verifier.rewards import Status, Verdict
from spiral_jax.verifier.settings import VerifierSettings


def aggregations_right(is_right):
    """Search traces are wrong, aggregations right where `is_right(cursor, set, trace)`."""

    def script(role, cursor, k, i):
        if role is Role.SEARCH:
            return f"trace {i} \\boxed{{{i}1}}"
        return "\\boxed{7}" if is_right(cursor, k, i) else "\\boxed{8}"

    return script


def first_set_right(cursor, k, i):
    return k == 0


def search_right(role, cursor, k, i):
    """The first cursor % 4 search traces are right, all aggregations wrong."""
    is_right = role is Role.SEARCH and i < cursor % 4
    return f"{'left' if i % 2 else 'right'}=1 \\boxed{{{7 if is_right else 8}}}"


def first_word(text, problem):
    return text.split("=")[0]


# --- which problems make a batch ----------------------------------------------------------------


def test_the_batch_is_the_first_kept_in_cursor_order_and_the_cursor_stands_behind_the_last():
    # Odd cursors are informative (set 0 right only), even ones are flat.
    training = scripted_training(aggregations_right(lambda cursor, k, i: cursor % 2 and k == 0))
    batch = training.collect(cursor=10)
    assert batch.rollouts.cursor_B.tolist() == [11, 13, 15, 17]
    assert batch.discarded.cursor_B.tolist() == [10, 12, 14, 16]
    assert not any(groups.advantage_UxC.any() for groups in batch.discarded.stages)
    assert batch.next_cursor == 18
    names = ("kept", "surplus", "starved", "undecided")
    counts = {name: batch.metrics[f"sampling/{name}"] for name in names}
    undecided = batch.metrics["sampling/tried"] - 8
    assert counts == {"kept": 4, "surplus": 0, "starved": 0, "undecided": undecided}


def test_the_batch_does_not_depend_on_how_many_run_at_once_or_are_expected_to_be_kept():
    script = aggregations_right(lambda cursor, k, i: cursor % 3 and k == 0)
    batches = []
    for at_once in (1, 7, 40):
        for rate in (0.1, 1.0):
            training = scripted_training(script, at_once=at_once, sampling__keep_rate=rate)
            batches.append(training.collect(step=2, cursor=5))
    assert len({batch.metrics["sampling/tried"] for batch in batches}) > 1
    first, *others = batches
    for batch in others:
        assert batch.rollouts.cursor_B.tolist() == first.rollouts.cursor_B.tolist()
        assert batch.next_cursor == first.next_cursor
        for credit, expected in zip(batch.credit, first.credit, strict=True):
            np.testing.assert_array_equal(credit.weight_UxC, expected.weight_UxC)


def test_weights_are_those_of_the_objective_on_the_kept_problems():
    right = np.random.default_rng(0).random((200, 4, 4)) < 0.5
    training = scripted_training(aggregations_right(lambda cursor, k, i: right[cursor, k, i]))
    batch = training.collect(step=1)
    kept = batch.rollouts
    reward = right[kept.cursor_B].astype(np.float32)
    np.testing.assert_array_equal(kept.rounds[0].reward_BxKxM, reward)

    rewards = Rewards(np.zeros((4, 8)), reward, kept.rounds[0].member_BxKxS)
    expected = compute_advantages("marginal_mean", [rewards]).rounds[0]
    search, aggregation = batch.credit
    three_digits_of_c = {"rtol": 1e-3}
    np.testing.assert_allclose(
        search.weight_UxC, expected.candidate_BxN / (4 * 0.886), **three_digits_of_c
    )
    weight_BxKxM = aggregation.weight_UxC.reshape(4, 4, 4)
    np.testing.assert_allclose(weight_BxKxM, expected.aggregation_BxKxM / (4 * 4 * 3), rtol=1e-6)


def test_a_short_batch_is_trained_on_when_the_cap_is_reached_with_a_quarter_kept():
    script = aggregations_right(lambda cursor, k, i: cursor == 9 and k == 0)
    batch = scripted_training(script, sampling__max_ratio=4.0).collect()
    assert batch.rollouts.cursor_B.tolist() == [9]
    assert batch.next_cursor == 16
    assert batch.metrics["sampling/tried"] == 16


@pytest.mark.parametrize("right", [False, True])
def test_a_task_without_signal_stops_the_run_with_the_histogram(right):
    training = scripted_training(aggregations_right(lambda cursor, k, i: right))
    with pytest.raises(NoSignal) as stopped:
        training.collect()
    histogram = f"{16 if right else 0} right: 16"
    assert all(part in str(stopped.value) for part in ("0 of 16 problems", "of 16", histogram))


# --- partial credit -------------------------------------------------------------------------------


def tenths(text, problem):
    """The last digit in tenths, and the answer, without a box."""
    return int(text[-1]) / 10, text


def graded(script, **overrides):
    return scripted_training(script, **overrides).with_actor(verifier=InlineVerifier(tenths))


def test_partial_credit_makes_advantages_that_are_differences_of_rewards():
    """Search is worthless; set 0 earns 0.9 of odd cursors, 0.3 of even ones, the others 0.3."""

    def script(role, cursor, k, i):
        if role is Role.SEARCH:
            return "0"
        return "9" if k == 0 and cursor % 2 else "3"

    batch = graded(script).collect()
    kept = batch.rollouts
    assert kept.cursor_B.tolist() == [1, 3, 5, 7]  # the even ones are flat, though not at 0
    reward_BxKxM = kept.rounds[0].reward_BxKxM
    np.testing.assert_allclose(reward_BxKxM[:, 0], 0.9, atol=2**-24)
    np.testing.assert_allclose(reward_BxKxM[:, 1:], 0.3, atol=2**-24)
    member_BxKxS = kept.rounds[0].member_BxKxS
    for b in range(4):
        in_first = np.isin(np.arange(8), member_BxKxS[b, 0])
        others = [np.isin(np.arange(8), member_S) for member_S in member_BxKxS[b]]
        score_of_sets = np.array([0.9, 0.3, 0.3, 0.3])
        mean_with = [score_of_sets[[o[i] for o in others]].mean() for i in range(8) if in_first[i]]
        expected = np.array(mean_with) - 0.45
        found = kept.search.advantage_UxC[b][in_first]
        np.testing.assert_allclose(found[expected != 0], expected[expected != 0], atol=1e-6)
    assert batch.metrics["verifier/wrong_aggregation"] == batch.metrics["sampling/kept"] * 32
    verdict = kept.aggregation.verdict_UxC[0, 0]
    assert verdict.answer == "9"


def test_a_batch_of_bits_is_the_same_whether_they_are_numbers_or_booleans():
    script = aggregations_right(lambda cursor, k, i: (cursor + k + i) % 3 == 0)

    def as_boolean(text, problem):
        return "{7}" in text

    batches = []
    for reward in (as_boolean, lambda *item: float(as_boolean(*item))):
        training = scripted_training(script).with_actor(verifier=InlineVerifier(reward))
        batches.append(training.collect())
    batches.append(scripted_training(script).collect())
    for other in batches[1:]:
        for mine, theirs in zip(batches[0].credit, other.credit, strict=True):
            np.testing.assert_array_equal(mine.advantage_UxC, theirs.advantage_UxC)
            np.testing.assert_array_equal(mine.weight_UxC, theirs.weight_UxC)
        assert batches[0].next_cursor == other.next_cursor


def test_the_first_problem_with_partial_credit_ends_a_run_that_needs_bits():
    judged = []

    def counted(text, problem):
        judged.append(problem.id)
        return tenths(text, problem)

    training = scripted_training(
        lambda *place: "5",
        at_once=1,
        verdict_delay=0,
        strategy=first_word,
        loss__estimator="polychromic",
    ).with_actor(verifier=InlineVerifier(counted))
    with pytest.raises(FractionalRewards, match="polychromic.*0.5"):
        training.collect()
    assert len(set(judged)) <= 2


@pytest.mark.parametrize("is_slow", [False, True])
def test_a_reward_that_never_judges_ends_the_run_with_the_first_problems(is_slow):
    class Failing(InlineVerifier):
        def judge(self, items):
            judged.append(items[0][1].id)
            slow = Verdict.of_slow_reward(5.0)
            return [slow if is_slow else Verdict.of(Status.ERROR, "boom")] * len(items)

    judged = []
    training = scripted_training(search_right, at_once=1, verdict_delay=0)
    training = training.with_actor(verifier=Failing(tenths))
    words = "took over verifier.timeout_s = 5" if is_slow else "boom"
    with pytest.raises(VerifierFailure, match=f"48 of 48.*{words}"):
        training.collect()
    assert set(judged) <= {"p0", "p1", "p2"}


def test_without_signal_partial_credit_is_shown():
    with pytest.raises(NoSignal) as stopped:
        graded(lambda *place: "3").collect()
    assert all(part in str(stopped.value) for part in ("0 right: 16", "0.3 (256x)"))


# --- what is left over ----------------------------------------------------------------------------


def test_what_still_runs_when_the_batch_is_full_is_abandoned_and_counted():
    script = aggregations_right(first_set_right)
    batch = scripted_training(script, at_once=1, sampling__keep_rate=0.25).collect()
    assert batch.rollouts.cursor_B.tolist() == [0, 1, 2, 3] and batch.next_cursor == 4
    assert batch.metrics["sampling/undecided"] == batch.metrics["sampling/tried"] - 4 > 0


def long_text(cursor, text):
    return "left=" + "1+" * 40


def test_problems_that_are_too_long_are_left_out_and_counted():
    task = with_text(number_task(), lambda cursor, text: long_text(0, "") if cursor % 2 else text)
    batch = scripted_training(aggregations_right(first_set_right), task).collect()
    assert batch.rollouts.cursor_B.tolist() == [0, 2, 4, 6]
    assert batch.metrics["sampling/too_long"] == 5  # 1, 3, 5 ... before each of the problems tried


def test_a_task_of_nothing_but_too_long_problems_is_an_error_that_names_the_field():
    task = with_text(number_task(), long_text)
    with pytest.raises(ConfigError, match="prompt.max_problem_tokens = 16"):
        scripted_training(aggregations_right(first_set_right), task).collect()


# --- `FirstKept` by itself ----------------------------------------------------------------------


@dataclasses.dataclass
class Decisions:
    """A `FirstKept` of B = 2 whose problems are decided by hand."""

    problems: FirstKept

    def ask(self, count):
        return [self.problems.next().cursor for _ in range(count)]

    def decide(self, cursor, keep):
        nothing = np.zeros((1, 2), np.float32)
        flags = np.array([keep]), np.array([False])
        rollouts = Rollouts([None], np.array([cursor]), search=None)
        advantages = Advantages((RoundAdvantages(nothing, None, *flags),))
        self.problems.add(rollouts, advantages)


def first_two_kept(monkeypatch, max_ratio=4.0, cursor=20):
    def from_cursor(source, at):
        return Asked(at, None, np.zeros(1, np.int32))

    monkeypatch.setattr(Source, "from_cursor", from_cursor)
    settings = DynamicSampling(2, max_ratio, keep_rate=0.25, failures=VerifierSettings(1, 5.0))
    return Decisions(FirstKept(settings, Source(None, None, 16), cursor))


def test_the_batch_is_complete_once_every_problem_up_to_the_last_that_it_needs_is_decided(
    monkeypatch,
):
    decisions = first_two_kept(monkeypatch)
    assert decisions.ask(5) == [20, 21, 22, 23, 24]
    complete = []
    for cursor, keep in ((24, True), (22, True), (21, False), (20, False), (23, True)):
        decisions.decide(cursor, keep)
        complete.append(decisions.problems.complete)
    # With 20 there are two kept ones, 22 and 24, but 23, which comes before 24, is not decided.
    assert complete == [False, False, False, False, True]
    assert decisions.problems.exhausted


def test_without_enough_kept_ones_it_is_complete_when_all_that_may_be_tried_are_decided(
    monkeypatch,
):
    decisions = first_two_kept(monkeypatch, max_ratio=1.5)
    assert decisions.ask(3) == [20, 21, 22] and decisions.problems.next() is None
    decisions.decide(21, True)
    decisions.decide(22, False)
    assert not decisions.problems.complete
    decisions.decide(20, False)
    assert decisions.problems.complete


def test_problems_are_asked_for_only_while_those_on_the_way_will_not_fill_the_batch(monkeypatch):
    decisions = first_two_kept(monkeypatch, max_ratio=100.0)
    asked = decisions.ask(8)  # a quarter of 8 is 2
    assert decisions.problems.next() is None
    for cursor in asked:
        decisions.decide(cursor, False)
    assert len(decisions.ask(16)) == 16  # kept ones now seem rarer: 0 of 8 beside 2 of 8
    assert decisions.problems.next() is None


# --- estimators ---------------------------------------------------------------------------------


def test_cut_off_traces_keep_no_positive_advantage():
    def script(role, cursor, k, i):
        if role is Role.SEARCH:
            return "left=1" + (CUT_OFF if i % 2 else "")
        return "\\boxed{7}" if k == 0 else "\\boxed{8}"

    batch = scripted_training(script).collect()
    cut_off = batch.rollouts.search.stop_UxC == Stop.LENGTH
    assert cut_off.any() and not cut_off.all()
    weight = batch.credit[0].weight_UxC
    assert (weight[cut_off] <= 0).all() and (weight[cut_off] < 0).any()
    assert (weight[~cut_off] > 0).any()


def test_grpo_uses_the_traces_own_rewards_and_no_aggregation():
    def script(role, cursor, k, i):
        return f"\\boxed{{{7 if i < cursor % 3 else 8}}}"

    batch = scripted_training(script, loss__estimator="grpo").collect()
    assert batch.rollouts.aggregation is None and list(batch.roles) == [Role.SEARCH]
    assert batch.rollouts.cursor_B.tolist() == [1, 2, 4, 5]  # cursor % 3 == 0: all wrong
    search = batch.rollouts.search
    expected = of_own_answers.grpo(search.reward_UxC) / search.trace_len_UxC.sum()
    np.testing.assert_allclose(batch.credit[0].weight_UxC, expected, rtol=1e-6)


@pytest.mark.parametrize("estimator", ["online_multitask", "paragator", "pkpo", "polychromic"])
def test_own_correctness_decides_where_the_aggregations_are_flat(estimator):
    strategy = first_word if estimator == "polychromic" else None
    batch = scripted_training(search_right, strategy=strategy, loss__estimator=estimator).collect()
    assert batch.rollouts.cursor_B.tolist() == [1, 2, 3, 5]  # cursor % 4 == 0: all wrong
    search, aggregation = batch.credit
    expected = compute_advantages(estimator, batch.rollouts.rewards()).rounds[0].candidate_BxN
    assert expected.any(axis=1).all() and not aggregation.weight_UxC.any()
    scale = search.weight_UxC[0, 0] / expected[0, 0]
    np.testing.assert_allclose(search.weight_UxC, scale * expected, rtol=1e-6)
    if strategy:
        np.testing.assert_array_equal(batch.rollouts.strategy_BxN, np.tile([0, 1], (4, 4)))


@pytest.mark.parametrize("estimator", ["grpo_nostd", "rloo"])
def test_relatives_of_grpo_have_no_aggregation(estimator):
    batch = scripted_training(search_right, loss__estimator=estimator).collect()
    assert batch.rollouts.aggregation is None and list(batch.roles) == [Role.SEARCH]
    assert batch.rollouts.cursor_B.tolist() == [1, 2, 3, 5]


def test_disjoint_sets_partition_the_traces_and_their_members_share_a_weight():
    batch = scripted_training(
        aggregations_right(first_set_right),
        loss__estimator="disjoint_sets",
        aggregation__subsets=2,
    ).collect()
    for b, member_KxS in enumerate(batch.rollouts.rounds[0].member_BxKxS):
        assert sorted(member_KxS.ravel().tolist()) == list(range(8))
        weight_KxS = batch.credit[0].weight_UxC[b, member_KxS]
        np.testing.assert_allclose(weight_KxS, [[0.5 / 4] * 4, [-0.5 / 4] * 4])
