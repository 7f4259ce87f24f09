"""Attention of whole groups in training: in blocks, with a backward pass of its own.

A prompt's token attends to its past; a trace's token to the whole prompt and to its own past, under
one softmax. Scores of one block of queries to one block of keys exist at a time; blocks above the
diagonal, behind the longest prompt and behind the longest trace are not computed. The queries of
all traces and of all heads that share a key are rows of one matrix product with the prompt's keys,
which exist once a group.

Kept for the backward pass are the output and the log-sum-exp of each query's scores. With d_out
their cotangent,

    weight = exp(score - lse)      d_score = weight * (d_out v - sum_e out d_out)
    d_v = weight^T d_out           d_q = d_score k           d_k = d_score^T q

hold for any part of the keys alone (FlashAttention-2, arXiv 2307.08691, section 3.1), so prompt and
own keys need not lie in one array. Scores, softmax and sums are float32; products take the inputs'
dtype.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from spiral_jax.model.cache import Cache, cache_entries, read_tokens
from spiral_jax.model.cache_attention import MASKED, Partial, attend, join, split_heads

KeyCotangents = tuple[jax.Array, jax.Array]  # of keys and of values, both [..., E, T]

KEPT = "attention"  # the name of output and log-sum-exp for policies of `jax.checkpoint`

# Names of scopes: a plan finds the loops of a compiled program by them.
PROMPT_SCOPE, TRACE_SCOPE = "prompt_attention", "trace_attention"
OWN_KEYS_SCOPE, PROMPT_KEYS_SCOPE = "own_keys", "prompt_keys"


class Lengths(NamedTuple):
    """How long the groups of a micro-batch are; all int32.

    Attributes:
      prompt_U: tokens of each prompt: what traces see of it.
      prompt: scalar, the longest prompt. Hidden states behind it have no meaning.
      trace: scalar, the longest trace. Hidden states behind it have no meaning.
    """

    prompt_U: jax.Array
    prompt: jax.Array
    trace: jax.Array


def prompt_attention(
    q_UxPxHxE: jax.Array, k_UxPxJxE: jax.Array, v_UxPxJxE: jax.Array, lengths: Lengths, block: int
) -> jax.Array:
    """Causal self-attention of right-padded prompts; [U, P, H, E].

    Causality hides the padding from every real query, and nobody reads the padded ones.
    """
    with jax.named_scope(PROMPT_SCOPE):
        own = k_UxPxJxE[:, None], v_UxPxJxE[:, None]
        return _attention(q_UxPxHxE[:, None], own, None, lengths.prompt, lengths, block)[:, 0]


def trace_attention(
    q_UxCxGxHxE: jax.Array,
    prompt_kv: tuple[jax.Array, jax.Array],
    own_kv: tuple[jax.Array, jax.Array],
    lengths: Lengths,
    block: int,
) -> jax.Array:
    """Attention of trace tokens under one softmax over the group's prompt and the trace's own past;
    [U, C, G, H, E].

    Args:
      prompt_kv: keys and values [U, P, J, E], shared by the C traces.
      own_kv: keys and values [U, C, G, J, E].
      block: queries, and keys, whose scores exist at once.
    """
    with jax.named_scope(TRACE_SCOPE):
        return _attention(q_UxCxGxHxE, own_kv, prompt_kv, lengths.trace, lengths, block)


def last_token_attention(
    q_UxHxE: jax.Array, k_UxPxJxE: jax.Array, v_UxPxJxE: jax.Array, prompt_len_U: jax.Array
) -> jax.Array:
    """Attention of each prompt's last token to its prompt; [U, H, E]. One query a group: its scores
    exist whole.
    """
    with jax.named_scope("last_token_attention"):
        q = split_heads(q_UxHxE, k_UxPxJxE.shape[-2])
        dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        visible = jnp.arange(k_UxPxJxE.shape[1]) < prompt_len_U[:, None, None, None]
        score = jnp.where(visible, dot("ujre,upje->ujrp", q, k_UxPxJxE), MASKED)
        out = dot("ujrp,upje->ujre", jax.nn.softmax(score).astype(q.dtype), v_UxPxJxE)
        return out.reshape(q_UxHxE.shape).astype(q_UxHxE.dtype)


def _attention(
    q_UxCxQxHxE: jax.Array,
    own_kv: tuple[jax.Array, jax.Array],
    prompt_kv: tuple[jax.Array, jax.Array] | None,
    longest: jax.Array,
    lengths: Lengths,
    block: int,
) -> jax.Array:
    """Brings heads to the front and every length to a multiple of its block; `longest`: the queries
    that count.
    """
    U, C, Q, H, E = q_UxCxQxHxE.shape
    own_size = even_block(Q, block)
    q = jnp.moveaxis(
        split_heads(_whole(q_UxCxQxHxE, own_size), own_kv[0].shape[-2]), (3, 4), (1, 3)
    )  # u j c r q e
    own = cache_entries(*(_whole(a, own_size) for a in own_kv), q.dtype)
    own = {name: jnp.swapaxes(a, 1, 2) for name, a in own.items()}  # u j c . .
    prompt, prompt_size = None, 1
    if prompt_kv is not None:
        prompt_size = even_block(prompt_kv[0].shape[1], block)
        prompt = cache_entries(
            *(_whole(a[:, None], prompt_size)[:, 0] for a in prompt_kv), q.dtype
        )  # u j . .
    blocks = _Blocks(own_size, prompt_size)
    counts = -(-longest // own_size), -(-lengths.prompt // prompt_size)
    out = _blockwise(blocks, q, own, prompt, lengths.prompt_U, counts)
    return jnp.moveaxis(out, (1, 3), (3, 4)).reshape(U, C, -1, H, E)[:, :, :Q]


class _Blocks(NamedTuple):
    """Tokens a block: of queries and own keys, and of the prompt's keys."""

    own: int
    prompt: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(
    size: _Blocks,
    q_UxJxCxRxQxE: jax.Array,
    own: Cache,
    prompt: Cache | None,
    prompt_len_U: jax.Array,
    counts: tuple[jax.Array, jax.Array],
) -> jax.Array:
    """[U, J, C, R, Q, E] with R = H / J.

    Args:
      q_UxJxCxRxQxE: scaled queries.
      own: [U, J, C, ...], Q tokens. prompt: [U, J, ...] or None. All of whole blocks.
      counts: scalars, blocks of queries and of prompt keys that are computed; the output is zero
      behind the first.
    """
    return _forward(size, q_UxJxCxRxQxE, own, prompt, prompt_len_U, counts)[0]


