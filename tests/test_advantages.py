"""Advantages, keep rule and loss weights against pure-Python oracles in fractions, and exact expectations.

Outputs are float32, so values agree with exact ones to 1e-6 relative (an ulp is 6e-8; sums of few terms).
"""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from spiral_jax.config import ESTIMATORS
from spiral_jax.groups import Stop
from spiral_jax.objective import advantages as adv
from spiral_jax.objective.subsets import bias_factor, draw_subsets, incidence

NAN = float("nan")
SET_ESTIMATORS = {"marginal_mean": adv.marginal_mean, "with_without": adv.with_without}


# ---- the oracle: definitions, looped over in exact arithmetic


def mean(values):
    return sum(values, Fraction(0)) / len(values)


def oracle(estimator, reward_KxM, subsets, n):
    """(search advantages, aggregation advantages, kept) as fractions; NaN rewards are skipped."""
    valid = [[Fraction(float(r)) for r in row if not math.isnan(r)] for row in reward_KxM]
    score = {k: mean(row) for k, row in enumerate(valid) if row}
    search = []
    for i in range(n):
        inside = [score[k] for k in score if i in subsets[k]]
        outside = [score[k] for k in score if i not in subsets[k]]
        if estimator == "marginal_mean":
            search.append(mean([f - mean(list(score.values())) for f in inside]) if inside else Fraction(0))
        elif estimator == "with_without":
            search.append(mean(inside) - mean(outside) if inside and outside else Fraction(0))
        else:
            search.append(Fraction(0))
    aggregation = [
        [Fraction(0) if math.isnan(r) else Fraction(float(r)) - score[k] for r in row]
        for k, row in enumerate(reward_KxM)
    ]
    signal = any(search) or any(any(row) for row in aggregation)
    enough = estimator == "aggregator_only" or len(score) >= 2
    return search, aggregation, signal and enough


def random_rewards(rng, shape, values):
    return rng.choice(np.array(values, np.float32), size=shape).astype(np.float32)


def check(estimator, reward_BxKxM, member_BxKxS, n):
    got = adv.compute(estimator, reward_BxKxM, incidence(member_BxKxS, n))
    assert got.search_BxN.dtype == got.aggregation_BxKxM.dtype == np.float32
    assert got.keep_B.dtype == got.starved_B.dtype == bool
    for b in range(len(reward_BxKxM)):
        search, aggregation, kept = oracle(estimator, reward_BxKxM[b].tolist(), member_BxKxS[b].tolist(), n)
        np.testing.assert_allclose(got.search_BxN[b], np.array(search, float), rtol=1e-6, atol=0)
        np.testing.assert_allclose(got.aggregation_BxKxM[b], np.array(aggregation, float), rtol=1e-6, atol=0)
        assert got.keep_B[b] == kept, (estimator, reward_BxKxM[b], member_BxKxS[b])
        assert not (got.keep_B[b] and got.starved_B[b])


@pytest.mark.parametrize("estimator", ["marginal_mean", "with_without", "aggregator_only"])
@pytest.mark.parametrize("n", range(2, 9))
def test_advantages_and_keep_rule_equal_the_definition_at_all_sizes(estimator, n):
    """rtol 1e-6 with atol 0: an advantage that is exactly zero must come out as exactly zero."""
    rng = np.random.default_rng(n)
    for s in range(1, n):
        total = math.comb(n, s)
        for k in sorted({min(2, total), min(4, total), min(11, total), total}):
            for values in ([0, 1], [0, 1, 1, NAN], [NAN, NAN, 0, 1], [0.1, 0.7, 1 / 3]):
                problems = 4 if k <= 11 else 1
                reward = random_rewards(rng, (problems, k, 3), values)
                member = np.stack([draw_subsets(n, 0, s, b, 0, n, s, k) for b in range(problems)])
                check(estimator, reward, member, n)


