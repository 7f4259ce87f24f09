"""Loss weights: with "unbiased" each term's expectation is the gradient that the estimator claims,
exactly.

Over every tuple of traces of a three-outcome policy, every draw of sets and every outcome of the
aggregations.
Advantages are float32: rtol 1e-6.
"""

import itertools

import numpy as np
import pytest
from enumerable_policy import THETA, arbitrary_set_function, score_gradient, tuples_and_probability

from spiral_jax.objective import estimators as adv
from spiral_jax.objective.estimators import Rewards
from spiral_jax.objective.subsets import bias_factor
from spiral_jax.objective.weights import aggregation_weights, search_weights

NAN = float("nan")
RIGHT = np.array([0.0, 1.0, 1.0])  # which outcomes are right, and of which strategy
STRATEGY = np.array([0, 1, -1])


def weigh(estimator, rewards, normalizer="unbiased", w=1.0, length=None):
    """(advantages, float64 search weights)."""
    got = adv.compute(estimator, rewards)
    length = np.ones(rewards.own_BxN.shape, int) if length is None else length
    return got, search_weights(estimator, normalizer, got.search_BxN, rewards, length, w).astype(
        np.float64
    )


# ---- the search term's expectation


def pass_rate(tuples):
    return RIGHT[tuples].max(axis=1)


def polychromic(tuples):
    strategies = np.array([len(set(STRATEGY[row]) - {-1}) for row in tuples])
    return RIGHT[tuples].mean(axis=1) * np.where(strategies > 1, strategies, 0) / tuples.shape[1]


@pytest.mark.parametrize("failed", [(), (1,), (0, 4)])
@pytest.mark.parametrize("estimator, s, climbs", [
    ("rloo", 1, pass_rate), ("online_multitask", 1, pass_rate),
    ("paragator", 1, pass_rate), ("paragator", 2, pass_rate),
    ("pkpo", 2, pass_rate), ("pkpo", 3, pass_rate), ("polychromic", 2, polychromic),
])  # fmt: skip
def test_search_by_own_correctness_climbs_what_it_claims(estimator, s, climbs, failed):
    """grad E[score of S independent traces], of pass@S or f_poly, with any reward-independent
    failures.
    """
    sets, probability = tuples_and_probability(s)
    truth = np.einsum("a,a,ad->d", probability, climbs(sets), score_gradient(sets).sum(axis=1))
    tuples, probability = tuples_and_probability(5)
    own = RIGHT[tuples]
    own[:, list(failed)] = NAN
    B = len(tuples)
    sets_of = (
        np.ones((B, 2, 2)),
        np.broadcast_to(np.array([range(s), range(1, s + 1)]), (B, 2, s)),
        STRATEGY[tuples],
    )
    _, weight = weigh(estimator, Rewards(own, *(() if estimator == "rloo" else sets_of)))
    expected = (
        np.einsum("b,bi,bid->d", probability, weight, score_gradient(tuples)) * B
    )  # the weights divide by B
    np.testing.assert_allclose(expected, truth, rtol=1e-6, atol=1e-8)
    assert np.abs(truth).max() > 1e-3


@pytest.mark.parametrize("failed_sets", [(), (1,)])
@pytest.mark.parametrize("n, s, k", [(4, 2, 2), (6, 2, 3), (5, 1, 4), (7, 3, 2)])
def test_disjoint_sets_are_independent_samples_of_their_score(n, s, k, failed_sets):
    """Left-over traces have no weight. One partition stands for all: traces are exchangeable."""
    f = arbitrary_set_function(s, seed=n)
    chosen, probability = tuples_and_probability(s)
    truth = np.einsum("a,a,ad->d", probability, f(chosen), score_gradient(chosen).sum(axis=1))
    if k - len(failed_sets) < 2:
        return
    tuples, probability = tuples_and_probability(n)
    member_KxS = np.random.default_rng(1).permutation(n)[: k * s].reshape(k, s)
    score = f(tuples[:, member_KxS])
    score[:, list(failed_sets)] = NAN
    B = len(tuples)
    rewards = Rewards(np.zeros((B, n)), score[..., None], np.broadcast_to(member_KxS, (B, k, s)))
    _, weight = weigh("disjoint_sets", rewards)
    expected = np.einsum("b,bi,bid->d", probability, weight, score_gradient(tuples)) * B
    np.testing.assert_allclose(expected, truth, rtol=1e-6, atol=1e-8)
    left_over = sorted(set(range(n)) - set(member_KxS.ravel().tolist()))
    assert not weight[:, left_over].any() and weight.any()


