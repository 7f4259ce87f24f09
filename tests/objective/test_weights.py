"""Loss weights: with "unbiased" each term expects the gradient that the estimator claims, exactly.

Over every tuple of traces of a three-outcome policy, every draw of sets and every outcome of the
aggregations. Advantages are float32: rtol 1e-6.
"""

import itertools
from typing import NamedTuple

import numpy as np
import pytest
from enumerable_policy import THETA, arbitrary_set_function, score_gradient, tuples_and_probability

from spiral_jax.core.config import ConfigError, defaults
from spiral_jax.objective import of_sets
from spiral_jax.objective.advantages import RoundAdvantages, compute_advantages
from spiral_jax.objective.estimators import ESTIMATORS
from spiral_jax.objective.rewards import Rewards
from spiral_jax.objective.settings import ObjectiveSettings, objective_settings
from spiral_jax.objective.weights import aggregation_weights, candidate_weights

NAN = float("nan")
RIGHT = np.array([0.0, 1.0, 1.0])  # which outcomes are right, and of which strategy
STRATEGY = np.array([0, 1, -1])


class Weighed(NamedTuple):
    """Advantages, and float64 loss weights of the traces that are read and of the aggregations."""

    advantages: RoundAdvantages
    keep_B: np.ndarray
    candidate_BxN: np.ndarray
    aggregation_BxKxM: np.ndarray | None


def weigh(estimator, rewards, normalizer="unbiased", w_search=1.0, w_aggregation=1.0, length=None):
    settings = ObjectiveSettings(estimator, normalizer, w_search, w_aggregation, length_gate=0.0)
    advantages = compute_advantages(estimator, [rewards])
    of_round = advantages.rounds[0]
    length = np.ones(rewards.own_BxN.shape, int) if length is None else length
    candidate = candidate_weights(settings, of_round.candidate_BxN, rewards, length)
    aggregation = None
    if rewards.aggregated_BxKxM is not None:
        aggregation = aggregation_weights(
            settings, of_round.aggregation_BxKxM, rewards.aggregated_BxKxM
        )
        assert aggregation.dtype == np.float32
        aggregation = aggregation.astype(np.float64)
    assert candidate.dtype == np.float32
    return Weighed(of_round, advantages.keep_B, candidate.astype(np.float64), aggregation)


# --- the search term's expectation --------------------------------------------------------------


def pass_rate(tuples):
    return RIGHT[tuples].max(axis=1)


def polychromic(tuples):
    strategies = np.array([len(set(STRATEGY[row]) - {-1}) for row in tuples])
    return RIGHT[tuples].mean(axis=1) * np.where(strategies > 1, strategies, 0) / tuples.shape[1]


