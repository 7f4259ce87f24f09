"""Group attention in loops over blocks of keys, with a backward pass of its own, in plain XLA.

Scores of one block of queries to one block of keys exist at a time; blocks above the diagonal,
behind the longest prompt and behind the longest trace are not computed.

Kept for the backward pass are the output and the log-sum-exp of each query's scores. With d_out
their cotangent,

    weight = exp(score - lse)      d_score = weight * (d_out v - sum_e out d_out)
    d_v = weight^T d_out           d_q = d_score k           d_k = d_score^T q

hold for any part of the keys alone (FlashAttention-2, arXiv 2307.08691, section 3.1), so prompt and
own keys need not lie in one array: both passes call one loop for each set of keys (`_attend_to`,
`_cotangents_of`). Scores, softmax and sums are float32; products take the inputs' dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from spiral_jax.model import layouts
from spiral_jax.model.attention_parts import Part, attend, join, nothing_seen
from spiral_jax.model.cache import Cache, read_tokens

KEPT = "attention"  # the name of output and log-sum-exp for policies of `jax.checkpoint`

# Names of scopes: a plan finds the loops of a compiled program by them.
OWN_KEYS_SCOPE, PROMPT_KEYS_SCOPE = "own_keys", "prompt_keys"

# Number of a block of keys -> bool [..., N, T]: which of them the rows of queries see.
Visible = Callable[[jax.Array], jax.Array]


class KeySizes(NamedTuple):
    """Tokens a block: of queries and own keys, and of the prompt's keys."""

    own: int
    prompt: int


class KeyCounts(NamedTuple):
    """Scalars: how many blocks of queries and of the prompt's keys are computed."""

    own: jax.Array
    prompt: jax.Array


class KeyCotangents(NamedTuple):
    """Of a set of keys and values, both [..., E, T] float32."""

    k: jax.Array
    v: jax.Array


def even_block(length: int, block: int) -> int:
    """The smallest block with which `length` takes as few of them as with `block`."""
    return -(-length // -(-length // block))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_blockwise(
    sizes: KeySizes,
    q_UxJxCxRxQxE: jax.Array,
    own: Cache,
    prompt: Cache | None,
    prompt_len_U: jax.Array,
    counts: KeyCounts,
) -> jax.Array:
    """[U, J, C, R, Q, E] with R = H / J: causal over own keys, and over the whole prompt.

    Args:
      q_UxJxCxRxQxE: scaled queries.
      own: [U, J, C, ...], Q tokens.
      prompt: [U, J, ...] or None. All lengths are multiples of their block.
      counts: the output is zero behind the blocks of queries that are computed.
    """
    return _forward(sizes, q_UxJxCxRxQxE, own, prompt, prompt_len_U, counts)[0]


