"""Evaluation estimators against enumeration, exact fractions and simulation."""

import itertools
import math
import statistics
from fractions import Fraction

import numpy as np
import pytest

from spiral_jax.evaluation.statistics import (
    Estimate,
    answer_entropy,
    bootstrap_weights,
    longest_of_k,
    majority_at_k,
    majority_correct,
    mean_and_interval,
    pass_at_k,
    ratios_and_intervals,
)


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_k_subsets_with_a_correct_sample(n):
    for k in range(1, n + 1):
        expected = []
        for c in range(n + 1):
            correct = [i < c for i in range(n)]
            draws = list(itertools.combinations(correct, k))
            expected.append(sum(any(draw) for draw in draws) / len(draws))
        # float64 products of at most 7 factors
        np.testing.assert_allclose(pass_at_k(np.arange(n + 1), n, k), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("k", [1, 2, 17, 128, 512, 1024])
def test_pass_at_k_does_not_lose_digits_at_a_thousand_samples(k):
    n, correct = 1024, np.array([0, 1, 2, 511, 1023, 1024])
    expected = [float(1 - Fraction(math.comb(n - int(c), k), math.comb(n, k))) for c in correct]
    # 1024 factors, each rounded to 2^-53: relative error of the product below 1024 * 2.3e-16
    np.testing.assert_allclose(pass_at_k(correct, n, k), expected, rtol=0, atol=3e-13)


@pytest.mark.parametrize(("n", "k", "p"), [(4, 4, 0.3), (8, 3, 0.1), (16, 8, 0.05)])
def test_pass_at_k_is_unbiased(n, k, p):
    c = np.arange(n + 1)
    weight = np.array([math.comb(n, int(i)) * p**i * (1 - p) ** (n - i) for i in c])
    assert (weight * pass_at_k(c, n, k)).sum() == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


def test_pass_at_k_takes_any_shape_and_sample_counts_by_problem():
    rng = np.random.default_rng(0)
    n = rng.integers(3, 20, size=(2, 5))
    correct = rng.integers(0, n + 1)
    result = pass_at_k(correct, n, 3)
    assert result.shape == (2, 5)
    assert result.dtype == np.float64
    for index in np.ndindex(2, 5):
        assert result[index] == pass_at_k(correct[index], int(n[index]), 3)


@pytest.mark.parametrize(
    ("correct", "n", "k", "message"),
    [
        ([5], 4, 1, "between 0 and n"),
        ([-1], 4, 1, "between 0 and n"),
        ([1], 4, 5, "k = 5"),
        ([1], 4, 0, "k = 0"),
        ([1, 1], [4, 2], 3, "k = 3"),
        ([1.5], 4, 1, "whole"),
        ([math.nan], 4, 1, "whole"),
    ],
)
def test_pass_at_k_refuses_impossible_counts(correct, n, k, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(np.array(correct), np.array(n), k)


@pytest.mark.parametrize("length", range(1, 6))
def test_majority_agrees_with_a_vote_over_every_list(length):
    for classes in itertools.product([None, "a", "b", "c"], repeat=length):
        winners = statistics.multimode([answer for answer in classes if answer is not None])
        chances = {gold: majority_correct(list(classes), gold) for gold in ("a", "b", "c", "d")}
        assert chances == {gold: 1 / len(winners) if gold in winners else 0 for gold in chances}


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (["7", "8", "7"], 1.0),
        (["7", "8"], 1 / 2),
        (["7", "8", "9"], 1 / 3),
        (["8", "8", "7"], 0.0),
        ([None, None, None, "7"], 1.0),
        ([None, None, "8", "7"], 1 / 2),
        ([None, None], 0.0),
    ],
)
def test_unparsed_answers_have_no_vote_and_ties_are_split(classes, expected):
    assert majority_correct(classes, "7") == expected


def test_a_vote_without_candidates_is_an_error():
    with pytest.raises(ValueError, match="at least one candidate"):
        majority_correct([], "7")


