"""The decode program: several tokens a call of all classes; linear layers on all rows together.

token -> embedding -> for each layer: project (all rows) | write and attend (each class) | finish
(all rows) -> head -> draw, until the chunk is full, nothing runs, or enough groups ask for another
slot
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from spiral_jax.core.mesh import GROUP_AXES, group_count_multiple
from spiral_jax.model.attention.caches import decode_attention
from spiral_jax.model.cache import Cache, cache_entries, write_entries
from spiral_jax.model.transformer import DecoderLayer, rms_norm
from spiral_jax.sampling.draw import draw_token
from spiral_jax.sampling.keys import uniforms
from spiral_jax.sampling.rows import RowLayout, pack_rows
from spiral_jax.sampling.settings import DecodeSettings, Schedule, SlotClass
from spiral_jax.sampling.slots import SlotState, TraceState, is_stop
from spiral_jax.sampling.weights import DecodeWeights

DECODE_SCOPE = "decode"  # a plan finds the loop over tokens in a compiled program by this name

States = tuple[SlotState, ...]


class Chunk(NamedTuple):
    """What `decode_chunk` returns: the states after some steps, and what was drawn in them.

    Attributes:
      token_NxZxR: int32; -1 where a row drew none. N: steps of a full chunk; R: rows of all classes
        on one shard, class after class.
      logprob_NxZxR: float32.
      steps: int32, how many were done.
    """

    states: States
    token_NxZxR: jax.Array
    logprob_NxZxR: jax.Array
    steps: jax.Array


def decode_chunk(
    settings: DecodeSettings,
    schedule: Schedule,
    rows: int,
    weights: DecodeWeights,
    states: States,
) -> Chunk:
    """Decodes up to `schedule.chunk` tokens of every running trace.

    The chunk ends early when `schedule.exit_groups` more groups than at its start can leave their
    slot, and when so few rows of each shard run that a smaller program can compute them.

    Args:
      rows: of each shard that linear layers compute, one of `schedule.decode_rows`. At least as
        many as run there; those that run are packed.
      states: of `schedule.classes`.
    """
    shards = group_count_multiple(settings.mesh)
    layout = RowLayout(schedule.classes, shards)
    all_rows = schedule.decode_rows(shards)[-1]
    fewer_rows = max((n for n in schedule.decode_rows(shards) if n < rows), default=0)

    def running_ZxR(states: States) -> jax.Array:
        return layout.join(_running(schedule.classes, states))

    if rows < all_rows:
        layout = dataclasses.replace(layout, packing=pack_rows(running_ZxR(states), rows))
    leaving_at_start = _can_leave(schedule, states)

    def go_on(chunk: Chunk) -> jax.Array:
        most_running = jnp.max(jnp.sum(running_ZxR(chunk.states), axis=1))
        leaving = _can_leave(schedule, chunk.states) - leaving_at_start
        not_full = chunk.steps < schedule.chunk
        return not_full & (most_running > fewer_rows) & (leaving < schedule.exit_groups)

    def step(chunk: Chunk) -> Chunk:
        states, token_ZxR, logprob_ZxR = decode_step(settings, layout, weights, chunk.states)

        def put(all_steps: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_index_in_dim(all_steps, new, chunk.steps, 0)

        return Chunk(
            states,
            put(chunk.token_NxZxR, token_ZxR),
            put(chunk.logprob_NxZxR, logprob_ZxR),
            chunk.steps + 1,
        )

    def along_shards(a_NxZxR: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(a_NxZxR, P(None, GROUP_AXES))

    shape = schedule.chunk, shards, all_rows
    nothing_drawn = Chunk(
        states,
        along_shards(jnp.full(shape, -1, jnp.int32)),
        along_shards(jnp.zeros(shape, jnp.float32)),
        jnp.zeros((), jnp.int32),
    )
    with jax.named_scope(DECODE_SCOPE):
        return jax.lax.while_loop(go_on, step, nothing_drawn)


def decode_step(
    settings: DecodeSettings, layout: RowLayout, weights: DecodeWeights, states: States
) -> tuple[States, jax.Array, jax.Array]:
    """One token of every running trace: (states, token [Z, R] or -1, log-prob [Z, R])."""
    config, module = settings.config, DecoderLayer(settings.config)
    traces = [state.traces for state in states]
    running = _running(layout.classes, states)

    step_ZxN = layout.rows_of_groups([t.step_U for t in traces])
    prompt_len_ZxN = layout.rows_of_groups([t.prompt_len_U for t in traces])
    position_ZxN = prompt_len_ZxN + step_ZxN - 1

    x_ZxNxD = weights.embed[layout.rows([t.token_UxC for t in traces])]
    own: list[list[Cache]] = [[] for _ in states]  # each class's caches, layer by layer
    for i, layer in enumerate(weights.layers):
        q, k, v = module.apply(layer, x_ZxNxD, position_ZxN, method="project")
        q, k, v = layout.split(q), layout.split(k), layout.split(v)
        attended = []
        for j, state in enumerate(states):
            cache = _write_token(
                state.own[i], k[j], v[j], state.traces.step_U - 1, settings.cache_dtype
            )
            own[j].append(cache)
            attended.append(_attend_if_running(running[j], q[j], state, i, cache))
        x_ZxNxD = module.apply(layer, x_ZxNxD, layout.rows(attended), method="finish")

    x_ZxNxD = rms_norm(x_ZxNxD, weights.final_norm, config.arch.norm_eps)
    logits_ZxNxV = jnp.einsum(
        "znd,dv->znv", x_ZxNxD, weights.head, preferred_element_type=jnp.float32
    )
    uniform_ZxN = uniforms(layout.rows([t.key_UxCx2 for t in traces]), step_ZxN)
    token_ZxN, logprob_ZxN = draw_token(settings.draw, logits_ZxNxV, uniform_ZxN)
    token_ZxN = jnp.where(layout.rows(running), token_ZxN, -1)

    advanced = []
    for state, caches, token_UxC in zip(
        states, own, layout.split(token_ZxN, missing=-1), strict=True
    ):
        traces_after = _advance(settings, state.traces, token_UxC)
        advanced.append(SlotState(traces_after, state.prompt, tuple(caches)))
    return tuple(advanced), layout.unpack(token_ZxN, missing=-1), layout.unpack(logprob_ZxN)


def _running(classes: tuple[SlotClass, ...], states: States) -> list[jax.Array]:
    """Of each class, which of its traces [U, C] draw at the next step."""
    return [state.traces.running_UxC(slots.G) for state, slots in zip(states, classes, strict=True)]


def _can_leave(schedule: Schedule, states: States) -> jax.Array:
    """How many slots have so few running traces that a narrower class can take them.

    Free slots count too, at a chunk's start as well as later.
    """
    total = jnp.zeros((), jnp.int32)
    for i, running_UxC in enumerate(_running(schedule.classes, states)):
        few_U = jnp.sum(running_UxC, axis=1) <= schedule.leave_at(i)
        total += jnp.sum(few_U)
    return total


def _attend_if_running(
    running_UxC: jax.Array, q_UxCxHxE: jax.Array, state: SlotState, layer: int, own: Cache
) -> jax.Array:
    """Attention [U, C, H, E] of one class; zeros, at no cost, where no trace of it runs."""

    def attend(q_UxCxHxE: jax.Array, prompt: Cache, own: Cache) -> jax.Array:
        newest_U = state.traces.step_U - 1
        return decode_attention(q_UxCxHxE, prompt, state.traces.prompt_len_U, own, newest_U)

    def skip(q_UxCxHxE: jax.Array, prompt: Cache, own: Cache) -> jax.Array:
        return jnp.zeros_like(q_UxCxHxE)

    return jax.lax.cond(jnp.any(running_UxC), attend, skip, q_UxCxHxE, state.prompt[layer], own)


def _advance(settings: DecodeSettings, traces: TraceState, token_UxC: jax.Array) -> TraceState:
    """Takes in the drawn tokens; -1 leaves a trace as it is."""
    drew_UxC = token_UxC >= 0
    step_U = traces.step_U + jnp.any(drew_UxC, axis=1)
    at_limit_UxC = step_U[:, None] >= traces.limit_UxC
    ends_UxC = is_stop(settings.stop_ids, token_UxC) | at_limit_UxC
    return traces.replace(
        step_U=step_U,
        token_UxC=jnp.where(drew_UxC, token_UxC, traces.token_UxC),
        ended_UxC=traces.ended_UxC | (drew_UxC & ends_UxC),
    )


def _write_token(
    cache: Cache, k_UxCxJxE: jax.Array, v_UxCxJxE: jax.Array, index_U: jax.Array, dtype: jnp.dtype
) -> Cache:
    """Writes one key and value of every trace at its group's index, in place."""
    entries = cache_entries(k_UxCxJxE[:, :, None], v_UxCxJxE[:, :, None], dtype)
    return jax.vmap(write_entries)(cache, entries, index_U)
