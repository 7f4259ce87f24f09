"""The safetensors files of a directory, one or several with an index: tensors by name.

Reading touches only the slice that is asked for, writing holds one tensor at a time; torch is not
involved.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from spiral_jax.core.errors import UserError

# The names that the format has for the dtypes that a checkpoint's weights may have.
_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class WeightsError(UserError):
    """Weights that are not what the configuration promises; names the file and the tensor."""


@dataclasses.dataclass(frozen=True)
class TensorFiles:
    """Open files. Made by `open_tensors`.

    Attributes:
      where: the file or index that says which tensors there are: errors begin with it.
    """

    where: pathlib.Path
    _slices: Mapping[str, Any]

    @property
    def names(self) -> set[str]:
        return set(self._slices)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slices[name].get_shape())

    def dtype(self, name: str) -> np.dtype:
        """float32, float16 or bfloat16. Raises `WeightsError` for any other."""
        stored = self.dtype_name(name)
        if stored not in _DTYPES:
            raise WeightsError(
                f"{self.where}: tensor {name} has dtype {stored}; supported: {', '.join(_DTYPES)}. "
                "Quantised checkpoints must be dequantised first."
            )
        return _DTYPES[stored]

    def dtype_name(self, name: str) -> str:
        """As the format has it."""
        return self._slices[name].get_dtype()

    def regrouped(self, removed: Collection[str], added: Mapping[str, Any]) -> TensorFiles:
        """The same files, with tensors `added` that were made of those `removed`.

        Args:
          added: what safetensors calls a slice, by name.
        """
        kept = {name: part for name, part in self._slices.items() if name not in removed}
        return TensorFiles(self.where, kept | added)

    def read(self, name: str, index: tuple[slice, ...] = (slice(None),)) -> np.ndarray:
        """The part of a tensor at `index`, in its stored dtype; nothing else is read."""
        return self._slices[name][index if len(index) > 1 else index[0]]


@contextlib.contextmanager
def open_tensors(path: pathlib.Path, stem: str) -> Iterator[TensorFiles]:
    """Opens `path/STEM.safetensors`, or the shards that `path/STEM.safetensors.index.json` lists.

    Raises:
      WeightsError: neither or both are there, a file is corrupt, the index names a missing shard,
        or index and shards do not agree on where a tensor is.
    """
    single, index = path / f"{stem}.safetensors", path / f"{stem}.safetensors.index.json"
    if single.is_file() and index.is_file():
        raise WeightsError(
            f"{path}: has both {single.name} and {index.name}. Delete the one that is out of date."
        )
    if not single.is_file() and not index.is_file():
        raise WeightsError(
            f"{single}: no such file, and no {index.name}. Weights are read from safetensors "
            "alone: convert others with transformers' save_pretrained."
        )
    shard_of = _read_index(index) if index.is_file() else None
    with contextlib.ExitStack() as stack:
        slices: dict[str, Any] = {}
        files = [single]
        if shard_of is not None:
            files = [path / shard for shard in sorted(set(shard_of.values()))]
        for file in files:
            tensors = stack.enter_context(_open(file))
            for name in tensors.keys():  # noqa: SIM118  (not a dict)
                if shard_of is not None and shard_of.get(name) != file.name:
                    listed = f"says {shard_of[name]}" if name in shard_of else "does not list it"
                    raise WeightsError(f"{file}: holds tensor {name}, but {index.name} {listed}.")
                slices[name] = tensors.get_slice(name)
        if lacking := sorted((shard_of or {}).keys() - slices.keys()):
            raise WeightsError(
                f"{path / shard_of[lacking[0]]}: lacks tensor {lacking[0]}, which {index.name} "
                f"puts there ({len(lacking)} such tensors)."
            )
        yield TensorFiles(single if shard_of is None else index, slices)


def _open(file: pathlib.Path) -> Any:
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file}: corrupt ({error}). Fetch the checkpoint again.") from error


def _read_index(index: pathlib.Path) -> dict[str, str]:
    """Tensor -> name of its shard."""
    try:
        shard_of = json.loads(index.read_bytes())["weight_map"]
        shards = sorted(set(shard_of.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{index}: not a weight index ({type(error).__name__}: {error}). Fetch it again."
        ) from error
    for shard in shards:
        if pathlib.PurePath(shard).name != shard or not (index.parent / shard).is_file():
            named = next(name for name, file in shard_of.items() if file == shard)
            raise WeightsError(
                f"{index}: puts {named} into {shard!r}, which is not there. Fetch the missing "
                "shard."
            )
    return shard_of


@dataclasses.dataclass(frozen=True)
class Output:
    """A tensor to be written; `read` makes it when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    path: pathlib.Path, stem: str, outputs: list[Output], max_bytes: int
) -> list[pathlib.Path]:
    """Writes STEM.safetensors, or shards of at most `max_bytes` of data with an index.

    One tensor is held at a time.

    Returns:
      the weight files. A tensor larger than `max_bytes` gets a shard of its own.
    """
    shards: list[list[Output]] = [[]]
    for output in outputs:
        if shards[-1] and sum(held.nbytes for held in shards[-1]) + output.nbytes > max_bytes:
            shards.append([])
        shards[-1].append(output)
    files = [path / f"{stem}.safetensors"]
    if len(shards) > 1:
        numbers = range(1, len(shards) + 1)
        files = [path / f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in numbers]
        _write_index(path / f"{stem}.safetensors.index.json", files, shards)
    for shard, name in zip(shards, files, strict=True):
        with open(name, "wb") as file:
            _write_file(file, shard)
    return files


def _write_index(path: pathlib.Path, files: list[pathlib.Path], shards: list[list[Output]]) -> None:
    total, weight_map = 0, {}
    for file, shard in zip(files, shards, strict=True):
        for output in shard:
            total += output.nbytes
            weight_map[output.name] = file.name
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    path.write_text(json.dumps(content, indent=2) + "\n")


def _write_file(file: BinaryIO, outputs: list[Output]) -> None:
    """One file in safetensors' format.

    Length of the header (u64), header (JSON, padded to 8 bytes), then the tensors in C order,
    little endian.
    """
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for output in outputs:
        header[output.name] = {
            "dtype": _NAMES[output.dtype],
            "shape": list(output.shape),
            "data_offsets": [offset, offset + output.nbytes],
        }
        offset += output.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for output in outputs:
        array = output.read()
        if array.shape != output.shape or array.dtype != output.dtype:
            raise ValueError(
                f"{output.name}: {array.dtype}{list(array.shape)} is not what its header says"
            )
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
