"""Prompts -> their keys and values in pages, in chunks of the prompt.

A prompt's last token is not among them: it is the first that each of its traces decodes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P

from spiral_jax.core import mesh as meshes
from spiral_jax.core.mesh import GROUP_AXES, constrain_groups
from spiral_jax.model.attention.backends import make_page_backend, make_prompt_backend
from spiral_jax.model.attention.part import KeyValue
from spiral_jax.model.transformer import DecoderLayer, rope_position
from spiral_jax.sampling.decode import POOL_SPEC, Pool
from spiral_jax.sampling.settings import DecodeSettings
from spiral_jax.sampling.weights import DecodeWeights, decode_config

PREFILL_SCOPE = "prefill"  # a plan finds the loop in a compiled program by this name


@struct.dataclass
class Prompts:
    """What is computed in one call: W prompts of each of Z shards.

    Attributes:
      token_ZxWxP: int32, right-padded, without each prompt's last token.
      length_ZxW: int32, of them; 0 where there is none.
      table_ZxWxT: int32 pages that they fill; page 0, nobody's, behind them.
    """

    token_ZxWxP: jax.Array
    length_ZxW: jax.Array
    table_ZxWxT: jax.Array


def prefill(
    settings: DecodeSettings, chunk: int, weights: DecodeWeights, pool: Pool, new: Prompts
) -> Pool:
    """Runs right-padded prompts in chunks of tokens; stops behind the longest one, whatever P is.

    Args:
      chunk: prompt tokens whose activations exist at once; divides P.
    """
    Z, W, P_ = new.token_ZxWxP.shape
    config, U = settings.config, Z * W
    arch = config.arch
    token_UxP = constrain_groups(new.token_ZxWxP.reshape(U, P_))
    length_U = constrain_groups(new.length_ZxW.reshape(U))
    module = DecoderLayer(decode_config(config, settings.mesh))
    backend = make_prompt_backend(config.attention)

    def run_chunk(i: jax.Array, stores: tuple[Any, ...]) -> tuple[Any, ...]:
        start = i * chunk
        ids_UxT = jax.lax.dynamic_slice_in_dim(token_UxP, start, chunk, axis=1)
        position_UxT = jnp.broadcast_to(start + jnp.arange(chunk), (U, chunk))

        x_UxTxD, filled = constrain_groups(weights.embed[ids_UxT]), []
        for number, (layer, store) in enumerate(zip(weights.layers, stores, strict=True)):
            rotated_UxT = rope_position(arch, number, position_UxT)
            q, k, v = module.apply(layer, x_UxTxD, rotated_UxT, method="project")
            attended, store = backend.attend(store, q, KeyValue(k, v), start, length_U)
            x_UxTxD = module.apply(layer, x_UxTxD, attended, method="finish")
            filled.append(store)
        return tuple(filled)

    with jax.named_scope(PREFILL_SCOPE):
        empty = tuple(
            backend.empty(U, P_, arch.J, arch.E, config.compute_dtype) for _ in range(arch.L)
        )
        chunks = (jnp.max(length_U) + chunk - 1) // chunk
        stores = jax.lax.fori_loop(0, chunks, run_chunk, jax.tree.map(constrain_groups, empty))

    def by_shard(a_Ux: jax.Array) -> jax.Array:
        return a_Ux.reshape(Z, W, *a_Ux.shape[1:])

    on_shards = meshes.over_shards(
        settings.mesh,
        make_page_backend(config.pages).write_prompts,
        arguments=(POOL_SPEC, P(GROUP_AXES, None, None, "tensor"), P(GROUP_AXES)),
        results=POOL_SPEC,
    )
    return tuple(
        on_shards(pages, jax.tree.map(by_shard, backend.written(store)), new.table_ZxWxT)
        for pages, store in zip(pool, stores, strict=True)
    )
