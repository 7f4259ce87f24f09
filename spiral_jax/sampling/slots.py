"""Slots: where groups stand while they are decoded. A class is a table of equal slots.

    enter   prefilled prompts -> free slots of a class, with the first token of every trace drawn
    move    a group's remaining traces -> a narrower or longer slot of another class

Device shards (data x fsdp) are handled apart: a group stays on the shard that prefilled it, so
nothing is sent around.

Axes: Z shards; W prompts, or groups that enter, of one call on each shard; U = Z * (slots a shard)
as everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from spiral_jax.core import mesh as meshes
from spiral_jax.core.mesh import GROUP_AXES
from spiral_jax.model.cache import Cache, empty_cache
from spiral_jax.sampling.draw import draw_token
from spiral_jax.sampling.keys import trace_keys, uniforms
from spiral_jax.sampling.prefill import Prefilled
from spiral_jax.sampling.settings import DecodeSettings, SlotClass


@struct.dataclass
class TraceState:
    """How far the traces of each group are; the leading axes are U, or Z and W.

    Attributes:
      prompt_len_U: int32.
      step_U: int32 tokens drawn by each trace that still runs; at least 1 (the first is drawn on
        admission).
      token_UxC: int32, the newest.
      key_UxCx2: uint32 key data of the traces.
      limit_UxC: int32 tokens that a trace may have.
      ended_UxC: True for traces that have ended, and for rows that hold none.
    """

    prompt_len_U: jax.Array
    step_U: jax.Array
    token_UxC: jax.Array
    key_UxCx2: jax.Array
    limit_UxC: jax.Array
    ended_UxC: jax.Array

    def running_UxC(self, G: int) -> jax.Array:
        """TraceState that draw at the next step: not ended, and their slot has room for a token."""
        return ~self.ended_UxC & (self.step_U < G)[:, None]


@struct.dataclass
class SlotState:
    """The groups in the slots of one class, on the device.

    Attributes:
      traces: how far they are.
      prompt: a cache [U, J, ...] for each layer.
      own: a cache [U, C, J, ...] for each layer.
    """

    traces: TraceState
    prompt: tuple[Cache, ...]
    own: tuple[Cache, ...]


def empty_state(settings: DecodeSettings, slots: SlotClass) -> SlotState:
    """A class without any group."""
    arch, U, C = settings.config.arch, slots.slots, slots.C

    def caches(*lead: int, tokens: int) -> tuple[Cache, ...]:
        shape = (*lead, arch.J)
        return tuple(
            empty_cache(shape, arch.E, tokens, settings.cache_dtype) for _ in range(arch.L)
        )

    traces = TraceState(
        prompt_len_U=jnp.ones(U, jnp.int32),
        step_U=jnp.ones(U, jnp.int32),
        token_UxC=jnp.zeros((U, C), jnp.int32),
        key_UxCx2=jnp.zeros((U, C, 2), jnp.uint32),
        limit_UxC=jnp.ones((U, C), jnp.int32),
        ended_UxC=jnp.ones((U, C), bool),
    )
    return SlotState(
        traces=traces,
        prompt=caches(U, tokens=settings.cached_prompt(slots.P)),
        own=caches(U, C, tokens=slots.G),
    )


@struct.dataclass
class Admission:
    """Groups, or pieces of them, that enter: W a shard, with slot = -1 where there is none.

    Attributes:
      row_ZxW: int32 row of the group's prompt among those that the shard has prefilled.
      id_ZxWx6: int32, as in `GroupRequests`.
      first_trace_ZxW: int32 index of the first trace: > 0 for a piece of a group that is wider than
        the class.
      limit_ZxWxC: int32; 0 for rows without a trace.
      slot_ZxW: int32 slot within the shard.
    """

    row_ZxW: jax.Array
    id_ZxWx6: jax.Array
    first_trace_ZxW: jax.Array
    limit_ZxWxC: jax.Array
    slot_ZxW: jax.Array


class Entered(NamedTuple):
    """What `enter` returns: the state, and the first tokens.

    Attributes:
      token_ZxWxC: int32; -1 where there is no trace.
      logprob_ZxWxC: float32.
    """

    state: SlotState
    token_ZxWxC: jax.Array
    logprob_ZxWxC: jax.Array


def enter(settings: DecodeSettings, state: SlotState, ready: Prefilled, new: Admission) -> Entered:
    """Draws the first token of every trace, and puts the groups into their slots.

    Each slot gets a copy of its group's prompt.
    """
    traces_ZxW, logprob_ZxWxC = _first_tokens(settings, ready, new)
    put = _over_shards(settings.mesh, _put_on_shard, arguments=6)
    traces, prompt = put(
        state.traces, state.prompt, traces_ZxW, ready.prompt, new.row_ZxW, new.slot_ZxW
    )
    token_ZxWxC = jnp.where(new.limit_ZxWxC > 0, traces_ZxW.token_UxC, -1)
    return Entered(state.replace(traces=traces, prompt=prompt), token_ZxWxC, logprob_ZxWxC)


class Move(NamedTuple):
    """One group of each shard that moves, with the rows that still run.

    Attributes:
      from_Z, to_Z: int32 slots within the shard; -1: this shard moves nothing.
      row_ZxC: int32 rows of the source slot that become the target's; -1: none.
    """

    from_Z: jax.Array
    to_Z: jax.Array
    row_ZxC: jax.Array


def move(
    settings: DecodeSettings, source: SlotState, target: SlotState, groups: Move
) -> tuple[SlotState, SlotState]:
    """Both states after one group of each shard has moved; its slot of `source` is free."""
    on_shards = _over_shards(settings.mesh, _move_on_shard, arguments=3)
    return on_shards(source, target, groups)


def is_stop(stop_ids: tuple[int, ...], token: jax.Array) -> jax.Array:
    """bool, like `token`: whether it ends its trace."""
    stops = jnp.zeros(token.shape, bool)
    for stop in stop_ids:
        stops |= token == stop
    return stops


def _first_tokens(
    settings: DecodeSettings, ready: Prefilled, new: Admission
) -> tuple[TraceState, jax.Array]:
    """The traces [Z, W, ...] of the entering groups, and their first log-probs [Z, W, C]."""
    Z, W, C = new.limit_ZxWxC.shape

    trace_ZxWxC = new.first_trace_ZxW[..., None] + jnp.arange(C)
    id_ZxWxCx6 = jnp.broadcast_to(new.id_ZxWx6[:, :, None], (Z, W, C, new.id_ZxWx6.shape[-1]))
    key_ZxWxCx2 = trace_keys(settings.seed, id_ZxWxCx6, trace_ZxWxC)
    uniform_ZxWxC = uniforms(key_ZxWxCx2, jnp.zeros((Z, W, C), jnp.int32))

    logits_ZxWxV = jnp.take_along_axis(ready.logits_ZxWxV, new.row_ZxW[..., None], axis=1)
    logits_ZxWxCxV = jnp.broadcast_to(logits_ZxWxV[:, :, None], (Z, W, C, logits_ZxWxV.shape[-1]))
    token_ZxWxC, logprob_ZxWxC = draw_token(settings.draw, logits_ZxWxCxV, uniform_ZxWxC)

    traces = TraceState(
        prompt_len_U=jnp.take_along_axis(ready.prompt_len_ZxW, new.row_ZxW, axis=1),
        step_U=jnp.ones((Z, W), jnp.int32),
        token_UxC=token_ZxWxC,
        key_UxCx2=key_ZxWxCx2,
        limit_UxC=new.limit_ZxWxC,
        ended_UxC=is_stop(settings.stop_ids, token_ZxWxC) | (new.limit_ZxWxC <= 1),
    )
    return traces, logprob_ZxWxC


def _over_shards(mesh: Mesh, function: Callable[..., Any], arguments: int) -> Callable[..., Any]:
    """`function`, run on each shard's own slots.

    Every argument and result has its shard or slot axis first.
    """
    if meshes.group_count_multiple(mesh) == 1:
        return function
    along = P(GROUP_AXES)
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(along,) * arguments,
        out_specs=along,
        axis_names=set(GROUP_AXES),
        check_vma=False,
    )


def _put_on_shard(
    traces: TraceState,
    prompt: tuple[Cache, ...],
    new_1xW: TraceState,
    ready_1xW: tuple[Cache, ...],
    row_1xW: jax.Array,
    slot_1xW: jax.Array,
) -> tuple[TraceState, tuple[Cache, ...]]:
    """Writes groups and their prompts over their slots, one after the other, in place."""

    def put(
        w: jax.Array, slots: tuple[TraceState, tuple[Cache, ...]]
    ) -> tuple[TraceState, tuple[Cache, ...]]:
        group = jax.tree.map(lambda a: a[0, w], new_1xW)
        group_prompt = jax.tree.map(lambda a: a[0, row_1xW[0, w]], ready_1xW)
        return _write_slot(slots, (group, group_prompt), slot_1xW[0, w])

    return jax.lax.fori_loop(0, slot_1xW.shape[1], put, (traces, prompt))


def _move_on_shard(
    source: SlotState, target: SlotState, groups: Move
) -> tuple[SlotState, SlotState]:
    to, row_C = groups.to_Z[0], groups.row_ZxC[0]
    leaving = jnp.where(to >= 0, groups.from_Z[0], -1)

    def take_rows(tree: Any) -> Any:
        return jax.tree.map(lambda a: a[jnp.maximum(row_C, 0)], tree)

    group = _read_slot(source, leaving)
    traces = group.traces.replace(
        token_UxC=take_rows(group.traces.token_UxC),
        key_UxCx2=take_rows(group.traces.key_UxCx2),
        limit_UxC=take_rows(group.traces.limit_UxC),
        ended_UxC=take_rows(group.traces.ended_UxC) | (row_C < 0),
    )
    group = SlotState(traces, group.prompt, take_rows(group.own))
    target = _write_slot(target, group, to)

    nobody_C = jnp.ones_like(source.traces.ended_UxC[0])
    ended_UxC = _write_slot(source.traces.ended_UxC, nobody_C, leaving)
    return source.replace(traces=source.traces.replace(ended_UxC=ended_UxC)), target


def _read_slot(slots: Any, slot: jax.Array) -> Any:
    """A tree of what is in one slot; of slot 0 where `slot` is -1."""

    def read(all_slots: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(all_slots, jnp.maximum(slot, 0), 0, keepdims=False)

    return jax.tree.map(read, slots)


def _write_slot(slots: Any, new: Any, slot: jax.Array) -> Any:
    """A tree `new` over the beginning of one slot: it may be smaller (a shorter cache).

    Nothing is written where `slot` is -1.
    """

    def write(all_slots: jax.Array, new: jax.Array) -> jax.Array:
        at = (jnp.maximum(slot, 0),) + (jnp.zeros((), slot.dtype),) * new.ndim
        old = jax.lax.dynamic_slice(all_slots, at, (1, *new.shape))
        kept_or_new = jnp.where(slot >= 0, new[None].astype(old.dtype), old)
        return jax.lax.dynamic_update_slice(all_slots, kept_or_new, at)

    return jax.tree.map(write, slots, new)