def test_mean_and_standard_error_are_the_ordinary_ones_and_the_interval_is_near_the_normal_one():
    values = np.random.default_rng(1).random(37)
    error = statistics.stdev(values.tolist()) / math.sqrt(37)
    mean = statistics.fmean(values.tolist())
    got = mean_and_interval(values, bootstrap_weights(0, 37, 4000))
    assert got.count == 37
    assert (got.mean, got.standard_error) == pytest.approx((mean, error), abs=1e-14)
    # percentiles of a mean of 37 are near the normal ones
    normal = (mean - 1.96 * error, mean + 1.96 * error)
    assert (got.low, got.high) == pytest.approx(normal, abs=0.6 * error)


def test_an_interval_never_leaves_what_a_share_can_be():
    weights = bootstrap_weights(0, 6, 2000)
    for right in range(7):
        values = np.array([1.0] * right + [0.0] * (6 - right))
        got = mean_and_interval(values, weights)
        assert 0 <= got.low <= got.mean <= got.high <= 1


def test_failed_problems_are_left_out_and_the_count_says_so():
    values = np.array([1.0, math.nan, 0.0, 1.0, math.nan])
    got = mean_and_interval(values, bootstrap_weights(0, 5, 2000))
    error = statistics.stdev([1, 0, 1]) / math.sqrt(3)
    assert (got.mean, got.standard_error, got.count) == pytest.approx((2 / 3, error, 3), abs=1e-14)


@pytest.mark.parametrize(
    ("values", "mean", "count"), [([0.5], 0.5, 1), ([], None, 0), ([math.nan], None, 0)]
)
def test_too_few_problems_have_no_interval_and_never_nan(values, mean, count):
    weights = bootstrap_weights(0, len(values), 10) if values else np.zeros((10, 0))
    assert mean_and_interval(np.array(values), weights) == Estimate(mean, None, None, None, count)


def test_samples_must_be_averaged_by_problem_first():
    with pytest.raises(ValueError, match=r"shape \(3, 4\)"):
        mean_and_interval(np.zeros((3, 4)), bootstrap_weights(0, 3, 10))


def partitions(n, most=None):
    """All multisets of positive integers that add up to n."""
    if n == 0:
        yield []
    for first in range(min(n, n if most is None else most), 0, -1):
        for rest in partitions(n - first, first):
            yield [first, *rest]


@pytest.mark.parametrize("n", range(1, 9))
def test_majority_at_k_is_the_mean_vote_of_all_k_subsets(n):
    for correct in range(n + 1):
        for unparsed in range(n - correct + 1):
            for wrong in partitions(n - correct - unparsed):
                classes = ["right"] * correct + [None] * unparsed
                classes += [name for name, count in enumerate(wrong) for _ in range(count)]
                got = majority_at_k(correct, wrong, unparsed)
                for k in range(1, n + 1):
                    votes = [
                        majority_correct(draw, "right")
                        for draw in itertools.combinations(classes, k)
                    ]
                    assert got[k - 1] == pytest.approx(math.fsum(votes) / len(votes), abs=1e-13), (
                        wrong,
                        k,
                    )


def test_majority_at_k_agrees_with_simulated_votes_at_64_samples():
    wrong, rng = [14, 9, 3, 3, 1, 1, 1, 1], np.random.default_rng(0)
    classes = ["right"] * 15 + [name for name, count in enumerate(wrong) for _ in range(count)]
    classes += [None] * (64 - len(classes))
    got = majority_at_k(15, wrong, 64 - 15 - sum(wrong))
    for k in (2, 7, 32):
        draws = [[classes[i] for i in rng.permutation(64)[:k]] for _ in range(4000)]
        simulated = np.mean([majority_correct(draw, "right") for draw in draws])
        # four standard deviations at most
        assert abs(got[k - 1] - simulated) < 4 * 0.5 / math.sqrt(4000)
    assert got[0] == pytest.approx(15 / 64) and got[63] == 1.0


