"""What a page says of an advantage, against the objective's own number: at random and by hand."""

import dataclasses
import math
import re

import numpy as np
import pytest

from spiral_jax.objective import explain
from spiral_jax.objective.advantages import compute_advantages
from spiral_jax.objective.estimators import ESTIMATORS
from spiral_jax.objective.explain import Evidence, Score
from spiral_jax.objective.rewards import Rewards
from spiral_jax.objective.subsets import Key, disjoint_subsets, draw_subsets

NAMES = "ABCDEF"
MEMBERS = [[0, 1], [0, 2], [1, 2], [1, 3]]
SCORES = [Score(3, 4), Score(3, 4), Score(0, 4), Score(2, 4)]
BY_OWN_ANSWERS = ("online_multitask", "paragator", "pkpo", "grpo", "grpo_nostd", "rloo")


def score_of(reward):
    return Score.of(reward[~np.isnan(reward)].tolist())


def plain(reward):
    return None if math.isnan(reward) else float(reward)


def evidence(trace, reward=1.0, own=None, set_size=2, members=MEMBERS, scores=SCORES):
    own = own or Score(0, 0)
    return Evidence(trace, reward, own, set_size, members, scores, NAMES)


# Candidates 0 and 3 are right: sets A, B and D have one. Of the six sets of two of four traces all
# but {1, 2} have one: 1 of those with trace 0, 2/3 of those without.
CONTROLLED = dataclasses.replace(evidence(0), own_N=[1.0, 0.0, 0.0, 1.0], c=0.5)


def number_at_the_end(words):
    """What a reason's words come to, to three decimals; 0 where they say none."""
    said = re.search(r"([+-][\d.]+|\b0)\.$", words)
    return float(said[1]) if said else 0.0


def check(reason, advantage):
    """The reason has the objective's number, and its words end in it."""
    assert reason.value == pytest.approx(advantage, abs=1e-6)  # float32
    assert reason.value == pytest.approx(number_at_the_end(reason.words), abs=5.01e-4)


def test_every_estimator_but_the_one_that_needs_more_than_counts_is_tested_here():
    over_sets = {"marginal_mean", "with_without", "disjoint_sets", "aggregator_only"}
    over_sets |= {"set_control_variate"}
    assert {*over_sets, *BY_OWN_ANSWERS, "polychromic"} == set(ESTIMATORS)


@pytest.mark.parametrize(
    "estimator", ["marginal_mean", "with_without", "disjoint_sets", "aggregator_only"]
)
@pytest.mark.parametrize("failing", [0.0, 0.4])
@pytest.mark.parametrize("values", [(0.0, 1.0), (0.0, 0.25, 0.6875, 1.0)])
def test_the_reason_of_every_set_advantage_ends_in_the_objectives_number(
    estimator, values, failing
):
    row, rng = ESTIMATORS[estimator], np.random.default_rng(0)
    draw, sizes = draw_subsets, ((8, 4, 4, 4), (4, 2, 6, 3), (5, 1, 5, 2))
    if row.sets == "partition":
        draw, sizes = disjoint_subsets, ((8, 4, 2, 4), (4, 2, 2, 3), (5, 1, 5, 2))
    for case in range(30):
        N, S, K, M = sizes[case % 3]
        member_KxS = draw(Key(case, 0, 0, 0, 0), N, S, K)
        reward_KxM = np.where(rng.random((K, M)) < failing, np.nan, rng.choice(values, size=(K, M)))
        rewards = Rewards(np.zeros((1, N)), reward_KxM[None], member_KxS[None])
        advantages = compute_advantages(estimator, [rewards]).rounds[0]
        scores = [score_of(reward_M) for reward_M in reward_KxM]
        for i in range(N):
            of_trace = evidence(i, set_size=S, members=member_KxS.tolist(), scores=scores)
            check(row.explain(of_trace), advantages.candidate_BxN[0, i])
        for k, m in np.ndindex(K, M):
            reason = explain.aggregation(plain(reward_KxM[k, m]), scores[k])
            check(reason, advantages.aggregation_BxKxM[0, k, m])


@pytest.mark.parametrize("failing", [0.0, 0.4])
@pytest.mark.parametrize("values", [(0.0, 1.0), (0.0, 0.25, 0.6875, 1.0)])
@pytest.mark.parametrize("c", [0.0, 0.7])
def test_the_reason_of_every_advantage_with_a_control_variate_ends_in_the_objectives_number(
    c, values, failing
):
    rng = np.random.default_rng(2)
    for case in range(24):
        N, S, K, M = ((8, 4, 4, 4), (4, 2, 6, 3), (5, 1, 5, 2))[case % 3]
        member_KxS = draw_subsets(Key(case, 0, 0, 0, 0), N, S, K)
        own_N = np.where(rng.random(N) < failing, np.nan, rng.choice(values, size=N))
        reward_KxM = np.where(rng.random((K, M)) < failing, np.nan, rng.choice(values, size=(K, M)))
        rewards = Rewards(own_N[None], reward_KxM[None], member_KxS[None])
        advantages = compute_advantages("set_control_variate", [rewards], (c,)).rounds[0]
        scores = [score_of(reward_M) for reward_M in reward_KxM]
        for i in range(N):
            of_trace = evidence(i, set_size=S, members=member_KxS.tolist(), scores=scores)
            of_trace = dataclasses.replace(of_trace, own_N=[*map(plain, own_N)], c=c)
            reason = ESTIMATORS["set_control_variate"].explain(of_trace)
            check(reason, advantages.candidate_BxN[0, i])


