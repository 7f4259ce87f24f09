"""Rewards of whole batches -> advantages, kept problems, loss weights. Host-side numpy, float64 inside, float32 out.

Set RL for the search traces, standard RL for the aggregation traces (arXiv 2606.23595, Eq. 6-8):

    f_k = mean_m r_km
    A_search(i)  marginal_mean: mean of f_k - mean(f) over the drawn sets that contain trace i; 0 if there are none
                 with_without:  mean f of the drawn sets with i - mean f of those without; 0 if one side is empty
    A_agg(k, m)  r_km - f_k

The loss is -sum_i weight_i * sum_t ratio_t, so everything that normalises is in the weights. NaN rewards are our own
failures: such samples are in no mean and have advantage 0, and a set without a valid sample is in no mean either.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from spiral_jax.groups import Stop
from spiral_jax.objective.subsets import bias_factor

# Means in float64 leave about 1e-16 of the largest term where the exact result is 0; float32 rewards that differ at
# all, by 6e-8 or more of it, leave far more than 1e-12. What is below this share of the largest term is set to 0.
_ROUNDING = 1e-12
_STD_EPS = 1e-6


def set_score(reward_BxKxM: np.ndarray) -> np.ndarray:
    """f_k: mean reward of a set's valid samples. [B, K, M] -> float64 [B, K], NaN for a set without valid samples.

    Float64, as this is an intermediate: equal fractions (1/3, 2/6) give equal floats.
    """
    return _mean(reward_BxKxM, ~np.isnan(reward_BxKxM))


def marginal_mean(f_BxK: np.ndarray, incidence_BxKxN: np.ndarray) -> np.ndarray:
    """The paper's search advantage (Eq. 6-7): float [B, K], bool [B, K, N] -> float32 [B, N].

    Mean of f_k - mean(f) over the valid sets that contain the trace; 0 if there are none.
    """
    valid_BxK = ~np.isnan(f_BxK)
    score_BxK = f_BxK - _mean(f_BxK, valid_BxK)[:, None]
    advantage_BxN = _mean_over_sets(score_BxK, incidence_BxKxN & valid_BxK[..., None])
    return _clean(advantage_BxN, f_BxK)


def with_without(f_BxK: np.ndarray, incidence_BxKxN: np.ndarray) -> np.ndarray:
    """Mean f of the valid sets with the trace minus mean f of those without; 0 if either is empty.

    Shapes as in `marginal_mean`. RLOO at S = 1. Sets without a trace are independent of it, hence a legal baseline.
    """
    valid_BxKx1 = ~np.isnan(f_BxK)[..., None]
    with_BxN = _mean_over_sets(f_BxK, incidence_BxKxN & valid_BxKx1)
    without_BxN = _mean_over_sets(f_BxK, ~incidence_BxKxN & valid_BxKx1)
    return _clean(with_BxN - without_BxN, f_BxK)


def aggregation_advantage(reward_BxKxM: np.ndarray) -> np.ndarray:
    """r_km - f_k (paper: the set's own mean, no std, no leave-one-out). [B, K, M] -> float32 [B, K, M]; 0 at NaN."""
    return _clean(reward_BxKxM - set_score(reward_BxKxM)[..., None], reward_BxKxM)


def grpo(reward_BxN: np.ndarray) -> np.ndarray:
    """(r - mean) / (std + 1e-6), std over the population (divided by the count). [B, N] -> float32 [B, N]; 0 at NaN."""
    valid_BxN = ~np.isnan(reward_BxN)
    centred_BxN = reward_BxN - _mean(reward_BxN, valid_BxN)[:, None]
    std_Bx1 = np.sqrt(_mean(centred_BxN**2, valid_BxN))[:, None]
    return _clean(centred_BxN / (std_Bx1 + _STD_EPS), reward_BxN / (std_Bx1 + _STD_EPS))


def length_gate(
    advantage: np.ndarray, length: np.ndarray, stop: np.ndarray, limit_tokens: int, gate: float
) -> np.ndarray:
    """Positive advantages of too long traces become 0, negative ones stay (paper Eq. 8, whose limit is unpublished).

    Args:
      advantage, length, stop: arrays of one shape; tokens, values of `Stop`.
      limit_tokens: the role's limit on a trace.
      gate: > 1: tokens; 0 < gate <= 1: share of the limit; 0: traces that the limit cut off. A trace is too long if
        strictly longer, so gate = 1 changes nothing.

    Returns:
      float32 of the same shape.

    Raises:
      ValueError: gate is negative or NaN.
    """
    if not gate >= 0:
        raise ValueError(f"loss.length_gate = {gate}: must be >= 0 (0: cut-off traces; <= 1: share; else tokens)")
    # A share is a quotient, since in floats 57 > 0.57 * 100.
    long = stop == Stop.LENGTH if gate == 0 else length / (1 if gate > 1 else limit_tokens) > gate
    return np.where((advantage > 0) & long, 0.0, advantage).astype(np.float32)


def is_starved(estimator: str, reward: np.ndarray) -> np.ndarray:
    """Problems that our own failures left without an advantage, whatever the rewards -> bool [B].

    marginal_mean, with_without (reward [B, K, M]): fewer than 2 valid sets. aggregator_only ([B, K, M]): no set with
    2 valid samples. grpo ([B, N]): fewer than 2 valid traces.
    """
    valid = ~np.isnan(reward)
    if estimator == "grpo":
        return valid.sum(axis=-1) < 2
    if estimator == "aggregator_only":
        return (valid.sum(axis=-1) < 2).all(axis=-1)
    return valid.any(axis=-1).sum(axis=-1) < 2


def is_informative(estimator: str, reward: np.ndarray, incidence_BxKxN: np.ndarray | None = None) -> np.ndarray:
    """The keep rule of dynamic sampling: not starved, and some advantage is non-zero before the gate -> bool [B].

    Arguments as in `compute`. Decided without a division, so exact for integer rewards, and for others whose
    sums float64 holds exactly. If rewards vary within a set, an aggregation advantage is non-zero. If they vary within
    none, f_k is each set's one reward, and both set estimators are non-zero at trace i just when
    V * sum of f over i's n_i sets != n_i * sum of f over all V sets. Unequal sets alone do not suffice: they can
    cancel at every trace ({0,1}, {2,3} right, {0,2}, {1,3} wrong).
    """
    valid = ~np.isnan(reward)
    high = np.where(valid, reward, -np.inf).max(axis=-1)
    low = np.where(valid, reward, np.inf).min(axis=-1)
    varies = high > low  # [B] or [B, K]; high < low without valid rewards
    if estimator == "grpo":
        return varies
    informative_B = varies.any(axis=-1)
    if estimator == "aggregator_only":
        return informative_B
    valid_BxK = valid.any(axis=-1)
    f_BxK = np.where(valid_BxK, high, 0).astype(np.float64)
    member_BxKxN = incidence_BxKxN & valid_BxK[..., None]
    sets_Bx1 = valid_BxK.sum(axis=-1, keepdims=True)
    with_BxN = sets_Bx1 * np.einsum("bk,bkn->bn", f_BxK, member_BxKxN.astype(np.float64))
    all_BxN = member_BxKxN.sum(axis=1) * f_BxK.sum(axis=-1, keepdims=True)
    return (informative_B | (with_BxN != all_BxN).any(axis=-1)) & ~is_starved(estimator, reward)


@dataclasses.dataclass(frozen=True)
class Advantages:
    """What an estimator makes of the rewards of B problems, before the length gate.

    Attributes:
      search_BxN: float32.
      aggregation_BxKxM: float32; None for grpo, which has no aggregation traces.
      keep_B: bool, `is_informative`.
      starved_B: bool, `is_starved`; never kept.
    """

    search_BxN: np.ndarray
    aggregation_BxKxM: np.ndarray | None
    keep_B: np.ndarray
    starved_B: np.ndarray


def compute(estimator: str, reward: np.ndarray, incidence_BxKxN: np.ndarray | None = None) -> Advantages:
    """Advantages of B problems under one of `config.ESTIMATORS`.

    Args:
      estimator: "marginal_mean", "with_without", "aggregator_only" (search advantages are zero) or "grpo".
      reward: float, NaN = our failure. grpo: [B, N], of the search traces; else [B, K, M], of the aggregation traces.
      incidence_BxKxN: bool, which traces are in which sets (`subsets.incidence`); all but grpo need it.

    Raises:
      ValueError: another estimator, or arrays whose shapes do not fit together.
    """
    reward = np.asarray(reward, np.float64)
    if estimator == "grpo":
        if reward.ndim != 2 or incidence_BxKxN is not None:
            raise ValueError(f"grpo takes reward [B, N] and no incidence, got reward {reward.shape}")
        search_BxN, aggregation_BxKxM = grpo(reward), None
    else:
        shape = None if incidence_BxKxN is None else incidence_BxKxN.shape
        if reward.ndim != 3 or shape is None or len(shape) != 3 or shape[:2] != reward.shape[:2]:
            raise ValueError(f"{estimator} takes reward [B, K, M], incidence [B, K, N], got {reward.shape}, {shape}")
        aggregation_BxKxM = aggregation_advantage(reward)
        if estimator == "marginal_mean":
            search_BxN = marginal_mean(set_score(reward), incidence_BxKxN)
        elif estimator == "with_without":
            search_BxN = with_without(set_score(reward), incidence_BxKxN)
        elif estimator == "aggregator_only":
            search_BxN = np.zeros((shape[0], shape[2]), np.float32)
        else:
            raise ValueError(f"estimator {estimator!r}: must be marginal_mean, with_without, aggregator_only or grpo")
    return Advantages(
        search_BxN=search_BxN,
        aggregation_BxKxM=aggregation_BxKxM,
        keep_B=is_informative(estimator, reward, incidence_BxKxN),
        starved_B=is_starved(estimator, reward),
    )


def search_weights(
    estimator: str,
    normalizer: str,
    advantage_BxN: np.ndarray,
    reward_BxKxM: np.ndarray,
    subset_size: int,
    search_weight: float,
) -> np.ndarray:
    """Loss weights of the search traces of the B kept problems -> float32 [B, N]. For grpo: `grpo_weights`.

    "unbiased": w_s / (B c_b) * A, with c_b = `bias_factor` at the problem's number of valid sets (failures are
    independent of rewards, so the valid sets are a uniform draw too). "sum": w_s * A.

    Raises:
      ValueError: a problem has fewer than 2 valid sets (it should not have been kept), or another normalizer.
    """
    if not _is_unbiased(normalizer) or estimator == "aggregator_only":  # whose advantages are zero
        return (search_weight * advantage_BxN.astype(np.float64)).astype(np.float32)
    problems, n = advantage_BxN.shape
    sets_B = (~np.isnan(reward_BxKxM)).any(axis=-1).sum(axis=-1)
    factor_B = np.array([bias_factor(estimator, n, subset_size, int(k)) for k in sets_B], np.float64)
    return (search_weight / (problems * factor_B[:, None]) * advantage_BxN).astype(np.float32)


def aggregation_weights(
    normalizer: str, advantage_BxKxM: np.ndarray, reward_BxKxM: np.ndarray, aggregation_weight: float
) -> np.ndarray:
    """Loss weights of the aggregation traces of the B kept problems -> float32 [B, K, M].

    "unbiased": w_a / (B K_b (M_bk - 1)) * A, with M_bk the set's valid samples and K_b the problem's sets that have
    at least 2 of them: one alone has no baseline, and counting its set would shrink the gradient. "sum": w_a * A.

    Raises:
      ValueError: another normalizer.
    """
    if not _is_unbiased(normalizer):
        return (aggregation_weight * advantage_BxKxM.astype(np.float64)).astype(np.float32)
    samples_BxKx1 = (~np.isnan(reward_BxKxM)).sum(axis=-1, keepdims=True)
    sets_Bx1x1 = (samples_BxKx1 >= 2).sum(axis=1, keepdims=True)
    count = len(advantage_BxKxM) * np.maximum(sets_Bx1x1, 1) * np.maximum(samples_BxKx1 - 1, 1)  # where A = 0 anyway
    return (aggregation_weight / count * advantage_BxKxM).astype(np.float32)


def grpo_weights(
    advantage_BxN: np.ndarray, reward_BxN: np.ndarray, length_BxN: np.ndarray, search_weight: float
) -> np.ndarray:
    """GRPO's token mean: w_s * A / (tokens of all traces of the kept batch with a valid reward) -> float32 [B, N].

    Both normalizers mean this for grpo: it has one term, so there is nothing to balance.
    """
    tokens = np.where(np.isnan(reward_BxN), 0, length_BxN).sum(dtype=np.int64)
    return (search_weight / max(int(tokens), 1) * advantage_BxN.astype(np.float64)).astype(np.float32)


def _is_unbiased(normalizer: str) -> bool:
    if normalizer not in ("unbiased", "sum"):
        raise ValueError(f"loss.normalizer = {normalizer!r}: must be unbiased or sum")
    return normalizer == "unbiased"


def _mean(value: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Mean over the last axis where `valid`; NaN where nothing is."""
    count = valid.sum(axis=-1)
    total = np.where(valid, value, 0).sum(axis=-1, dtype=np.float64)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _mean_over_sets(value_BxK: np.ndarray, member_BxKxN: np.ndarray) -> np.ndarray:
    """[B, N]: mean of the sets' values over each trace's sets; NaN for a trace in none."""
    return _mean(value_BxK[:, None, :], member_BxKxN.transpose(0, 2, 1))


def _clean(advantage: np.ndarray, terms: np.ndarray) -> np.ndarray:
    """float32, with 0 for NaN and for what is only rounding beside the problem's largest |term|. Same rank, B first."""
    axes = tuple(range(1, terms.ndim))
    largest = np.where(np.isnan(terms), 0, np.abs(terms)).max(axis=axes, keepdims=True, initial=0)
    return np.where(np.abs(advantage) > _ROUNDING * largest, advantage, 0.0).astype(np.float32)
