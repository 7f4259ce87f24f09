"""Subset draws are uniform, distinct and reproducible."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from spiral_jax.objective.subsets import (
    Key,
    chances,
    disjoint_subsets,
    draw_subsets,
    incidence,
    independent_subsets,
)

KEY = Key(seed=0, purpose=0, step=3, cursor=17, round=1)


def is_uniform(counts, cells):
    """Whether chi-squared finds nothing against `cells` equally likely values at 0.1 %."""
    expected = sum(counts.values()) / cells
    statistic = sum((count - expected) ** 2 / expected for count in counts.values())
    return len(counts) == cells and statistic < stats.chi2.ppf(0.999, cells - 1)


def as_tuples(subsets):
    return [tuple(row) for row in subsets.tolist()]


@pytest.mark.parametrize("n", range(1, 9))
def test_every_draw_holds_distinct_ascending_subsets_up_to_all_of_them(n):
    for s in range(1, n + 1):
        total = math.comb(n, s)
        for k in sorted({1, min(2, total), (total + 1) // 2, max(total - 1, 1), total}):
            rows = draw_subsets(KEY, n, s, k)
            assert rows.shape == (k, s) and rows.dtype == np.int32
            assert (np.diff(rows, axis=1) > 0).all() and rows.min() >= 0 and rows.max() < n
            assert len(set(as_tuples(rows))) == k
        assert set(as_tuples(rows)) == set(itertools.combinations(range(n), s))


@pytest.mark.parametrize("k", [2, 5])  # T = 10: by rejection, and from the list of all subsets
def test_draws_are_uniform_over_all_sets_of_subsets_and_over_their_order(k):
    draws = [as_tuples(draw_subsets(Key(7, 0, 0, cursor, 0), 5, 2, k)) for cursor in range(8000)]
    assert is_uniform(Counter(frozenset(draw) for draw in draws), cells=math.comb(10, k))
    for place in (0, k - 1):  # it is part of random keys, so no subset may prefer a place
        assert is_uniform(Counter(draw[place] for draw in draws), cells=10)


def test_subsets_of_a_huge_number_of_them_are_distinct_and_cover_all_traces_equally():
    rows = draw_subsets(KEY, 64, 8, 4000)  # C(64, 8) = 4.4e9
    assert len(set(as_tuples(rows))) == 4000
    counts = np.bincount(rows.ravel(), minlength=64)
    variance = 4000 * (8 / 64) * (56 / 64)
    assert ((counts - 500) ** 2).sum() / variance / (64 / 63) < stats.chi2.ppf(0.999, 63)
    assert draw_subsets(KEY, 64, 32, 4).shape == (4, 32)


def test_a_draw_depends_on_each_integer_of_its_key_and_on_nothing_else():
    base = draw_subsets(KEY, 16, 4, 8)
    np.random.default_rng(0).random(5)
    np.random.seed(123)
    np.testing.assert_array_equal(base, draw_subsets(KEY, 16, 4, 8))
    others = [KEY._replace(**{field: getattr(KEY, field) + 1}) for field in KEY._fields]
    others.append(KEY._replace(step=KEY.cursor, cursor=KEY.step))
    for other in others:
        assert not np.array_equal(base, draw_subsets(other, 16, 4, 8))


def test_the_stream_of_draws_is_pinned():
    """A change here makes old runs irreproducible."""
    drawn = draw_subsets(KEY, 8, 4, 4).tolist()
    assert drawn == [[2, 5, 6, 7], [1, 2, 4, 6], [0, 3, 6, 7], [1, 2, 3, 4]]
    assert disjoint_subsets(KEY, 8, 4, 2).tolist() == [[1, 3, 4, 7], [0, 2, 5, 6]]


def test_disjoint_subsets_share_no_trace_and_are_uniform():
    rows = disjoint_subsets(KEY, 9, 2, 4)
    assert rows.shape == (4, 2) and rows.dtype == np.int32 and (np.diff(rows, axis=1) > 0).all()
    assert len(set(rows.ravel().tolist())) == 8 and rows.min() >= 0 and rows.max() < 9
    draws = [disjoint_subsets(Key(1, 1, 0, cursor, 0), 5, 2, 2) for cursor in range(4000)]
    assert is_uniform(Counter(as_tuples(draw)[1] for draw in draws), cells=10)


def test_independent_draws_are_uniform_and_may_repeat():
    draws = [independent_subsets(Key(7, 1, 0, cursor, 2), 5, 2, 5) for cursor in range(2000)]
    counts = Counter(subset for draw in draws for subset in as_tuples(draw))
    assert is_uniform(counts, cells=10)
    # more draws than there are subsets: every member of a population has its own
    assert independent_subsets(KEY, 3, 3, 8).tolist() == [[0, 1, 2]] * 8
    rounds = [independent_subsets(KEY._replace(round=round), 8, 4, 8) for round in (1, 2)]
    assert not np.array_equal(*rounds)


def test_incidence_marks_exactly_the_members_over_leading_axes():
    keys = [[Key(0, 0, 0, cursor, round) for cursor in range(4)] for round in range(2)]
    rows = np.stack([[draw_subsets(key, 7, 3, 5) for key in of_round] for of_round in keys])
    member = incidence(rows, 7)
    assert member.shape == (2, 4, 5, 7) and member.dtype == bool
    for index in np.ndindex(2, 4, 5):
        assert set(np.flatnonzero(member[index])) == set(rows[index].tolist())
    assert incidence(np.zeros((0, 5, 3), np.int32), 7).shape == (0, 5, 7)


@pytest.mark.parametrize("call, parts", [
    (lambda: draw_subsets(KEY, 5, 2, 11),          ("11 subsets", "C(5, 2) = 10")),
    (lambda: draw_subsets(KEY, 5, 6, 1),           ("subset size 6", "5 traces")),
    (lambda: draw_subsets(KEY, 5, 2, 0),           ("0 subsets", "C(5, 2) = 10")),
    (lambda: disjoint_subsets(KEY, 7, 2, 4),       ("4 disjoint subsets", "2 traces", "of 7")),
    (lambda: independent_subsets(KEY, 4, 5, 1),    ("5 traces", "between 1 and 4")),
    (lambda: independent_subsets(KEY, 4, 0, 1),    ("0 traces", "between 1 and 4")),
    (lambda: independent_subsets(KEY, 4, 2, 0),    ("0 subsets", ">= 1")),
    (lambda: incidence(np.array([[0, 7]]), 7),     ("0..7", "range(7)")),
    (lambda: chances(8, 4, 1),                     ("1 subset", ">= 2")),
])  # fmt: skip
def test_impossible_sizes_are_refused_with_the_numbers(call, parts):
    with pytest.raises(ValueError) as refused:
        call()
    assert all(part in str(refused.value) for part in parts)