# ---- both terms together


def joint_objective(theta, s, slope):
    """J: S traces from softmax(theta), then an aggregator that is right with
    sigmoid(slope[multiset] . theta).
    """
    policy = np.exp(theta) / np.exp(theta).sum()
    tuples = np.array(list(itertools.product(range(3), repeat=s)))
    right = 1 / (1 + np.exp(-slope(tuples) @ theta))
    return (policy[tuples].prod(axis=1) * right).sum()


@pytest.mark.parametrize("estimator", ["marginal_mean", "with_without"])
@pytest.mark.parametrize("failed", [
    np.zeros((3, 2), bool),
    # one set is left with a lone sample: valid for search, no aggregation
    np.array([[0, 0], [0, 1], [0, 0]], bool),
    np.array([[0, 0], [0, 0], [1, 1]], bool),  # one set lost: c at two sets
])  # fmt: skip
def test_unbiased_weights_make_both_terms_one_gradient_of_j(estimator, failed):
    """Expectation over traces, draws and aggregations, with any reward-independent failures, is
    dJ/dtheta.

    The reference is a central difference of J: error about 1e-10. Advantages are float32: rtol
    1e-6.
    """
    n, s, k, m = 3, 2, 3, 2
    rng = np.random.default_rng(11)
    table = {
        key: rng.normal(size=3) * 2 for key in itertools.combinations_with_replacement(range(3), s)
    }

    def slope(rows):
        return np.array([table[tuple(sorted(row))] for row in rows.reshape(-1, s)]).reshape(
            *rows.shape[:-1], 3
        )

    truth = [
        (joint_objective(THETA + step, s, slope) - joint_objective(THETA - step, s, slope)) / 2e-5
        for step in 1e-5 * np.eye(3)
    ]
    subsets = np.array(
        list(itertools.permutations(itertools.combinations(range(n), s), k))
    )  # all draws, in order
    outcomes = np.array(list(itertools.product([0.0, 1.0], repeat=k * m))).reshape(-1, k, m)
    tuples, probability = tuples_and_probability(n)
    tuple_of, draw_of, outcome_of = (
        index.ravel() for index in np.indices((len(tuples), len(subsets), len(outcomes)))
    )
    chosen, reward = subsets[draw_of], outcomes[outcome_of]
    slopes = slope(tuples[tuple_of[:, None, None], chosen])  # [B, K, 3]
    right = 1 / (1 + np.exp(-slopes @ THETA))[..., None]
    weight = (
        probability[tuple_of]
        / len(subsets)
        * np.where(reward == 1, right, 1 - right).prod(axis=(1, 2))
    )
    observed = np.where(failed, NAN, reward)
    got, search = weigh(estimator, Rewards(np.zeros((len(reward), n)), observed, chosen))
    aggregation = aggregation_weights("unbiased", got.aggregation_BxKxM, observed, 1.0).astype(
        np.float64
    )
    search_term = np.einsum("b,bi,bid->d", weight, search, score_gradient(tuples[tuple_of]))
    aggregation_term = np.einsum("b,bkm,bkm,bkd->d", weight, aggregation, reward - right, slopes)
    assert (
        weight.sum() == pytest.approx(1)
        and min(np.abs(search_term).max(), np.abs(aggregation_term).max()) > 0
    )
    total = (search_term + aggregation_term) * len(reward)  # the weights divide by the batch
    np.testing.assert_allclose(total, truth, rtol=1e-6, atol=1e-8)


# ---- the weights themselves


def test_unbiased_weights_divide_by_actual_counts_of_each_problem():
    reward = np.array([[[1, 0], [0, 0], [1, 1]], [[1, NAN], [NAN, NAN], [1, 0]]])
    rewards = Rewards(np.zeros((2, 4)), reward, np.array([[[0, 1], [1, 2], [2, 3]]] * 2))
    got, search = weigh("with_without", rewards, w=3.0)
    for b, sets in enumerate((3, 2)):
        exact = 3.0 / (2 * bias_factor("with_without", 4, 2, sets)) * got.search_BxN[b]
        np.testing.assert_allclose(search[b], exact, rtol=1e-6)
    aggregation = aggregation_weights("unbiased", got.aggregation_BxKxM, reward, 5.0)
    np.testing.assert_allclose(
        aggregation[0, 0], [5 / (2 * 3) * 0.5, -5 / (2 * 3) * 0.5], rtol=1e-6
    )
    np.testing.assert_allclose(
        aggregation[1], [[0, 0], [0, 0], [5 / 2 * 0.5, -5 / 2 * 0.5]], rtol=1e-6
    )
    assert aggregation.dtype == np.float32


