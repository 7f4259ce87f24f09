"""Prompts -> their keys and values and the logits of the first token, in chunks of the prompt."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from spiral_jax.core.mesh import constrain_groups
from spiral_jax.model.attention.backends import make_prompt_backend
from spiral_jax.model.attention.part import KeyValue
from spiral_jax.model.cache import Cache
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
    """What the loop over chunks carries.

    Attributes:
      stores: keys and values of each layer so far, as the backend stores them.
      last_UxD: activations of each prompt's last token, once it was there.
    """

    stores: tuple[Any, ...]
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
    module, backend = DecoderLayer(config), make_prompt_backend(config.attention, cache_dtype)

    def run_chunk(i: jax.Array, before: _Progress) -> _Progress:
        start = i * chunk
        ids_UxT = jax.lax.dynamic_slice_in_dim(prompt_UxP, start, chunk, axis=1)
        position_UxT = jnp.broadcast_to(start + jnp.arange(chunk), (U, chunk))

        x_UxTxD, stores = constrain_groups(weights.embed[ids_UxT]), []
        for layer, store in zip(weights.layers, before.stores, strict=True):
            q, k, v = module.apply(layer, x_UxTxD, position_UxT, method="project")
            attended, store = backend.attend(store, q, KeyValue(k, v), start, prompt_len_U)
            x_UxTxD = module.apply(layer, x_UxTxD, attended, method="finish")
            stores.append(store)

        at_U = prompt_len_U - 1 - start
        is_here_U = (at_U >= 0) & (at_U < chunk)
        nearest_Ux1x1 = jnp.clip(at_U, 0, chunk - 1)[:, None, None]
        here_UxD = jnp.take_along_axis(x_UxTxD, nearest_Ux1x1, axis=1)[:, 0]
        last_UxD = jnp.where(is_here_U[:, None], here_UxD, before.last_UxD)
        return _Progress(tuple(stores), last_UxD)

    with jax.named_scope(PREFILL_SCOPE):
        empty = tuple(
            backend.empty(U, P, arch.J, arch.E, config.compute_dtype) for _ in range(arch.L)
        )
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

    caches = jax.tree.map(by_shard, tuple(backend.cache(store) for store in end.stores))
    return Prefilled(new.prompt_len_ZxW, by_shard(logits_UxV), caches)
