"""The policy loss of one micro-batch, with what a researcher wants to see of it.

With r = pi(token) / pi_sampled(token), w a trace's weight (its advantage, normalised) and sg = no
gradient, a token's term of the objective is

    importance sampling    w r                                    the default
    truncated (TIS)        w sg(min(r, tis_cap)) pi / sg(pi)      fengyao.notion.site/off-policy-rl

A batch makes one update, so pi is the policy that sampled it, and r differs from 1 only by what
sampler and trainer compute differently. TIS bounds the weight that such a token can get. Clipping
as in PPO has nothing else to act on here.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from spiral_jax.core.metrics import Max, Mean


def policy_loss(
    logprob_UxCxG: jax.Array,
    entropy_UxCxG: jax.Array,
    sampled_logprob_UxCxG: jax.Array,
    weight_UxC: jax.Array,
    mask_UxCxG: jax.Array,
    tis_cap: float = 0.0,
) -> tuple[jax.Array, dict[str, Mean | Max]]:
    """Minus the sum of the objective's terms over tokens.

    On-policy its gradient is -sum_i weight_i grad log pi(trace_i) (arXiv 2606.23595 section 3; the
    form of the loss that the paper names is unpublished).

    Args:
      tis_cap: the largest ratio of a token that counts; 0 = any.

    Returns:
      float32 scalar loss, and metrics: entropy (nat a token), and how far sampler and trainer are
      apart: k3 estimate of KL(sampled || trained) a token, largest |log ratio|, and the ratio's
      first two moments, of which the effective share of samples is mean(ratio)^2 / mean(ratio^2).
      With `tis_cap` also the share of tokens whose ratio is above it.
    """
    log_ratio = jnp.where(mask_UxCxG, logprob_UxCxG - sampled_logprob_UxCxG, 0.0)
    ratio = jnp.exp(log_ratio)
    if tis_cap:
        # 1, with the gradient of log pi
        own = jnp.exp(log_ratio - jax.lax.stop_gradient(log_ratio))
        bounded_ratio = jax.lax.stop_gradient(jnp.minimum(ratio, tis_cap))
        term = weight_UxC[..., None] * bounded_ratio * own
    else:
        term = weight_UxC[..., None] * ratio
    loss = -jnp.sum(jnp.where(mask_UxCxG, term, 0.0))

    ratio, log_ratio = jax.lax.stop_gradient((ratio, log_ratio))
    tokens = jnp.sum(mask_UxCxG).astype(jnp.float32)

    def token_mean(value_UxCxG: jax.Array) -> Mean:
        return Mean(jnp.sum(jnp.where(mask_UxCxG, value_UxCxG, 0.0)), tokens)

    metrics = {
        "entropy": token_mean(entropy_UxCxG),
        "mismatch/kl": token_mean(ratio - 1.0 - log_ratio),
        "mismatch/ratio": token_mean(ratio),
        "mismatch/ratio_squared": token_mean(ratio**2),
        "mismatch/max_abs_log_ratio": Max(jnp.max(jnp.abs(log_ratio))),
    }
    if tis_cap:
        metrics["loss/bounded_share"] = token_mean((ratio > tis_cap).astype(jnp.float32))
    return loss, metrics


def reference_kl(
    logprob_UxCxG: jax.Array, reference_UxCxG: jax.Array, mask_UxCxG: jax.Array
) -> Mean:
    """The k3 estimate of KL(pi || reference) of sampled tokens.

    With u = log reference - log pi it is exp(u) - 1 - u: never negative, and unbiased on-policy as
    a number (joschu.net/blog/kl-approx.html; GRPO's, arXiv 2402.03300). As a loss its on-policy
    gradient is that of KL(reference || pi) instead.
    """
    u = jnp.where(mask_UxCxG, reference_UxCxG - logprob_UxCxG, 0.0)
    return Mean(jnp.sum(jnp.exp(u) - 1.0 - u), jnp.sum(mask_UxCxG).astype(jnp.float32))
