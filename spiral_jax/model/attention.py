"""Attention over groups: causal within a prompt, and two-part (prompt block + own trace) for what continues it.

Training runs whole groups (`prompt_attention`, `trace_attention`), the sampler reads caches (`prefix_attention` in
prefill, `decode_attention`). Scores and softmax are float32. Parts that are attended to separately are joined by their
log-sum-exp, kept as (top score, sum of weights).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from spiral_jax.model.cache import Cache, read_tokens

# (sum of weighted values [..., N, E], top score [..., N], sum of weights [..., N]), float32; weight = exp(score - top)
Partial = tuple[jax.Array, jax.Array, jax.Array]

_MASKED = -1e30  # finite: a row without any visible key stays finite


def prompt_attention(q_UxPxHxE: jax.Array, k_UxPxJxE: jax.Array, v_UxPxJxE: jax.Array, query_block: int) -> jax.Array:
    """Causal self-attention of right-padded prompts; [U, P, H, E].

    No length is needed: causality hides the padding from every real query, and nobody reads the padded ones.
    """

    def block(q_UxQxHxE: jax.Array, index_Q: jax.Array) -> jax.Array:
        q = _split_heads(q_UxQxHxE, k_UxPxJxE.shape[-2])
        score = jnp.einsum("uqjre,upje->ujrqp", q, k_UxPxJxE, preferred_element_type=jnp.float32)
        visible_QxP = jnp.arange(k_UxPxJxE.shape[1]) <= index_Q[:, None]
        weight = jax.nn.softmax(jnp.where(visible_QxP, score, _MASKED), axis=-1).astype(v_UxPxJxE.dtype)
        return jnp.einsum("ujrqp,upje->uqjre", weight, v_UxPxJxE).reshape(q_UxQxHxE.shape)

    with jax.named_scope("prompt_attention"):
        return _in_query_blocks(block, q_UxPxHxE, jnp.arange(q_UxPxHxE.shape[1]), query_block, axis=1)


def trace_attention(
    q_UxCxQxHxE: jax.Array,
    prompt_kv: tuple[jax.Array, jax.Array],
    prompt_len_U: jax.Array,
    own_kv: tuple[jax.Array, jax.Array],
    own_index_UxQ: jax.Array,
    query_block: int,
) -> jax.Array:
    """Attention of trace tokens under one softmax over the group's prompt and the trace itself; [U, C, Q, H, E].

    Args:
      q_UxCxQxHxE: queries, Q = G.
      prompt_kv: keys and values [U, P, J, E], shared by the C traces, visible up to `prompt_len_U`.
      prompt_len_U: int32.
      own_kv: keys and values [U, C, G, J, E].
      own_index_UxQ: int32 index of each query in its own trace: own keys up to and including it are visible.
      query_block: queries whose scores exist at once.
    """
    (prompt_k, prompt_v), (own_k, own_v) = prompt_kv, own_kv
    P, G = prompt_k.shape[1], own_k.shape[2]
    prompt_visible = (jnp.arange(P) < prompt_len_U[:, None])[:, None, None, None, None, :]  # u c j r q p

    def block(q: jax.Array, index_QxU: jax.Array) -> jax.Array:
        split = _split_heads(q, prompt_k.shape[-2])
        to_prompt = jnp.einsum("ucqjre,upje->ucjrqp", split, prompt_k, preferred_element_type=jnp.float32)
        to_own = jnp.einsum("ucqjre,ucgje->ucjrqg", split, own_k, preferred_element_type=jnp.float32)
        own_visible = (jnp.arange(G) <= index_QxU.T[:, :, None])[:, None, None, None, :, :]
        score = jnp.concatenate(
            [jnp.where(prompt_visible, to_prompt, _MASKED), jnp.where(own_visible, to_own, _MASKED)], axis=-1
        )
        weight = jax.nn.softmax(score, axis=-1).astype(own_v.dtype)
        out = jnp.einsum("ucjrqp,upje->ucqjre", weight[..., :P], prompt_v)
        out += jnp.einsum("ucjrqg,ucgje->ucqjre", weight[..., P:], own_v)
        return out.reshape(q.shape)

    with jax.named_scope("trace_attention"):
        return _in_query_blocks(block, q_UxCxQxHxE, own_index_UxQ.T, query_block, axis=2)


def decode_attention(
    q_UxCxHxE: jax.Array, prompt: Cache, prompt_len_U: jax.Array, own: Cache, own_index_U: jax.Array
) -> jax.Array:
    """One query of every trace, under one softmax over its group's prompt and its own tokens so far; [U, C, H, E].

    Args:
      q_UxCxHxE: queries of the newest tokens.
      prompt: [U, J, ...], shared by the C traces, visible up to `prompt_len_U`.
      prompt_len_U: int32.
      own: [U, C, J, ...], visible up to and including `own_index_U`.
      own_index_U: int32 index of the newest token, which is the same for all traces of a group.
    """
    U, C, H, E = q_UxCxHxE.shape
    J = own["v"].shape[2]
    with jax.named_scope("decode_attention"):
        q = _split_heads(q_UxCxHxE, J)  # u c j r e
        by_group = jnp.moveaxis(q, 1, 2).reshape(U, J, -1, E)  # u j (c r) e
        visible = jnp.arange(prompt["v"].shape[-2]) < prompt_len_U[:, None]
        of_prompt = _attend(by_group, prompt, visible[:, None, None])
        of_prompt = tuple(jnp.moveaxis(a.reshape(U, J, C, H // J, *a.shape[3:]), 2, 1) for a in of_prompt)
        visible = jnp.arange(own["v"].shape[-2]) <= own_index_U[:, None]
        out, _, weight = _join(of_prompt, _attend(q, own, visible[:, None, None, None]))
        return (out / weight[..., None]).reshape(U, C, H, E).astype(q_UxCxHxE.dtype)


def prefix_attention(q_UxQxHxE: jax.Array, prompt: Cache, start: jax.Array) -> jax.Array:
    """Causal attention of Q prompt tokens from `start` on over a cache that already holds them; [U, Q, H, E].

    Blockwise: scores of Q queries to Q keys exist at once, and blocks behind the last query are not read, however long
    the cache is.

    Args:
      q_UxQxHxE: queries at positions start ... start + Q - 1.
      prompt: [U, J, ...].
      start: scalar int32, a multiple of Q.
    """
    U, Q, H, E = q_UxQxHxE.shape
    J = prompt["v"].shape[1]
    q = jnp.moveaxis(_split_heads(q_UxQxHxE, J), 1, 3).reshape(U, J, -1, E)  # u j (r q) e
    position_N = jnp.tile(start + jnp.arange(Q), H // J)

    def add(b: jax.Array, total: Partial) -> Partial:
        visible = (b * Q + jnp.arange(Q)) <= position_N[:, None]
        return _join(total, _attend(q, read_tokens(prompt, b * Q, Q), visible))

    with jax.named_scope("prefix_attention"):
        nothing = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:-1], _MASKED), jnp.zeros(q.shape[:-1])
        out, _, weight = jax.lax.fori_loop(0, start // Q + 1, add, nothing)
        out = (out / weight[..., None]).reshape(U, J, H // J, Q, E)
        return jnp.moveaxis(out, 3, 1).reshape(U, Q, H, E).astype(q_UxQxHxE.dtype)


def _attend(q_xNxE: jax.Array, cache: Cache, visible_xNxT: jax.Array) -> Partial:
    key, value = cache["k"].astype(q_xNxE.dtype), cache["v"].astype(q_xNxE.dtype)
    score = jnp.einsum("...ne,...et->...nt", q_xNxE, key, preferred_element_type=jnp.float32)
    if "k_scale" in cache:
        score *= cache["k_scale"]
    score = jnp.where(visible_xNxT, score, _MASKED)
    top = jnp.max(score, axis=-1)
    weight = jnp.exp(score - top[..., None])
    total = jnp.sum(weight, axis=-1)
    if "v_scale" in cache:
        weight *= jnp.swapaxes(cache["v_scale"], -1, -2)
    out = jnp.einsum("...nt,...te->...ne", weight.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return out, top, total


def _join(a: Partial, b: Partial) -> Partial:
    """Attention to the keys of both parts. A part without any visible key adds exact zeros to one that has some."""
    top = jnp.maximum(a[1], b[1])
    scale_a, scale_b = jnp.exp(a[1] - top), jnp.exp(b[1] - top)
    return a[0] * scale_a[..., None] + b[0] * scale_b[..., None], top, a[2] * scale_a + b[2] * scale_b


def _split_heads(q: jax.Array, kv_heads: int) -> jax.Array:
    """[..., H, E] -> scaled [..., J, H / J, E]: the query heads that share a key/value head side by side."""
    *lead, H, E = q.shape
    return (q * (E**-0.5)).reshape(*lead, kv_heads, H // kv_heads, E)


def _in_query_blocks(
    attend: Callable[[jax.Array, jax.Array], jax.Array], q: jax.Array, index_Q: jax.Array, block: int, axis: int
) -> jax.Array:
    """Runs `attend(queries, their index)` on blocks along `axis`; one block's scores exist at a time."""
    Q = q.shape[axis]
    if block >= Q:
        return attend(q, index_Q)
    blocks = -(-Q // block)
    pad = [(0, 0)] * q.ndim
    pad[axis] = (0, blocks * block - Q)
    q = jnp.moveaxis(jnp.pad(q, pad), axis, 0).reshape(blocks, block, *q.shape[:axis], *q.shape[axis + 1 :])
    index = jnp.pad(index_Q, [(0, blocks * block - Q)] + [(0, 0)] * (index_Q.ndim - 1))
    index = index.reshape(blocks, block, *index_Q.shape[1:])
    attend_block = jax.checkpoint(lambda pair: jnp.moveaxis(attend(jnp.moveaxis(pair[0], 0, axis), pair[1]), axis, 0))
    out = jax.lax.map(attend_block, (q, index))
    return jnp.moveaxis(out.reshape(blocks * block, *out.shape[2:])[:Q], 0, axis)
