"""The rollout engine: a `Sampler` with continuous admission, and the door of this room.

The programs are compiled once (`programs.py`); each stream is a `Decoding`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from spiral_jax.core.config import ConfigError
from spiral_jax.model.transformer import ModelConfig
from spiral_jax.sampling.decoding import Decoding
from spiral_jax.sampling.memory import Room, describe, make_schedule
from spiral_jax.sampling.programs import CompiledProgram, Name, compile_programs
from spiral_jax.sampling.protocol import Feed
from spiral_jax.sampling.settings import (
    DecodeSettings,
    GroupLimits,
    Schedule,
    make_decode_settings,
    make_eval_draw,
)
from spiral_jax.sampling.weights import DecodeWeights, prepare


class Engine:
    """A `Sampler` with continuous admission.

    Args:
      settings: model, draws, mesh.
      schedule: pages, rows, and how long they are decoded at a time.

    Raises:
      ConfigError: a stop id outside the vocabulary.
    """

    def __init__(self, settings: DecodeSettings, schedule: Schedule):
        self.settings = settings
        self.schedule = schedule
        self._programs: dict[Name, CompiledProgram] = {}
        _check_stop_ids(settings)

    @property
    def programs(self) -> dict[Name, CompiledProgram]:
        """All compiled programs; compiles them at the first use."""
        if not self._programs:
            self._programs = compile_programs(self.settings, self.schedule)
        return self._programs

    def start_report(self) -> str:
        """Compiles what is not compiled yet; says what there is: programs, times, memory."""
        return describe(self.programs, self.settings, self.schedule)

    def prepare(self, variables: dict[str, Any]) -> DecodeWeights:
        """The policy as the programs read it; a base in int8 may be shared, and must stay."""
        with jax.set_mesh(self.settings.mesh):
            return prepare(variables, self.settings.config, self.settings.mesh)

    def stream(self, weights: DecodeWeights, feed: Feed) -> Decoding:
        """Begins to sample what `feed` gives; see `protocol.Sampler`."""
        return Decoding(self.settings, self.schedule, self.programs, weights, feed)


def make_samplers(
    c: ConfigDict,
    model: ModelConfig,
    mesh: Mesh,
    stop_ids: tuple[int, ...],
    limits: Sequence[GroupLimits],
    room: Room,
) -> tuple[Engine, Engine]:
    """The samplers of training and of evaluation.

    They are one and the same unless `config.eval` draws in another way.

    Args:
      limits: of the groups of every stage of both.

    Raises:
      ConfigError: not even the largest group has room; a stop id outside the vocabulary.
    """
    settings = make_decode_settings(c, model, mesh, stop_ids)
    schedule = make_schedule(c, settings, limits, room)
    sampler, eval_draw = Engine(settings, schedule), make_eval_draw(c)
    if eval_draw == settings.draw:
        return sampler, sampler
    return sampler, Engine(dataclasses.replace(settings, draw=eval_draw), schedule)


def _check_stop_ids(settings: DecodeSettings) -> None:
    V = settings.config.arch.V
    outside = [stop for stop in settings.stop_ids if not 0 <= stop < V]
    if outside:
        raise ConfigError(
            f"stop ids {outside} are outside the vocabulary of {V} ids: "
            "mend generation_config.json."
        )
