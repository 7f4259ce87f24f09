"""What the training benchmark measures: groups shaped as aggregation and as search.

The model is the sampler benchmark's.
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
        U, C, P, G = self.U, self.C, self.P, self.G
        return StepWork(
            prompt_UxP=rng.integers(1, ARCHITECTURE.V, (U, P), np.int32),
            trace_UxCxG=rng.integers(1, ARCHITECTURE.V, (U, C, G), np.int32),
            # about -log V
            recorded_UxCxG=rng.uniform(-11, -10, (U, C, G)).astype(np.float32),
            weight_UxC=rng.normal(size=(U, C)).astype(np.float32),
        )

    def flops(self, adapters: bool) -> dict[str, float]:
        """Operations without anything computed twice.

        With each prompt once, and with it repeated for each trace.
        """
        rank = LORA_RANK if adapters else 0
        U, C, P, G = self.U, self.C, self.P, self.G
        return {
            "shared": ideal_train_flops(ARCHITECTURE, rank, None, U, C, P, G),
            "repeated": ideal_train_flops(ARCHITECTURE, rank, None, U * C, 1, P, G),
        }


SHAPES = {
    "aggregation": Shape("aggregation: a group of 1,024 + 4 x 128 tokens", 1, 4, 1024, 128),
    "search": Shape("search: a group of 128 + 8 x 256 tokens", 1, 8, 128, 256),
}
SMALL = Shape("gradient check", 2, 2, 24, 9)


def write_adapters(path: pathlib.Path) -> None:
    """Random adapters of all projections by our names, none of them zero.

    `layers/q/a` is [L, in, rank], `layers/q/b` [L, rank, out].
    """
    a, rng, arrays = ARCHITECTURE, np.random.default_rng(2), {}
    heads, kv = a.H * a.E, a.J * a.E
    sizes = [(a.D, heads), (a.D, kv), (a.D, kv), (heads, a.D), (a.D, a.F), (a.D, a.F), (a.F, a.D)]
    for name, (width, features) in zip(PARTS, sizes, strict=True):
        down = rng.normal(0, width**-0.5, (a.L, width, LORA_RANK))
        up = rng.normal(0, 0.02, (a.L, LORA_RANK, features))
        arrays[f"layers/{name}/a"] = down.astype(np.float32)
        arrays[f"layers/{name}/b"] = up.astype(np.float32)
    np.savez(path, **arrays)
