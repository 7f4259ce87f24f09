"""What the training benchmark measures: the sampler benchmark's model; groups shaped as aggregation
and as search.
"""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np

from benchmarks.peers.step_work import LORA_RANK, StepWork
from benchmarks.sampler_cases import ARCHITECTURE
from spiral_jax.model.flops import ideal_train_flops

PARTS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class Shape:
    """U groups of P prompt tokens and C traces of G tokens each."""

    title: str
    U: int
    C: int
    P: int
    G: int

    def work(self, seed: int = 0) -> StepWork:
        rng = np.random.default_rng(seed)
        ids = lambda *shape: rng.integers(1, ARCHITECTURE.V, shape, np.int32)  # noqa: E731
        return StepWork(
            prompt_UxP=ids(self.U, self.P),
            trace_UxCxG=ids(self.U, self.C, self.G),
            recorded_UxCxG=rng.uniform(-11, -10, (self.U, self.C, self.G)).astype(
                np.float32
            ),  # about -log V
            weight_UxC=rng.normal(size=(self.U, self.C)).astype(np.float32),
        )

    def flops(self, adapters: bool) -> dict[str, float]:
        """Operations without anything computed twice: with each prompt once, and with it repeated
        for each trace.
        """
        rank = LORA_RANK if adapters else 0
        return {
            "shared": ideal_train_flops(ARCHITECTURE, rank, None, self.U, self.C, self.P, self.G),
            "repeated": ideal_train_flops(
                ARCHITECTURE, rank, None, self.U * self.C, 1, self.P, self.G
            ),
        }


SHAPES = {
    "aggregation": Shape("aggregation: a group of 1,024 + 4 x 128 tokens", 1, 4, 1024, 128),
    "search": Shape("search: a group of 128 + 8 x 256 tokens", 1, 8, 128, 256),
}
SMALL = Shape("gradient check", 2, 2, 24, 9)


def write_adapters(path: pathlib.Path) -> None:
    """Random adapters of all projections by our names, none of them zero: `layers/q/a` [L, in,
    rank] and so on.
    """
    a, rng, arrays = ARCHITECTURE, np.random.default_rng(2), {}
    heads, kv = a.H * a.E, a.J * a.E
    sizes = [(a.D, heads), (a.D, kv), (a.D, kv), (heads, a.D), (a.D, a.F), (a.D, a.F), (a.F, a.D)]
    for name, (width, features) in zip(PARTS, sizes, strict=True):
        arrays[f"layers/{name}/a"] = rng.normal(0, width**-0.5, (a.L, width, LORA_RANK)).astype(
            np.float32
        )
        arrays[f"layers/{name}/b"] = rng.normal(0, 0.02, (a.L, LORA_RANK, features)).astype(
            np.float32
        )
    np.savez(path, **arrays)