@pytest.mark.parametrize("estimator", BY_OWN_ANSWERS)
@pytest.mark.parametrize("failing", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("values", [(0.0, 1.0), (0.0, 0.25, 0.6875, 1.0)])
def test_the_reason_of_every_advantage_of_own_answers_ends_in_the_objectives_number(
    estimator, values, failing
):
    row, rng = ESTIMATORS[estimator], np.random.default_rng(1)
    sets = (np.zeros((1, 2, 2)), np.array([[[0, 1, 2], [3, 4, 5]]])) if row.aggregates else ()
    for _ in range(60):
        own_N = np.where(rng.random(8) < failing, np.nan, rng.choice(values, size=8))
        advantages = compute_advantages(estimator, [Rewards(own_N[None], *sets)])
        for i in range(8):
            of_trace = evidence(i, plain(own_N[i]), score_of(own_N), 3)
            of_trace = dataclasses.replace(of_trace, own_N=[*map(plain, own_N)])
            check(row.explain(of_trace), advantages.rounds[0].candidate_BxN[0, i])


@pytest.mark.parametrize("explanation, value, parts", [
    (explain.against_sets_without(evidence(0)), 0.5,
     ("0.750", "A 3/4, B 3/4", "0.250", "C 0/4, D 2/4", "+0.500")),
    (explain.with_control_variate(CONTROLLED), 5 / 12,
     ("A 3/4, B 3/4", "C 0/4, D 2/4", "+0.500; the same", "reward: +0.500", "+0.333",
      "c = 0.500", "+0.417")),
    (explain.against_all_sets(evidence(0)), 0.25,
     ("0.750", "A 3/4, B 3/4", "0.500", "A 3/4, B 3/4, C 0/4, D 2/4", "+0.250")),
    (explain.aggregation(1.0, SCORES[0]), 0.25,
     ("3 of the set's 4", "reward 1", "0.750", "+0.250")),
    (explain.against_mean_by_std(evidence(0, own=Score(5, 8))), 0.774595,
     ("5 of 8", "0.625", "0.484", "+0.775")),
    (explain.pass_at_k(evidence(0, reward=0.0, own=Score(2, 8), set_size=4)), -1 / 14,
     ("2 of 8", "sets of 4", "0.214", "0.286", "-0.071")),
    (explain.against_mean(evidence(0, reward=0.5, own=Score.of([0.5, 0.5, 1.0, 0.0]))), 0.0,
     ("4 traces have earned 2 together", "0.500", "reward 0.5")),
    (explain.aggregation(0.25, Score.of([0.25, 0.75, 1.0])), -5 / 12,
     ("3 aggregations have earned 2 together", "0.667", "reward 0.25", "-0.417")),
])  # fmt: skip
def test_the_words_have_the_counts_that_the_number_follows_from(explanation, value, parts):
    assert explanation.value == pytest.approx(value, abs=1e-5)
    assert [part for part in parts if part not in explanation.words] == []


@pytest.mark.parametrize("reason, words", [
    (explain.against_all_sets(evidence(9)), "in no set"),
    (explain.against_all_sets(evidence(3, scores=[*SCORES[:3], Score(0, 0)])), "in no set"),
    (explain.against_sets_without(evidence(3, scores=[*SCORES[:3], Score(0, 0)])), "in no set"),
    (explain.against_sets_without(evidence(0, members=MEMBERS[:2], scores=SCORES[:2])),
     "in every set"),
    (explain.aggregation(None, Score(0, 0)), "our failure"),
    (explain.against_mean_by_std(evidence(0, reward=None, own=Score(2, 4))), "our failure"),
    (explain.not_trained(evidence(0)), "trains no traces"),
])  # fmt: skip
def test_traces_without_a_comparison_say_so_and_have_none(reason, words):
    assert reason.value == 0 and words in reason.words


def test_without_the_steps_c_no_number_is_claimed():
    reason = explain.with_control_variate(dataclasses.replace(CONTROLLED, c=None))
    assert reason.value is None and "not logged" in reason.words


def test_an_estimator_that_is_not_explained_claims_no_number():
    assert ESTIMATORS["polychromic"].explain(evidence(0)).value is None