@pytest.mark.parametrize("estimator", ["marginal_mean", "with_without", "aggregator_only"])
def test_keep_rule_on_sparse_rewards_and_cancelling_sets(estimator):
    """One-sample sets and small N: here sets differ and still cancel at every trace, or have too few valid samples."""
    rng = np.random.default_rng(5)
    reward = np.array(list(itertools.product([0.0, 1.0], repeat=4)))[:, :, None]  # every outcome of K = 4, M = 1
    for draw in itertools.combinations(itertools.combinations(range(4), 2), 4):  # every draw at N = 4, S = 2
        check(estimator, reward, np.broadcast_to(np.array(draw), (16, 4, 2)), 4)
    member = np.stack([draw_subsets(5, 0, 0, b, 0, 4, 2, 4) for b in range(400)])
    check(estimator, random_rewards(rng, (400, 4, 2), [0, 1, NAN, NAN]), member, 4)


# ---- what holds of each estimator


def test_sets_that_differ_but_cancel_at_every_trace_are_dropped():
    member = np.array([[[0, 1], [2, 3], [0, 2], [1, 3]]])
    reward = np.array([1.0, 1.0, 0.0, 0.0]).reshape(1, 4, 1) * np.ones((1, 4, 3))
    for estimator in SET_ESTIMATORS:
        got = adv.compute(estimator, reward, incidence(member, 4))
        assert not got.search_BxN.any() and not got.aggregation_BxKxM.any() and not got.keep_B[0]


def test_equal_thirds_from_different_counts_give_exactly_no_search_advantage():
    reward = np.array([[[1, 0, 0, NAN, NAN, NAN], [0, 1, 0, 1, 0, 0], [NAN, 0, NAN, 0, NAN, 1]]])
    member = np.array([[[0, 1], [1, 2], [0, 3]]])
    for estimator in SET_ESTIMATORS:
        got = adv.compute(estimator, reward, incidence(member, 4))
        assert not got.search_BxN.any() and got.aggregation_BxKxM.any() and got.keep_B[0]
    flat = np.full((1, 3, 3), 0.1, np.float32)  # 0.1 + 0.1 + 0.1 != 3 * 0.1 in floats
    for estimator in ("marginal_mean", "with_without", "aggregator_only"):
        got = adv.compute(estimator, flat, incidence(member, 4))
        assert not got.search_BxN.any() and not got.aggregation_BxKxM.any() and not got.keep_B[0]


@pytest.mark.parametrize("value", [0.0, 1.0, NAN])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_all_correct_all_wrong_and_all_failed_problems_are_flat_and_dropped(estimator, value):
    member = np.stack([draw_subsets(0, 0, 0, b, 0, 8, 4, 4) for b in range(3)])
    arguments = (np.full((3, 8), value),) if estimator == "grpo" else (np.full((3, 4, 4), value), incidence(member, 8))
    got = adv.compute(estimator, *arguments)
    assert not got.search_BxN.any() and not got.keep_B.any()
    assert estimator == "grpo" or not got.aggregation_BxKxM.any()
    assert got.starved_B.all() == math.isnan(value)


def test_a_problem_with_one_valid_set_is_starved_for_set_estimators_alone():
    reward = np.full((1, 3, 2), NAN)
    reward[0, 1] = [0, 1]
    member = incidence(np.array([[[0, 1], [1, 2], [0, 2]]]), 3)
    for estimator in SET_ESTIMATORS:
        got = adv.compute(estimator, reward, member)
        assert got.starved_B[0] and not got.keep_B[0] and not got.search_BxN.any()
    got = adv.compute("aggregator_only", reward, member)
    assert got.keep_B[0] and not got.starved_B[0]
    np.testing.assert_array_equal(got.aggregation_BxKxM[0, 1], [-0.5, 0.5])


def test_set_score_leaves_failed_samples_out_and_a_lone_sample_has_no_advantage():
    reward = np.array([[[1, 0, NAN], [NAN, NAN, NAN], [NAN, 1, NAN]]], np.float32)
    np.testing.assert_array_equal(adv.set_score(reward), [[0.5, NAN, 1.0]])
    np.testing.assert_array_equal(adv.aggregation_advantage(reward), [[[0.5, -0.5, 0], [0, 0, 0], [0, 0, 0]]])


