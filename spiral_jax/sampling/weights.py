"""The policy as the sampler reads it: laid out once after each update."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from flax import struct
from jax.sharding import Mesh

from spiral_jax.core import mesh as meshes
from spiral_jax.model.transformer import (
    ModelConfig,
    head_kernel,
    init_variables,
    join_projections,
    unstack_layers,
)


@struct.dataclass
class DecodeWeights:
    """Weights in the compute dtype, replicated over groups and cut along `tensor` only.

    Adapters are not added to the base, which would round them to its dtype. Projections that read
    the same input are one matrix, with B of their adapters below it (`linear.JoinedLinear`).

    Attributes:
      embed: [V, D].
      head: [D, V]; a transposed copy where they are tied, so that no step transposes it.
      final_norm: [D].
      layers: L trees of variables; stacked weights, sliced inside the decode loop, would be copied
        whole.
    """

    embed: jax.Array
    head: jax.Array
    final_norm: jax.Array
    layers: tuple[dict[str, Any], ...]


def decode_config(config: ModelConfig, mesh: Mesh) -> ModelConfig:
    """Of the `DecoderLayer` that takes `DecodeWeights.layers`."""
    return dataclasses.replace(config, joined=mesh.shape["tensor"])


@functools.partial(jax.jit, static_argnums=(1, 2))
def lay_out(variables: dict[str, Any], config: ModelConfig, mesh: Mesh) -> DecodeWeights:
    """`DecodeWeights` from the model's collections, wherever those lie."""
    variables = jax.tree.map(lambda a: a.astype(config.compute_dtype), variables)
    params, joined = variables["params"], decode_config(config, mesh)
    layers = unstack_layers(variables, config.arch.L)
    weights = DecodeWeights(
        embed=params["embed"],
        head=head_kernel(config, params),
        final_norm=params["final_norm"],
        layers=tuple(join_projections(joined, layer) for layer in layers),
    )
    place = meshes.weight_shardings(weights, mesh, decode=True)
    return jax.lax.with_sharding_constraint(weights, place)


@functools.cache  # a start asks for them many times, and finding them traces the model
def abstract_weights(config: ModelConfig, mesh: Mesh) -> DecodeWeights:
    """Shapes, dtypes and shardings of `DecodeWeights`."""
    variables = jax.eval_shape(lambda: init_variables(config, jax.random.key(0)))
    weights = jax.eval_shape(lambda tree: lay_out(tree, config, mesh), variables)
    place = meshes.weight_shardings(weights, mesh, decode=True)
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), weights, place
    )