@pytest.mark.parametrize("failed", [(), (1,), (0, 4)])
@pytest.mark.parametrize("estimator, s, climbs", [
    ("rloo",             1, pass_rate),
    ("online_multitask", 1, pass_rate),
    ("paragator",        1, pass_rate),
    ("paragator",        2, pass_rate),
    ("pkpo",             2, pass_rate),
    ("pkpo",             3, pass_rate),
    ("polychromic",      2, polychromic),
])  # fmt: skip
def test_search_by_own_correctness_climbs_what_it_claims(estimator, s, climbs, failed):
    """grad E[score of S independent traces], with any failures that rewards do not cause."""
    chosen, probability = tuples_and_probability(s)
    truth = np.einsum("a,a,ad->d", probability, climbs(chosen), score_gradient(chosen).sum(axis=1))
    assert np.abs(truth).max() > 1e-3

    tuples, probability = tuples_and_probability(5)
    own, B = RIGHT[tuples], len(tuples)
    own[:, list(failed)] = NAN
    rewards = Rewards(own)
    if estimator != "rloo":
        member = np.broadcast_to(np.array([range(s), range(1, s + 1)]), (B, 2, s))
        rewards = Rewards(own, np.ones((B, 2, 2)), member, STRATEGY[tuples])
    weight_BxN = weigh(estimator, rewards).candidate_BxN * B  # they divide by B
    expected = np.einsum("b,bi,bid->d", probability, weight_BxN, score_gradient(tuples))
    np.testing.assert_allclose(expected, truth, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("n, s, k, failed_sets", [
    (4, 2, 2, ()),
    (6, 2, 3, ()),
    (6, 2, 3, (1,)),
    (5, 1, 4, ()),
    (5, 1, 4, (1,)),
    (7, 3, 2, ()),
])  # fmt: skip
def test_disjoint_sets_are_independent_samples_of_their_score(n, s, k, failed_sets):
    """Left-over traces have no weight. One partition stands for all: traces are exchangeable."""
    f = arbitrary_set_function(s, seed=n)
    chosen, probability = tuples_and_probability(s)
    truth = np.einsum("a,a,ad->d", probability, f(chosen), score_gradient(chosen).sum(axis=1))

    tuples, probability = tuples_and_probability(n)
    B = len(tuples)
    member_KxS = np.random.default_rng(1).permutation(n)[: k * s].reshape(k, s)
    score = f(tuples[:, member_KxS])
    score[:, list(failed_sets)] = NAN
    member = np.broadcast_to(member_KxS, (B, k, s))
    weighed = weigh("disjoint_sets", Rewards(np.zeros((B, n)), score[..., None], member))
    weight_BxN = weighed.candidate_BxN * B
    expected = np.einsum("b,bi,bid->d", probability, weight_BxN, score_gradient(tuples))
    np.testing.assert_allclose(expected, truth, rtol=1e-6, atol=1e-8)
    left_over = sorted(set(range(n)) - set(member_KxS.ravel().tolist()))
    assert not weight_BxN[:, left_over].any() and weight_BxN.any()


# --- both terms together ------------------------------------------------------------------------


def arbitrary_slopes(s):
    """Of an aggregator that is right with sigmoid(slope . theta): a slope for each multiset."""
    rng = np.random.default_rng(11)
    multisets = itertools.combinations_with_replacement(range(3), s)
    table = {multiset: rng.normal(size=3) * 2 for multiset in multisets}

    def slope(rows):
        slopes = np.array([table[tuple(sorted(row))] for row in rows.reshape(-1, s)])
        return slopes.reshape(*rows.shape[:-1], 3)

    return slope


def joint_objective(theta, s, slope):
    """J: S traces from softmax(theta), then that aggregator."""
    policy = np.exp(theta) / np.exp(theta).sum()
    tuples = np.array(list(itertools.product(range(3), repeat=s)))
    right = 1 / (1 + np.exp(-slope(tuples) @ theta))
    return (policy[tuples].prod(axis=1) * right).sum()


@pytest.mark.parametrize("estimator", ["marginal_mean", "with_without"])
@pytest.mark.parametrize("failed", [
    [[0, 0], [0, 0], [0, 0]],
    [[0, 0], [0, 1], [0, 0]],  # a set with a lone sample: valid for search, no aggregation
    [[0, 0], [0, 0], [1, 1]],  # one set lost: c at two sets
])  # fmt: skip
def test_unbiased_weights_make_both_terms_one_gradient_of_j(estimator, failed):
    """The expectation over traces, draws and aggregations is dJ/dtheta, a central difference.

    Its error is about 1e-10. Failures do not depend on rewards.
    """
    n, s, k, m = 3, 2, 3, 2
    slope = arbitrary_slopes(s)
    truth = []
    for step in 1e-5 * np.eye(3):
        above, below = (joint_objective(THETA + sign * step, s, slope) for sign in (1, -1))
        truth.append((above - below) / 2e-5)

    sets = itertools.combinations(range(n), s)
    draws = np.array(list(itertools.permutations(sets, k)))  # all of them, in order
    outcomes = np.array(list(itertools.product([0.0, 1.0], repeat=k * m))).reshape(-1, k, m)
    tuples, probability = tuples_and_probability(n)
    every = np.indices((len(tuples), len(draws), len(outcomes)))
    tuple_of, draw_of, outcome_of = (index.ravel() for index in every)
    member, reward = draws[draw_of], outcomes[outcome_of]
    slope_BxKx3 = slope(tuples[tuple_of[:, None, None], member])
    right_BxKx1 = 1 / (1 + np.exp(-slope_BxKx3 @ THETA))[..., None]
    of_rewards_B = np.where(reward == 1, right_BxKx1, 1 - right_BxKx1).prod(axis=(1, 2))
    probability_B = probability[tuple_of] / len(draws) * of_rewards_B
    assert probability_B.sum() == pytest.approx(1)

    observed = np.where(np.array(failed, bool), NAN, reward)
    weighed = weigh(estimator, Rewards(np.zeros((len(reward), n)), observed, member))
    search_term = np.einsum(
        "b,bi,bid->d", probability_B, weighed.candidate_BxN, score_gradient(tuples[tuple_of])
    )
    aggregation_term = np.einsum(
        "b,bkm,bkm,bkd->d",
        probability_B,
        weighed.aggregation_BxKxM,
        reward - right_BxKx1,
        slope_BxKx3,
    )
    assert min(np.abs(search_term).max(), np.abs(aggregation_term).max()) > 0
    total = (search_term + aggregation_term) * len(reward)  # the weights divide by the batch
    np.testing.assert_allclose(total, truth, rtol=1e-6, atol=1e-8)


# --- the weights themselves ---------------------------------------------------------------------


def test_unbiased_weights_divide_by_actual_counts_of_each_problem():
    reward = np.array([[[1, 0], [0, 0], [1, 1]], [[1, NAN], [NAN, NAN], [1, 0]]])
    rewards = Rewards(np.zeros((2, 4)), reward, np.array([[[0, 1], [1, 2], [2, 3]]] * 2))
    weighed = weigh("with_without", rewards, w_search=3.0, w_aggregation=5.0)
    for b, sets in enumerate((3, 2)):
        scale = 3.0 / (2 * of_sets.with_without_factor(4, 2, sets))
        expected = scale * weighed.advantages.candidate_BxN[b]
        np.testing.assert_allclose(weighed.candidate_BxN[b], expected, rtol=1e-6)
    of_three, of_one = 5 / (2 * 3) * 0.5, 5 / 2 * 0.5
    aggregation = weighed.aggregation_BxKxM
    np.testing.assert_allclose(aggregation[0, 0], [of_three, -of_three], rtol=1e-6)
    np.testing.assert_allclose(aggregation[1], [[0, 0], [0, 0], [of_one, -of_one]], rtol=1e-6)


@pytest.mark.parametrize("estimator", [name for name, row in ESTIMATORS.items() if row.factor])
def test_sum_weights_are_plain_multiples_of_the_advantages(estimator):
    reward = np.array([[[1, 0], [0, 0], [1, NAN]]])
    member, strategy = np.array([[[0, 1], [1, 2], [2, 3]]]), np.array([[0, 1, 0, 1]])
    rewards = Rewards(np.array([[1.0, 0, 0, 1]]), reward, member, strategy)
    weighed = weigh(estimator, rewards, "sum", w_search=0.3, w_aggregation=0.7)
    advantages = weighed.advantages
    np.testing.assert_allclose(weighed.candidate_BxN, 0.3 * advantages.candidate_BxN, rtol=1e-6)
    if advantages.aggregation_BxKxM is not None:
        expected = 0.7 * advantages.aggregation_BxKxM
        np.testing.assert_allclose(weighed.aggregation_BxKxM, expected, rtol=1e-6)


def test_aggregator_only_takes_one_set_and_gives_search_no_weight():
    reward = np.array([[[1, 0, 0]]])
    weighed = weigh("aggregator_only", Rewards(np.ones((1, 4)), reward, np.arange(4)[None, None]))
    assert weighed.keep_B[0] and not weighed.candidate_BxN.any()
    expected = [[[1 / 3, -1 / 6, -1 / 6]]]
    np.testing.assert_allclose(weighed.aggregation_BxKxM, expected, rtol=1e-6)


@pytest.mark.parametrize("normalizer", ["unbiased", "sum"])
@pytest.mark.parametrize("estimator", ["grpo", "grpo_nostd"])
def test_grpo_weights_are_a_mean_over_the_tokens_of_valid_traces(estimator, normalizer):
    rewards = Rewards(np.array([[1, 0, NAN], [0, 1, 1]]))
    length = np.array([[5, 7, 1000], [1, 2, 3]], np.int32)
    weighed = weigh(estimator, rewards, normalizer, w_search=2.0, length=length)
    expected = 2.0 * weighed.advantages.candidate_BxN / 18
    np.testing.assert_allclose(weighed.candidate_BxN, expected, rtol=1e-6)
    assert weighed.candidate_BxN[0, 2] == 0


def test_rloo_and_centred_rewards_differ_by_a_constant_that_the_weights_take_out():
    own = np.array([[1.0, 0, 0, NAN], [1, 1, 0, 1]])
    sets = np.ones((2, 2, 2)), np.array([[[0, 1], [2, 3]]] * 2)
    rloo = weigh("rloo", Rewards(own)).candidate_BxN
    centred = weigh("online_multitask", Rewards(own, *sets)).candidate_BxN
    np.testing.assert_allclose(rloo, centred, rtol=1e-6)


def test_an_empty_batch_has_empty_weights():
    rewards = Rewards(np.zeros((0, 8)), np.zeros((0, 4, 2)), np.zeros((0, 4, 4), int))
    assert weigh("aggregator_only", rewards).candidate_BxN.shape == (0, 8)
    assert weigh("grpo", Rewards(np.zeros((0, 8)))).candidate_BxN.shape == (0, 8)


# --- what is refused ----------------------------------------------------------------------------

ONE_VALID_SET = np.array([[[1.0], [NAN]]]), np.array([[[0, 1], [2, 3]]])


@pytest.mark.parametrize("estimator, rewards", [
    ("marginal_mean", Rewards(np.zeros((1, 4)), *ONE_VALID_SET)),
    ("disjoint_sets", Rewards(np.zeros((1, 4)), *ONE_VALID_SET)),
    ("rloo",          Rewards(np.full((1, 4), NAN))),
])  # fmt: skip
def test_problems_that_should_not_have_been_kept_are_refused(estimator, rewards):
    with pytest.raises(ValueError, match="1 subset|without enough valid rewards"):
        weigh(estimator, rewards)


@pytest.mark.parametrize("field, value, allowed", [
    ("estimator",   "reinforce", tuple(ESTIMATORS)),
    ("normalizer",  "mean",      ("unbiased", "sum")),
    ("length_gate", -0.5,        (">= 0",)),
    ("length_gate", NAN,         (">= 0",)),
])  # fmt: skip
def test_settings_that_cannot_be_are_refused_with_field_value_and_what_is_allowed(
    field, value, allowed
):
    loss = defaults().loss
    loss[field] = value
    with pytest.raises(ConfigError) as refused:
        objective_settings(loss)
    assert all(part in str(refused.value) for part in (f"loss.{field}", repr(value), *allowed))
