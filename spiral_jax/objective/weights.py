"""Advantages of the kept problems -> loss weights: all that normalises (numpy, float64 inside).

The loss is -sum_i weight_i * sum_t ratio_t. The paper does not publish its normalisers: "unbiased"
makes each term an unbiased gradient of what it climbs (for the estimators over drawn sets, of the
same J) before gate, dynamic sampling and dropped samples; "sum" is the plain sum over traces.
"""

from __future__ import annotations

import numpy as np

from spiral_jax.core.groups import Role
from spiral_jax.objective.rewards import Rewards
from spiral_jax.objective.settings import ObjectiveSettings


def candidate_weights(
    settings: ObjectiveSettings,
    advantage_BxN: np.ndarray,
    rewards: Rewards,
    length_BxN: np.ndarray,
    role: Role = Role.SEARCH,
) -> np.ndarray:
    """Loss weights of the traces that are read, of the B kept problems -> float32 [B, N].

    "unbiased": w / (B c_b) * A, with the estimator's factor c_b of the problem. "sum": w * A.
    Without a factor (GRPO) both are the mean over tokens, w * A / (tokens of all traces with a
    valid reward): there is one term only, so there is nothing to balance.

    Args:
      advantage_BxN: after the length gate.
      length_BxN: tokens of these traces.
      role: of these traces. w is w_s of search; of answers that are read it is w_a, as of their own
        success, so that both together are the gradient of one mean.

    Raises:
      ValueError: a problem is starved, and should not have been kept.
    """
    factor = settings.row.factor
    weight = settings.search_weight if role is Role.SEARCH else settings.aggregation_weight
    if factor is None:
        tokens = np.where(np.isnan(rewards.own_BxN), 0, length_BxN).sum(dtype=np.int64)
        scale = weight / max(int(tokens), 1)
    elif settings.normalizer == "unbiased":
        factor_B = factor(rewards)
        if not (factor_B > 0).all():
            raise ValueError(
                f"{settings.estimator}: a problem without enough valid rewards was kept "
                f"(c = {factor_B.min():g})"
            )
        scale = weight / (len(advantage_BxN) * factor_B[:, None])
    else:
        scale = weight
    return (scale * advantage_BxN.astype(np.float64)).astype(np.float32)


def aggregation_weights(
    settings: ObjectiveSettings, advantage_BxKxM: np.ndarray, reward_BxKxM: np.ndarray
) -> np.ndarray:
    """Loss weights of the aggregation traces of the B kept problems -> float32 [B, K, M].

    "unbiased": w_a / (B K_b (M_bk - 1)) * A, with M_bk the set's valid samples and K_b the
    problem's sets that have at least 2 of them: one alone has no baseline, and counting its set
    would shrink the gradient. "sum": w_a * A.
    """
    weight = settings.aggregation_weight
    if settings.normalizer == "sum":
        return (weight * advantage_BxKxM.astype(np.float64)).astype(np.float32)
    samples_BxKx1 = (~np.isnan(reward_BxKxM)).sum(axis=-1, keepdims=True)
    sets_Bx1x1 = (samples_BxKx1 >= 2).sum(axis=1, keepdims=True)
    # Both are at least 1 where the advantage is not 0.
    others_BxKx1, sets_Bx1x1 = np.maximum(samples_BxKx1 - 1, 1), np.maximum(sets_Bx1x1, 1)
    count = len(advantage_BxKxM) * sets_Bx1x1 * others_BxKx1
    return (weight / count * advantage_BxKxM).astype(np.float32)
