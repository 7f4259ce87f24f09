"""Attention over groups: causal within a prompt, and two-part (prompt block + own trace) for what continues it.

One function serves training and decoding, so both see the same numbers. Scores and softmax are float32.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

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
      q_UxCxQxHxE: queries; Q = G in training, 1 in decoding.
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
