"""Attention to caches: causal within a prompt, and two-part (prompt block + own trace) for what
continues it.

The sampler's: `prefix_attention` in prefill, `decode_attention`; training has `group_attention`.
Scores and softmax are float32. Parts that are attended to separately are joined by their
log-sum-exp, kept as (top score, sum of weights).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from spiral_jax.model.cache import Cache, read_tokens

# (sum of weighted values [..., N, E], top score [..., N], sum of weights [..., N]), float32; weight
# = exp(score - top)
Partial = tuple[jax.Array, jax.Array, jax.Array]

PREFIX_SCOPE = "prefix_attention"  # a plan finds its loop in a compiled program by this name

MASKED = -1e30  # finite: a row without any visible key stays finite


def decode_attention(
    q_UxCxHxE: jax.Array, prompt: Cache, prompt_len_U: jax.Array, own: Cache, own_index_U: jax.Array
) -> jax.Array:
    """One query of every trace, under one softmax over its group's prompt and its own tokens so
    far; [U, C, H, E].

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
        q = split_heads(q_UxCxHxE, J)  # u c j r e
        by_group = jnp.moveaxis(q, 1, 2).reshape(U, J, -1, E)  # u j (c r) e
        visible = jnp.arange(prompt["v"].shape[-2]) < prompt_len_U[:, None]
        of_prompt = attend(by_group, prompt, visible[:, None, None])
        of_prompt = tuple(
            jnp.moveaxis(a.reshape(U, J, C, H // J, *a.shape[3:]), 2, 1) for a in of_prompt
        )
        visible = jnp.arange(own["v"].shape[-2]) <= own_index_U[:, None]
        out, _, weight = join(of_prompt, attend(q, own, visible[:, None, None, None]))
        return (out / weight[..., None]).reshape(U, C, H, E).astype(q_UxCxHxE.dtype)


def prefix_attention(q_UxQxHxE: jax.Array, prompt: Cache, start: jax.Array) -> jax.Array:
    """Causal attention of Q prompt tokens from `start` on over a cache that already holds them; [U,
    Q, H, E].

    Blockwise: scores of Q queries to Q keys exist at once, and blocks behind the last query are not
    read, however long the cache is.

    Args:
      q_UxQxHxE: queries at positions start ... start + Q - 1.
      prompt: [U, J, ...].
      start: scalar int32, a multiple of Q.
    """
    U, Q, H, E = q_UxQxHxE.shape
    J = prompt["v"].shape[1]
    q = jnp.moveaxis(split_heads(q_UxQxHxE, J), 1, 3).reshape(U, J, -1, E)  # u j (r q) e
    position_N = jnp.tile(start + jnp.arange(Q), H // J)

    def add(b: jax.Array, total: Partial) -> Partial:
        visible = (b * Q + jnp.arange(Q)) <= position_N[:, None]
        return join(total, attend(q, read_tokens(prompt, b * Q, Q), visible))

    with jax.named_scope(PREFIX_SCOPE):
        nothing = (
            jnp.zeros(q.shape, jnp.float32),
            jnp.full(q.shape[:-1], MASKED),
            jnp.zeros(q.shape[:-1]),
        )
        out, _, weight = jax.lax.fori_loop(0, start // Q + 1, add, nothing)
        out = (out / weight[..., None]).reshape(U, J, H // J, Q, E)
        return jnp.moveaxis(out, 3, 1).reshape(U, Q, H, E).astype(q_UxQxHxE.dtype)


def attend(q_xNxE: jax.Array, cache: Cache, visible_xNxT: jax.Array) -> Partial:
    key, value = cache["k"].astype(q_xNxE.dtype), cache["v"].astype(q_xNxE.dtype)
    score = jnp.einsum("...ne,...et->...nt", q_xNxE, key, preferred_element_type=jnp.float32)
    if "k_scale" in cache:
        score *= cache["k_scale"]
    score = jnp.where(visible_xNxT, score, MASKED)
    top = jnp.max(score, axis=-1)
    weight = jnp.exp(score - top[..., None])
    total = jnp.sum(weight, axis=-1)
    if "v_scale" in cache:
        weight *= jnp.swapaxes(cache["v_scale"], -1, -2)
    out = jnp.einsum(
        "...nt,...te->...ne", weight.astype(value.dtype), value, preferred_element_type=jnp.float32
    )
    return out, top, total


def join(a: Partial, b: Partial) -> Partial:
    """Attention to the keys of both parts. A part without any visible key adds exact zeros to one
    that has some.
    """
    top = jnp.maximum(a[1], b[1])
    scale_a, scale_b = jnp.exp(a[1] - top), jnp.exp(b[1] - top)
    return (
        a[0] * scale_a[..., None] + b[0] * scale_b[..., None],
        top,
        a[2] * scale_a + b[2] * scale_b,
    )


def split_heads(q: jax.Array, kv_heads: int) -> jax.Array:
    """[..., H, E] -> scaled [..., J, H / J, E]: the query heads that share a key/value head side by
    side.
    """
    *lead, H, E = q.shape
    return (q * (E**-0.5)).reshape(*lead, kv_heads, H // kv_heads, E)
