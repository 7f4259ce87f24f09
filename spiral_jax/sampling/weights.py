"""The policy as the sampler reads it: laid out once after each update.

A float base is copied: training scans over stacked weights, and a loop over tokens that sliced them
would copy each layer for every token. A base in int8 lies in separate arrays already. The sampler
reads these very arrays, unless the mesh axis `fsdp` cuts them; the adapters alone are laid out.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from spiral_jax.core import mesh as meshes
from spiral_jax.core.mesh import bytes_on_a_device
from spiral_jax.model.transformer import ModelConfig, head_kernel, init_variables
from spiral_jax.model.trees import join_projections, unstack_layers


@struct.dataclass
class DecodeWeights:
    """Weights in the compute dtype or int8, replicated over groups and cut along `tensor` only.

    Adapters are not added to the base, which would round them to its dtype. Projections of a float
    base that read the same input are one matrix, with B of their adapters below it
    (`linear.JoinedLinear`).

    Attributes:
      embed: [V, D].
      head: [D, V]; beside a float base that ties them a transposed copy, so that no step transposes
        it; beside one in int8 None: the embedding is read for it.
      final_norm: [D].
      layers: L trees of variables.
    """

    embed: jax.Array | None
    head: jax.Array | None
    final_norm: jax.Array | None
    layers: tuple[dict[str, Any], ...]

    def logits(self, x_ZxNxD: jax.Array) -> jax.Array:
        """float32 [Z, N, V]."""
        axes, kernel = ("vd", self.embed) if self.head is None else ("dv", self.head)
        return jnp.einsum(f"znd,{axes}->znv", x_ZxNxD, kernel, preferred_element_type=jnp.float32)


def decode_config(config: ModelConfig, mesh: Mesh) -> ModelConfig:
    """Of the `DecoderLayer` that takes `DecodeWeights.layers`."""
    return dataclasses.replace(config, joined=0 if config.quantised else mesh.shape["tensor"])


def reads_base(config: ModelConfig, mesh: Mesh) -> bool:
    """Whether the sampler reads the base's own arrays."""
    return config.quantised and mesh.shape["fsdp"] == 1


def prepare(variables: dict[str, Any], config: ModelConfig, mesh: Mesh) -> DecodeWeights:
    """`DecodeWeights` from the model's collections, wherever those lie."""
    made = lay_out(variables, config, mesh)
    return _beside_base(variables["params"], made.layers) if reads_base(config, mesh) else made


@functools.partial(jax.jit, static_argnums=(1, 2))
def lay_out(variables: dict[str, Any], config: ModelConfig, mesh: Mesh) -> DecodeWeights:
    """What of `DecodeWeights` is made anew; nothing else is in it."""
    if not config.quantised:
        weights = _copied(variables, config, mesh)
    elif reads_base(config, mesh):
        weights = DecodeWeights(None, None, None, _adapters(variables, config))
    else:
        weights = _beside_base(variables["params"], _adapters(variables, config))
    place = meshes.weight_shardings(weights, mesh, decode=True)
    return jax.lax.with_sharding_constraint(weights, place)


def _copied(variables: dict[str, Any], config: ModelConfig, mesh: Mesh) -> DecodeWeights:
    variables = jax.tree.map(lambda a: a.astype(config.compute_dtype), variables)
    params, blocks = variables["params"], decode_config(config, mesh).joined
    layers = unstack_layers(variables, config.arch.L)
    return DecodeWeights(
        embed=params["embed"],
        head=head_kernel(config, params),
        final_norm=params["final_norm"],
        layers=tuple(join_projections(layer, blocks) for layer in layers),
    )


def _adapters(variables: dict[str, Any], config: ModelConfig) -> tuple[dict[str, Any], ...]:
    """Those of each layer, in the compute dtype."""
    adapters = {name: tree for name, tree in variables.items() if name != "params"}
    adapters = jax.tree.map(lambda a: a.astype(config.compute_dtype), adapters)
    return unstack_layers(adapters, config.arch.L)


def _beside_base(base: dict[str, Any], adapters: tuple[dict[str, Any], ...]) -> DecodeWeights:
    """A base in int8 as it is."""
    of_base = unstack_layers({"params": base}, len(adapters))
    return DecodeWeights(
        embed=base["embed"],
        head=base.get("head"),
        final_norm=base["final_norm"],
        layers=tuple(one | other for one, other in zip(of_base, adapters, strict=True)),
    )


@functools.cache  # a start asks for them many times, and finding them traces the model
def abstract_weights(config: ModelConfig, mesh: Mesh) -> DecodeWeights:
    """Shapes, dtypes and shardings of `DecodeWeights`."""
    return _abstract(prepare, config, mesh)


@functools.cache
def bytes_laid_out(config: ModelConfig, mesh: Mesh) -> int:
    """Bytes on a device of what `prepare` makes: of what is not the base's own arrays."""
    return bytes_on_a_device(_abstract(lay_out, config, mesh))


def _abstract(
    function: Callable[..., DecodeWeights], config: ModelConfig, mesh: Mesh
) -> DecodeWeights:
    variables = jax.eval_shape(lambda: init_variables(config, jax.random.key(0)))
    weights = jax.eval_shape(lambda tree: function(tree, config, mesh), variables)
    return meshes.with_shardings(weights, meshes.weight_shardings(weights, mesh, decode=True))