def _forward(
    size: _Blocks,
    q: jax.Array,
    own: Cache,
    prompt: Cache | None,
    prompt_len_U: jax.Array,
    counts: tuple,
) -> tuple[jax.Array, jax.Array]:
    """(output in q's shape and dtype, log-sum-exp of each query's scores without the last axis,
    float32).
    """
    U, J, C, R, _, E = q.shape

    def one(i: jax.Array, done: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rows = _block_rows(q, i, size.own)  # u j c (r q) e
        total = (
            jnp.zeros(rows.shape, jnp.float32),
            jnp.full(rows.shape[:-1], MASKED),
            jnp.zeros(rows.shape[:-1]),
        )
        if prompt is not None:
            total = _of_prompt(size.prompt, rows, prompt, prompt_len_U, counts[1], total)

        def to_own(j: jax.Array, total: Partial) -> Partial:
            return join(
                total,
                attend(rows, read_tokens(own, j * size.own, size.own), _causal(i, j, size.own, R)),
            )

        with jax.named_scope(OWN_KEYS_SCOPE):
            out, top, weight = jax.lax.fori_loop(0, i + 1, to_own, total)
        new = (out / weight[..., None]).astype(q.dtype), top + jnp.log(weight)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(
                a, b.reshape(U, J, C, R, size.own, *a.shape[5:]), i * size.own, 4
            )
            for a, b in zip(done, new, strict=True)
        )

    return jax.lax.fori_loop(
        0, counts[0], one, (jnp.zeros_like(q), jnp.zeros(q.shape[:-1], jnp.float32))
    )


