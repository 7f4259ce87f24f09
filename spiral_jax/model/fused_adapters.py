"""PEFT's adapters of experts whose matrices are one parameter -> an adapter of each projection.

transformers 5 holds a layer's experts in `gate_up_proj` [X, 2 F, D] and `down_proj` [X, D, F], and
PEFT wraps a parameter, so what it saves of a layer are, for R its rank:

    mlp.experts.base_layer.lora_A [X R, D], lora_B [2 F, R X]     of gate_up_proj
    mlp.experts.lora_A [X R, F], lora_B [D, R X]                  of down_proj

A is sorted by expert, B by rank. Gate and up read the same A. At R = r both have its r ranks. At
R = 2 r, as PEFT reads an adapter with two apart, each has its half, and B must be zero in the
other's.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from spiral_jax.model.tensor_files import TensorFiles, WeightsError
from spiral_jax.model.transformer import ModelConfig

PARAMETERS = ("down_proj", "gate_up_proj")  # that PEFT wraps
_FUSED = re.compile(r"(.*\.mlp\.experts)(\.base_layer|)\.lora_([AB])\.weight")


@dataclasses.dataclass(frozen=True)
class _Part:
    """The matrix of one expert's projection, as `TensorFiles` wants a tensor's slices."""

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    def get_dtype(self) -> str:
        return self.dtype

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.read()[index]


def by_projection(files: TensorFiles, config: ModelConfig) -> TensorFiles:
    """`files` with A and B of each expert's projections in place of fused ones, if there are any.

    Raises:
      WeightsError: a tensor whose shape is that of no adapter of `config`; and, when it is read, a
        B of gate and up that reads the ranks of the other.
    """
    whole = functools.lru_cache(maxsize=1)(files.read)  # parts are read one after the other
    parts, fused = {}, set()
    for name in files.names:
        if match := _FUSED.fullmatch(name):
            room, inner, side = match.groups()
            tensor = _Fused(files, config, name, ("gate", "up") if inner else ("down",), side)
            for projection, part in tensor.parts(whole):
                parts[f"{room}.{projection}_proj.lora_{side}.weight"] = part
            fused.add(name)
    return files.regrouped(fused, parts) if fused else files


@dataclasses.dataclass(frozen=True)
class _Fused:
    """A of all experts of a layer, or B.

    Attributes:
      projections: of which it is.
      side: "A" or "B".
    """

    files: TensorFiles
    config: ModelConfig
    name: str
    projections: tuple[str, ...]
    side: str

    def parts(self, whole: Callable[[str], np.ndarray]) -> Iterator[tuple[str, _Part]]:
        """(expert.projection, its matrix) of all; `whole` reads a tensor."""
        dtype, r, R = self.files.dtype_name(self.name), self.config.lora_rank, self._rank()
        shape = (r, self._width) if self.side == "A" else (self._features, r)
        for expert in range(self.config.arch.routing.experts):
            for i, projection in enumerate(self.projections):
                read = functools.partial(self._read, whole, R, expert, i)
                yield f"{expert}.{projection}", _Part(dtype, shape, read)

    @property
    def _width(self) -> int:
        return self.config.arch.F if self.projections == ("down",) else self.config.arch.D

    @property
    def _features(self) -> int:
        return self.config.arch.D if self.projections == ("down",) else self.config.arch.F

    def _rank(self) -> int:
        """R."""
        r, n, X = self.config.lora_rank, len(self.projections), self.config.arch.routing.experts
        shapes = {
            R: (X * R, self._width) if self.side == "A" else (n * self._features, R * X)
            for R in (r, n * r)
        }
        found = self.files.shape(self.name)
        for R, shape in shapes.items():
            if shape == found:
                return R
        allowed = " or ".join(str(list(shape)) for shape in shapes.values())
        raise WeightsError(
            f"{self.files.where}: tensor {self.name} has shape {list(found)}; config.json and "
            f"config.model.lora_rank = {r} say {allowed}."
        )

    def _read(self, whole: Callable[[str], np.ndarray], R: int, expert: int, i: int) -> np.ndarray:
        """The matrix of projection i of an expert."""
        array, r, F = whole(self.name), self.config.lora_rank, self._features
        X = self.config.arch.routing.experts
        own = slice(None) if r == R else slice(i * r, (i + 1) * r)
        if self.side == "A":
            return array.reshape(X, R, self._width)[expert, own]
        rows = array.reshape(-1, R, X)[i * F : (i + 1) * F, :, expert]
        if np.count_nonzero(rows) != np.count_nonzero(rows[:, own]):
            raise WeightsError(
                f"{self.files.where}: tensor {self.name}: {self.projections[i]} of expert {expert} "
                f"reads all {R} ranks that it shares with {self.projections[1 - i]}, but each can "
                f"have config.model.lora_rank = {r} alone. Merge that adapter into its base, and "
                f"start from the result; or train it with PEFT at rank {r}, with gate_up_proj in "
                "target_parameters."
            )
        return rows[:, own]
