"""One uniform number per (trace, position) from integers alone, and the token that it stands for.

threefry keys from (seed, purpose, step, cursor, round, role, set, trace, position): a trace's numbers depend neither
on its slot nor on its neighbours, the batch's shape, the device count or a restart.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_BLOCK = 512  # vocabulary entries whose sum is one step of the coarse cumulative sum


def trace_keys(seed: int, id_Ux6: jax.Array, traces: int) -> jax.Array:
    """Keys [U, C] of every trace of groups with ids (purpose, step, cursor, round, role, set)."""

    def one(ids: jax.Array, trace: jax.Array) -> jax.Array:
        key = jax.random.key(seed, impl="threefry2x32")
        for i in range(ids.shape[0]):
            key = jax.random.fold_in(key, ids[i])
        return jax.random.fold_in(key, trace)

    over_traces = jax.vmap(one, in_axes=(None, 0))
    return jax.vmap(over_traces, in_axes=(0, None))(id_Ux6, jnp.arange(traces))


def uniforms(key_UxC: jax.Array, position: jax.Array) -> jax.Array:
    """float32 [U, C] in [0, 1): the draw of each trace at token `position` (scalar int32)."""
    draw = lambda key: jax.random.uniform(jax.random.fold_in(key, position))  # noqa: E731
    return jax.vmap(jax.vmap(draw))(key_UxC)


def inverse_cdf(logits: jax.Array, uniform: jax.Array, temperature: float) -> tuple[jax.Array, jax.Array]:
    """The token at which the cumulative distribution passes `uniform`, and its log-prob.

    Two cumulative sums, over block sums and inside one block, instead of one over V: V = 151,936 costs little more
    than reading the logits. A token of probability zero is never returned.

    Args:
      logits: [..., V] float32.
      uniform: [...] in [0, 1).
      temperature: > 0.

    Returns:
      int32 token and float32 log-prob, both [...], of softmax(logits / temperature).
    """
    with jax.named_scope("sample"):
        V = logits.shape[-1]
        block = min(_BLOCK, V)
        x = logits / temperature
        top = jnp.max(x, axis=-1, keepdims=True)
        mass = jnp.pad(jnp.exp(x - top), [(0, 0)] * (x.ndim - 1) + [(0, -V % block)])
        mass = mass.reshape(*x.shape[:-1], -1, block)
        coarse = jnp.cumsum(mass.sum(-1), axis=-1)
        target = (uniform * coarse[..., -1])[..., None]
        at_block = _first_above(coarse, mass.sum(-1), target)
        before = jnp.where(at_block > 0, jnp.take_along_axis(coarse, jnp.maximum(at_block - 1, 0), axis=-1), 0.0)
        inside = jnp.take_along_axis(mass, at_block[..., None], axis=-2)[..., 0, :]
        token = (at_block * block + _first_above(before + jnp.cumsum(inside, axis=-1), inside, target))[..., 0]
        logprob = jnp.take_along_axis(x - top, token[..., None], axis=-1)[..., 0] - jnp.log(coarse[..., -1])
        return token.astype(jnp.int32), logprob


def _first_above(cumulative: jax.Array, mass: jax.Array, target: jax.Array) -> jax.Array:
    """Index [..., 1] of the first entry with mass above target; rounding may leave none, then of the last with mass.

    A parallel cumulative sum adds in another order at each entry, so it may step, even up, where the mass is zero.
    """
    has_mass = mass > 0
    above = has_mass & (cumulative > target)
    last_with_mass = mass.shape[-1] - 1 - jnp.argmax(has_mass[..., ::-1], axis=-1, keepdims=True)
    return jnp.where(above.any(-1, keepdims=True), jnp.argmax(above, axis=-1, keepdims=True), last_with_mass)
