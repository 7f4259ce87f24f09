"""spiral_jax's own engine: fp32, prompt keys and values once a group.

It also records log-probs, as training needs.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from benchmarks.peers.contestant import Work, serve
from spiral_jax.core import mesh as meshes
from spiral_jax.core.config import defaults
from spiral_jax.core.groups import GroupRequests, Groups, Purpose, Role
from spiral_jax.core.metrics import Mean
from spiral_jax.model import hf
from spiral_jax.model.architecture import read_architecture
from spiral_jax.model.transformer import ModelConfig
from spiral_jax.sampling import memory
from spiral_jax.sampling.draw import Draw
from spiral_jax.sampling.engine import Engine
from spiral_jax.sampling.memory import Room, memory_of_a_device
from spiral_jax.sampling.protocol import Feed, Sampling, sample
from spiral_jax.sampling.settings import DecodeSettings, GroupLimits, Schedule

HEAVY_TAIL_ROWS = 64


def make_schedule(work: Work, settings: DecodeSettings) -> Schedule:
    """What a user would configure: rows and pages for all groups of one length, else a few rows."""
    (U, P), C, G = work.prompt_UxP.shape, work.limit_UxC.shape[1], work.longest
    is_even = work.limit_UxC.min() == G
    c = defaults()
    c.sampling.rows = U * C if is_even else HEAVY_TAIL_ROWS
    c.sampling.chunk = G if is_even else 64
    c.sampling.prefill_tokens = U * P if is_even else P
    room = Room(memory_of_a_device(settings.mesh), resident=0)
    schedule = memory.make_schedule(c, settings, [GroupLimits(P, C, G)], room)
    if not is_even:
        return schedule
    # a row begins where it leaves each of the others a page to grow by
    filled = U * schedule.prompt_pages + U * C * (schedule.own_pages + 1)
    return dataclasses.replace(schedule, pages=max(1 + filled, schedule.least_pages))


def make_requests(work: Work, seed: int) -> GroupRequests:
    U, P = work.prompt_UxP.shape
    id_Ux6 = np.zeros((U, 6), np.int32)
    id_Ux6[:] = (Purpose.EVALUATION, seed, 0, 0, Role.SEARCH, 0)
    id_Ux6[:, 2] = np.arange(U)
    C, G = work.limit_UxC.shape[1], work.longest
    return GroupRequests(work.prompt_UxP, np.full(U, P, np.int32), id_Ux6, C, G, work.limit_UxC)


class Counting:
    """An engine that keeps its last stream, for the metrics."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def stream(self, weights: Any, feed: Feed) -> Sampling:
        self.sampling = self.engine.stream(weights, feed)
        return self.sampling


class Spiral:
    def load(self, model: str) -> dict[str, Any]:
        path = pathlib.Path(model)
        self.config = ModelConfig(read_architecture(path))
        self.mesh = jax.make_mesh((1, 1, 1), meshes.AXES, axis_types=(AxisType.Auto,) * 3)
        self.params = hf.load_params(path, self.config, self.mesh)
        self.engines: dict[tuple[Schedule, float], Engine] = {}
        return {
            "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax")},
            "settings": "engine; equal lengths: all groups at once; heavy tail: "
            f"{HEAVY_TAIL_ROWS} rows",
        }

    def _engine(self, work: Work, temperature: float) -> Engine:
        draw = Draw(temperature)
        settings = DecodeSettings(self.config, jnp.float32, draw, 0, (), 256, self.mesh)
        key = make_schedule(work, settings), temperature
        if key not in self.engines:
            self.engines[key] = Engine(settings, key[0])
            self.weights = self.engines[key].prepare({"params": self.params})
        return self.engines[key]

    def _groups(
        self, work: Work, seed: int, temperature: float
    ) -> tuple[Groups, dict[str, Mean | float]]:
        counting = Counting(self._engine(work, temperature))
        groups = sample(counting, self.weights, make_requests(work, seed))
        return groups, counting.sampling.metrics()

    def greedy(self, prompt: list[int], tokens: int) -> list[int]:
        work = Work(np.array([prompt], np.int32), np.array([[tokens]], np.int32))
        return self._groups(work, 0, 0.0)[0].trace_ids(0, 0).tolist()

    def sample(
        self, work: dict[str, Any], groups_per_batch: int, seed: int, temperature: float = 1.0
    ) -> int:
        """`groups_per_batch` is for peers with static batches."""
        work = Work.from_json(work)
        groups, metrics = self._groups(work, seed, temperature)
        if (groups.trace_len_UxC < work.limit_UxC).any():
            raise RuntimeError("traces shorter than their limits")
        return int(metrics["sampling/row_occupancy"].count)

    def peak_bytes(self, work: dict[str, Any], groups_per_batch: int) -> int:
        """Of the program that needs most: weights and all pages are among its arguments."""
        needed = []
        for program in self._engine(Work.from_json(work), 1.0).programs.values():
            found = program.run.memory_analysis()
            arguments, results = found.argument_size_in_bytes, found.output_size_in_bytes
            in_and_out = arguments + results - found.alias_size_in_bytes
            needed.append(in_and_out + found.temp_size_in_bytes)
        return max(needed)


if __name__ == "__main__":
    serve(Spiral())