def _forward(
    sizes: KeySizes,
    q: jax.Array,
    own: Cache,
    prompt: Cache | None,
    prompt_len_U: jax.Array,
    counts: KeyCounts,
) -> tuple[jax.Array, jax.Array]:
    """(output [U, J, C, R, Q, E] in q's dtype, log-sum-exp of scores [U, J, C, R, Q] float32)."""
    R = q.shape[3]

    def attend_block(
        i: jax.Array, done: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        out, lse = done
        rows = _block_rows(q, i, sizes.own)
        seen = nothing_seen(rows)
        if prompt is not None:
            with jax.named_scope(PROMPT_KEYS_SCOPE):
                visible = _in_prompt(prompt_len_U, sizes.prompt)
                seen_by_all = jax.tree.map(_merge_traces, seen)
                seen_by_all = _attend_to(
                    prompt, sizes.prompt, counts.prompt, visible, _merge_traces(rows), seen_by_all
                )
                seen = jax.tree.map(lambda a, like: a.reshape(like.shape), seen_by_all, seen)
        with jax.named_scope(OWN_KEYS_SCOPE):
            seen = _attend_to(own, sizes.own, i + 1, _causal(i, sizes.own, R), rows, seen)
        return (
            _write_block(out, seen.output(q.dtype), i, sizes.own),
            _write_block(lse, seen.lse(), i, sizes.own),
        )

    nothing = jnp.zeros_like(q), jnp.zeros(q.shape[:-1], jnp.float32)
    return jax.lax.fori_loop(0, counts.own, attend_block, nothing)


def _attend_to(
    keys: Cache, size: int, count: jax.Array, visible: Visible, rows: jax.Array, seen: Part
) -> Part:
    """`seen` joined with the attention of rows [..., N, E] to the first `count` blocks of keys."""

    def add_block(j: jax.Array, seen: Part) -> Part:
        return join(seen, attend(rows, read_tokens(keys, j * size, size), visible(j)))

    return jax.lax.fori_loop(0, count, add_block, seen)


def _keep(
    sizes: KeySizes,
    q: jax.Array,
    own: Cache,
    prompt: Cache | None,
    prompt_len_U: jax.Array,
    counts: KeyCounts,
) -> tuple[jax.Array, Any]:
    out, lse = _forward(sizes, q, own, prompt, prompt_len_U, counts)
    out, lse = checkpoint_name(out, KEPT), checkpoint_name(lse, KEPT)
    return out, (q, own, prompt, prompt_len_U, counts, out, lse)


def _backward(sizes: KeySizes, kept: Any, d_out: jax.Array) -> tuple:
    """Cotangents of queries, of own and of the prompt's keys and values."""
    q, own, prompt, prompt_len_U, counts, out, lse = kept
    R = q.shape[3]
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)

    def add_block(i: jax.Array, done: tuple) -> tuple:
        d_q, d_own, d_prompt = done
        rows = _QueryRows.of(*(_block_rows(a, i, sizes.own) for a in (q, d_out, lse, delta)))
        d_rows = jnp.zeros(rows.q.shape, jnp.float32)
        with jax.named_scope(OWN_KEYS_SCOPE):
            visible = _causal(i, sizes.own, R)
            d_rows, d_own = _cotangents_of(own, sizes.own, i + 1, visible, rows, d_rows, d_own)
        if prompt is not None:
            rows = rows.of_all_traces()
            d_rows = d_rows.reshape(rows.q.shape)
            with jax.named_scope(PROMPT_KEYS_SCOPE):
                size, visible = sizes.prompt, _in_prompt(prompt_len_U, sizes.prompt)
                d_rows, d_prompt = _cotangents_of(
                    prompt, size, counts.prompt, visible, rows, d_rows, d_prompt
                )
        return _write_block(d_q, d_rows.astype(q.dtype), i, sizes.own), d_own, d_prompt

    nothing = jnp.zeros_like(q), _no_cotangents(own), _no_cotangents(prompt)
    d_q, d_own, d_prompt = jax.lax.fori_loop(0, counts.own, add_block, nothing)
    return d_q, _as_cache(d_own, q.dtype), _as_cache(d_prompt, q.dtype), None, None


attend_blockwise.defvjp(_keep, _backward)


class _QueryRows(NamedTuple):
    """A block of queries in the backward pass, and what is known of them.

    Attributes:
      q, d_out: [..., N, E]; q_columns, d_out_columns: the same as [..., E, N].
      lse, delta: [..., N].
    """

    q: jax.Array
    d_out: jax.Array
    lse: jax.Array
    delta: jax.Array
    q_columns: jax.Array
    d_out_columns: jax.Array

    @classmethod
    def of(cls, q: jax.Array, d_out: jax.Array, lse: jax.Array, delta: jax.Array) -> _QueryRows:
        return cls(q, d_out, lse, delta, layouts.columns(q), layouts.columns(d_out))

    def of_all_traces(self) -> _QueryRows:
        """[U, J, C, N, ...] -> [U, J, C * N, ...], as the prompt's keys meet them."""
        rows = (self.q, self.d_out, self.lse, self.delta)
        return _QueryRows.of(*(_merge_traces(a) for a in rows))


