"""Shapes, dtypes and shardings of what the sampler's programs take and return; no array is made."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spiral_jax.core import mesh as meshes
from spiral_jax.core.mesh import GROUP_AXES
from spiral_jax.sampling.prefill import Prefilled, Prompts, prefill
from spiral_jax.sampling.settings import DecodeSettings, Schedule, SlotClass
from spiral_jax.sampling.slots import Admission, Move, SlotState, empty_state
from spiral_jax.sampling.weights import abstract_weights


def abstract_state(settings: DecodeSettings, slots: SlotClass) -> SlotState:
    """A class's `SlotState`."""
    state = jax.eval_shape(functools.partial(empty_state, settings, slots))
    return SlotState(
        traces=_along_groups(state.traces, settings.mesh),
        prompt=_along_groups(state.prompt, settings.mesh, tensor_axis=-3),
        own=_along_groups(state.own, settings.mesh, tensor_axis=-3),
    )


@functools.cache  # as in `abstract_weights`
def abstract_prefilled(settings: DecodeSettings, schedule: Schedule, i: int) -> Prefilled:
    """Prompts that groups enter class i from."""
    chunk = settings.chunk_of(schedule.classes[i].P)
    function = functools.partial(prefill, settings.config, settings.cache_dtype, chunk)
    weights = abstract_weights(settings.config, settings.mesh)
    ready = jax.eval_shape(function, weights, prompt_shapes(settings, schedule, i))
    return Prefilled(
        prompt_len_ZxW=_along_groups(ready.prompt_len_ZxW, settings.mesh),
        logits_ZxWxV=_along_groups(ready.logits_ZxWxV, settings.mesh, tensor_axis=-1),
        prompt=_along_groups(ready.prompt, settings.mesh, tensor_axis=-3),
    )


def prompt_shapes(settings: DecodeSettings, schedule: Schedule, i: int) -> Prompts:
    """Prompts of one prefill for class i."""
    Z, W = _prompts_of_a_call(settings, schedule, i)
    tokens = settings.cached_prompt(schedule.classes[i].P)
    return Prompts(_ints(settings, Z, W, tokens), _ints(settings, Z, W))


def admission_shapes(settings: DecodeSettings, schedule: Schedule, i: int) -> Admission:
    """An admission into class i: as many groups as a prefill has prompts."""
    Z, W = _prompts_of_a_call(settings, schedule, i)
    return Admission(
        row_ZxW=_ints(settings, Z, W),
        id_ZxWx6=_ints(settings, Z, W, 6),
        first_trace_ZxW=_ints(settings, Z, W),
        limit_ZxWxC=_ints(settings, Z, W, schedule.classes[i].C),
        slot_ZxW=_ints(settings, Z, W),
    )


def move_shapes(settings: DecodeSettings, to: SlotClass) -> Move:
    """A move into class `to`."""
    Z = meshes.group_count_multiple(settings.mesh)
    return Move(_ints(settings, Z), _ints(settings, Z), _ints(settings, Z, to.C))


def shardings(tree: Any) -> Any:
    """The shardings of a tree of shapes or arrays."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def _prompts_of_a_call(settings: DecodeSettings, schedule: Schedule, i: int) -> tuple[int, int]:
    """Z and W of class i: as many prompts as `prefill_tokens` pays for, at least one a shard."""
    slots, shards = schedule.classes[i], meshes.group_count_multiple(settings.mesh)
    paid_for = schedule.prefill_tokens // settings.cached_prompt(slots.P)
    return shards, max(1, min(paid_for, slots.slots // shards))


def _ints(settings: DecodeSettings, *shape: int) -> jax.ShapeDtypeStruct:
    """int32 [Z, ...], along the groups' axes."""
    along = meshes.group_sharding(settings.mesh)
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=along)


def _along_groups(tree: Any, mesh: Mesh, tensor_axis: int | None = None) -> Any:
    """A tree of shapes with shardings: the leading axis along the groups' axes.

    Args:
      tensor_axis: lies along `tensor`, where that divides it; the heads of a cache [..., J, *, *],
        the vocabulary of logits.
    """

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        spec: list[Any] = [GROUP_AXES] + [None] * (len(leaf.shape) - 1)
        if tensor_axis is not None and leaf.shape[tensor_axis] % mesh.shape["tensor"] == 0:
            spec[tensor_axis] = "tensor"
        sharding = NamedSharding(mesh, P(*spec))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, tree)
