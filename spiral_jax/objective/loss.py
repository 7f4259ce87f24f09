"""The policy loss of one micro-batch, with what a researcher wants to see of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from spiral_jax.metrics import Max, Mean


def importance_sampling_loss(
    logprob_UxCxG: jax.Array,
    entropy_UxCxG: jax.Array,
    sampled_logprob_UxCxG: jax.Array,
    weight_UxC: jax.Array,
    mask_UxCxG: jax.Array,
) -> tuple[jax.Array, dict[str, Mean | Max]]:
    """-sum_i weight_i sum_t ratio_t with ratio = pi(token) / pi_sampled(token), summed over tokens, not clipped.

    On-policy its gradient is -sum_i weight_i grad log pi(trace_i) (arXiv 2606.23595 section 3; the form of the loss
    that the paper names is unpublished).

    Returns:
      float32 scalar loss, and metrics: entropy (nat a token), and how far sampler and trainer are apart: k3 estimate of
      KL(sampled || trained) a token, largest |log ratio|, and the ratio's first two moments, of which the effective
      share of samples is mean(ratio)^2 / mean(ratio^2).
    """
    log_ratio = jnp.where(mask_UxCxG, logprob_UxCxG - sampled_logprob_UxCxG, 0.0)
    ratio = jnp.exp(log_ratio)
    loss = -jnp.sum(jnp.where(mask_UxCxG, weight_UxC[..., None] * ratio, 0.0))
    ratio, log_ratio = jax.lax.stop_gradient((ratio, log_ratio))
    tokens = jnp.sum(mask_UxCxG).astype(jnp.float32)
    of_tokens = lambda value: jnp.sum(jnp.where(mask_UxCxG, value, 0.0))  # noqa: E731
    metrics = {
        "entropy": Mean(of_tokens(entropy_UxCxG), tokens),
        "mismatch/kl": Mean(of_tokens(ratio - 1.0 - log_ratio), tokens),
        "mismatch/ratio": Mean(of_tokens(ratio), tokens),
        "mismatch/ratio_squared": Mean(of_tokens(ratio**2), tokens),
        "mismatch/max_abs_log_ratio": Max(jnp.max(jnp.abs(log_ratio))),
    }
    return loss, metrics
