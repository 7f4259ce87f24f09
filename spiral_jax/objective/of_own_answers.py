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

    It is `marginal_mean` over all k-sets of their best reward, which is how rewards between 0 and 1
    are taken (max@k). 0 if n <= k: there is no other set. [B, N] -> float32 [B, N], 0 at NaN and
    just where it is 0 without rounding.
    """
    return _by_reward(own_BxN, k, _pass_at_k)


def max_at_k(own_BxN: np.ndarray, k: int) -> np.ndarray:
    """PKPO's s^(loo-1) (arXiv 2505.15201): sum over k-sets I of (max_I r - max_{I-i} r) / C(n, k).

    Of 0/1 rewards C(n-c, k-1) / C(n, k) for a right trace and 0 for a wrong one; sum_i s_i grad log
    pi(y_i) is an unbiased gradient of max@k. Arguments and result as in `pass_at_k`; 0 if n < k.
    """
    return _by_reward(own_BxN, k, _max_at_k)


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


def check_bits(own_BxN: np.ndarray) -> None:
    """Raises `ValueError` for a reward that is not 0, 1 or NaN."""
    if not np.isin(own_BxN[~np.isnan(own_BxN)], (0, 1)).all():
        raise ValueError(
            "own correctness must be 0, 1 or NaN: sets are scored by how many of their traces are "
            "right."
        )


def _by_reward(
    own_BxN: np.ndarray,
    k: int,
    advantage: Callable[[tuple[Fraction, ...], Fraction, int], Fraction],
) -> np.ndarray:
    """float32 [B, N] from `advantage(all valid rewards, the trace's, k)`; 0 at NaN."""
    advantage_BxN = np.zeros(own_BxN.shape, np.float32)
    for b, own_N in enumerate(own_BxN):
        valid = tuple(sorted(Fraction(reward) for reward in own_N[~np.isnan(own_N)].tolist()))
        for reward in set(valid):
            advantage_BxN[b, own_N == float(reward)] = float(advantage(valid, reward, k))
    return advantage_BxN


def _without(rewards: tuple[Fraction, ...], reward: Fraction) -> list[Fraction]:
    others = list(rewards)
    others.remove(reward)
    return others


@functools.lru_cache(maxsize=4096)
def _pass_at_k(rewards: tuple[Fraction, ...], reward: Fraction, k: int) -> Fraction:
    if len(rewards) <= k:
        return Fraction(0)
    with_it = mean_best(_without(rewards, reward), k - 1, at_least=reward)
    return with_it - mean_best(rewards, k)


@functools.lru_cache(maxsize=4096)
def _max_at_k(rewards: tuple[Fraction, ...], reward: Fraction, k: int) -> Fraction:
    n, others = len(rewards), _without(rewards, reward)
    if n < k:
        return Fraction(0)
    gain = mean_best(others, k - 1, at_least=reward) - mean_best(others, k - 1)
    return Fraction(k, n) * gain