@pytest.mark.parametrize("c, n, s, right, wrong", [
    (2, 4, 2, 1 / 3, -1 / 3), (1, 8, 1, 1, -1 / 7), (1, 8, 2, 1, -1 / 7), (1, 8, 4, 1, -1 / 7), (7, 8, 2, 0, 0),
])  # fmt: skip
def test_published_vectors_of_the_best_of_set_score_over_all_sets(c, n, s, right, wrong):
    """Of n traces c are right and a set scores 1 if it holds a right one (binary max@k, leave-two-out form)."""
    subsets = np.array(list(itertools.combinations(range(n), s)))
    score = (subsets < c).any(axis=1).astype(float)[None]
    got = adv.with_without(score, incidence(subsets[None], n))[0]
    np.testing.assert_allclose(got, [right] * c + [wrong] * (n - c), rtol=1e-6, atol=0)
    centred = adv.marginal_mean(score, incidence(subsets[None], n))[0]
    np.testing.assert_allclose(centred, (1 - s / n) * got, rtol=1e-6, atol=0)


@pytest.mark.parametrize("n", range(2, 9))
def test_with_without_over_single_traces_is_rloo(n):
    score = np.random.default_rng(n).random((5, n))
    member = np.broadcast_to(np.arange(n)[:, None], (5, n, 1))
    rloo = n / (n - 1) * (score - score.mean(axis=1, keepdims=True))
    np.testing.assert_allclose(adv.with_without(score, incidence(member, n)), rloo, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("estimator", SET_ESTIMATORS)
def test_advantages_over_all_sets_sum_to_zero(estimator):
    rng = np.random.default_rng(2)
    for n, s in ((4, 2), (5, 3), (8, 4), (8, 1)):
        subsets = np.array(list(itertools.combinations(range(n), s)))
        score = rng.random((6, len(subsets)))
        got = SET_ESTIMATORS[estimator](score, incidence(np.broadcast_to(subsets, (6, *subsets.shape)), n))
        assert np.abs(got).max() > 1e-3
        np.testing.assert_allclose(got.sum(axis=1), 0, atol=n * 6e-8)  # an ulp below 1 for each term


def test_grpo_divides_by_the_population_std_and_leaves_failed_traces_out():
    reward = np.array(
        [[1, 0, 0, 0], [1, NAN, 0, 1], [1, 1, 1, 1], [NAN, NAN, NAN, 1], [0.1, 0.1, 0.1, NAN]], np.float32
    )
    got = adv.compute("grpo", reward)
    np.testing.assert_allclose(got.search_BxN[0], (np.eye(4)[0] - 0.25) / (math.sqrt(3 / 16) + 1e-6), rtol=1e-6)
    std = math.sqrt(2 / 9) + 1e-6
    np.testing.assert_allclose(got.search_BxN[1], [1 / 3 / std, 0, -2 / 3 / std, 1 / 3 / std], rtol=1e-6)
    assert not got.search_BxN[2:].any() and got.aggregation_BxKxM is None
    assert got.keep_B.tolist() == [True, True, False, False, False]
    assert got.starved_B.tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("gate, kept", [
    (0.0, [1, 1, 1, 0]),  # only what the limit cut off; a stop id as the last allowed token is no cut
    (0.5, [1, 1, 0, 0]), (0.49, [1, 0, 0, 0]), (1.0, [1, 1, 1, 1]),
    (50, [1, 1, 0, 0]), (51, [1, 1, 0, 0]), (49.5, [1, 0, 0, 0]), (10, [1, 0, 0, 0]), (9, [0, 0, 0, 0]),
    (100, [1, 1, 1, 1]), (1000, [1, 1, 1, 1]),
])  # fmt: skip
def test_length_gate_zeroes_only_positive_advantages_of_longer_traces(gate, kept):
    length = np.array([10, 50, 100, 100])
    stop = np.array([Stop.STOP, Stop.STOP, Stop.STOP, Stop.LENGTH])
    advantage = np.array([[0.5] * 4, [-0.5] * 4, [0.0] * 4], np.float32)
    got = adv.length_gate(advantage, np.tile(length, (3, 1)), np.tile(stop, (3, 1)), 100, gate)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, [0.5 * np.array(kept), [-0.5] * 4, [0.0] * 4])