def _of_prompt(
    size: int,
    rows: jax.Array,
    prompt: Cache,
    prompt_len_U: jax.Array,
    count: jax.Array,
    total: Partial,
) -> Partial:
    """`total` joined with the attention of rows [U, J, C, N, E], all traces' as one, to the prompt."""
    merge = lambda a, of: a.reshape(*a.shape[:2], -1, *a.shape[of:])  # noqa: E731

    def to_block(j: jax.Array, total: Partial) -> Partial:
        return join(
            total,
            attend(flat, read_tokens(prompt, j * size, size), _in_prompt(prompt_len_U, j, size)),
        )

    flat = merge(rows, 4)
    with jax.named_scope(PROMPT_KEYS_SCOPE):
        merged = jax.lax.fori_loop(0, count, to_block, tuple(merge(a, 4) for a in total))
    return tuple(a.reshape(b.shape) for a, b in zip(merged, total, strict=True))


def _keep(
    size: _Blocks,
    q: jax.Array,
    own: Cache,
    prompt: Cache | None,
    prompt_len_U: jax.Array,
    counts: tuple,
) -> Any:
    out, lse = (
        checkpoint_name(a, KEPT) for a in _forward(size, q, own, prompt, prompt_len_U, counts)
    )
    return out, (q, own, prompt, prompt_len_U, counts, out, lse)


def _backward(size: _Blocks, kept: Any, d_out: jax.Array) -> tuple:
    """Cotangents of queries, own and prompt's keys and values; the formulas are at the top of this
    file.
    """
    q, own, prompt, prompt_len_U, counts, out, lse = kept
    U, J, C, R, _, E = q.shape
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)

    def one(i: jax.Array, done: tuple) -> tuple:
        d_q, d_own, d_prompt = done
        rows = _rows(*(_block_rows(a, i, size.own) for a in (q, d_out, lse, delta)))

        def to_own(
            j: jax.Array, done: tuple[jax.Array, KeyCotangents]
        ) -> tuple[jax.Array, KeyCotangents]:
            return _add_block(done, rows, own, j * size.own, size.own, _causal(i, j, size.own, R))

        with jax.named_scope(OWN_KEYS_SCOPE):
            d_rows, d_own = jax.lax.fori_loop(
                0, i + 1, to_own, (jnp.zeros(rows.q.shape, jnp.float32), d_own)
            )
        if prompt is not None:
            flat = _rows(*(a.reshape(U, J, -1, *a.shape[4:]) for a in rows[:4]))

            def to_prompt(
                j: jax.Array, done: tuple[jax.Array, KeyCotangents]
            ) -> tuple[jax.Array, KeyCotangents]:
                visible = _in_prompt(prompt_len_U, j, size.prompt)
                return _add_block(done, flat, prompt, j * size.prompt, size.prompt, visible)

            with jax.named_scope(PROMPT_KEYS_SCOPE):
                flat_rows = d_rows.reshape(flat.q.shape)
                d_rows, d_prompt = jax.lax.fori_loop(0, counts[1], to_prompt, (flat_rows, d_prompt))
        d_rows = d_rows.reshape(U, J, C, R, size.own, E).astype(q.dtype)
        return jax.lax.dynamic_update_slice_in_dim(d_q, d_rows, i * size.own, 4), d_own, d_prompt

    zeros = jax.tree.map(
        lambda k: (jnp.zeros(k.shape, jnp.float32),) * 2, (own["k"], prompt and prompt["k"])
    )
    d_q, *d_keys = jax.lax.fori_loop(0, counts[0], one, (jnp.zeros_like(q), *zeros))
    as_cache = lambda d: (
        d and {"k": d[0].astype(q.dtype), "v": jnp.swapaxes(d[1], -1, -2).astype(q.dtype)}
    )  # noqa: E731
    return d_q, *map(as_cache, d_keys), None, None


