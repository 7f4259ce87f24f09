"""Keys and values of one layer, as decoding reads them: heads first, then tokens.

A cache is a dict of `k` and `v` [..., J, T, E]; stored as int8 also `k_scale` and `v_scale` [...,
J, T, 1], float32, one scale for each (token, head).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Cache = dict[str, jax.Array]

_TOKENS = -2  # the axis of tokens, of keys, values and scales alike


def empty_cache(lead: tuple[int, ...], E: int, T: int, dtype: jnp.dtype) -> Cache:
    """A cache of T tokens with leading axes `lead` = (..., J); int8 comes with its scales."""
    cache = {name: jnp.zeros((*lead, T, E), dtype) for name in ("k", "v")}
    if dtype == jnp.int8:
        scales = ("k_scale", "v_scale")
        cache |= {name: jnp.zeros((*lead, T, 1), jnp.float32) for name in scales}
    return cache


def cache_entries(k_xTxJxE: jax.Array, v_xTxJxE: jax.Array, dtype: jnp.dtype) -> Cache:
    """New keys and values [..., T, J, E] in the layout and dtype of a cache [..., J, T, *]."""
    k, v = jnp.moveaxis(k_xTxJxE, -3, _TOKENS), jnp.moveaxis(v_xTxJxE, -3, _TOKENS)
    if dtype != jnp.int8:
        return {"k": k.astype(dtype), "v": v.astype(dtype)}
    (k, k_scale), (v, v_scale) = _to_int8(k), _to_int8(v)
    return {"k": k, "v": v, "k_scale": k_scale, "v_scale": v_scale}


def write_entries(cache: Cache, entries: Cache, index: jax.Array) -> Cache:
    """`cache` with `entries` from token `index` (scalar int32) on."""

    def write(stored: jax.Array, new: jax.Array) -> jax.Array:
        axis = stored.ndim + _TOKENS
        return jax.lax.dynamic_update_slice_in_dim(stored, new, index, axis)

    return jax.tree.map(write, cache, entries)


def read_tokens(cache: Cache, start: jax.Array, count: int) -> Cache:
    """`count` (static) tokens from `start` (scalar int32) on."""
    return jax.tree.map(
        lambda a: jax.lax.dynamic_slice_in_dim(a, start, count, a.ndim + _TOKENS), cache
    )


def _to_int8(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(int8, float32 scale along E): the largest entry becomes 127; all zeros stay zeros."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
    return jnp.round(x / jnp.where(scale > 0, scale, 1)).astype(jnp.int8), scale
