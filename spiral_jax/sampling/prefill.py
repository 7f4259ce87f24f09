"""Prompts -> their keys and values and the logits of the first token, in chunks of the prompt."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from spiral_jax.core.mesh import constrain_groups
from spiral_jax.model.cache import Cache, cache_entries, empty_cache, write_entries
from spiral_jax.model.cache_attention import prefix_attention
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
    """Prompts that are computed: any number of groups, or pieces of one, may enter from each of
    them.

    Attributes:
      prompt_len_ZxW: int32.
      logits_ZxWxV: float32, behind each prompt's last token.
      prompt: a cache [Z, W, J, ...] for each layer.
    """

    prompt_len_ZxW: jax.Array
    logits_ZxWxV: jax.Array
    prompt: tuple[Cache, ...]


def prefill(
    config: ModelConfig, cache_dtype: jnp.dtype, chunk: int, weights: DecodeWeights, new: Prompts
) -> Prefilled:
    """Runs right-padded prompts in chunks of tokens; stops behind the longest one, whatever P is.

    Args:
      chunk: prompt tokens whose activations exist at once; divides P.
    """
    Z, W, P = new.prompt_ZxWxP.shape
    prompt_UxP, prompt_len_U = new.prompt_ZxWxP.reshape(Z * W, P), new.prompt_len_ZxW.reshape(Z * W)
    caches, logits_UxV = _run_chunks(
        config,
        cache_dtype,
        chunk,
        weights,
        constrain_groups(prompt_UxP),
        constrain_groups(prompt_len_U),
    )
    caches, logits_ZxWxV = jax.tree.map(
        lambda a: a.reshape(Z, W, *a.shape[1:]), (caches, logits_UxV)
    )
    return Prefilled(new.prompt_len_ZxW, logits_ZxWxV, caches)


def _run_chunks(
    config: ModelConfig,
    cache_dtype: jnp.dtype,
    chunk: int,
    weights: DecodeWeights,
    prompt_UxP: jax.Array,
    prompt_len_U: jax.Array,
) -> tuple[tuple[Cache, ...], jax.Array]:
    """A cache [U, J, ...] of P tokens for each layer, and float32 logits [U, V] behind each
    prompt's last token.
    """
    (U, P), arch = prompt_UxP.shape, config.arch
    block = DecoderLayer(config)

    def run(
        i: jax.Array, carry: tuple[tuple[Cache, ...], jax.Array]
    ) -> tuple[tuple[Cache, ...], jax.Array]:
        (caches, last_UxD), start = carry, i * chunk
        ids = jax.lax.dynamic_slice_in_dim(prompt_UxP, start, chunk, axis=1)
        position = jnp.broadcast_to(start + jnp.arange(chunk), (U, chunk))
        x, written = constrain_groups(weights.embed[ids]), []
        for layer, cache in zip(weights.layers, caches, strict=True):
            q, k, v = block.apply(layer, x, position, method="project")
            cache = write_entries(cache, cache_entries(k, v, cache_dtype), start)
            out = prefix_attention(q, cache, start)
            x = block.apply(layer, x, out, method="finish")
            written.append(cache)
        at_U = prompt_len_U - 1 - start
        here = jnp.take_along_axis(x, jnp.clip(at_U, 0, chunk - 1)[:, None, None], axis=1)[:, 0]
        return tuple(written), jnp.where(((at_U >= 0) & (at_U < chunk))[:, None], here, last_UxD)

    with jax.named_scope(PREFILL_SCOPE):
        empty = tuple(empty_cache((U, arch.J), arch.E, P, cache_dtype) for _ in range(arch.L))
        empty = jax.tree.map(constrain_groups, empty)
        last = constrain_groups(jnp.zeros((U, arch.D), config.compute_dtype))
        chunks = (jnp.max(prompt_len_U) + chunk - 1) // chunk
        caches, last_UxD = jax.lax.fori_loop(0, chunks, run, (empty, last))
        last_UxD = rms_norm(last_UxD, weights.final_norm, arch.norm_eps)
        return caches, jnp.einsum(
            "ud,dv->uv", last_UxD, weights.head, preferred_element_type=jnp.float32
        )
