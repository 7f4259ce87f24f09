"""Advantages over drawn sets: what holds of each estimator, and exact expectations.

Outputs are float32, so values agree with exact ones to 1e-6 relative (an ulp is 6e-8; sums of few
terms).
"""

import itertools

import numpy as np
import pytest
from enumerable_policy import POLICY, arbitrary_set_function, score_gradient, tuples_and_probability

from spiral_jax.objective import of_sets as sets
from spiral_jax.objective.subsets import bias_factor, incidence

NAN = float("nan")
SET_ESTIMATORS = {"marginal_mean": sets.marginal_mean, "with_without": sets.with_without}


def test_set_score_leaves_failed_samples_out_and_a_lone_sample_has_no_advantage():
    reward = np.array([[[1, 0, NAN], [NAN, NAN, NAN], [NAN, 1, NAN]]], np.float32)
    np.testing.assert_array_equal(sets.set_score(reward), [[0.5, NAN, 1.0]])
    np.testing.assert_array_equal(
        sets.aggregation_advantage(reward), [[[0.5, -0.5, 0], [0, 0, 0], [0, 0, 0]]]
    )


@pytest.mark.parametrize("c, n, s, right, wrong", [
    (2, 4, 2, 1 / 3, -1 / 3), (1, 8, 1, 1, -1 / 7), (1, 8, 2, 1, -1 / 7), (1, 8, 4, 1, -1 / 7), (7, 8, 2, 0, 0),
])  # fmt: skip
def test_published_vectors_of_the_best_of_set_score_over_all_sets(c, n, s, right, wrong):
    """Of n traces c are right and a set scores 1 if it holds a right one (binary max@k,
    leave-two-out form).
    """
    subsets = np.array(list(itertools.combinations(range(n), s)))
    score = (subsets < c).any(axis=1).astype(float)[None]
    got = sets.with_without(score, incidence(subsets[None], n))[0]
    np.testing.assert_allclose(got, [right] * c + [wrong] * (n - c), rtol=1e-6, atol=0)
    centred = sets.marginal_mean(score, incidence(subsets[None], n))[0]
    np.testing.assert_allclose(centred, (1 - s / n) * got, rtol=1e-6, atol=0)


@pytest.mark.parametrize("n", range(2, 9))
def test_with_without_over_single_traces_is_rloo(n):
    score = np.random.default_rng(n).random((5, n))
    member = np.broadcast_to(np.arange(n)[:, None], (5, n, 1))
    rloo = n / (n - 1) * (score - score.mean(axis=1, keepdims=True))
    np.testing.assert_allclose(
        sets.with_without(score, incidence(member, n)), rloo, rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("estimator", SET_ESTIMATORS)
def test_advantages_over_all_sets_sum_to_zero(estimator):
    rng = np.random.default_rng(2)
    for n, s in ((4, 2), (5, 3), (8, 4), (8, 1)):
        subsets = np.array(list(itertools.combinations(range(n), s)))
        score = rng.random((6, len(subsets)))
        got = SET_ESTIMATORS[estimator](
            score, incidence(np.broadcast_to(subsets, (6, *subsets.shape)), n)
        )
        assert np.abs(got).max() > 1e-3
        np.testing.assert_allclose(
            got.sum(axis=1), 0, atol=n * 6e-8
        )  # an ulp below 1 for each term


@pytest.mark.parametrize("estimator", SET_ESTIMATORS)
@pytest.mark.parametrize("n, s, k", [
    (2, 1, 2), (3, 1, 2), (3, 2, 2), (3, 2, 3), (4, 1, 3), (4, 2, 2), (4, 2, 3), (4, 2, 6), (4, 3, 2), (5, 2, 2),
])  # fmt: skip
def test_expected_search_gradient_is_the_bias_factor_times_the_true_one(estimator, n, s, k):
    """Over every tuple of traces and every draw of subsets; rtol 1e-6 for float32 advantages."""
    f = arbitrary_set_function(s, seed=n * 100 + s * 10 + k)
    chosen, probability = tuples_and_probability(s)
    truth = np.einsum("a,a,ad->d", probability, f(chosen), score_gradient(chosen).sum(axis=1))
    subsets = np.array(list(itertools.combinations(range(n), s)))
    draws = np.array(list(itertools.combinations(range(len(subsets)), k)))
    tuples, probability = tuples_and_probability(n)
    all_scores = f(tuples[:, subsets])  # [tuple, subset]
    score = all_scores[:, draws].reshape(-1, k)
    member = np.broadcast_to(incidence(subsets[draws], n), (len(tuples), len(draws), k, n)).reshape(
        -1, k, n
    )
    advantage = (
        SET_ESTIMATORS[estimator](score, member).reshape(len(tuples), len(draws), n).mean(axis=1)
    )
    expected = np.einsum(
        "a,ai,aid->d", probability, advantage.astype(np.float64), score_gradient(tuples)
    )
    np.testing.assert_allclose(
        expected, bias_factor(estimator, n, s, k) * truth, rtol=1e-6, atol=1e-8
    )
    assert np.abs(truth).max() > 1e-3


@pytest.mark.parametrize("m", [2, 3, 4])
def test_expected_aggregation_gradient_loses_one_of_m_samples(m):
    """The mean over m of A grad log pi expects (M - 1) / M of the true gradient: the baseline holds
    the sample.
    """
    value = np.array([1.0, 0.0, 1.0])
    truth = (POLICY * value) @ score_gradient(np.arange(3))
    tuples, probability = tuples_and_probability(m)
    advantage = sets.aggregation_advantage(value[tuples][:, None])[:, 0].astype(np.float64)
    expected = np.einsum("a,am,amd->d", probability, advantage, score_gradient(tuples)) / m
    np.testing.assert_allclose(expected, (m - 1) / m * truth, rtol=1e-6)