def test_a_trace_at_exactly_its_share_of_the_limit_passes_the_gate():
    for percent in range(1, 101):  # 0.57 * 100 < 57 in floats
        length = np.array([percent, percent + 1])
        got = adv.length_gate(np.ones(2), length, np.zeros(2, int), 100, percent / 100)
        assert got.tolist() == [1, 0]


def test_an_empty_batch_stays_empty():
    got = adv.compute("marginal_mean", np.zeros((0, 4, 2)), np.zeros((0, 4, 8), bool))
    assert got.search_BxN.shape == (0, 8) and got.aggregation_BxKxM.shape == (0, 4, 2) and got.keep_B.shape == (0,)
    assert adv.search_weights("marginal_mean", "unbiased", got.search_BxN, np.zeros((0, 4, 2)), 4, 1.0).shape == (0, 8)
    assert adv.grpo(np.zeros((0, 8))).shape == (0, 8)


@pytest.mark.parametrize("call, words", [
    (lambda: adv.compute("pkpo", np.zeros((1, 2, 2)), np.ones((1, 2, 4), bool)), "'pkpo': must be marginal_mean"),
    (lambda: adv.compute("grpo", np.zeros((1, 2, 2))), r"grpo takes reward \[B, N\]"),
    (lambda: adv.compute("with_without", np.zeros((1, 2, 2))), r"incidence \[B, K, N\], got"),
    (lambda: adv.compute("with_without", np.zeros((1, 3, 2)), np.ones((1, 2, 4), bool)), "got"),
    (lambda: adv.length_gate(np.zeros(1), np.ones(1), np.zeros(1), 9, -0.5), "length_gate = -0.5"),
    (lambda: adv.length_gate(np.zeros(1), np.ones(1), np.zeros(1), 9, NAN), "length_gate = nan"),
    (lambda: adv.search_weights("marginal_mean", "mean", np.zeros((1, 4)), np.zeros((1, 2, 2)), 2, 1.0), "normalizer"),
    (lambda: adv.aggregation_weights("mean", np.zeros((1, 2, 2)), np.zeros((1, 2, 2)), 1.0), "normalizer"),
    (lambda: adv.search_weights("marginal_mean", "unbiased", np.zeros((1, 4)), np.array([[[1.0], [NAN]]]), 2, 1.0),
     "1 subset: must be >= 2"),
])  # fmt: skip
def test_bad_input_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# ---- exact expectations on a three-outcome softmax policy


THETA = np.array([0.3, -0.5, 0.4])
POLICY = np.exp(THETA) / np.exp(THETA).sum()


def tuples_and_probability(count):
    tuples = np.array(list(itertools.product(range(3), repeat=count)))
    return tuples, POLICY[tuples].prod(axis=1)


def arbitrary_set_function(s, seed):
    """A random number for each multiset of S outcomes: symmetric, with no order among outcomes."""
    rng = np.random.default_rng(seed)
    table = {key: rng.random() for key in itertools.combinations_with_replacement(range(3), s)}
    return lambda rows: np.array([table[tuple(sorted(row))] for row in rows.reshape(-1, s)]).reshape(rows.shape[:-1])


def score_gradient(outcome):
    """grad log pi of a softmax policy: one-hot minus probabilities."""
    return np.eye(3)[outcome] - POLICY


