"""Slots: where groups stand while they are decoded. A class is a table of equal slots; a group may
move between them.

    enter   prefilled prompts -> free slots of a class, with the first token of every trace drawn
    move    a group's remaining traces -> a narrower or longer slot of another class

Device shards (data x fsdp) are handled apart: a group stays on the shard that prefilled it, so
nothing is sent around.
Axes: Z shards, W prompts, or groups that enter, of one call a shard; U = Z * (slots a shard) as
everywhere.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from spiral_jax.core import mesh as meshes
from spiral_jax.core.mesh import GROUP_AXES
from spiral_jax.model.cache import Cache, empty_cache
from spiral_jax.model.transformer import ModelConfig
from spiral_jax.sampling.draw import Draw, draw_token
from spiral_jax.sampling.keys import trace_keys, uniforms
from spiral_jax.sampling.prefill import Prefilled


@dataclasses.dataclass(frozen=True)
class SlotClass:
    """`slots` places for groups of up to C traces with prompts of up to P and traces of up to G
    tokens.
    """

    slots: int
    C: int
    P: int
    G: int

    @property
    def rows(self) -> int:
        return self.slots * self.C


@dataclasses.dataclass(frozen=True)
class DecodeSettings:
    """What all programs of a sampler share, static.

    Attributes:
      config: the model.
      cache_dtype: of keys and values: the compute dtype or int8.
      draw: how tokens are drawn.
      seed: of the run.
      stop_ids: token ids that end a trace.
      prefill_chunk: prompt tokens whose activations exist at once.
      mesh: groups lie along its data and fsdp axes, heads along tensor.
    """

    config: ModelConfig
    cache_dtype: Any
    draw: Draw
    seed: int
    stop_ids: tuple[int, ...]
    prefill_chunk: int
    mesh: Mesh

    def chunk_of(self, prompt: int) -> int:
        """Tokens of a prefill chunk for prompts of up to `prompt` tokens."""
        return min(self.prefill_chunk, prompt)

    def cached_prompt(self, prompt: int) -> int:
        """Tokens of a prompt cache for prompts of up to `prompt` tokens: whole chunks."""
        chunk = self.chunk_of(prompt)
        return -(-prompt // chunk) * chunk


@struct.dataclass
class SlotState:
    """The groups in the slots of one class, on the device.

    Attributes:
      prompt_len_U: int32.
      step_U: int32 tokens drawn by each trace that still runs; at least 1 (the first is drawn on
      admission).
      token_UxC: int32, the newest.
      key_UxCx2: uint32 key data of the traces.
      limit_UxC: int32 tokens a trace may have.
      ended_UxC: True for traces that have ended, and for rows that hold none.
      prompt: a cache [U, J, ...] for each layer.
      own: a cache [U, C, J, ...] for each layer.
    """

    prompt_len_U: jax.Array
    step_U: jax.Array
    token_UxC: jax.Array
    key_UxCx2: jax.Array
    limit_UxC: jax.Array
    ended_UxC: jax.Array
    prompt: tuple[Cache, ...]
    own: tuple[Cache, ...]

    def running_UxC(self, G: int) -> jax.Array:
        """Traces that draw at the next step: not ended, and their slot has room for another token."""
        return ~self.ended_UxC & (self.step_U < G)[:, None]


def empty_state(settings: DecodeSettings, slots: SlotClass) -> SlotState:
    """A class without any group."""
    arch, U, C = settings.config.arch, slots.slots, slots.C
    caches = lambda lead, tokens: tuple(  # noqa: E731
        empty_cache((*lead, arch.J), arch.E, tokens, settings.cache_dtype) for _ in range(arch.L)
    )
    return SlotState(
        prompt_len_U=jnp.ones(U, jnp.int32),
        step_U=jnp.ones(U, jnp.int32),
        token_UxC=jnp.zeros((U, C), jnp.int32),
        key_UxCx2=jnp.zeros((U, C, 2), jnp.uint32),
        limit_UxC=jnp.ones((U, C), jnp.int32),
        ended_UxC=jnp.ones((U, C), bool),
        prompt=caches((U,), settings.cached_prompt(slots.P)),
        own=caches((U, C), slots.G),
    )


def state_shardings(tree: Any, mesh: Mesh) -> Any:
    """Slots or shards along the groups' axes; along `tensor`, where it divides them, caches' heads
    and logits.
    """

    def of_leaf(path: tuple[Any, ...], leaf: Any) -> jax.sharding.NamedSharding:
        name, spec, cut = (
            meshes.path_name(path),
            [GROUP_AXES] + [None] * (len(leaf.shape) - 1),
            None,
        )
        if "prompt/" in name or "own/" in name:
            cut = len(leaf.shape) - 3
        elif "logits" in name:
            cut = len(leaf.shape) - 1
        if cut is not None and leaf.shape[cut] % mesh.shape["tensor"] == 0:
            spec[cut] = "tensor"
        return jax.sharding.NamedSharding(mesh, P(*spec))

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


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


def enter(
    settings: DecodeSettings, state: SlotState, ready: Prefilled, new: Admission
) -> tuple[SlotState, jax.Array, jax.Array]:
    """Draws the first token of every trace, and puts the groups into their slots, each with a copy
    of its prompt.

    Returns:
      the state; the first tokens [Z, W, C] int32, -1 where there is no trace; their log-probs,
      float32.
    """
    Z, W, C = new.limit_ZxWxC.shape
    flat = lambda a: meshes.constrain_groups(a.reshape(Z * W, *a.shape[2:]))  # noqa: E731
    split = lambda a: a.reshape(Z, W, *a.shape[1:])  # noqa: E731
    of_prompt = lambda a: flat(jax.vmap(lambda of_shard, row: of_shard[row])(a, new.row_ZxW))  # noqa: E731
    trace_UxC = flat(new.first_trace_ZxW)[:, None] + jnp.arange(C)
    id_UxCx6 = jnp.broadcast_to(flat(new.id_ZxWx6)[:, None], (Z * W, C, new.id_ZxWx6.shape[-1]))
    key_UxCx2 = trace_keys(settings.seed, id_UxCx6, trace_UxC)
    uniform_UxC = uniforms(key_UxCx2, jnp.zeros((Z * W, C), jnp.int32))
    logits_UxV = of_prompt(ready.logits_ZxWxV)
    logits = jnp.broadcast_to(logits_UxV[:, None], (Z * W, C, logits_UxV.shape[-1]))
    token_UxC, logprob_UxC = draw_token(settings.draw, logits, uniform_UxC)
    limit_UxC = flat(new.limit_ZxWxC)
    group = SlotState(
        prompt_len_U=of_prompt(ready.prompt_len_ZxW),
        step_U=jnp.ones(Z * W, jnp.int32),
        token_UxC=token_UxC,
        key_UxCx2=key_UxCx2,
        limit_UxC=limit_UxC,
        ended_UxC=is_stop(settings.stop_ids, token_UxC) | (limit_UxC <= 1),
        prompt=(),
        own=(),
    )
    own, group = state.own, jax.tree.map(split, group)
    state = _put_groups(settings.mesh, state.replace(own=()), group, ready.prompt, new).replace(
        own=own
    )
    return state, split(jnp.where(limit_UxC > 0, token_UxC, -1)), split(logprob_UxC)


def move(
    settings: DecodeSettings,
    source: SlotState,
    target: SlotState,
    from_Z: jax.Array,
    to_Z: jax.Array,
    row_ZxC: jax.Array,
) -> tuple[SlotState, SlotState]:
    """Moves one group of each shard from a slot of `source` to one of `target`, with the rows that
    still run.

    Args:
      from_Z, to_Z: int32 slots within the shard; -1: this shard moves nothing.
      row_ZxC: int32 rows of the source slot that become the target's; -1: none.

    Returns:
      both states; the source slot is free.
    """
    return _over_shards(settings.mesh, _move_on_shard, parts=5)(
        source, target, from_Z, to_Z, row_ZxC
    )


def is_stop(stop_ids: tuple[int, ...], token: jax.Array) -> jax.Array:
    """bool, like `token`: whether it ends its trace."""
    return functools.reduce(
        jnp.logical_or, [token == stop for stop in stop_ids], jnp.zeros(token.shape, bool)
    )


def _over_shards(mesh: Mesh, function: Any, parts: int) -> Any:
    """`function` on each shard's own slots; every argument and result has its shard or slot axis
    first.
    """
    if meshes.group_count_multiple(mesh) == 1:
        return function
    along = P(GROUP_AXES)
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(along,) * parts,
        out_specs=along,
        axis_names=set(GROUP_AXES),
        check_vma=False,
    )


def _put_groups(
    mesh: Mesh,
    state: SlotState,
    group_ZxW: SlotState,
    prompt_ZxW: tuple[Cache, ...],
    new: Admission,
) -> SlotState:
    """Writes groups and their prompts over their slots, one after the other, in place."""

    def on_shard(
        state: SlotState,
        group_1xW: SlotState,
        prompt_1xW: tuple[Cache, ...],
        row_1xW: jax.Array,
        slot_1xW: jax.Array,
    ) -> SlotState:
        def put(w: jax.Array, state: SlotState) -> SlotState:
            slot, row = slot_1xW[0, w], row_1xW[0, w]
            group = jax.tree.map(lambda a: a[0, w], group_1xW)
            group = group.replace(prompt=jax.tree.map(lambda a: a[0, row], prompt_1xW))
            return jax.tree.map(
                lambda all_slots, one: _write_slot(all_slots, one, slot), state, group
            )

        return jax.lax.fori_loop(0, slot_1xW.shape[1], put, state)

    return _over_shards(mesh, on_shard, parts=5)(
        state, group_ZxW, prompt_ZxW, new.row_ZxW, new.slot_ZxW
    )


def _move_on_shard(
    source: SlotState, target: SlotState, from_1: jax.Array, to_1: jax.Array, row_1xC: jax.Array
) -> tuple[SlotState, SlotState]:
    moving, row_C = jnp.where(to_1[0] >= 0, from_1[0], -1), row_1xC[0]
    group = jax.tree.map(
        lambda a: jax.lax.dynamic_index_in_dim(a, jnp.maximum(moving, 0), 0, keepdims=False), source
    )
    rows = lambda tree: jax.tree.map(lambda a: a[jnp.maximum(row_C, 0)], tree)  # noqa: E731
    group = group.replace(
        token_UxC=rows(group.token_UxC),
        key_UxCx2=rows(group.key_UxCx2),
        limit_UxC=rows(group.limit_UxC),
        ended_UxC=rows(group.ended_UxC) | (row_C < 0),
        own=rows(group.own),
    )
    target = jax.tree.map(
        lambda all_slots, new: _write_slot(all_slots, new, to_1[0]), target, group
    )
    free = _write_slot(source.ended_UxC, jnp.ones_like(source.ended_UxC[0]), moving)
    return source.replace(ended_UxC=free), target


def _write_slot(all_slots: jax.Array, new: jax.Array, slot: jax.Array) -> jax.Array:
    """`new`, which may be smaller (a shorter cache), over the beginning of a slot; nothing where
    slot is -1.
    """
    at = (jnp.maximum(slot, 0),) + (jnp.zeros((), slot.dtype),) * new.ndim
    old = jax.lax.dynamic_slice(all_slots, at, (1, *new.shape))
    return jax.lax.dynamic_update_slice(
        all_slots, jnp.where(slot >= 0, new[None].astype(old.dtype), old), at
    )
