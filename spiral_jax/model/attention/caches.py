"""The sampler's attention to its caches: of a prompt in prefill, and of one token in decoding.

Training has `groups.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from spiral_jax.model.attention.part import Part, attend, join, nothing_seen, split_heads
from spiral_jax.model.cache import Cache, read_tokens

PREFIX_SCOPE = "prefix_attention"  # a plan finds its loop in a compiled program by this name


def decode_attention(
    q_UxCxHxE: jax.Array, prompt: Cache, prompt_len_U: jax.Array, own: Cache, own_index_U: jax.Array
) -> jax.Array:
    """One query of every trace, over its group's prompt and its own tokens so far; [U, C, H, E].

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
        q_UxCxJxRxE = split_heads(q_UxCxHxE, J)

        # Queries of all traces are rows of one product with the prompt's keys.
        by_group = jnp.moveaxis(q_UxCxJxRxE, 1, 2).reshape(U, J, -1, E)  # u j (c r) e
        in_prompt = jnp.arange(prompt["v"].shape[-2]) < prompt_len_U[:, None]
        of_group = attend(by_group, prompt, in_prompt[:, None, None])
        of_prompt = jax.tree.map(
            lambda a: jnp.moveaxis(a.reshape(U, J, C, H // J, *a.shape[3:]), 2, 1), of_group
        )

        so_far = jnp.arange(own["v"].shape[-2]) <= own_index_U[:, None]
        of_own = attend(q_UxCxJxRxE, own, so_far[:, None, None, None])
        return join(of_prompt, of_own).output(q_UxCxHxE.dtype).reshape(U, C, H, E)


def prefix_attention(q_UxQxHxE: jax.Array, prompt: Cache, start: jax.Array) -> jax.Array:
    """Causal attention of Q prompt tokens over a cache that already holds them; [U, Q, H, E].

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

    def add_block(b: jax.Array, seen: Part) -> Part:
        visible = (b * Q + jnp.arange(Q)) <= position_N[:, None]
        return join(seen, attend(q, read_tokens(prompt, b * Q, Q), visible))

    with jax.named_scope(PREFIX_SCOPE):
        seen = jax.lax.fori_loop(0, start // Q + 1, add_block, nothing_seen(q))
        out = seen.output(q_UxQxHxE.dtype).reshape(U, J, H // J, Q, E)
        return jnp.moveaxis(out, 3, 1).reshape(U, Q, H, E)