@pytest.mark.parametrize("estimator", SET_ESTIMATORS)
@pytest.mark.parametrize("n, s, k", [
    (2, 1, 2), (3, 1, 2), (3, 2, 2), (3, 2, 3), (4, 1, 3), (4, 2, 2), (4, 2, 3), (4, 2, 6), (4, 3, 2), (5, 2, 2),
])  # fmt: skip
def test_expected_search_gradient_is_the_bias_factor_times_the_true_one(estimator, n, s, k):
    """Over every tuple of traces and every draw of subsets; rtol 1e-6 for float32 advantages."""
    f = arbitrary_set_function(s, seed=n * 100 + s * 10 + k)
    sets, probability = tuples_and_probability(s)
    truth = np.einsum("a,a,ad->d", probability, f(sets), score_gradient(sets).sum(axis=1))
    subsets = np.array(list(itertools.combinations(range(n), s)))
    draws = np.array(list(itertools.combinations(range(len(subsets)), k)))
    tuples, probability = tuples_and_probability(n)
    all_scores = f(tuples[:, subsets])  # [tuple, subset]
    score = all_scores[:, draws].reshape(-1, k)
    member = np.broadcast_to(incidence(subsets[draws], n), (len(tuples), len(draws), k, n)).reshape(-1, k, n)
    advantage = SET_ESTIMATORS[estimator](score, member).reshape(len(tuples), len(draws), n).mean(axis=1)
    expected = np.einsum("a,ai,aid->d", probability, advantage.astype(np.float64), score_gradient(tuples))
    np.testing.assert_allclose(expected, bias_factor(estimator, n, s, k) * truth, rtol=1e-6, atol=1e-8)
    assert np.abs(truth).max() > 1e-3


@pytest.mark.parametrize("m", [2, 3, 4])
def test_expected_aggregation_gradient_loses_one_of_m_samples(m):
    """The mean over m of A grad log pi expects (M - 1) / M of the true gradient: the baseline holds the sample."""
    value = np.array([1.0, 0.0, 1.0])
    truth = (POLICY * value) @ score_gradient(np.arange(3))
    tuples, probability = tuples_and_probability(m)
    advantage = adv.aggregation_advantage(value[tuples][:, None])[:, 0].astype(np.float64)
    expected = np.einsum("a,am,amd->d", probability, advantage, score_gradient(tuples)) / m
    np.testing.assert_allclose(expected, (m - 1) / m * truth, rtol=1e-6)


def joint_objective(theta, s, slope):
    """J: S traces from softmax(theta), then an aggregator that is right with sigmoid(slope[multiset] . theta)."""
    policy = np.exp(theta) / np.exp(theta).sum()
    tuples = np.array(list(itertools.product(range(3), repeat=s)))
    right = 1 / (1 + np.exp(-slope(tuples) @ theta))
    return (policy[tuples].prod(axis=1) * right).sum()


@pytest.mark.parametrize("estimator", SET_ESTIMATORS)
@pytest.mark.parametrize("failed", [
    np.zeros((3, 2), bool),
    np.array([[0, 0], [0, 1], [0, 0]], bool),  # one set is left with a lone sample: valid for search, no aggregation
    np.array([[0, 0], [0, 0], [1, 1]], bool),  # one set lost: c at two sets
])  # fmt: skip
def test_unbiased_weights_make_both_terms_one_gradient_of_j(estimator, failed):
    """Expectation over traces, draws and aggregations, with any reward-independent failures, is dJ/dtheta.

    The reference is a central difference of J: error about 1e-10. Advantages are float32: rtol 1e-6.
    """
    n, s, k, m = 3, 2, 3, 2
    rng = np.random.default_rng(11)
    table = {key: rng.normal(size=3) * 2 for key in itertools.combinations_with_replacement(range(3), s)}

    def slope(rows):
        return np.array([table[tuple(sorted(row))] for row in rows.reshape(-1, s)]).reshape(*rows.shape[:-1], 3)

    truth = [
        (joint_objective(THETA + step, s, slope) - joint_objective(THETA - step, s, slope)) / 2e-5
        for step in 1e-5 * np.eye(3)
    ]
    subsets = np.array(list(itertools.permutations(itertools.combinations(range(n), s), k)))  # all draws, in order
    outcomes = np.array(list(itertools.product([0.0, 1.0], repeat=k * m))).reshape(-1, k, m)
    tuples, probability = tuples_and_probability(n)
    tuple_of, draw_of, outcome_of = (index.ravel() for index in np.indices((len(tuples), len(subsets), len(outcomes))))
    chosen, reward = subsets[draw_of], outcomes[outcome_of]
    slopes = slope(tuples[tuple_of[:, None, None], chosen])  # [B, K, 3]
    right = 1 / (1 + np.exp(-slopes @ THETA))[..., None]
    weight = probability[tuple_of] / len(subsets) * np.where(reward == 1, right, 1 - right).prod(axis=(1, 2))
    observed = np.where(failed, NAN, reward)
    got = adv.compute(estimator, observed, incidence(chosen, n))
    search = adv.search_weights(estimator, "unbiased", got.search_BxN, observed, s, 1.0).astype(np.float64)
    aggregation = adv.aggregation_weights("unbiased", got.aggregation_BxKxM, observed, 1.0).astype(np.float64)
    search_term = np.einsum("b,bi,bid->d", weight, search, score_gradient(tuples[tuple_of]))
    aggregation_term = np.einsum("b,bkm,bkm,bkd->d", weight, aggregation, reward - right, slopes)
    assert weight.sum() == pytest.approx(1) and min(np.abs(search_term).max(), np.abs(aggregation_term).max()) > 0
    total = (search_term + aggregation_term) * len(reward)  # the weights divide by the batch
    np.testing.assert_allclose(total, truth, rtol=1e-6, atol=1e-8)


