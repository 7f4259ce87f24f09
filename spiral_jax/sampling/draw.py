"""Logits and one uniform number a row -> a token, and its log-prob.

The log-prob is that of the distribution really drawn from: after temperature and cuts.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from spiral_jax.core.groups import Role

_BLOCK = 512  # vocabulary entries whose sum is one step of the coarse cumulative sum


@dataclasses.dataclass(frozen=True)
class Draw:
    """How tokens are drawn; the cuts are applied after the temperature, in this order.

    Attributes:
      temperature: >= 0; 0 = greedy, the most likely token, whose log-prob is then 0.
      top_k: only the k most likely tokens, ties with the last of them too; 0 = all.
      top_p: only the most likely tokens that together hold this mass; 1 = all.
      min_p: only tokens at least this fraction as likely as the most likely one; 0 = all.
      aggregation_temperature: of aggregation traces; None = `temperature`.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    aggregation_temperature: float | None = None

    @property
    def cuts(self) -> bool:
        """Whether some token is ruled out, so that log-probs are not those of the plain softmax."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Of search and of aggregation traces; one where both have the same."""
        other = self.aggregation_temperature
        same = other is None or other == self.temperature
        return (self.temperature,) if same else (self.temperature, other)


def draw_token(
    draw: Draw, logits: jax.Array, uniform: jax.Array, role: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """int32 token and float32 log-prob, both [...].

    Args:
      logits: [..., V] float32.
      uniform: [...] in [0, 1).
      role: [...] values of `Role`; needed where the two roles have their own temperatures.
    """
    with jax.named_scope("draw"):
        if len(draw.temperatures) == 1:
            return _draw_at(draw, draw.temperature, logits, uniform)
        if 0 not in draw.temperatures:
            search, aggregation = draw.temperatures
            of_row = jnp.where(role == Role.AGGREGATION, aggregation, search)
            return _draw_at(draw, of_row[..., None], logits, uniform)
        search, aggregation = (_draw_at(draw, t, logits, uniform) for t in draw.temperatures)
        is_search = role == Role.SEARCH
        return jax.tree.map(lambda a, b: jnp.where(is_search, a, b), search, aggregation)


def _draw_at(
    draw: Draw, temperature: float | jax.Array, logits: jax.Array, uniform: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The same at one temperature, or at positive ones that broadcast against `logits`."""
    if isinstance(temperature, int | float) and temperature == 0:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return token, jnp.zeros(token.shape, jnp.float32)
    logits = logits / temperature
    return inverse_cdf(_cut(draw, logits) if draw.cuts else logits, uniform)


def _cut(draw: Draw, x: jax.Array) -> jax.Array:
    """Logits with what `draw` rules out at -inf; the most likely token always stays."""
    least = jnp.full(x.shape[:-1], -jnp.inf)  # the smallest logit that stays
    if draw.top_k:
        highest, _ = jax.lax.top_k(x, min(draw.top_k, x.shape[-1]))
        least = highest[..., -1]

    if draw.top_p < 1:
        x = jnp.where(x >= least[..., None], x, -jnp.inf)
        ranked = jnp.sort(x, axis=-1, descending=True)
        mass = jax.nn.softmax(ranked, axis=-1)
        more_likely = jnp.cumsum(mass, axis=-1) - mass
        # a token is needed while what is more likely does not hold top_p yet
        needed = (more_likely < draw.top_p).at[..., 0].set(True)
        least_needed = jnp.min(jnp.where(needed, ranked, jnp.inf), axis=-1)
        least = jnp.maximum(least, least_needed)

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
    to_whole_blocks = [(0, 0)] * (logits.ndim - 1) + [(0, -V % block)]
    mass = jnp.pad(jnp.exp(logits - top), to_whole_blocks)
    mass = mass.reshape(*logits.shape[:-1], -1, block)

    # the block in which the cumulative sum passes the target
    of_block = mass.sum(-1)
    upto_block = jnp.cumsum(of_block, axis=-1)
    total = upto_block[..., -1]
    target = (uniform * total)[..., None]
    at_block = _first_above(upto_block, of_block, target)

    # the token inside it
    upto_last_block = jnp.take_along_axis(upto_block, jnp.maximum(at_block - 1, 0), axis=-1)
    before = jnp.where(at_block > 0, upto_last_block, 0.0)
    inside = jnp.take_along_axis(mass, at_block[..., None], axis=-2)[..., 0, :]
    at_token = _first_above(before + jnp.cumsum(inside, axis=-1), inside, target)
    token = at_block * block + at_token

    logprob = jnp.take_along_axis(logits - top, token, axis=-1)[..., 0] - jnp.log(total)
    return token[..., 0].astype(jnp.int32), logprob


def _first_above(cumulative: jax.Array, mass: jax.Array, target: jax.Array) -> jax.Array:
    """Index [..., 1] of the first entry with mass whose cumulative sum is above the target.

    Rounding may leave none: then of the last entry with mass. A parallel cumulative sum adds in
    another order at each entry, so it may step, even up, where the mass is zero.
    """
    has_mass = mass > 0
    above = has_mass & (cumulative > target)
    last_with_mass = mass.shape[-1] - 1 - jnp.argmax(has_mass[..., ::-1], axis=-1, keepdims=True)
    first_above = jnp.argmax(above, axis=-1, keepdims=True)
    return jnp.where(above.any(-1, keepdims=True), first_above, last_with_mass)