@pytest.mark.parametrize("estimator", [name for name, rule in adv.RULES.items() if rule.factor])
def test_sum_weights_are_plain_multiples_of_the_advantages(estimator):
    reward = np.array([[[1, 0], [0, 0], [1, NAN]]])
    sets = (reward, np.array([[[0, 1], [1, 2], [2, 3]]]), np.array([[0, 1, 0, 1]]))
    got, search = weigh(estimator, Rewards(np.array([[1.0, 0, 0, 1]]), *sets), "sum", 0.3)
    np.testing.assert_allclose(search, 0.3 * got.search_BxN.astype(float), rtol=1e-6)
    np.testing.assert_allclose(
        aggregation_weights("sum", got.aggregation_BxKxM, reward, 0.7),
        0.7 * got.aggregation_BxKxM,
        rtol=1e-6,
    )


def test_aggregator_only_takes_one_set_and_gives_search_no_weight():
    reward = np.array([[[1, 0, 0]]])
    got, search = weigh(
        "aggregator_only", Rewards(np.ones((1, 4)), reward, np.arange(4)[None, None])
    )
    assert got.keep_B[0] and not search.any()
    aggregation = aggregation_weights("unbiased", got.aggregation_BxKxM, reward, 1.0)
    np.testing.assert_allclose(aggregation, [[[1 / 3, -1 / 6, -1 / 6]]], rtol=1e-6)


@pytest.mark.parametrize("normalizer", ["unbiased", "sum"])
@pytest.mark.parametrize("estimator", ["grpo", "grpo_nostd"])
def test_grpo_weights_are_a_mean_over_the_tokens_of_valid_traces(estimator, normalizer):
    rewards = Rewards(np.array([[1, 0, NAN], [0, 1, 1]]))
    length = np.array([[5, 7, 1000], [1, 2, 3]], np.int32)
    got, weight = weigh(estimator, rewards, normalizer, 2.0, length)
    np.testing.assert_allclose(weight, 2.0 * got.search_BxN / 18, rtol=1e-6)
    assert weight[0, 2] == 0


def test_rloo_and_centred_rewards_differ_by_a_constant_that_the_weights_take_out():
    own = np.array([[1.0, 0, 0, NAN], [1, 1, 0, 1]])
    sets = (np.ones((2, 2, 2)), np.array([[[0, 1], [2, 3]]] * 2))
    np.testing.assert_allclose(
        weigh("rloo", Rewards(own))[1], weigh("online_multitask", Rewards(own, *sets))[1], rtol=1e-6
    )


ONE_VALID_SET = (np.array([[[1.0], [NAN]]]), np.array([[[0, 1], [2, 3]]]))


@pytest.mark.parametrize("call, words", [
    (lambda: weigh("rloo", Rewards(np.array([[1.0, 0]])), "mean"), "normalizer = 'mean'"),
    (lambda: aggregation_weights("mean", np.zeros((1, 2, 2)), np.zeros((1, 2, 2)), 1.0), "normalizer"),
    (lambda: weigh("marginal_mean", Rewards(np.zeros((1, 4)), *ONE_VALID_SET)), "1 subset: must be >= 2"),
    (lambda: weigh("rloo", Rewards(np.full((1, 4), NAN))), "rloo: a problem without enough valid rewards"),
    (lambda: weigh("disjoint_sets", Rewards(np.zeros((1, 4)), *ONE_VALID_SET)), "without enough valid rewards"),
])  # fmt: skip
def test_problems_that_should_not_have_been_kept_and_unknown_normalizers_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_an_empty_batch_has_empty_weights():
    rewards = Rewards(np.zeros((0, 8)), np.zeros((0, 4, 2)), np.zeros((0, 4, 4), int))
    assert weigh("aggregator_only", rewards)[1].shape == (0, 8)
    assert weigh("grpo", Rewards(np.zeros((0, 8))))[1].shape == (0, 8)
