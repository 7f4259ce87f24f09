"""What lies on the chips of a run, from shapes alone: state, decode copy, pages, batch."""

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
from spiral_jax.core.mesh import bytes_on_a_device
from spiral_jax.learner.blocks import Block, abstract_blocks, check_micro_batches
from spiral_jax.learner.state import TrainState, abstract_state, keeps_base
from spiral_jax.learner.step import make_train_step
from spiral_jax.model import hf
from spiral_jax.model.architecture import check_mesh
from spiral_jax.model.transformer import ModelConfig
from spiral_jax.planning.analytic import ShardedModel
from spiral_jax.planning.settings import PlanSettings
from spiral_jax.sampling.decode import Pool
from spiral_jax.sampling.engine import Engine, make_samplers
from spiral_jax.sampling.memory import Room
from spiral_jax.sampling.programs import Name, Recipe, recipes
from spiral_jax.sampling.shapes import abstract_pool
from spiral_jax.sampling.weights import abstract_weights, bytes_laid_out

_STOP_IDS = (0, 1)  # which ids end a trace changes no shape, and the tokenizer is not read


class TooFewPages(ConfigError):
    """The memory for pages does not hold the largest group."""


@dataclasses.dataclass(frozen=True)
class Inventory:
    """A run on a mesh of devices that need not exist; arrays are shapes with shardings.

    Attributes:
      train_step: jitted; see `learner.step.make_train_step`.
      base: frozen parameters, None where all are trained.
      blocks: of one step.
      decode_weights: all that the sampler reads.
      pool: the sampler's pages of keys and values.
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
    pool: Pool

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
        stored = 1 if self.model.quantised else width
        return ShardedModel(self.model.arch, dict(self.mesh.shape), width, stored)

    @functools.cached_property
    def recipes(self) -> dict[Name, Recipe]:
        """The sampler's programs; made for the first that is lowered; arithmetic needs none."""
        return recipes(self.engine.settings, self.engine.schedule)

    def pages(self) -> dict[str, int]:
        """What the sampler of a shard has: for JSON."""
        schedule = self.engine.schedule
        return {
            "pages": schedule.pages - 1,
            "page_tokens": schedule.page,
            "tokens": (schedule.pages - 1) * schedule.page,
            "rows": schedule.rows[-1],
            "rows_a_bundle": schedule.width,
            "shards": self.shards,
        }

    def state_memory(self) -> dict[str, int]:
        """Bytes a chip that always lie there: base and adapters (or all in float32), optimizer."""
        return {
            "weights": bytes_on_a_device([self.base, self.state.trained]),
            "optimizer": bytes_on_a_device(self.state.opt),
        }

    def policy_memory(self) -> dict[str, int]:
        """The same and the decode copy, which is there from one update to the start of the next."""
        return self.state_memory() | {"decode copy": self.decode_copy}

    @property
    def decode_copy(self) -> int:
        """Bytes a chip of what is laid out for the sampler."""
        return bytes_laid_out(self.model, self.mesh)

    def sampler_memory(self) -> dict[str, int]:
        """The same and the pool of pages, which is there while traces are sampled."""
        return self.policy_memory() | {"keys and values": bytes_on_a_device(self.pool)}


def take_inventory(
    c: ConfigDict, model: ModelConfig, mesh: Mesh | AbstractMesh, chip_bytes: int
) -> Inventory:
    """What a run of this configuration holds.

    Args:
      chip_bytes: memory of a chip, of which `config.sampling.memory` takes its share for pages.

    Raises:
      TooFewPages: that share does not hold the largest group.
      ConfigError: heads, columns or groups that the mesh does not divide.
    """
    settings = PlanSettings.from_config(c)
    learner = settings.learner
    check_mesh(model.arch, mesh)
    check_micro_batches(learner.shapes, mesh)
    base = None
    if keeps_base(learner, model):
        base = hf.abstract_params(model)
        base = meshes.with_shardings(base, meshes.weight_shardings(base, mesh))
    state = abstract_state(learner, model, mesh)
    room = Room(chip_bytes, resident=bytes_on_a_device([base, state]))
    try:
        engine, _ = make_samplers(c, model, mesh, _STOP_IDS, settings.limits, room)
    except ConfigError as error:
        raise TooFewPages(str(error)) from error
    return Inventory(
        settings=settings,
        model=model,
        mesh=mesh,
        train_step=make_train_step(learner, model),
        base=base,
        state=state,
        blocks=[place_block(block, mesh) for block in abstract_blocks(learner.shapes)],
        engine=engine,
        decode_weights=abstract_weights(model, mesh),
        pool=abstract_pool(engine.settings, engine.schedule),
    )


def place_block(block: Block, mesh: Mesh | AbstractMesh) -> Block:
    """Shapes of a block, with the shardings that training gives it."""
    groups, everywhere = meshes.group_sharding(mesh, leading=1), meshes.replicated(mesh)
    return meshes.with_shardings(
        block, jax.tree.map(lambda leaf: groups if leaf.ndim else everywhere, block)
    )
