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
from collections.abc import Callable
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
    parts, fused = {}, set()
    for name in files.names:
        if match := _FUSED.fullmatch(name):
            room, inner, side = match.groups()
            projections = ("gate", "up") if inner else ("down",)
            parts |= _parts(files, config, name, room, side, projections)
            fused.add(name)
    return files.regrouped(fused, parts) if fused else files


def _parts(
    files: TensorFiles,
    config: ModelConfig,
    name: str,
    room: str,
    side: str,
    projections: tuple[str, ...],
) -> dict[str, _Part]:
    """Those of one fused tensor, by the names that they have in files of adapters apart."""
    arch, r, n = config.arch, config.lora_rank, len(projections)
    X, width, features = arch.routing.experts, arch.D, arch.F
    if n == 1:
        width, features = features, width
    shapes = {R: (X * R, width) if side == "A" else (n * features, R * X) for R in (r, n * r)}
    ranks = [R for R, shape in shapes.items() if files.shape(name) == shape]
    if not ranks:
        allowed = " or ".join(str(list(shape)) for shape in shapes.values())
        raise WeightsError(
            f"{files.where}: tensor {name} has shape {list(files.shape(name))}; config.json and "
            f"config.model.lora_rank = {r} say {allowed}."
        )
    R = ranks[0]

    @functools.lru_cache(maxsize=1)  # the parts are read one after the other
    def whole() -> np.ndarray:
        array = files.read(name)
        if side == "A":
            return array.reshape(X, R, width)
        return array.reshape(n * features, R, X).transpose(2, 0, 1)

    def read(expert: int, i: int) -> np.ndarray:
        own = slice(None) if r == R else slice(i * r, (i + 1) * r)
        if side == "A":
            return whole()[expert, own]
        rows = whole()[expert, i * features : (i + 1) * features]
        if np.count_nonzero(rows) != np.count_nonzero(rows[:, own]):
            raise WeightsError(
                f"{files.where}: tensor {name}: {projections[i]} of expert {expert} reads all {R} "
                f"ranks that it shares with {projections[1 - i]}, but config.model.lora_rank = {r} "
                "is what each has. Merge that adapter into its base, and start from the result; or "
                f"train it with PEFT at rank {r}, with gate_up_proj in target_parameters."
            )
        return rows[:, own]

    shape = (r, width) if side == "A" else (features, r)
    dtype = files.dtype_name(name)
    return {
        f"{room}.{expert}.{projection}_proj.lora_{side}.weight": _Part(
            dtype, shape, functools.partial(read, expert, i)
        )
        for expert in range(X)
        for i, projection in enumerate(projections)
    }
