"""Attention of whole groups in training, made of parts under one softmax.

A prompt's token attends to its past; a trace's token to the whole prompt and to its own past. The
queries of all traces and of all heads that share a key are rows of one matrix product with the
prompt's keys, which exist once a group.

The parts, and the backward pass, are loops over blocks (`blockwise`), which runs anywhere; kernels
of a backend would take its place.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spiral_jax.model.attention_parts import MASKED, split_heads
from spiral_jax.model.blockwise import KeyCounts, KeySizes, attend_blockwise, even_block
from spiral_jax.model.cache import cache_entries

# Names of scopes: a plan finds the loops of a compiled program by them.
PROMPT_SCOPE, TRACE_SCOPE = "prompt_attention", "trace_attention"


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
        q, own_kv = q_UxPxHxE[:, None], (k_UxPxJxE[:, None], v_UxPxJxE[:, None])
        return _attention(q, own_kv, None, lengths.prompt, lengths, block)[:, 0]


def trace_attention(
    q_UxCxGxHxE: jax.Array,
    prompt_kv: tuple[jax.Array, jax.Array],
    own_kv: tuple[jax.Array, jax.Array],
    lengths: Lengths,
    block: int,
) -> jax.Array:
    """Attention of trace tokens to the group's prompt and the trace's own past; [U, C, G, H, E].

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
    """Attention of each prompt's last token to its prompt; [U, H, E].

    It is one query a group, so its scores exist at once.
    """
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    with jax.named_scope("last_token_attention"):
        q_UxJxRxE = split_heads(q_UxHxE, k_UxPxJxE.shape[-2])
        visible = jnp.arange(k_UxPxJxE.shape[1]) < prompt_len_U[:, None, None, None]
        score = jnp.where(visible, dot("ujre,upje->ujrp", q_UxJxRxE, k_UxPxJxE), MASKED)
        weight = jax.nn.softmax(score).astype(q_UxHxE.dtype)
        out = dot("ujrp,upje->ujre", weight, v_UxPxJxE)
        return out.reshape(q_UxHxE.shape).astype(q_UxHxE.dtype)


def _attention(
    q_UxCxQxHxE: jax.Array,
    own_kv: tuple[jax.Array, jax.Array],
    prompt_kv: tuple[jax.Array, jax.Array] | None,
    longest: jax.Array,
    lengths: Lengths,
    block: int,
) -> jax.Array:
    """Brings heads to the front and every length to whole blocks; `longest`: queries that count."""
    U, C, Q, H, E = q_UxCxQxHxE.shape
    J = own_kv[0].shape[-2]
    sizes = KeySizes(even_block(Q, block), 1)

    q = split_heads(_pad_to_blocks(q_UxCxQxHxE, sizes.own, axis=2), J)
    q_UxJxCxRxQxE = jnp.moveaxis(q, (3, 4), (1, 3))
    k, v = (_pad_to_blocks(a, sizes.own, axis=2) for a in own_kv)
    own = cache_entries(k, v, q.dtype)
    own = {name: jnp.swapaxes(a, 1, 2) for name, a in own.items()}  # u j c . .

    prompt = None
    if prompt_kv is not None:
        sizes = sizes._replace(prompt=even_block(prompt_kv[0].shape[1], block))
        k, v = (_pad_to_blocks(a, sizes.prompt, axis=1) for a in prompt_kv)
        prompt = cache_entries(k, v, q.dtype)  # u j . .

    counts = KeyCounts(-(-longest // sizes.own), -(-lengths.prompt // sizes.prompt))
    out = attend_blockwise(sizes, q_UxJxCxRxQxE, own, prompt, lengths.prompt_U, counts)
    return jnp.moveaxis(out, (1, 3), (3, 4)).reshape(U, C, -1, H, E)[:, :, :Q]


def _pad_to_blocks(a: jax.Array, size: int, axis: int) -> jax.Array:
    """Padded with zeros along `axis` to a multiple of `size`."""
    padding = [(0, 0)] * a.ndim
    padding[axis] = (0, -a.shape[axis] % size)
    return jnp.pad(a, padding)
