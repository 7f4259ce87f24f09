"""spiral_jax's own engine: fp32, prompt keys and values once a group.

It also records log-probs, as training needs.
"""

from __future__ import annotations

import importlib.metadata
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from benchmarks.peers.contestant import Work, serve
from spiral_jax.core import mesh as meshes
from spiral_jax.core.groups import GroupRequests, Groups, Purpose, Role
from spiral_jax.core.metrics import Mean
from spiral_jax.model import hf
from spiral_jax.model.architecture import read_architecture
from spiral_jax.model.transformer import ModelConfig
from spiral_jax.sampling.draw import Draw
from spiral_jax.sampling.engine import Engine
from spiral_jax.sampling.protocol import Feed, Sampling, sample
from spiral_jax.sampling.settings import DecodeSettings, Schedule, SlotClass
from spiral_jax.sampling.shapes import abstract_state

HEAVY_TAIL_ROWS = tuple(range(4, 64, 4))


def equal_length_classes(U: int, C: int, P: int, G: int) -> tuple[SlotClass, ...]:
    """What a user would configure for U groups of one length: slots for all of them."""
    if G <= 128:
        return (SlotClass(U, C, P, G),)
    return SlotClass(U, C, P, G // 2), SlotClass(U, C, P, G)


def heavy_tail_classes(P: int, G: int) -> tuple[SlotClass, ...]:
    """What a user would configure for groups of 8 traces of very different lengths."""
    return (
        SlotClass(4, 8, P, G),
        SlotClass(4, 4, P, G),
        SlotClass(4, 2, P, G),
        SlotClass(8, 1, P, G),
    )


def make_schedule(work: Work) -> Schedule:
    """Slots for all groups where traces are of one length, else narrowing classes for a few."""
    (U, P), C, G = work.prompt_UxP.shape, work.limit_UxC.shape[1], work.longest
    if work.limit_UxC.min() == G:
        return Schedule(
            equal_length_classes(U, C, P, G),
            chunk=max(1, G // 2),
            exit_groups=1,
            prefill_tokens=U * P,
            row_counts=(U * C,),
        )
    return Schedule(
        heavy_tail_classes(P, G),
        chunk=64,
        exit_groups=1,
        prefill_tokens=P,
        row_counts=HEAVY_TAIL_ROWS,
    )


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
            "settings": "engine; equal lengths: all groups at once; heavy tail: slots of 8, 4, 2 "
            "and 1 traces",
        }

    def _engine(self, work: Work, temperature: float) -> Engine:
        key = make_schedule(work), temperature
        if key not in self.engines:
            settings = DecodeSettings(
                self.config, jnp.float32, Draw(temperature), 0, (), 256, self.mesh
            )
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
        first_tokens = groups.trace_len_UxC.size  # drawn by prefill
        return int(metrics["sampling/row_occupancy"].count) + first_tokens

    def peak_bytes(self, work: dict[str, Any], groups_per_batch: int) -> int:
        """Of the program that needs most, with every slot and the weights."""
        engine = self._engine(Work.from_json(work), 1.0)
        states = [abstract_state(engine.settings, slots) for slots in engine.schedule.classes]
        slots = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(states))
        needed = []
        for (kind, *_), program in engine.programs.items():
            memory = program.run.memory_analysis()
            arguments, results = memory.argument_size_in_bytes, memory.output_size_in_bytes
            in_and_out = arguments + results - memory.alias_size_in_bytes
            beside = slots if kind == "prefill" else 0
            needed.append(in_and_out + memory.temp_size_in_bytes + beside)
        return max(needed)


if __name__ == "__main__":
    serve(Spiral())
