"""What a checkpoint says of each of its arrays: dtype, shape and a checksum.

Orbax's files carry no checksum that covers the values, so a flipped bit could come back as a wrong
weight without an error.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from spiral_jax.core.mesh import path_name


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """(path as "a/b/c", leaf), in the order of the tree."""
    return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def describe(state: Any) -> dict[str, dict]:
    """{"dtype", "shape", "crc32"} of each array by its path. A collective on several hosts."""
    return {
        name: {"dtype": str(leaf.dtype), "shape": list(leaf.shape), "crc32": _crc32(leaf)}
        for name, leaf in named_leaves(state)
    }


def differences(saved: dict[str, dict], target: dict[str, jax.ShapeDtypeStruct]) -> list[str]:
    """How the saved arrays differ from `target`'s in path, dtype or shape; [] = not at all."""
    stated = []
    lacking, unplaced = sorted(target.keys() - saved.keys()), sorted(saved.keys() - target.keys())
    if lacking:
        stated.append(f"it lacks {few(lacking)}")
    if unplaced:
        stated.append(f"it has {few(unplaced)}, for which there is no place")

    other = []
    for name in target.keys() & saved.keys():
        there = saved[name]["dtype"], saved[name]["shape"]
        here = str(target[name].dtype), list(target[name].shape)
        if there != here:
            other.append(f"{name} is {there[0]}{there[1]} there and {here[0]}{here[1]} here")
    return stated + ([few(sorted(other))] if other else [])


def changed_arrays(state: Any, saved: dict[str, dict]) -> list[str]:
    """Paths of the arrays whose checksum is not the saved one. A collective on several hosts."""
    return [name for name, leaf in named_leaves(state) if _crc32(leaf) != saved[name]["crc32"]]


def header_crc32(header: dict) -> int:
    """Of everything in a checkpoint's header but its own field "crc32"."""
    content = {key: value for key, value in header.items() if key != "crc32"}
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _crc32(x: jax.Array) -> int:
    """Of the whole array's bytes in C order, so that it does not depend on the sharding."""
    if x.is_fully_addressable or x.is_fully_replicated:
        on_host = np.asarray(x)
    else:  # lies on several hosts: a collective, called by all of them in the order of the tree
        on_host = multihost_utils.process_allgather(x, tiled=True)
    return zlib.crc32(np.ascontiguousarray(on_host).reshape(-1).view(np.uint8))


def few(names: list[str], limit: int = 5) -> str:
    """The first names of a list that may be long."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
