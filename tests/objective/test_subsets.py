"""Subset draws are uniform, distinct and reproducible; bias factors agree with counting every
possible draw.
"""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from spiral_jax.objective.subsets import (
    bias_factor,
    disjoint_subsets,
    draw_subsets,
    incidence,
    independent_subsets,
)

IDS = (0, 0, 3, 17, 1)  # seed, purpose, step, cursor, round


@pytest.mark.parametrize("n, s", [(n, s) for n in range(1, 9) for s in range(1, n + 1)])
def test_every_draw_holds_distinct_ascending_subsets_up_to_all_of_them(n, s):
    total = math.comb(n, s)
    for k in sorted({1, min(2, total), (total + 1) // 2, max(total - 1, 1), total}):
        rows = draw_subsets(*IDS, n, s, k)
        assert rows.shape == (k, s) and rows.dtype == np.int32
        assert (np.diff(rows, axis=1) > 0).all() and rows.min() >= 0 and rows.max() < n
        assert len({tuple(row) for row in rows}) == k
    assert {tuple(row) for row in rows} == set(itertools.combinations(range(n), s))


@pytest.mark.parametrize("k", [2, 5])  # T = 10: by rejection, and from the list of all subsets
def test_draws_are_uniform_over_all_sets_of_subsets_and_over_their_order(k):
    subsets = list(itertools.combinations(range(5), 2))
    draws = [
        [tuple(row) for row in draw_subsets(7, 0, 0, cursor, 0, 5, 2, k)] for cursor in range(8000)
    ]
    unordered = Counter(frozenset(draw) for draw in draws)
    cells = math.comb(10, k)
    assert len(unordered) == cells
    expected = len(draws) / cells
    statistic = sum((count - expected) ** 2 / expected for count in unordered.values())
    assert statistic < stats.chi2.ppf(0.999, cells - 1)
    for slot in (
        0,
        k - 1,
    ):  # the subset's index is part of random keys, so no subset may prefer an index
        counts = Counter(draw[slot] for draw in draws)
        statistic = sum(
            (counts[subset] - len(draws) / 10) ** 2 / (len(draws) / 10) for subset in subsets
        )
        assert statistic < stats.chi2.ppf(0.999, 9)


def test_subsets_of_a_huge_number_of_them_are_distinct_and_cover_all_traces_equally():
    rows = draw_subsets(*IDS, 64, 8, 4000)  # C(64, 8) = 4.4e9
    assert len({tuple(row) for row in rows}) == 4000
    counts = np.bincount(rows.ravel(), minlength=64)
    variance = 4000 * (8 / 64) * (56 / 64)
    assert ((counts - 500) ** 2).sum() / variance / (64 / 63) < stats.chi2.ppf(0.999, 63)
    assert draw_subsets(*IDS, 64, 32, 4).shape == (4, 32)


def test_a_draw_depends_on_each_integer_and_on_nothing_else():
    base = draw_subsets(*IDS, 16, 4, 8)
    np.random.default_rng(0).random(5)
    np.random.seed(123)
    np.testing.assert_array_equal(base, draw_subsets(*IDS, 16, 4, 8))
    for position in range(len(IDS)):
        other = list(IDS)
        other[position] += 1
        assert not np.array_equal(base, draw_subsets(*other, 16, 4, 8))
    permuted = draw_subsets(0, 0, 17, 3, 1, 16, 4, 8)  # step and cursor exchanged
    assert not np.array_equal(base, permuted)


def test_the_stream_of_draws_is_pinned():
    """A change here makes old runs irreproducible."""
    assert draw_subsets(*IDS, 8, 4, 4).tolist() == [
        [2, 5, 6, 7],
        [1, 2, 4, 6],
        [0, 3, 6, 7],
        [1, 2, 3, 4],
    ]
    assert disjoint_subsets(*IDS, 8, 4, 2).tolist() == [[1, 3, 4, 7], [0, 2, 5, 6]]


def test_disjoint_subsets_share_no_trace_and_are_uniform():
    rows = disjoint_subsets(*IDS, 9, 2, 4)
    assert rows.shape == (4, 2) and rows.dtype == np.int32 and (np.diff(rows, axis=1) > 0).all()
    assert len(set(rows.ravel().tolist())) == 8 and rows.min() >= 0 and rows.max() < 9
    first = Counter(
        tuple(disjoint_subsets(1, 1, 0, cursor, 0, 5, 2, 2)[1]) for cursor in range(4000)
    )
    assert len(first) == 10
    assert sum((count - 400) ** 2 / 400 for count in first.values()) < stats.chi2.ppf(0.999, 9)


def test_incidence_marks_exactly_the_members_over_leading_axes():
    rows = np.stack([[draw_subsets(0, 0, 0, c, r, 7, 3, 5) for c in range(4)] for r in range(2)])
    got = incidence(rows, 7)
    assert got.shape == (2, 4, 5, 7) and got.dtype == bool
    for index in np.ndindex(2, 4, 5):
        assert set(np.flatnonzero(got[index])) == set(rows[index].tolist())
    assert incidence(np.zeros((0, 5, 3), np.int32), 7).shape == (0, 5, 7)


def test_bias_factor_at_the_papers_settings_agrees_with_all_916895_draws():
    subsets = list(itertools.combinations(range(8), 4))
    holds = np.array([0 in subset for subset in subsets])
    draws = np.fromiter(
        itertools.chain.from_iterable(itertools.combinations(range(70), 4)), np.int8
    ).reshape(-1, 4)
    times = holds[draws].sum(axis=1)  # drawn subsets that contain trace 0
    in_some, in_all = (times > 0).mean(), (times == 4).mean()
    assert bias_factor("marginal_mean", 8, 4, 4) == pytest.approx(2 * in_some - 1, rel=1e-12)
    assert bias_factor("with_without", 8, 4, 4) == pytest.approx(2 * (in_some - in_all), rel=1e-12)
    assert round(bias_factor("marginal_mean", 8, 4, 4), 3) == 0.886
    assert round(bias_factor("with_without", 8, 4, 4), 3) == 1.772


def test_bias_factor_over_all_subsets_is_that_of_the_complete_estimators():
    for n in range(2, 9):
        for s in range(1, n):
            total = math.comb(n, s)
            assert bias_factor("marginal_mean", n, s, total) == pytest.approx(n / s - 1, rel=1e-15)
            assert bias_factor("with_without", n, s, total) == pytest.approx(n / s, rel=1e-15)
    assert 0 < bias_factor("marginal_mean", 64, 8, 4) < bias_factor("with_without", 64, 8, 4)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: bias_factor("marginal_mean", 8, 4, 1), "1 subset: must be >= 2"),
        (lambda: bias_factor("with_without", 8, 4, 1), "1 subset: must be >= 2"),
        (lambda: bias_factor("grpo", 8, 4, 4), "'grpo' has no bias factor"),
        (lambda: bias_factor("marginal_mean", 4, 4, 2), r"C\(4, 4\) = 1"),
        (lambda: draw_subsets(*IDS, 5, 2, 11), r"11 subsets: must be between 1 and C\(5, 2\) = 10"),
        (lambda: draw_subsets(*IDS, 5, 6, 1), "subset size 6"),
        (lambda: draw_subsets(*IDS, 5, 2, 0), "0 subsets"),
        (lambda: disjoint_subsets(*IDS, 7, 2, 4), "4 disjoint subsets of 2 traces out of 7"),
        (lambda: incidence(np.array([[0, 7]]), 7), r"within range\(7\)"),
    ],
)
def test_impossible_sizes_are_refused_with_the_numbers(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_independent_draws_are_uniform_and_may_repeat():
    draws = [
        tuple(row)
        for cursor in range(2000)
        for row in independent_subsets(7, 1, 0, cursor, 2, 5, 2, 5)
    ]
    counts = Counter(draws)
    assert set(counts) == set(itertools.combinations(range(5), 2))
    statistic = sum((count - 1000) ** 2 / 1000 for count in counts.values())
    assert statistic < stats.chi2.ppf(0.999, 9)
    # more draws than there are subsets: every member of a population has its own
    assert independent_subsets(*IDS, 3, 3, 8).tolist() == [[0, 1, 2]] * 8
    assert not np.array_equal(
        independent_subsets(7, 1, 0, 0, 1, 8, 4, 8), independent_subsets(7, 1, 0, 0, 2, 8, 4, 8)
    )


@pytest.mark.parametrize(("n", "s", "k"), [(4, 5, 1), (4, 0, 1), (4, 2, 0)])
def test_independent_draws_refuse_impossible_sizes(n, s, k):
    with pytest.raises(ValueError, match="between 1 and"):
        independent_subsets(*IDS, n, s, k)