# ---- loss weights


def test_unbiased_weights_divide_by_actual_counts_of_each_problem():
    reward = np.array([[[1, 0], [0, 0], [1, 1]], [[1, NAN], [NAN, NAN], [1, 0]]])
    member = np.array([[[0, 1], [1, 2], [2, 3]], [[0, 1], [1, 2], [2, 3]]])
    got = adv.compute("with_without", reward, incidence(member, 4))
    search = adv.search_weights("with_without", "unbiased", got.search_BxN, reward, 2, 3.0)
    for b, sets in enumerate((3, 2)):
        exact = 3.0 / (2 * bias_factor("with_without", 4, 2, sets)) * got.search_BxN[b]
        np.testing.assert_allclose(search[b], exact, rtol=1e-6)
    aggregation = adv.aggregation_weights("unbiased", got.aggregation_BxKxM, reward, 5.0)
    np.testing.assert_allclose(aggregation[0, 0], [5 / (2 * 3) * 0.5, -5 / (2 * 3) * 0.5], rtol=1e-6)
    np.testing.assert_allclose(aggregation[1], [[0, 0], [0, 0], [5 / 2 * 0.5, -5 / 2 * 0.5]], rtol=1e-6)
    assert search.dtype == aggregation.dtype == np.float32


def test_sum_weights_are_plain_multiples_of_the_advantages():
    reward = np.array([[[1, 0], [0, 0], [1, NAN]]])
    got = adv.compute("marginal_mean", reward, incidence(np.array([[[0, 1], [1, 2], [2, 3]]]), 4))
    np.testing.assert_allclose(
        adv.search_weights("marginal_mean", "sum", got.search_BxN, reward, 2, 0.3), 0.3 * got.search_BxN, rtol=1e-6
    )
    np.testing.assert_allclose(
        adv.aggregation_weights("sum", got.aggregation_BxKxM, reward, 0.7), 0.7 * got.aggregation_BxKxM, rtol=1e-6
    )


def test_aggregator_only_takes_one_set_and_gives_search_no_weight():
    reward = np.array([[[1, 0, 0]]])
    got = adv.compute("aggregator_only", reward, np.ones((1, 1, 4), bool))
    assert got.keep_B[0]
    assert not adv.search_weights("aggregator_only", "unbiased", got.search_BxN, reward, 4, 1.0).any()
    aggregation = adv.aggregation_weights("unbiased", got.aggregation_BxKxM, reward, 1.0)
    np.testing.assert_allclose(aggregation, [[[1 / 3, -1 / 6, -1 / 6]]], rtol=1e-6)


def test_grpo_weights_are_a_mean_over_the_tokens_of_valid_traces():
    reward = np.array([[1, 0, NAN], [0, 1, 1]])
    length = np.array([[5, 7, 1000], [1, 2, 3]], np.int32)
    got = adv.compute("grpo", reward)
    weight = adv.grpo_weights(got.search_BxN, reward, length, 2.0)
    np.testing.assert_allclose(weight, 2.0 * got.search_BxN / 18, rtol=1e-6)
    assert weight[0, 2] == 0 and weight.dtype == np.float32
