"""Own correctness of search traces -> their advantages: what the controls learn from (numpy).

Rewards r_i of the N traces of a problem; NaN = our own failure: left out, advantage 0. n valid
ones, c of them right.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from spiral_jax.objective.of_sets import clean, mean

_STD_EPS = 1e-6


def grpo(own_BxN: np.ndarray) -> np.ndarray:
    """(r - mean) / (std + 1e-6), std divided by the count. [B, N] -> float32 [B, N]; 0 at NaN."""
    valid_BxN = ~np.isnan(own_BxN)
    centred_BxN = own_BxN - mean(own_BxN, valid_BxN)[:, None]
    std_Bx1 = np.sqrt(mean(centred_BxN**2, valid_BxN))[:, None]
    return clean(centred_BxN / (std_Bx1 + _STD_EPS), own_BxN / (std_Bx1 + _STD_EPS))


def centred(own_BxN: np.ndarray) -> np.ndarray:
    """r - mean: GRPO without its std (Dr. GRPO, arXiv 2503.20783). [B, N] -> float32; 0 at NaN."""
    return clean(own_BxN - mean(own_BxN, ~np.isnan(own_BxN))[:, None], own_BxN)


def leave_one_out(own_BxN: np.ndarray) -> np.ndarray:
    """r_i - mean of the others: RLOO (arXiv 2402.14740). [B, N] -> float32 [B, N]; 0 at NaN.

    It equals n / (n - 1) (r_i - mean).
    """
    n_Bx1 = (~np.isnan(own_BxN)).sum(axis=-1, keepdims=True)
    centred_BxN = own_BxN - mean(own_BxN, ~np.isnan(own_BxN))[:, None]
    return clean(n_Bx1 / np.maximum(n_Bx1 - 1, 1) * centred_BxN, own_BxN)


def pass_at_k(own_BxN: np.ndarray, k: int) -> np.ndarray:
    """The pass@k advantage that ParaGator (arXiv 2603.18886) gives its search traces.

    It is that of arXiv 2508.10751 without std. With mu = 1 - C(n-c, k) / C(n, k), pass@k of the n
    traces:

        right: 1 - mu        wrong: 1 - mu - C(n-c-1, k-1) / C(n-1, k-1)

    It is `marginal_mean` over all k-sets of the score "one of them is right". 0 if n <= k: there is
    no other set.

    Args:
      own_BxN: 0, 1 or NaN.

    Returns:
      float32 [B, N].
    """
    return _by_count(own_BxN, k, _pass_at_k)


def max_at_k(own_BxN: np.ndarray, k: int) -> np.ndarray:
    """PKPO's s^(loo-1) (arXiv 2505.15201): sum over k-sets I of (max_I r - max_{I-i} r) / C(n, k).

    Of 0/1 rewards C(n-c, k-1) / C(n, k) for a right trace and 0 for a wrong one; sum_i s_i grad log
    pi(y_i) is an unbiased gradient of pass@k. Arguments and result as in `pass_at_k`; 0 if n < k.
    """
    return _by_count(own_BxN, k, _max_at_k)


def mean_best(rewards: Sequence[Fraction], size: int, at_least: Fraction = Fraction(0)) -> Fraction:
    """Mean over all sets of `size` of these rewards of the higher of `at_least` and the set's best.

    Exact, and without going through the sets: a share of C(m, size) / C(n, size) of them has no
    reward of v or more, where m of the n rewards are below v.

    Args:
      rewards: in [0, 1]; at least `size` of them.
    """
    sets, total = math.comb(len(rewards), size), at_least
    levels = [at_least, *sorted({reward for reward in rewards if reward > at_least})]
    for below, level in itertools.pairwise(levels):
        lower = sum(reward < level for reward in rewards)
        total += (level - below) * (1 - Fraction(math.comb(lower, size), sets))
    return total


def varies(own_BxN: np.ndarray) -> np.ndarray:
    """Whether two valid rewards differ, so that a mean is no trace's own reward -> bool [..]."""
    valid = ~np.isnan(own_BxN)
    highest = np.where(valid, own_BxN, -np.inf).max(axis=-1)
    lowest = np.where(valid, own_BxN, np.inf).min(axis=-1)
    return highest > lowest


def differs_at_k(own_BxN: np.ndarray, others: int) -> np.ndarray:
    """Whether a trace is right and `others` are wrong -> bool [B].

    `pass_at_k` is non-zero just then with others = k (some k-set must have no right trace),
    `max_at_k` with k - 1.
    """
    n_B, c_B = counts(own_BxN)
    return (c_B >= 1) & (n_B - c_B >= others)


def counts(own_BxN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(valid traces n, right ones c), int [B] each.

    Raises:
      ValueError: a reward that is not 0, 1 or NaN.
    """
    valid_BxN = ~np.isnan(own_BxN)
    if not np.isin(own_BxN[valid_BxN], (0, 1)).all():
        raise ValueError(
            "own correctness must be 0, 1 or NaN: sets are scored by whether a right trace is in "
            "them."
        )
    return valid_BxN.sum(axis=-1), (own_BxN == 1).sum(axis=-1)


class _ByReward(NamedTuple):
    """The advantages of a problem's traces: all right ones have the same, and all wrong ones."""

    right: float
    wrong: float


def _by_count(
    own_BxN: np.ndarray, k: int, advantages: Callable[[int, int, int], _ByReward]
) -> np.ndarray:
    """float32 [B, N] from `advantages(n, c, k)` of each problem; 0 at NaN."""
    n_B, c_B = counts(own_BxN)
    by_reward_B = [advantages(int(n), int(c), k) for n, c in zip(n_B, c_B, strict=True)]
    right_B = np.array([each.right for each in by_reward_B], np.float64)
    wrong_B = np.array([each.wrong for each in by_reward_B], np.float64)
    advantage_BxN = np.where(own_BxN == 1, right_B[:, None], wrong_B[:, None])
    return np.where(np.isnan(own_BxN), 0.0, advantage_BxN).astype(np.float32)


@functools.lru_cache(maxsize=4096)
def _pass_at_k(n: int, c: int, k: int) -> _ByReward:
    if n <= k or c in (0, n):
        return _ByReward(0.0, 0.0)
    missed = Fraction(math.comb(n - c, k), math.comb(n, k))
    missed_with_it = Fraction(math.comb(n - c - 1, k - 1), math.comb(n - 1, k - 1))
    return _ByReward(float(missed), float(missed - missed_with_it))


@functools.lru_cache(maxsize=4096)
def _max_at_k(n: int, c: int, k: int) -> _ByReward:
    if n < k:
        return _ByReward(0.0, 0.0)
    return _ByReward(math.comb(n - c, k - 1) / math.comb(n, k), 0.0)
