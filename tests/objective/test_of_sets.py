"""Advantages over drawn sets: what holds of each estimator, and exact expectations.

Outputs are float32, so values agree with exact ones to 1e-6 relative (an ulp is 6e-8; sums of few
terms).
"""

import itertools
import math

import numpy as np
import pytest
from enumerable_policy import POLICY, arbitrary_set_function, score_gradient, tuples_and_probability

from spiral_jax.objective import of_sets
from spiral_jax.objective.subsets import incidence

NAN = float("nan")
ADVANTAGE = {"marginal_mean": of_sets.marginal_mean, "with_without": of_sets.with_without}
FACTOR = {
    "marginal_mean": of_sets.marginal_mean_factor,
    "with_without": of_sets.with_without_factor,
}


def test_set_score_leaves_failed_samples_out_and_a_lone_sample_has_no_advantage():
    reward = np.array([[[1, 0, NAN], [NAN, NAN, NAN], [NAN, 1, NAN]]], np.float32)
    np.testing.assert_array_equal(of_sets.set_score(reward), [[0.5, NAN, 1.0]])
    advantage = of_sets.aggregation_advantage(reward)
    np.testing.assert_array_equal(advantage, [[[0.5, -0.5, 0], [0, 0, 0], [0, 0, 0]]])


@pytest.mark.parametrize("c, n, s, right, wrong", [
    (2, 4, 2, 1 / 3, -1 / 3),
    (1, 8, 1, 1,     -1 / 7),
    (1, 8, 2, 1,     -1 / 7),
    (1, 8, 4, 1,     -1 / 7),
    (7, 8, 2, 0,     0),
])  # fmt: skip
def test_published_vectors_of_the_best_of_set_score_over_all_sets(c, n, s, right, wrong):
    """Of n traces c are right, and a set scores 1 if it holds a right one.

    Binary max@k in its leave-two-out form.
    """
    member = np.array(list(itertools.combinations(range(n), s)))
    score = (member < c).any(axis=1).astype(float)[None]
    incidence_1xTxN = incidence(member[None], n)
    advantage_N = of_sets.with_without(score, incidence_1xTxN)[0]
    np.testing.assert_allclose(advantage_N, [right] * c + [wrong] * (n - c), rtol=1e-6, atol=0)
    centred_N = of_sets.marginal_mean(score, incidence_1xTxN)[0]
    np.testing.assert_allclose(centred_N, (1 - s / n) * advantage_N, rtol=1e-6, atol=0)


