"""Keys and values of one layer, as decoding reads them: heads first, keys with their tokens last.

A cache is a dict: `k` [..., J, E, T] and `v` [..., J, T, E]; stored as int8 also `k_scale` [..., J,
1, T] and `v_scale` [..., J, T, 1], float32, one scale for each (token, head).

Keys with their tokens last are a layout for XLA's CPU backend, of little worth there by now
(docs/log.md). It stays as long as log-probs are to be those of earlier versions to 1e-5: sums in
another order moved some by 3e-5. To remove it: the axes of `k` and `k_scale` here, and "et" -> "te"
of keys in `attention.part.attend` and `attention.xla._cotangents_of`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Cache = dict[str, jax.Array]

_TOKEN_AXIS = {"k": -1, "v": -2, "k_scale": -1, "v_scale": -2}


def empty_cache(lead: tuple[int, ...], E: int, T: int, dtype: jnp.dtype) -> Cache:
    """A cache of T tokens with leading axes `lead` = (..., J); int8 comes with its scales."""
    cache = {"k": jnp.zeros((*lead, E, T), dtype), "v": jnp.zeros((*lead, T, E), dtype)}
    if dtype == jnp.int8:
        cache |= {
            "k_scale": jnp.zeros((*lead, 1, T), jnp.float32),
            "v_scale": jnp.zeros((*lead, T, 1), jnp.float32),
        }
    return cache


def cache_entries(k_xTxJxE: jax.Array, v_xTxJxE: jax.Array, dtype: jnp.dtype) -> Cache:
    """New keys and values [..., T, J, E] in the layout and dtype of a cache [..., J, *, *]."""
    k, v = jnp.moveaxis(k_xTxJxE, -3, -1), jnp.moveaxis(v_xTxJxE, -3, -2)
    if dtype != jnp.int8:
        return {"k": k.astype(dtype), "v": v.astype(dtype)}
    (k, k_scale), (v, v_scale) = to_int8(k, -2), to_int8(v, -1)
    return {"k": k, "v": v, "k_scale": k_scale, "v_scale": v_scale}


def write_entries(cache: Cache, entries: Cache, index: jax.Array) -> Cache:
    """`cache` with `entries` from token `index` (scalar int32) on."""
    return {
        name: jax.lax.dynamic_update_slice_in_dim(
            cache[name], entries[name], index, cache[name].ndim + axis
        )
        for name, axis in _TOKEN_AXIS.items()
        if name in cache
    }


def read_tokens(cache: Cache, start: jax.Array, count: int) -> Cache:
    """`count` (static) tokens from `start` (scalar int32) on."""
    return {
        name: jax.lax.dynamic_slice_in_dim(array, start, count, array.ndim + _TOKEN_AXIS[name])
        for name, array in cache.items()
    }


def to_int8(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """(int8, float32 scale along `axis`): the largest entry becomes 127; all zeros stay zeros."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=axis, keepdims=True) / 127
    return jnp.round(x / jnp.where(scale > 0, scale, 1)).astype(jnp.int8), scale
