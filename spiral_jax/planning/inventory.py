"""What lies on the chips of a run, from shapes alone: state, decode copy, slots, batch."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from spiral_jax.core import mesh as meshes
from spiral_jax.core.config import ConfigError
from spiral_jax.learner.blocks import Block, abstract_blocks, check_micro_batches
from spiral_jax.learner.state import TrainState, abstract_state, keeps_base
from spiral_jax.learner.step import make_train_step
from spiral_jax.model import hf
from spiral_jax.model.architecture import check_mesh
from spiral_jax.model.transformer import ModelConfig
from spiral_jax.planning.analytic import ShardedModel, bytes_a_chip
from spiral_jax.planning.settings import PlanSettings
from spiral_jax.sampling import shapes
from spiral_jax.sampling.engine import Engine, make_samplers
from spiral_jax.sampling.programs import Name, Recipe, recipes
from spiral_jax.sampling.weights import abstract_weights

_STOP_IDS = (0, 1)  # which ids end a trace changes no shape, and the tokenizer is not read


class SamplerMisfit(ConfigError):
    """The mesh does not divide the sampler's slots."""


@dataclasses.dataclass(frozen=True)
class Inventory:
    """A run on a mesh of devices that need not exist; arrays are shapes with shardings.

    Attributes:
      train_step: jitted; see `learner.step.make_train_step`.
      base: frozen parameters, None where all are trained.
      blocks: of one step.
      decode_weights: the decode copy.
      slots: the sampler's state, by class.
    """

    settings: PlanSettings
    model: ModelConfig
    mesh: Mesh | AbstractMesh
    train_step: Callable[..., Any]
    base: Any | None
    state: TrainState
    blocks: list[Block]
    engine: Engine
    decode_weights: Any
    slots: list[Any]

    @property
    def chips(self) -> int:
        return math.prod(self.mesh.shape.values())

    @property
    def shards(self) -> int:
        """Shards of the groups."""
        return meshes.group_count_multiple(self.mesh)

    @property
    def tensor(self) -> int:
        """Chips that share one shard of groups."""
        return self.mesh.shape["tensor"]

    @property
    def sharded_model(self) -> ShardedModel:
        width = self.model.compute_dtype.itemsize
        return ShardedModel(self.model.arch, dict(self.mesh.shape), width)

    @property
    def caches(self) -> list[Any]:
        """Keys and values of prompts and of traces, by class."""
        return [[state.prompt, state.own] for state in self.slots]

    @functools.cached_property
    def recipes(self) -> dict[Name, Recipe]:
        """The sampler's programs; made for the first that is lowered; arithmetic needs none."""
        return recipes(self.engine.settings, self.engine.schedule)

    def state_memory(self) -> dict[str, int]:
        """Bytes a chip that always lie there: base and adapters (or all in float32), optimizer."""
        return {
            "weights": bytes_a_chip([self.base, self.state.trained]),
            "optimizer": bytes_a_chip(self.state.opt),
        }

    def policy_memory(self) -> dict[str, int]:
        """The same and the decode copy, which is there from one update to the start of the next."""
        return self.state_memory() | {"decode copy": bytes_a_chip(self.decode_weights)}

    def sampler_memory(self) -> dict[str, int]:
        """The same and the caches of all slots, which are there while traces are sampled."""
        return self.policy_memory() | {"keys and values": bytes_a_chip(self.caches)}


def take_inventory(c: ConfigDict, model: ModelConfig, mesh: Mesh | AbstractMesh) -> Inventory:
    """What a run of this configuration holds.

    Raises:
      SamplerMisfit: slots that the mesh does not divide.
      ConfigError: heads, columns or groups that it does not divide.
    """
    settings = PlanSettings.from_config(c)
    learner = settings.learner
    check_mesh(model.arch, mesh)
    check_micro_batches(learner.shapes, mesh)
    try:
        engine, _ = make_samplers(c, model, mesh, _STOP_IDS)
    except ConfigError as error:
        raise SamplerMisfit(str(error)) from error

    base = None
    if keeps_base(learner, model):
        base = hf.abstract_params(model)
        base = meshes.with_shardings(base, meshes.weight_shardings(base, mesh))
    return Inventory(
        settings=settings,
        model=model,
        mesh=mesh,
        train_step=make_train_step(learner, model),
        base=base,
        state=abstract_state(learner, model, mesh),
        blocks=[place_block(block, mesh) for block in abstract_blocks(learner.shapes)],
        engine=engine,
        decode_weights=abstract_weights(model, mesh),
        slots=[shapes.abstract_state(engine.settings, slots) for slots in engine.schedule.classes],
    )


def place_block(block: Block, mesh: Mesh | AbstractMesh) -> Block:
    """Shapes of a block, with the shardings that training gives it."""
    groups, everywhere = meshes.group_sharding(mesh, leading=1), meshes.replicated(mesh)
    return meshes.with_shardings(
        block, jax.tree.map(lambda leaf: groups if leaf.ndim else everywhere, block)
    )
