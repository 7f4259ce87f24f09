"""Attention to some of the keys, and how parts become one softmax.

While keys are still being read, a part is kept as (top score, sum of weights) beside its weighted
values; read whole, as its output and log-sum-exp. Either way parts of the keys that are attended to
separately can be joined. Scores and softmax are float32.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from spiral_jax.model.cache import Cache

MASKED = -1e30  # finite: a row without any visible key stays finite


class Lengths(NamedTuple):
    """How long the groups of a micro-batch are; all int32.

    Attributes:
      prompt_U: tokens of each prompt: what traces see of it.
      trace_UxC: tokens of each trace.
      prompt: scalar, the longest prompt. Hidden states behind it have no meaning.
      trace: scalar, the longest trace. Hidden states behind it have no meaning.
    """

    prompt_U: jax.Array
    trace_UxC: jax.Array
    prompt: jax.Array
    trace: jax.Array


class KeyValue(NamedTuple):
    """Keys and values [..., T, J, E]."""

    k: jax.Array
    v: jax.Array


class Part(NamedTuple):
    """What rows of queries have seen so far, float32, with weight = exp(score - top).

    Attributes:
      values: [..., N, E], sum of weighted values.
      top: [..., N], largest score.
      weight: [..., N], sum of weights.
    """

    values: jax.Array
    top: jax.Array
    weight: jax.Array

    def output(self, dtype: jnp.dtype) -> jax.Array:
        """[..., N, E]: attention of each row to the keys that it has seen."""
        return (self.values / self.weight[..., None]).astype(dtype)

    def lse(self) -> jax.Array:
        """[..., N]: log-sum-exp of each row's scores."""
        return self.top + jnp.log(self.weight)


class Attended(NamedTuple):
    """Attention to all keys of a part, or of several that were merged.

    Attributes:
      out_BxTxHxE: in the queries' dtype.
      lse_BxHxT: float32, log-sum-exp of the scaled scores of the visible keys.
    """

    out_BxTxHxE: jax.Array
    lse_BxHxT: jax.Array


class Cotangents(NamedTuple):
    """Of a part's queries, keys and values, in their dtypes."""

    q_BxTxHxE: jax.Array
    k_BxSxJxE: jax.Array
    v_BxSxJxE: jax.Array


def merge(a: Attended, b: Attended) -> Attended:
    """Attention to the keys of both, for the same queries. The weights are float32."""
    lse = jnp.logaddexp(a.lse_BxHxT, b.lse_BxHxT)

    def weighted(part: Attended) -> jax.Array:
        weight_BxTxH = jnp.moveaxis(jnp.exp(part.lse_BxHxT - lse), 1, 2)
        return weight_BxTxH[..., None] * part.out_BxTxHxE.astype(jnp.float32)

    return Attended((weighted(a) + weighted(b)).astype(a.out_BxTxHxE.dtype), lse)


def nothing_seen(q_xNxE: jax.Array) -> Part:
    """The part of no key."""
    rows = q_xNxE.shape[:-1]
    return Part(jnp.zeros(q_xNxE.shape, jnp.float32), jnp.full(rows, MASKED), jnp.zeros(rows))


def attend(q_xNxE: jax.Array, cache: Cache, visible_xNxT: jax.Array) -> Part:
    """Attention of scaled queries to the visible keys of a cache."""
    k, v = cache["k"].astype(q_xNxE.dtype), cache["v"].astype(q_xNxE.dtype)
    score = jnp.einsum("...ne,...et->...nt", q_xNxE, k, preferred_element_type=jnp.float32)
    if "k_scale" in cache:
        score *= cache["k_scale"]
    score = jnp.where(visible_xNxT, score, MASKED)
    top = jnp.max(score, axis=-1)
    weight = jnp.exp(score - top[..., None])
    total = jnp.sum(weight, axis=-1)
    if "v_scale" in cache:
        weight *= jnp.swapaxes(cache["v_scale"], -1, -2)
    values = jnp.einsum(
        "...nt,...te->...ne", weight.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return Part(values, top, total)


def join(a: Part, b: Part) -> Part:
    """Attention to the keys of both parts.

    A part without any visible key adds exact zeros to one that has some.
    """
    top = jnp.maximum(a.top, b.top)
    scale_a, scale_b = jnp.exp(a.top - top), jnp.exp(b.top - top)
    values = a.values * scale_a[..., None] + b.values * scale_b[..., None]
    return Part(values, top, a.weight * scale_a + b.weight * scale_b)


def split_heads(q: jax.Array, kv_heads: int) -> jax.Array:
    """[..., H, E] -> scaled [..., J, H / J, E]: the query heads that share a key side by side."""
    *lead, H, E = q.shape
    return (q * (E**-0.5)).reshape(*lead, kv_heads, H // kv_heads, E)
