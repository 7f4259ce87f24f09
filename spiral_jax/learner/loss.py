"""The policy loss of one micro-batch, with what a researcher wants to see of it.

With r = pi(token) / pi_sampled(token), w a trace's weight (its advantage, normalised) and sg = no
gradient, a token's term of the objective is

    importance sampling    w r                                                 the default
    clip                   min(w r, w clip(r, 1 - clip_low, 1 + clip_high))    PPO, arXiv 1707.06347; each
                                                                               side its own: DAPO,
                                                                               2503.14476
    dual clip              at w < 0 not below w dual_clip                      arXiv 1912.09729
    truncated (TIS)        w sg(min(r, tis_cap)) pi / sg(pi)                   fengyao.notion.site/off-policy-rl

A batch makes one update, so pi is the policy that sampled it and r differs from 1 by what sampler
and trainer compute
differently: there TIS is importance sampling with bounded weights, and clipping, which would act on
r too, excludes it.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from spiral_jax.core.metrics import Max, Mean


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is done to the ratio r; 0 = nothing. Names as in `config.loss`."""

    clip_low: float = 0.0
    clip_high: float = 0.0
    dual_clip: float = 0.0
    tis_cap: float = 0.0


def policy_loss(
    logprob_UxCxG: jax.Array,
    entropy_UxCxG: jax.Array,
    sampled_logprob_UxCxG: jax.Array,
    weight_UxC: jax.Array,
    mask_UxCxG: jax.Array,
    objective: Objective = Objective(),  # noqa: B008  frozen
) -> tuple[jax.Array, dict[str, Mean | Max]]:
    """Minus the sum of the objective's terms over tokens.

    On-policy its gradient is -sum_i weight_i grad log pi(trace_i) (arXiv 2606.23595 section 3; the
    form of the loss that the paper names is unpublished).

    Returns:
      float32 scalar loss, and metrics: entropy (nat a token), and how far sampler and trainer are
      apart: k3 estimate of KL(sampled || trained) a token, largest |log ratio|, and the ratio's
      first two moments, of which the effective share of samples is mean(ratio)^2 / mean(ratio^2).
      With an objective that bounds the ratio also the share of tokens where it does.
    """
    log_ratio = jnp.where(mask_UxCxG, logprob_UxCxG - sampled_logprob_UxCxG, 0.0)
    ratio = jnp.exp(log_ratio)
    term, bounded = _terms(objective, ratio, log_ratio, weight_UxC[..., None])
    loss = -jnp.sum(jnp.where(mask_UxCxG, term, 0.0))
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
    if objective != Objective():
        metrics["loss/bounded_share"] = Mean(of_tokens(bounded.astype(jnp.float32)), tokens)
    return loss, metrics


def _terms(
    o: Objective, ratio: jax.Array, log_ratio: jax.Array, weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(term of each token, whether its ratio was bounded)."""
    if o.tis_cap:
        own = jnp.exp(
            log_ratio - jax.lax.stop_gradient(log_ratio)
        )  # 1, with the gradient of log pi
        return weight * jax.lax.stop_gradient(
            jnp.minimum(ratio, o.tis_cap)
        ) * own, ratio > o.tis_cap
    plain = weight * ratio
    term = plain
    if o.clip_low or o.clip_high:
        most = 1.0 + o.clip_high if o.clip_high else jnp.inf
        term = jnp.minimum(
            plain, weight * jnp.clip(ratio, 1.0 - o.clip_low if o.clip_low else 0.0, most)
        )
    if o.dual_clip:
        term = jnp.where(weight < 0, jnp.maximum(term, weight * o.dual_clip), term)
    return term, term != plain


def reference_kl(
    logprob_UxCxG: jax.Array, reference_UxCxG: jax.Array, mask_UxCxG: jax.Array
) -> Mean:
    """The k3 estimate of KL(pi || reference) of sampled tokens, with u = log reference - log pi:
    exp(u) - 1 - u.

    Never negative, and unbiased on-policy as a number (joschu.net/blog/kl-approx.html; GRPO's,
    arXiv 2402.03300). As a loss its on-policy gradient is that of KL(reference || pi) instead.
    """
    u = jnp.where(mask_UxCxG, reference_UxCxG - logprob_UxCxG, 0.0)
    return Mean(jnp.sum(jnp.exp(u) - 1.0 - u), jnp.sum(mask_UxCxG).astype(jnp.float32))
