"""The device mesh and one ordered table: which axis of which parameter lies along which mesh axis.

Groups (the leading U of every batch array) lie along `data` and `fsdp`, heads and feed-forward
columns along `tensor`, and the other large axis of every matrix along `fsdp`. The table covers
parameters, adapters and optimizer state alike, because an optimizer's moments carry the path of
their parameter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from spiral_jax.core.config import ConfigError

AXES = ("data", "fsdp", "tensor")
GROUP_AXES = ("data", "fsdp")
GPU_PLATFORMS = ("gpu", "cuda")  # of devices that are here, and of those that are described

# First match wins; patterns are searched in paths such as "layers/q/kernel" or
# "opt/0/mu/layers/q/a". Kernels are [in, out], stacked ones [L - 1, in, out]; the specs name the
# trailing axes.
_TABLE: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"/(q|k|v|gate|up)/kernel$", ("fsdp", "tensor")),
    (r"/(o|down)/kernel$", ("tensor", "fsdp")),
    (r"/(q|k|v|gate|up)/scale$", ("tensor",)),  # of a kernel in int8
    (r"/(o|down)/scale$", ("fsdp",)),
    (r"/(q|k|v|gate|up|qkv|gate_up)/bias$", ("tensor",)),
    (r"/(q|k|v|gate|up)/a$", ("fsdp", None)),
    (r"/(q|k|v|gate|up)/b$", (None, "tensor")),
    (r"/(o|down)/a$", ("tensor", None)),
    (r"/(o|down)/b$", (None, "fsdp")),
    (r"/(qkv|gate_up)/kernel$", (None, "tensor")),  # of decode weights: `linear.JoinedLinear`
    (r"/(qkv|gate_up)/a$", (None, None)),
    (r"/experts/(gate|up)$", ("fsdp", "tensor")),
    (r"/experts/down$", ("tensor", "fsdp")),
    (r"/experts/router$", ("fsdp", None)),
    (r"/experts/(gate|up)_a$", ("fsdp", None)),
    (r"/experts/(gate|up)_b$", (None, "tensor")),
    (r"/experts/down_a$", ("tensor", None)),
    (r"/experts/down_b$", (None, "fsdp")),
    (r"(^|/)embed$", ("tensor", "fsdp")),
    (r"(^|/)head$", ("fsdp", "tensor")),
    (r"(^|/|_)norm$|count$|step$", ()),
)


def host_mesh() -> Mesh:
    """A mesh of one CPU device, for programs that only move weights."""
    return jax.make_mesh(
        (1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices("cpu")[:1]
    )


def make_mesh(sizes: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of these devices, by default of all there are; its shape as `mesh_shape` says.

    Its axes may be parts of a TPU slice's axes, as those of (4, 8, 2) are on 8 x 8; `jax.make_mesh`
    allows that on v5e alone.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(sizes, len(devices), devices[0].platform)
    placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * 3)


def abstract_mesh(shape: tuple[int, int, int]) -> AbstractMesh:
    """A mesh of no devices, for shapes and plans."""
    return AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * 3)


def platform_of(mesh: Mesh | AbstractMesh) -> str:
    """Of its devices; "" where it has none."""
    return mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else ""


def mesh_shape(sizes: ConfigDict, count: int, kind: str) -> tuple[int, int, int]:
    """`config.mesh` for `count` devices of this kind, -1 resolved.

    Raises:
      ConfigError: the sizes do not match.
    """
    shape = [sizes[axis] for axis in AXES]
    stated = "config.mesh = " + ", ".join(f"{axis}={sizes[axis]}" for axis in AXES)
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise ConfigError(
            f"{stated}: sizes must be >= 1, and at most one may be -1 = all the rest."
        )
    known = math.prod(size for size in shape if size != -1)
    if -1 in shape and count % known == 0:
        shape[shape.index(-1)] = count // known
    if math.prod(shape) != count:
        raise ConfigError(
            f"{stated}: there are {count} {kind} devices; the product of the sizes must be that "
            "number (-1 in one of them takes the rest)."
        )
    return tuple(shape)


def path_name(path: tuple[Any, ...]) -> str:
    """A tree path as "a/b/c"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def weight_spec(name: str, shape: tuple[int, ...], mesh: Mesh, decode: bool = False) -> P:
    """The spec of one array by its path.

    An axis that a mesh axis does not divide is not cut along it. With `decode` nothing lies along
    `fsdp`: decode weights are replicated over groups, so that no weight is gathered inside the
    decode loop.

    Raises:
      KeyError: a path that the table does not know.
    """
    trailing = next((spec for pattern, spec in _TABLE if re.search(pattern, name)), None)
    if trailing is None:
        raise KeyError(f"{name}: no entry of the sharding table matches this path")
    spec = (None,) * (len(shape) - len(trailing)) + trailing

    def cuts(axis: str | None, size: int) -> bool:
        if axis is None or (decode and axis == "fsdp"):
            return False
        return size % mesh.shape[axis] == 0

    return P(*(axis if cuts(axis, n) else None for axis, n in zip(spec, shape, strict=True)))


def weight_shardings(tree: Any, mesh: Mesh, decode: bool = False) -> Any:
    """The tree of `NamedSharding`s for a tree of arrays or shapes."""

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, weight_spec(path_name(path), leaf.shape, mesh, decode))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """A tree of shapes, or arrays, as shapes that say where they lie.

    For programs that are compiled, and checkpoints that are read, without any array.

    Args:
      shardings: a tree of one for each.
    """

    def placed(leaf: Any, sharding: Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(placed, shapes, shardings)


def bytes_on_a_device(tree: Any) -> int:
    """Bytes of a tree of shapes with shardings, or of arrays, that lie on each device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def group_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Arrays whose axis number `leading` is U."""
    return NamedSharding(mesh, P(*(None,) * leading, GROUP_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device, so that every process can read it."""
    return NamedSharding(mesh, P())


def place(tree: Any, sharding: Any) -> Any:
    """Host arrays, the same on every process, as device arrays.

    Each process copies what its own devices hold.

    Args:
      sharding: of all arrays, or a tree of one for each.
    """

    def put(array: np.ndarray, sharding: Sharding) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    if isinstance(sharding, Sharding):
        return jax.tree.map(lambda array: put(array, sharding), tree)
    return jax.tree.map(put, tree, sharding)


def group_count_multiple(mesh: Mesh) -> int:
    """U of every batch must be a multiple of this."""
    return math.prod(mesh.shape[axis] for axis in GROUP_AXES)


def constrain_groups(x: jax.Array) -> jax.Array:
    """Keeps activations [U, ...] along the group axes of the mesh in context, if there is one."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(GROUP_AXES))


def over_shards(
    mesh: Mesh, function: Callable[..., Any], arguments: tuple[P, ...], results: Any
) -> Callable[..., Any]:
    """`function`, run on each device's own part of arrays [Z, ...], with Z taken away.

    Z: the shards of the groups, data * fsdp.

    Args:
      arguments, results: how each, or all arrays of a tree, lie on the mesh; GROUP_AXES first.
    """

    def on_one(*parts: Any) -> Any:
        own = jax.tree.map(lambda a: a[0], parts)
        return jax.tree.map(lambda a: a[None], function(*own))

    if mesh.size == 1:
        return on_one
    return jax.shard_map(on_one, mesh=mesh, in_specs=arguments, out_specs=results, check_vma=False)
