"""Attention of loops to a prompt whose earlier chunks are stored: the sampler's prefill."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from spiral_jax.model.attention.part import Part, attend, join, nothing_seen, split_heads
from spiral_jax.model.cache import Cache, read_tokens

PREFIX_SCOPE = "prefix_attention"  # a plan finds its loop in a compiled program by this name


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
