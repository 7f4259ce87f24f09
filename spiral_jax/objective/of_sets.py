"""Scores of sets -> advantages of the traces in them, and of the aggregations. Host-side numpy.

    f_k = mean_m r_km                    the success of set k's aggregations (arXiv 2606.23595)
    A_search(i), marginal_mean           mean of f_k - mean(f) over the drawn sets with trace i;
                                         0 if there are none
    A_search(i), with_without            mean f of the drawn sets with i - mean f of those without;
                                         0 if one side is empty
    A_agg(k, m)                          r_km - f_k

Both search advantages have c in E[sum_i A_i grad log pi(y_i)] = c grad E[f] where K distinct sets
are drawn uniformly; q and p are the chances that a trace is in some, and in all of them:

    marginal_mean    c = (N/S) q - 1     arXiv 2606.23595, Proposition 3.1, for unordered sets
    with_without     c = (N/S) (q - p)   sets without a trace do not depend on it: a legal baseline

0.886 and 1.772 at N = 8, S = 4, K = 4.

A NaN reward is our own failure: such samples are in no mean and have advantage 0, and a set without
a valid sample is in no mean either.
"""

from __future__ import annotations

import functools
import itertools
from fractions import Fraction

import numpy as np

from spiral_jax.objective.subsets import chances

# Means in float64 leave about 1e-16 of the largest term where the exact result is 0; float32
# rewards that differ at all, by 6e-8 or more of it, leave far more than 1e-12. What is below this
# share of the largest term is set to 0.
_ROUNDING = 1e-12


def set_score(reward_BxKxM: np.ndarray) -> np.ndarray:
    """f_k: mean reward of a set's valid samples. [B, K, M] -> float64 [B, K]; NaN without any.

    Float64, as this is an intermediate: equal fractions (1/3, 2/6) give equal floats.
    """
    return mean(reward_BxKxM, ~np.isnan(reward_BxKxM))


def marginal_mean(f_BxK: np.ndarray, incidence_BxKxN: np.ndarray) -> np.ndarray:
    """The paper's search advantage (Eq. 6-7): float [B, K], bool [B, K, N] -> float32 [B, N].

    Mean of f_k - mean(f) over the valid sets that contain the trace; 0 if there are none.
    """
    valid_BxK = ~np.isnan(f_BxK)
    score_BxK = f_BxK - mean(f_BxK, valid_BxK)[:, None]
    advantage_BxN = _mean_over_sets(score_BxK, incidence_BxKxN & valid_BxK[..., None])
    return clean(advantage_BxN, f_BxK)


def with_without(f_BxK: np.ndarray, incidence_BxKxN: np.ndarray) -> np.ndarray:
    """Mean f of the valid sets with the trace minus mean f of those without; 0 if either is empty.

    Shapes as in `marginal_mean`. RLOO at S = 1. Sets without a trace are independent of it, hence a
    legal baseline.
    """
    valid_BxKx1 = ~np.isnan(f_BxK)[..., None]
    with_BxN = _mean_over_sets(f_BxK, incidence_BxKxN & valid_BxKx1)
    without_BxN = _mean_over_sets(f_BxK, ~incidence_BxKxN & valid_BxKx1)
    return clean(with_BxN - without_BxN, f_BxK)


def marginal_mean_factor(n: int, s: int, k: int) -> float:
    """c of `marginal_mean`. Raises `ValueError`, see `subsets.chances`."""
    return float(Fraction(n, s) * chances(n, s, k).in_some - 1)


def with_without_factor(n: int, s: int, k: int) -> float:
    """c of `with_without`. Raises `ValueError`, see `subsets.chances`."""
    q, p = chances(n, s, k)
    return float(Fraction(n, s) * (q - p))


def sets_differ(f_BxK: np.ndarray, incidence_BxKxN: np.ndarray) -> np.ndarray:
    """Whether `marginal_mean` (or `with_without`: the same) is non-zero at some trace -> bool [B].

    Decided without a division, so exact for integer scores, and for others whose sums float64 holds
    exactly: with V valid sets, n_i of them with trace i, it is non-zero there just when V * sum of
    f over i's sets != n_i * sum of f over all. Unequal sets alone do not suffice: they can cancel
    at every trace ({0,1} and {2,3} right, {0,2} and {1,3} not).
    """
    valid_BxK = ~np.isnan(f_BxK)
    f_BxK = np.where(valid_BxK, f_BxK, 0.0)
    member_BxKxN = incidence_BxKxN & valid_BxK[..., None]
    with_BxN = valid_BxK.sum(axis=-1, keepdims=True) * np.einsum(
        "bk,bkn->bn", f_BxK, member_BxKxN.astype(np.float64)
    )
    all_BxN = member_BxKxN.sum(axis=1) * f_BxK.sum(axis=-1, keepdims=True)
    return (with_BxN != all_BxN).any(axis=-1)


def aggregation_advantage(reward_BxKxM: np.ndarray) -> np.ndarray:
    """r_km - f_k: [B, K, M] -> float32 [B, K, M]; 0 at NaN.

    The paper's baseline is the set's own mean, without std and without leaving one out.
    """
    return clean(reward_BxKxM - set_score(reward_BxKxM)[..., None], reward_BxKxM)


@functools.lru_cache(maxsize=16)
def every_subset(n: int, s: int) -> np.ndarray:
    """All S-subsets of range(N): int32 [C(N, S), S]; do not write into it."""
    return np.array(list(itertools.combinations(range(n), s)), np.int32)


def polychromic_score(
    own_BxN: np.ndarray, strategy_BxN: np.ndarray, member_TxS: np.ndarray
) -> np.ndarray:
    """S^2 f_poly of T sets: right traces times different strategies; whole numbers [B, T].

    0 where all traces are of one strategy. f_poly = (mean own reward) * (strategies / S) is that of
    Polychromic Objectives (arXiv 2509.25424) in the form of Poly-EPO (arXiv 2604.17654), which lets
    a language model name the strategies.

    Args:
      own_BxN: own correctness, 0 or 1; NaN = our own failure: sets with such a trace are NaN.
      strategy_BxN: int, equal numbers are the same strategy, -1 = none, which is not counted.
    """
    right_BxT = own_BxN[:, member_TxS].sum(axis=-1)
    ordered_BxTxS = np.sort(strategy_BxN[:, member_TxS], axis=-1)
    steps_BxT = (np.diff(ordered_BxTxS, axis=-1) > 0).sum(axis=-1)
    strategies_BxT = steps_BxT + (ordered_BxTxS[..., 0] >= 0)
    return right_BxT * np.where(strategies_BxT > 1, strategies_BxT, 0)


def mean(value: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Mean over the last axis where `valid`; NaN where nothing is."""
    count = valid.sum(axis=-1)
    total = np.where(valid, value, 0).sum(axis=-1, dtype=np.float64)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def clean(advantage: np.ndarray, terms: np.ndarray) -> np.ndarray:
    """float32, with 0 for NaN and for what is only rounding beside the problem's largest |term|.

    Both arguments have the same rank, B first.
    """
    axes = tuple(range(1, terms.ndim))
    largest = np.where(np.isnan(terms), 0, np.abs(terms)).max(axis=axes, keepdims=True, initial=0)
    return np.where(np.abs(advantage) > _ROUNDING * largest, advantage, 0.0).astype(np.float32)


def _mean_over_sets(value_BxK: np.ndarray, member_BxKxN: np.ndarray) -> np.ndarray:
    """[B, N]: mean of the sets' values over each trace's sets; NaN for a trace in none."""
    return mean(value_BxK[:, None, :], member_BxKxN.transpose(0, 2, 1))
