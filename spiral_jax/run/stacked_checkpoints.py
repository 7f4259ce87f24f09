"""Checkpoints that have all L layers in one stack, `layers`, instead of L - 1 and `last_layer`.

All runs recorded up to November 2026 have such ones. This file goes when none of them is resumed,
evaluated, exported or started from any more.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

_STACK, _LAST = "layers", "last_layer"


def is_stacked(saved: dict[str, dict], wanted: dict[str, jax.ShapeDtypeStruct]) -> bool:
    """Whether the saved arrays hold all layers in one stack, and the wanted ones do not."""
    if any(_LAST in name.split("/") for name in saved):
        return False
    return any(
        _LAST in name.split("/")
        or (name in saved and saved[name]["shape"][:1] == [leaf.shape[0] + 1])
        for name, leaf in wanted.items()
        if {_STACK, _LAST} & {*name.split("/")}
    )


def stack(wanted: Any, saved: dict[str, dict]) -> Any:
    """What to read for `wanted` (shapes with shardings), which may have either part or both."""
    L = next(a["shape"][0] for name, a in saved.items() if _STACK in name.split("/"))

    def of_stack(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((L, *leaf.shape[1:]), leaf.dtype, sharding=leaf.sharding)

    def of_last(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = _with_leading_axis(leaf.sharding)
        return jax.ShapeDtypeStruct((L, *leaf.shape), leaf.dtype, sharding=sharding)

    def stack_node(node: Any) -> Any:
        if not _has_layers(node):
            return node
        rest = {name: part for name, part in node.items() if name not in (_STACK, _LAST)}
        if _LAST in node:
            return rest | {_STACK: jax.tree.map(of_last, node[_LAST])}
        return rest | {_STACK: jax.tree.map(of_stack, node[_STACK])}

    return jax.tree.map(stack_node, wanted, is_leaf=_has_layers)


def split(read: Any, wanted: Any) -> Any:
    """The arrays of `wanted`, from those that `stack` asked for."""

    def first_layers(leaf: jax.ShapeDtypeStruct, array: jax.Array) -> jax.Array:
        return jax.jit(lambda a: a[:-1], out_shardings=leaf.sharding)(array)

    def last_layer(leaf: jax.ShapeDtypeStruct, array: jax.Array) -> jax.Array:
        return jax.jit(lambda a: a[-1], out_shardings=leaf.sharding)(array)

    def split_node(node: Any, part: Any) -> Any:
        if not _has_layers(node):
            return part
        done = {name: part[name] for name in node if name not in (_STACK, _LAST)}
        if _STACK in node:
            done[_STACK] = jax.tree.map(first_layers, node[_STACK], part[_STACK])
        if _LAST in node:
            done[_LAST] = jax.tree.map(last_layer, node[_LAST], part[_STACK])
        return done

    return jax.tree.map(split_node, wanted, read, is_leaf=_has_layers)


def _has_layers(node: Any) -> bool:
    return isinstance(node, dict) and bool({_STACK, _LAST} & node.keys())


def _with_leading_axis(sharding: Sharding) -> Sharding:
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
