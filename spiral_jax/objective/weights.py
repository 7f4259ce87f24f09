"""Advantages of the kept problems -> loss weights: all that normalises. Host-side numpy, float64
inside, float32 out.

The loss is -sum_i weight_i * sum_t ratio_t. The paper does not publish its normalisers: "unbiased"
makes each term an unbiased gradient of what it climbs (for the estimators over drawn sets, of the
same J) before gate, dynamic sampling and dropped samples; "sum" is the plain sum over traces.
"""

from __future__ import annotations

import numpy as np

from spiral_jax.objective.estimators import RULES, Rewards


def search_weights(
    estimator: str,
    normalizer: str,
    advantage_BxN: np.ndarray,
    rewards: Rewards,
    length_BxN: np.ndarray,
    search_weight: float,
) -> np.ndarray:
    """Loss weights of the search traces of the B kept problems -> float32 [B, N].

    "unbiased": w_s / (B c_b) * A, with the problem's own `SearchRule.factor` c_b. "sum": w_s * A.
    Without a factor (grpo, grpo_nostd) both are the mean over tokens, w_s * A / (tokens of all
    traces with a valid reward): there is one term only, so there is nothing to balance.

    Args:
      advantage_BxN: after the length gate.
      length_BxN: tokens of the search traces.

    Raises:
      ValueError: a problem is starved (it should not have been kept), or another normalizer.
    """
    factor = RULES[estimator].factor
    unbiased = _is_unbiased(normalizer)
    if factor is None:
        tokens = np.where(np.isnan(rewards.own_BxN), 0, length_BxN).sum(dtype=np.int64)
        scale = search_weight / max(int(tokens), 1)
    elif unbiased:
        factor_B = factor(rewards)
        if not (factor_B > 0).all():
            raise ValueError(
                f"{estimator}: a problem without enough valid rewards was kept (c = {factor_B.min():g})"
            )
        scale = search_weight / (len(advantage_BxN) * factor_B[:, None])
    else:
        scale = search_weight
    return (scale * advantage_BxN.astype(np.float64)).astype(np.float32)


def aggregation_weights(
    normalizer: str,
    advantage_BxKxM: np.ndarray,
    reward_BxKxM: np.ndarray,
    aggregation_weight: float,
) -> np.ndarray:
    """Loss weights of the aggregation traces of the B kept problems -> float32 [B, K, M].

    "unbiased": w_a / (B K_b (M_bk - 1)) * A, with M_bk the set's valid samples and K_b the
    problem's sets that have
    at least 2 of them: one alone has no baseline, and counting its set would shrink the gradient.
    "sum": w_a * A.

    Raises:
      ValueError: another normalizer.
    """
    if not _is_unbiased(normalizer):
        return (aggregation_weight * advantage_BxKxM.astype(np.float64)).astype(np.float32)
    samples_BxKx1 = (~np.isnan(reward_BxKxM)).sum(axis=-1, keepdims=True)
    sets_Bx1x1 = (samples_BxKx1 >= 2).sum(axis=1, keepdims=True)
    count = (
        len(advantage_BxKxM) * np.maximum(sets_Bx1x1, 1) * np.maximum(samples_BxKx1 - 1, 1)
    )  # where A = 0 anyway
    return (aggregation_weight / count * advantage_BxKxM).astype(np.float32)


def _is_unbiased(normalizer: str) -> bool:
    if normalizer not in ("unbiased", "sum"):
        raise ValueError(f"loss.normalizer = {normalizer!r}: must be unbiased or sum")
    return normalizer == "unbiased"
