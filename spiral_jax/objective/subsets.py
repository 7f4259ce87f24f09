"""Which traces are aggregated together: integers that name a problem -> its subsets, their
incidence, and the bias factor that the draw puts on the search gradient. Host-side numpy.

Draws use only PCG64's raw 64-bit words (ordered by argsort), whose stream NumPy keeps fixed between
versions; `Generator` methods have no such promise.
"""

from __future__ import annotations

import functools
import itertools
import math
from fractions import Fraction

import numpy as np

_DRAWN, _DISJOINT, _INDEPENDENT = 0, 1, 2  # spawn keys: the kinds of draw never share random words


def _bits(
    kind: int, seed: int, purpose: int, step: int, cursor: int, round_: int
) -> np.random.PCG64:
    return np.random.PCG64(
        np.random.SeedSequence((seed, purpose, step, cursor, round_), spawn_key=(kind,))
    )


def draw_subsets(
    seed: int, purpose: int, step: int, cursor: int, round_: int, n: int, s: int, k: int
) -> np.ndarray:
    """K distinct S-subsets of range(N), uniform without replacement over all C(N, S) (arXiv
    2606.23595, sec. 3.2).

    Args:
      seed, purpose, step, cursor, round_: non-negative integers; the draw is a pure function of
      them and of n, s, k.
      n, s, k: traces of the problem, traces of a subset, subsets.

    Returns:
      int32 [K, S]: rows in random order, each ascending.

    Raises:
      ValueError: s is not in 1..n, or k is not in 1..C(n, s).
    """
    _require_sizes(n, s, k)
    bits = _bits(_DRAWN, seed, purpose, step, cursor, round_)
    total = math.comb(n, s)
    if total <= 2 * k:  # rejection would collect coupons for long; the list has at most 2K entries
        every = np.array(list(itertools.combinations(range(n), s)), np.int32)
        return every[np.argsort(bits.random_raw(total))[:k]]
    drawn: dict[
        tuple[int, ...], None
    ] = {}  # ordered set; more than half of all subsets are still new
    while len(drawn) < k:
        drawn[tuple(np.sort(np.argsort(bits.random_raw(n))[:s]).tolist())] = None
    return np.array(list(drawn), np.int32)


def disjoint_subsets(
    seed: int, purpose: int, step: int, cursor: int, round_: int, n: int, s: int, k: int
) -> np.ndarray:
    """K disjoint S-subsets cut from one random permutation of range(N), as evaluation uses them.

    Arguments and result as in `draw_subsets`.

    Raises:
      ValueError: s < 1, k < 1 or k * s > n.
    """
    if s < 1 or k < 1 or k * s > n:
        raise ValueError(
            f"{k} disjoint subsets of {s} traces out of {n}: both must be >= 1 and their product at most {n}. "
            "Lower eval.subsets or raise search.traces."
        )
    order = np.argsort(_bits(_DISJOINT, seed, purpose, step, cursor, round_).random_raw(n))
    return np.sort(order[: k * s].reshape(k, s), axis=-1).astype(np.int32)


def independent_subsets(
    seed: int, purpose: int, step: int, cursor: int, round_: int, n: int, s: int, k: int
) -> np.ndarray:
    """K S-subsets of range(N), each drawn by itself, so that some may be equal: one for each member
    of a population.

    Recursive self-aggregation (arXiv 2509.26626) draws like this. Arguments and result as in
    `draw_subsets`.

    Raises:
      ValueError: s is not in 1..n, or k < 1.
    """
    if not 1 <= s <= n or k < 1:
        raise ValueError(
            f"{k} subsets of {s} traces out of {n}: needs >= 1 subset and between 1 and {n} traces."
        )
    words_KxN = (
        _bits(_INDEPENDENT, seed, purpose, step, cursor, round_).random_raw(k * n).reshape(k, n)
    )
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


@functools.lru_cache(maxsize=1024)
def bias_factor(estimator: str, n: int, s: int, k: int) -> float:
    """c in E[sum_i A_i grad log pi(y_i)] = c * grad E[f], for K distinct S-subsets of N traces
    drawn uniformly.

    With T = C(N, S) subsets, T1 = C(N-1, S-1) of them with a given trace,
    q = 1 - C(T-T1, K) / C(T, K) (that trace is in some drawn subset), p = C(T1, K) / C(T, K) (in
    all of them):

        marginal_mean   c = (N/S) q - 1        arXiv 2606.23595, Proposition 3.1, for unordered subsets
        with_without    c = (N/S) (q - p)      subsets without a trace do not depend on it: a legal baseline

    0.886 and 1.772 at N=8, S=4, K=4. Exact in integers, rounded once.

    Raises:
      ValueError: k < 2 (c = 0: no signal), k > C(n, s), s not in 1..n, or another estimator.
    """
    _require_sizes(n, s, k)
    if k < 2:
        raise ValueError(
            f"{k} subset: must be >= 2, since one subset alone has advantage zero. Drop the problem."
        )
    total, containing = math.comb(n, s), math.comb(n - 1, s - 1)
    draws = math.comb(total, k)
    in_some = 1 - Fraction(math.comb(total - containing, k), draws)
    in_all = Fraction(math.comb(containing, k), draws)
    if estimator == "marginal_mean":
        return float(Fraction(n, s) * in_some - 1)
    if estimator == "with_without":
        return float(Fraction(n, s) * (in_some - in_all))
    raise ValueError(
        f"estimator {estimator!r} has no bias factor: must be marginal_mean or with_without"
    )


def _require_sizes(n: int, s: int, k: int) -> None:
    if not 1 <= s <= n:
        raise ValueError(
            f"subset size {s}: must be between 1 and the {n} traces. Set aggregation.subset_size."
        )
    if not 1 <= k <= math.comb(n, s):
        raise ValueError(
            f"{k} subsets: must be between 1 and C({n}, {s}) = {math.comb(n, s)}, as subsets are distinct. "
            "Set aggregation.subsets."
        )
