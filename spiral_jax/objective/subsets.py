"""Which traces are aggregated together: a key that names a problem -> its subsets. Host-side numpy.

Draws use only PCG64's raw 64-bit words (ordered by argsort), whose stream NumPy keeps fixed between
versions; `Generator` methods have no such promise.
"""

from __future__ import annotations

import functools
import itertools
import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np

_DRAWN, _DISJOINT, _INDEPENDENT = 0, 1, 2  # spawn keys: the kinds of draw never share random words


class Key(NamedTuple):
    """What names a draw of subsets: non-negative integers.

    `round` counts the rounds of aggregation whose sets were drawn before, of the same problem.
    """

    seed: int
    purpose: int
    step: int
    cursor: int
    round: int


def _bits(kind: int, key: Key) -> np.random.PCG64:
    return np.random.PCG64(np.random.SeedSequence(tuple(key), spawn_key=(kind,)))


def draw_subsets(key: Key, n: int, s: int, k: int) -> np.ndarray:
    """K distinct S-subsets of range(N), uniform over all C(N, S), without replacement.

    The paper draws like this (arXiv 2606.23595, section 3.2).

    Args:
      key: the draw is a pure function of it and of n, s, k.
      n, s, k: traces of the problem, traces of a subset, subsets.

    Returns:
      int32 [K, S]: rows in random order, each ascending.

    Raises:
      ValueError: s is not in 1..n, or k is not in 1..C(n, s).
    """
    _require_sizes(n, s, k)
    bits = _bits(_DRAWN, key)
    total = math.comb(n, s)
    if total <= 2 * k:  # rejection would collect coupons for long; the list has at most 2K entries
        every = np.array(list(itertools.combinations(range(n), s)), np.int32)
        return every[np.argsort(bits.random_raw(total))[:k]]
    drawn: dict[tuple[int, ...], None] = {}  # an ordered set; more than half of all are still new
    while len(drawn) < k:
        drawn[tuple(np.sort(np.argsort(bits.random_raw(n))[:s]).tolist())] = None
    return np.array(list(drawn), np.int32)


def disjoint_subsets(key: Key, n: int, s: int, k: int) -> np.ndarray:
    """K disjoint S-subsets cut from one random permutation of range(N), as evaluation uses them.

    Arguments and result as in `draw_subsets`.

    Raises:
      ValueError: s < 1, k < 1 or k * s > n.
    """
    if s < 1 or k < 1 or k * s > n:
        raise ValueError(
            f"{k} disjoint subsets of {s} traces out of {n}: both must be >= 1 and their product "
            f"at most {n}. Lower eval.subsets or raise search.traces."
        )
    order = np.argsort(_bits(_DISJOINT, key).random_raw(n))
    return np.sort(order[: k * s].reshape(k, s), axis=-1).astype(np.int32)


def independent_subsets(key: Key, n: int, s: int, k: int) -> np.ndarray:
    """K S-subsets of range(N), each drawn by itself, so that some may be equal.

    Recursive self-aggregation draws one for each member of a population like this (arXiv
    2509.26626). Arguments and result as in `draw_subsets`.

    Raises:
      ValueError: s is not in 1..n, or k < 1.
    """
    if not 1 <= s <= n or k < 1:
        raise ValueError(
            f"{k} subsets of {s} traces out of {n}: needs >= 1 subset and between 1 and {n} traces."
        )
    words_KxN = _bits(_INDEPENDENT, key).random_raw(k * n).reshape(k, n)
    return np.sort(np.argsort(words_KxN, axis=-1)[:, :s], axis=-1).astype(np.int32)


def incidence(member_KxS: np.ndarray, n: int) -> np.ndarray:
    """Whether trace i is in subset k: integers [..., K, S] -> bool [..., K, N].

    Raises:
      ValueError: a member is not in range(n).
    """
    if member_KxS.size and (member_KxS.min() < 0 or member_KxS.max() >= n):
        raise ValueError(
            f"subset members {member_KxS.min()}..{member_KxS.max()}: must be within range({n})"
        )
    return (member_KxS[..., None] == np.arange(n)).any(axis=-2)


class Chances(NamedTuple):
    """Of a trace, when K distinct S-subsets of N traces are drawn uniformly.

    Attributes:
      in_some: q = 1 - C(T-T1, K) / C(T, K), that it is in some drawn subset.
      in_all: p = C(T1, K) / C(T, K), that it is in all of them.

    T = C(N, S) subsets, T1 = C(N-1, S-1) of them with a given trace.
    """

    in_some: Fraction
    in_all: Fraction


@functools.lru_cache(maxsize=1024)
def chances(n: int, s: int, k: int) -> Chances:
    """Exact, in integers.

    Raises:
      ValueError: k < 2 (one subset compares nothing), k > C(n, s), or s not in 1..n.
    """
    _require_sizes(n, s, k)
    if k < 2:
        raise ValueError(
            f"{k} subset: must be >= 2, since one subset alone has advantage zero. Drop the "
            "problem."
        )
    total, containing = math.comb(n, s), math.comb(n - 1, s - 1)
    draws = math.comb(total, k)
    in_some = 1 - Fraction(math.comb(total - containing, k), draws)
    return Chances(in_some, Fraction(math.comb(containing, k), draws))


def _require_sizes(n: int, s: int, k: int) -> None:
    if not 1 <= s <= n:
        raise ValueError(
            f"subset size {s}: must be between 1 and the {n} traces. Set aggregation.subset_size."
        )
    if not 1 <= k <= math.comb(n, s):
        raise ValueError(
            f"{k} subsets: must be between 1 and C({n}, {s}) = {math.comb(n, s)}, as subsets are "
            "distinct. Set aggregation.subsets."
        )
