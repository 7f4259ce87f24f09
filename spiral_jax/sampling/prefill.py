"""Prompts -> their keys and values and the logits of the first token, in chunks of the prompt."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from spiral_jax.core.mesh import constrain_groups
from spiral_jax.model.attention.caches import prefix_attention
from spiral_jax.model.cache import Cache, cache_entries, empty_cache, write_entries
from spiral_jax.model.transformer import DecoderLayer, ModelConfig, rms_norm
from spiral_jax.sampling.weights import DecodeWeights

PREFILL_SCOPE = "prefill"  # a plan finds the loop in a compiled program by this name


@struct.dataclass
class Prompts:
    """What is computed in one call: W prompts of each of Z shards.

    Attributes:
      prompt_ZxWxP: int32, right-padded.
      prompt_len_ZxW: int32, >= 1.
    """

    prompt_ZxWxP: jax.Array
    prompt_len_ZxW: jax.Array


@struct.dataclass
class Prefilled:
    """Computed prompts: any number of groups, or pieces of one, may enter from each of them.

    Attributes:
      prompt_len_ZxW: int32.
      logits_ZxWxV: float32, behind each prompt's last token.
      prompt: a cache [Z, W, J, ...] for each layer.
    """

    prompt_len_ZxW: jax.Array
    logits_ZxWxV: jax.Array
    prompt: tuple[Cache, ...]


class _Progress(NamedTuple):
    """What the loop over chunks carries: caches so far, and the last token's activations."""

    caches: tuple[Cache, ...]
    last_UxD: jax.Array


def prefill(
    config: ModelConfig, cache_dtype: jnp.dtype, chunk: int, weights: DecodeWeights, new: Prompts
) -> Prefilled:
    """Runs right-padded prompts in chunks of tokens; stops behind the longest one, whatever P is.

    Args:
      chunk: prompt tokens whose activations exist at once; divides P.
    """
    Z, W, P = new.prompt_ZxWxP.shape
    U, arch = Z * W, config.arch
    prompt_UxP = constrain_groups(new.prompt_ZxWxP.reshape(U, P))
    prompt_len_U = constrain_groups(new.prompt_len_ZxW.reshape(U))
    block = DecoderLayer(config)

    def run_chunk(i: jax.Array, before: _Progress) -> _Progress:
        start = i * chunk
        ids_UxT = jax.lax.dynamic_slice_in_dim(prompt_UxP, start, chunk, axis=1)
        position_UxT = jnp.broadcast_to(start + jnp.arange(chunk), (U, chunk))

        x_UxTxD, caches = constrain_groups(weights.embed[ids_UxT]), []
        for layer, cache in zip(weights.layers, before.caches, strict=True):
            q, k, v = block.apply(layer, x_UxTxD, position_UxT, method="project")
            cache = write_entries(cache, cache_entries(k, v, cache_dtype), start)
            attended = prefix_attention(q, cache, start)
            x_UxTxD = block.apply(layer, x_UxTxD, attended, method="finish")
            caches.append(cache)

        at_U = prompt_len_U - 1 - start
        is_here_U = (at_U >= 0) & (at_U < chunk)
        nearest_Ux1x1 = jnp.clip(at_U, 0, chunk - 1)[:, None, None]
        here_UxD = jnp.take_along_axis(x_UxTxD, nearest_Ux1x1, axis=1)[:, 0]
        last_UxD = jnp.where(is_here_U[:, None], here_UxD, before.last_UxD)
        return _Progress(tuple(caches), last_UxD)

    with jax.named_scope(PREFILL_SCOPE):
        empty = tuple(empty_cache((U, arch.J), arch.E, P, cache_dtype) for _ in range(arch.L))
        nothing = jnp.zeros((U, arch.D), config.compute_dtype)
        start = jax.tree.map(constrain_groups, _Progress(empty, nothing))
        chunks = (jnp.max(prompt_len_U) + chunk - 1) // chunk
        end = jax.lax.fori_loop(0, chunks, run_chunk, start)

        last_UxD = rms_norm(end.last_UxD, weights.final_norm, arch.norm_eps)
        logits_UxV = jnp.einsum(
            "ud,dv->uv", last_UxD, weights.head, preferred_element_type=jnp.float32
        )

    def by_shard(a_Ux: jax.Array) -> jax.Array:
        return a_Ux.reshape(Z, W, *a_Ux.shape[1:])

    caches = jax.tree.map(by_shard, end.caches)
    return Prefilled(new.prompt_len_ZxW, by_shard(logits_UxV), caches)
