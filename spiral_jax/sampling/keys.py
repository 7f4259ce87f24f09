"""Keys: one uniform number per (trace, position), from integers alone.

threefry keys from (seed, purpose, step, cursor, round, role, set, trace, position): a trace's
numbers depend neither on its pages nor on its neighbours, the batch's shape, the device count or a
restart.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_IMPL = "threefry2x32"  # a named algorithm: the default may change


def trace_keys(seed: int, id_xx6: jax.Array, trace_x: jax.Array) -> jax.Array:
    """Key data, uint32 [..., 2], of traces `trace_x` (int32 [...]) of groups with these ids.

    Args:
      id_xx6: int32 [..., 6] (purpose, step, cursor, round, role, set).
    """
    words = jnp.concatenate([id_xx6, trace_x[..., None]], axis=-1)

    def fold(word_W: jax.Array) -> jax.Array:
        key = jax.random.key(seed, impl=_IMPL)
        for i in range(word_W.shape[0]):
            key = jax.random.fold_in(key, word_W[i])
        return jax.random.key_data(key)

    return jax.vmap(fold)(words.reshape(-1, words.shape[-1])).reshape(*trace_x.shape, 2)


def uniforms(key_xx2: jax.Array, position_x: jax.Array) -> jax.Array:
    """float32 [...] in [0, 1): the number of each trace at token `position_x` (int32 [...])."""

    def number(data: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(data, impl=_IMPL)
        return jax.random.uniform(jax.random.fold_in(key, position))

    numbers = jax.vmap(number)(key_xx2.reshape(-1, 2), position_x.reshape(-1))
    return numbers.reshape(position_x.shape)
