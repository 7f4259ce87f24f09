"""Logits and one uniform number a row -> a token, and its log-prob under the distribution really
drawn from.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

_BLOCK = 512  # vocabulary entries whose sum is one step of the coarse cumulative sum


@dataclasses.dataclass(frozen=True)
class Draw:
    """How tokens are drawn; the cuts are applied after the temperature, in this order.

    Attributes:
      temperature: >= 0; 0 = greedy, the most likely token, whose log-prob is then 0.
      top_k: only the k most likely tokens, ties with the last of them too; 0 = all.
      top_p: only the most likely tokens that together hold this mass; 1 = all.
      min_p: only tokens at least this fraction as likely as the most likely one; 0 = all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def cuts(self) -> bool:
        """Whether some token is ruled out, so that log-probs are not those of the plain softmax."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def draw_token(draw: Draw, logits: jax.Array, uniform: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int32 token and float32 log-prob, both [...], from logits [..., V] float32 and uniform [...]
    in [0, 1).
    """
    with jax.named_scope("draw"):
        if draw.temperature == 0:
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            return token, jnp.zeros(token.shape, jnp.float32)
        logits = logits / draw.temperature
        return inverse_cdf(_cut(draw, logits) if draw.cuts else logits, uniform)


def _cut(draw: Draw, x: jax.Array) -> jax.Array:
    """Logits with what `draw` rules out at -inf; the most likely token always stays."""
    least = jnp.full(x.shape[:-1], -jnp.inf)
    if draw.top_k:
        least = jax.lax.top_k(x, min(draw.top_k, x.shape[-1]))[0][..., -1]
    if draw.top_p < 1:
        x = jnp.where(x >= least[..., None], x, -jnp.inf)
        ranked = jnp.sort(x, axis=-1, descending=True)
        mass = jax.nn.softmax(ranked, axis=-1)
        needed = (
            jnp.cumsum(mass, axis=-1) - mass < draw.top_p
        )  # what is more likely does not hold top_p yet
        needed = needed.at[..., 0].set(True)
        least = jnp.maximum(least, jnp.min(jnp.where(needed, ranked, jnp.inf), axis=-1))
    if draw.min_p > 0:
        least = jnp.maximum(least, jnp.max(x, axis=-1) + jnp.log(draw.min_p))
    return jnp.where(x >= least[..., None], x, -jnp.inf)


def inverse_cdf(logits: jax.Array, uniform: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The token at which the cumulative distribution passes `uniform`, and its log-prob.

    Two cumulative sums, over block sums and inside one block, instead of one over V: V = 151,936
    costs little more than reading the logits. A token of probability zero is never returned.

    Args:
      logits: [..., V] float32.
      uniform: [...] in [0, 1).

    Returns:
      int32 token and float32 log-prob, both [...], of softmax(logits).
    """
    V = logits.shape[-1]
    block = min(_BLOCK, V)
    top = jnp.max(logits, axis=-1, keepdims=True)
    mass = jnp.pad(jnp.exp(logits - top), [(0, 0)] * (logits.ndim - 1) + [(0, -V % block)])
    mass = mass.reshape(*logits.shape[:-1], -1, block)
    coarse = jnp.cumsum(mass.sum(-1), axis=-1)
    target = (uniform * coarse[..., -1])[..., None]
    at_block = _first_above(coarse, mass.sum(-1), target)
    before = jnp.where(
        at_block > 0, jnp.take_along_axis(coarse, jnp.maximum(at_block - 1, 0), axis=-1), 0.0
    )
    inside = jnp.take_along_axis(mass, at_block[..., None], axis=-2)[..., 0, :]
    token = (at_block * block + _first_above(before + jnp.cumsum(inside, axis=-1), inside, target))[
        ..., 0
    ]
    logprob = jnp.take_along_axis(logits - top, token[..., None], axis=-1)[..., 0] - jnp.log(
        coarse[..., -1]
    )
    return token.astype(jnp.int32), logprob


def _first_above(cumulative: jax.Array, mass: jax.Array, target: jax.Array) -> jax.Array:
    """Index [..., 1] of the first entry with mass above target; rounding may leave none, then of
    the last with mass.

    A parallel cumulative sum adds in another order at each entry, so it may step, even up, where
    the mass is zero.
    """
    has_mass = mass > 0
    above = has_mass & (cumulative > target)
    last_with_mass = mass.shape[-1] - 1 - jnp.argmax(has_mass[..., ::-1], axis=-1, keepdims=True)
    return jnp.where(
        above.any(-1, keepdims=True), jnp.argmax(above, axis=-1, keepdims=True), last_with_mass
    )