@pytest.mark.parametrize("n", range(2, 9))
def test_with_without_over_single_traces_is_rloo(n):
    score = np.random.default_rng(n).random((5, n))
    member = np.broadcast_to(np.arange(n)[:, None], (5, n, 1))
    rloo = n / (n - 1) * (score - score.mean(axis=1, keepdims=True))
    advantage = of_sets.with_without(score, incidence(member, n))
    np.testing.assert_allclose(advantage, rloo, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("estimator", ADVANTAGE)
def test_advantages_over_all_sets_sum_to_zero(estimator):
    rng = np.random.default_rng(2)
    for n, s in ((4, 2), (5, 3), (8, 4), (8, 1)):
        member = np.array(list(itertools.combinations(range(n), s)))
        score = rng.random((6, len(member)))
        each = np.broadcast_to(member, (6, *member.shape))
        advantage = ADVANTAGE[estimator](score, incidence(each, n))
        assert np.abs(advantage).max() > 1e-3
        an_ulp_each = n * 6e-8  # below 1
        np.testing.assert_allclose(advantage.sum(axis=1), 0, atol=an_ulp_each)


# --- exact expectations -------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ADVANTAGE)
@pytest.mark.parametrize("n, s, k", [
    (2, 1, 2), (3, 1, 2), (3, 2, 2), (3, 2, 3), (4, 1, 3),
    (4, 2, 2), (4, 2, 3), (4, 2, 6), (4, 3, 2), (5, 2, 2),
])  # fmt: skip
def test_expected_search_gradient_is_the_bias_factor_times_the_true_one(estimator, n, s, k):
    """Over every tuple of traces and every draw of subsets; rtol 1e-6 for float32 advantages."""
    f = arbitrary_set_function(s, seed=n * 100 + s * 10 + k)
    chosen, probability = tuples_and_probability(s)
    truth = np.einsum("a,a,ad->d", probability, f(chosen), score_gradient(chosen).sum(axis=1))
    assert np.abs(truth).max() > 1e-3

    subsets = np.array(list(itertools.combinations(range(n), s)))
    draws = np.array(list(itertools.combinations(range(len(subsets)), k)))
    tuples, probability = tuples_and_probability(n)
    score_of_each = f(tuples[:, subsets])  # [tuple, subset]
    score = score_of_each[:, draws].reshape(-1, k)
    in_draws = incidence(subsets[draws], n)
    member = np.broadcast_to(in_draws, (len(tuples), *in_draws.shape)).reshape(-1, k, n)
    advantage = ADVANTAGE[estimator](score, member).astype(np.float64)
    mean_advantage = advantage.reshape(len(tuples), len(draws), n).mean(axis=1)
    expected = np.einsum("a,ai,aid->d", probability, mean_advantage, score_gradient(tuples))
    factor = FACTOR[estimator](n, s, k)
    np.testing.assert_allclose(expected, factor * truth, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("m", [2, 3, 4])
def test_expected_aggregation_gradient_loses_one_of_m_samples(m):
    """The mean over m of A grad log pi expects (M - 1) / M of the true gradient.

    The baseline holds the sample itself.
    """
    value = np.array([1.0, 0.0, 1.0])
    truth = (POLICY * value) @ score_gradient(np.arange(3))
    tuples, probability = tuples_and_probability(m)
    advantage = of_sets.aggregation_advantage(value[tuples][:, None])[:, 0].astype(np.float64)
    expected = np.einsum("a,am,amd->d", probability, advantage, score_gradient(tuples)) / m
    np.testing.assert_allclose(expected, (m - 1) / m * truth, rtol=1e-6)


# --- bias factors -------------------------------------------------------------------------------


def test_bias_factors_at_the_papers_settings_agree_with_all_916895_draws():
    subsets = list(itertools.combinations(range(8), 4))
    holds = np.array([0 in subset for subset in subsets])
    each = itertools.chain.from_iterable(itertools.combinations(range(70), 4))
    draws = np.fromiter(each, np.int8).reshape(-1, 4)
    times = holds[draws].sum(axis=1)  # drawn subsets that contain trace 0
    in_some, in_all = (times > 0).mean(), (times == 4).mean()

    marginal_mean = of_sets.marginal_mean_factor(8, 4, 4)
    with_without = of_sets.with_without_factor(8, 4, 4)
    assert marginal_mean == pytest.approx(2 * in_some - 1, rel=1e-12)
    assert with_without == pytest.approx(2 * (in_some - in_all), rel=1e-12)
    assert (round(marginal_mean, 3), round(with_without, 3)) == (0.886, 1.772)


def test_bias_factors_over_all_subsets_are_those_of_the_complete_estimators():
    for n in range(2, 9):
        for s in range(1, n):
            total = math.comb(n, s)
            marginal_mean = of_sets.marginal_mean_factor(n, s, total)
            assert marginal_mean == pytest.approx(n / s - 1, rel=1e-15)
            assert of_sets.with_without_factor(n, s, total) == pytest.approx(n / s, rel=1e-15)
    assert 0 < of_sets.marginal_mean_factor(64, 8, 4) < of_sets.with_without_factor(64, 8, 4)


@pytest.mark.parametrize("factor", FACTOR.values())
def test_one_subset_and_more_than_there_are_have_no_factor(factor):
    with pytest.raises(ValueError, match="1 subset: must be >= 2"):
        factor(8, 4, 1)
    with pytest.raises(ValueError, match=r"2 subsets.* C\(4, 4\) = 1"):
        factor(4, 4, 2)