def test_majority_at_k_is_finite_and_sharp_at_a_thousand_samples():
    got = majority_at_k(501, [499], 0)
    assert (
        np.isfinite(got).all() and got[0] == pytest.approx(0.501) and got[-1] == pytest.approx(1.0)
    )
    # k = 2: both right, or one of each, a tie; exact fractions
    exact = Fraction(math.comb(501, 2) + Fraction(501 * 499, 2), math.comb(1000, 2))
    assert got[1] == pytest.approx(float(exact), abs=1e-12)


@pytest.mark.parametrize(
    "counts", [(0, [], 0), (-1, [2], 0), (1, [0], 0), (1, [], -1), (1001, [], 0)]
)
def test_majority_at_k_refuses_impossible_counts(counts):
    with pytest.raises(ValueError, match="counts must be"):
        majority_at_k(*counts)


@pytest.mark.parametrize("lengths", [[5], [3, 9], [4, 4, 7, 1, 4], [10, 2, 8, 2, 2, 6, 9]])
def test_longest_of_k_is_the_mean_maximum_of_all_k_subsets(lengths):
    expected = [
        np.mean([max(draw) for draw in itertools.combinations(lengths, k)])
        for k in range(1, len(lengths) + 1)
    ]
    np.testing.assert_allclose(longest_of_k(lengths), expected, rtol=1e-14)


def test_longest_of_k_needs_lengths():
    with pytest.raises(ValueError, match="n from 1 to 1000"):
        longest_of_k([])


@pytest.mark.parametrize(
    ("classes", "expected"),
    [([0, 0, 0], 0.0), ([0, 1], math.log(2)), ([0, None, 1, 2, 2], 1.5 * math.log(2)), ([3], 0.0)],
)
def test_entropy_is_that_of_the_parsed_answers(classes, expected):
    assert answer_entropy(classes) == pytest.approx(expected, abs=1e-15)


def test_entropy_of_no_answers_is_nan():
    assert math.isnan(answer_entropy([None, None]))


def test_bootstrap_weights_are_resamples_of_all_problems_and_depend_on_the_seed_alone():
    weights = bootstrap_weights(0, 7, 3000)
    assert weights.shape == (3000, 7) and (weights.sum(axis=1) == 7).all()
    # multinomial: mean 1, variance 1 - 1/7; four standard deviations of a mean over 3000
    assert np.abs(weights.mean(axis=0) - 1).max() < 4 * math.sqrt((1 - 1 / 7) / 3000)
    assert np.array_equal(weights, bootstrap_weights(0, 7, 3000))
    assert not np.array_equal(weights, bootstrap_weights(1, 7, 3000))


def test_bootstrap_interval_covers_a_ratio_in_95_of_100_evaluations():
    rng, covered, errors = np.random.default_rng(3), [], []
    weights = bootstrap_weights(0, 100, 400)
    for _ in range(400):
        count = rng.integers(0, 4, size=(100, 1)).astype(float)
        total = rng.binomial(count.astype(int), 0.3).astype(float)
        (got,) = ratios_and_intervals(total, count, weights)
        covered.append(got.low <= 0.3 <= got.high)
        errors.append((got.mean - 0.3) / got.standard_error)
    # binomial deviation over 400 evaluations is 0.011; percentile intervals of 100 problems cover a
    # little less
    assert abs(np.mean(covered) - 0.95) < 0.04
    assert np.std(errors) == pytest.approx(1, abs=0.15)


def test_problems_without_a_value_are_left_out_and_too_few_have_no_interval():
    total, count = (
        np.array([[1.0, 0, 0], [0, 0, 0], [1, 0.5, 0]]),
        np.array([[1.0, 0, 0], [1, 0, 0], [1, 1, 0]]),
    )
    several, lone, none = ratios_and_intervals(total, count, bootstrap_weights(0, 3, 100))
    assert several.count == 3 and several.mean == pytest.approx(2 / 3) and several.low is not None
    assert lone == Estimate(0.5, None, None, None, 1)
    assert none == Estimate(None, None, None, None, 0)