def _cotangents_of(
    keys: Cache,
    size: int,
    count: jax.Array,
    visible: Visible,
    rows: _QueryRows,
    d_rows: jax.Array,
    d_keys: KeyCotangents,
) -> tuple[jax.Array, KeyCotangents]:
    """(d_rows, d_keys) with what the first `count` blocks of keys add to both."""
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    dtype = rows.q.dtype

    def add_block(
        j: jax.Array, done: tuple[jax.Array, KeyCotangents]
    ) -> tuple[jax.Array, KeyCotangents]:
        d_rows, d_keys = done
        block = read_tokens(keys, j * size, size)
        score = dot("...ne,...et->...nt", rows.q, block["k"])
        weight = jnp.where(visible(j), jnp.exp(score - rows.lse[..., None]), 0.0)
        d_weight = dot("...ne,...te->...nt", rows.d_out, block["v"])
        d_score = (weight * (d_weight - rows.delta[..., None])).astype(dtype)
        new_k = dot("...en,...nt->...et", rows.q_columns, d_score)
        new_v = dot("...en,...nt->...et", rows.d_out_columns, weight.astype(dtype))
        d_keys = KeyCotangents(
            _add_tokens(d_keys.k, new_k, j * size), _add_tokens(d_keys.v, new_v, j * size)
        )
        return d_rows + dot("...nt,...et->...ne", d_score, block["k"]), d_keys

    return jax.lax.fori_loop(0, count, add_block, (d_rows, d_keys))


def _no_cotangents(keys: Cache | None) -> KeyCotangents | None:
    if keys is None:
        return None
    zeros = jnp.zeros(keys["k"].shape, jnp.float32)
    return KeyCotangents(zeros, zeros)


def _as_cache(d_keys: KeyCotangents | None, dtype: jnp.dtype) -> Cache | None:
    """Cotangents in the layout of the cache that they belong to."""
    if d_keys is None:
        return None
    return {"k": d_keys.k.astype(dtype), "v": jnp.swapaxes(d_keys.v, -1, -2).astype(dtype)}


def _add_tokens(total_xT: jax.Array, tokens_xN: jax.Array, start: jax.Array) -> jax.Array:
    """`total` with `tokens` added from `start` on, along the last axis."""
    new = jax.lax.dynamic_slice_in_dim(total_xT, start, tokens_xN.shape[-1], -1) + tokens_xN
    return jax.lax.dynamic_update_slice_in_dim(total_xT, new, start, total_xT.ndim - 1)


def _causal(i: jax.Array, size: int, R: int) -> Visible:
    """Own keys: the queries of block i, R heads of them, see their past and themselves."""

    def visible(j: jax.Array) -> jax.Array:
        query = jnp.tile(i * size + jnp.arange(size), R)
        return j * size + jnp.arange(size) <= query[:, None]  # (r q) t

    return visible


def _in_prompt(prompt_len_U: jax.Array, size: int) -> Visible:
    """The prompt's keys: every query sees all that exist."""

    def visible(j: jax.Array) -> jax.Array:
        return (j * size + jnp.arange(size) < prompt_len_U[:, None])[:, None, None]  # u 1 1 t

    return visible


def _block_rows(a_UxJxCxRxQ: jax.Array, i: jax.Array, size: int) -> jax.Array:
    """[U, J, C, R * size, ...]: block i along Q, heads that share a key below each other."""
    a = jax.lax.dynamic_slice_in_dim(a_UxJxCxRxQ, i * size, size, 4)
    return a.reshape(*a.shape[:3], -1, *a.shape[5:])


def _write_block(a_UxJxCxRxQ: jax.Array, rows: jax.Array, i: jax.Array, size: int) -> jax.Array:
    """`a` with rows [U, J, C, R * size, ...], or those of all traces as one, as its block i."""
    block = rows.reshape(*a_UxJxCxRxQ.shape[:4], size, *a_UxJxCxRxQ.shape[5:])
    return jax.lax.dynamic_update_slice_in_dim(a_UxJxCxRxQ, block, i * size, 4)


def _merge_traces(a_UxJxCxN: jax.Array) -> jax.Array:
    """[U, J, C, N, ...] -> [U, J, C * N, ...]."""
    return a_UxJxCxN.reshape(*a_UxJxCxN.shape[:2], -1, *a_UxJxCxN.shape[4:])