_blockwise.defvjp(_keep, _backward)


class _Rows(NamedTuple):
    """A block of queries in the backward pass.

    Attributes:
      q, d_out: [..., N, E].
      lse, delta: [..., N].
      columns: q and d_out as [..., E, N], once for all blocks of keys: two factors that both have
        their rows first cost XLA's CPU backend more.
    """

    q: jax.Array
    d_out: jax.Array
    lse: jax.Array
    delta: jax.Array
    columns: tuple[jax.Array, jax.Array]


def _rows(q: jax.Array, d_out: jax.Array, lse: jax.Array, delta: jax.Array) -> _Rows:
    return _Rows(q, d_out, lse, delta, (jnp.swapaxes(q, -1, -2), jnp.swapaxes(d_out, -1, -2)))


def _add_block(
    done: tuple[jax.Array, KeyCotangents],
    rows: _Rows,
    keys: Cache,
    start: jax.Array,
    size: int,
    visible: jax.Array,
) -> tuple[jax.Array, KeyCotangents]:
    """Adds to (d_q of the rows, cotangents of all keys) what `size` keys from `start` on
    contribute.
    """
    part, (d_rows, d_keys) = read_tokens(keys, start, size), done
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    score = dot("...ne,...et->...nt", rows.q, part["k"])
    weight = jnp.where(visible, jnp.exp(score - rows.lse[..., None]), 0.0)
    d_score = weight * (dot("...ne,...te->...nt", rows.d_out, part["v"]) - rows.delta[..., None])
    weight, d_score = weight.astype(rows.q.dtype), d_score.astype(rows.q.dtype)
    new = (
        dot("...en,...nt->...et", of, by)
        for of, by in zip(rows.columns, (d_score, weight), strict=True)
    )
    d_keys = tuple(_add_tokens(d, tokens, start) for d, tokens in zip(d_keys, new, strict=True))
    return d_rows + dot("...nt,...et->...ne", d_score, part["k"]), d_keys


def _add_tokens(total_xT: jax.Array, tokens_xN: jax.Array, start: jax.Array) -> jax.Array:
    """`total` with `tokens` added from `start` on, along the last axis."""
    new = jax.lax.dynamic_slice_in_dim(total_xT, start, tokens_xN.shape[-1], -1) + tokens_xN
    return jax.lax.dynamic_update_slice_in_dim(total_xT, new, start, total_xT.ndim - 1)


def _causal(i: jax.Array, j: jax.Array, size: int, R: int) -> jax.Array:
    """bool [(r q), t]: which keys of block j the queries of block i see."""
    query = jnp.tile(i * size + jnp.arange(size), R)
    return j * size + jnp.arange(size) <= query[:, None]


def _in_prompt(prompt_len_U: jax.Array, j: jax.Array, size: int) -> jax.Array:
    """bool [u, 1, 1, t]: which keys of the prompt's block j exist."""
    return (j * size + jnp.arange(size) < prompt_len_U[:, None])[:, None, None]


def _block_rows(a_UxJxCxRxQ: jax.Array, i: jax.Array, size: int) -> jax.Array:
    """[U, J, C, R * size, ...]: block i along Q, heads that share a key below each other."""
    a = jax.lax.dynamic_slice_in_dim(a_UxJxCxRxQ, i * size, size, 4)
    return a.reshape(*a.shape[:3], -1, *a.shape[5:])


def even_block(length: int, block: int) -> int:
    """The smallest block with which `length` takes as few of them as with `block`."""
    return -(-length // -(-length // block))


def _whole(a_UxCxT: jax.Array, size: int) -> jax.Array:
    """Padded with zeros along T to whole blocks."""
    return jnp.pad(
        a_UxCxT, [(0, 0), (0, 0), (0, -a_UxCxT.shape[2] % size)] + [(0, 0)] * (a_UxCxT.ndim - 3)
    )
