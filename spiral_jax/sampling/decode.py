"""The decode program: some classes of slots, several tokens a call; linear layers on all rows together.

token -> embedding -> for each layer: project (all rows) | write and attend (each class) | finish (all rows)
      -> head -> draw, until the chunk is full, nothing runs, or enough groups ask for another slot
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from spiral_jax.mesh import GROUP_AXES, constrain_groups
from spiral_jax.model.attention import decode_attention
from spiral_jax.model.cache import Cache, cache_entries, write_entries
from spiral_jax.model.qwen3 import Block, rms_norm
from spiral_jax.sampling.draw import draw_token
from spiral_jax.sampling.randomness import uniforms
from spiral_jax.sampling.slots import DecodeSettings, SlotClass, SlotState, is_stop
from spiral_jax.sampling.weights import DecodeWeights

States = tuple[SlotState, ...]


def decode_chunk(
    settings: DecodeSettings,
    classes: tuple[SlotClass, ...],
    leave_at: tuple[int, ...],
    chunk: int,
    exit_groups: int,
    shards: int,
    weights: DecodeWeights,
    states: States,
) -> tuple[States, jax.Array, jax.Array, jax.Array]:
    """Decodes up to `chunk` tokens of every running trace.

    Args:
      classes: of `states`.
      leave_at: for each class, the number of running traces at which a group can leave its slot: 0 where there is no
        narrower one.
      chunk: tokens, >= 1.
      exit_groups: the chunk ends early when this many more groups than at its start can leave.
      shards: Z, the size of the groups' mesh axes.

    Returns:
      the states; tokens [chunk, Z, R] int32, -1 where a row drew none; log-probs [chunk, Z, R] float32; steps done.
      R = rows of all classes on one shard, class after class.
    """

    def can_leave(states: States) -> jax.Array:
        """How many slots have few enough running traces; free ones count too, at the start as well as later."""
        few = [
            jnp.sum(jnp.sum(state.running_UxC(slots.G), axis=1) <= limit)
            for state, slots, limit in zip(states, classes, leave_at, strict=True)
        ]
        return sum(few)

    def go_on(carry: tuple[Any, ...]) -> jax.Array:
        states, *_, step = carry
        runs = sum(jnp.sum(state.running_UxC(slots.G)) for state, slots in zip(states, classes, strict=True)) > 0
        return (step < chunk) & runs & (can_leave(states) - leaving_at_start < exit_groups)

    def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        states, tokens, logprobs, step = carry
        states, token_ZxR, logprob_ZxR = decode_step(settings, classes, shards, weights, states)
        put = lambda all_steps, new: jax.lax.dynamic_update_index_in_dim(all_steps, new, step, 0)  # noqa: E731
        return states, put(tokens, token_ZxR), put(logprobs, logprob_ZxR), step + 1

    rows = sum(slots.rows for slots in classes) // shards
    along = lambda a: jax.lax.with_sharding_constraint(a, P(None, GROUP_AXES))  # noqa: E731
    leaving_at_start = can_leave(states)
    carry = (
        states,
        along(jnp.full((chunk, shards, rows), -1, jnp.int32)),
        along(jnp.zeros((chunk, shards, rows), jnp.float32)),
        jnp.zeros((), jnp.int32),
    )
    with jax.named_scope("decode"):
        return jax.lax.while_loop(go_on, body, carry)


def decode_step(
    settings: DecodeSettings, classes: tuple[SlotClass, ...], shards: int, weights: DecodeWeights, states: States
) -> tuple[States, jax.Array, jax.Array]:
    """One token of every running trace: (states, token [Z, R] or -1, log-prob [Z, R])."""
    config, block = settings.config, Block(settings.config)

    def join(parts: list[jax.Array]) -> jax.Array:
        return constrain_groups(jnp.concatenate([a.reshape(shards, -1, *a.shape[2:]) for a in parts], axis=1))

    def split(a_ZxR: jax.Array) -> list[jax.Array]:
        ends = [sum(slots.rows for slots in classes[: i + 1]) // shards for i in range(len(classes))]
        parts = jnp.split(a_ZxR, ends[:-1], axis=1)
        return [part.reshape(c.slots, c.C, *part.shape[2:]) for part, c in zip(parts, classes, strict=True)]

    of_row = lambda value_U, c: jnp.broadcast_to(value_U[:, None], (c.slots, c.C))  # noqa: E731
    step_ZxR = join([of_row(state.step_U, c) for state, c in zip(states, classes, strict=True)])
    prompt_ZxR = join([of_row(state.prompt_len_U, c) for state, c in zip(states, classes, strict=True)])
    x = weights.embed[join([state.token_UxC for state in states])]
    own = []
    for i, layer in enumerate(weights.layers):
        q, k, v = block.apply(layer, x, prompt_ZxR + step_ZxR - 1, method="project")
        attended, of_layer = [], []
        for state, q_UxC, k_UxC, v_UxC in zip(states, split(q), split(k), split(v), strict=True):
            cache = _write_token(state.own[i], k_UxC, v_UxC, state.step_U - 1, settings.cache_dtype)
            attended.append(decode_attention(q_UxC, state.prompt[i], state.prompt_len_U, cache, state.step_U - 1))
            of_layer.append(cache)
        own.append(of_layer)
        x = block.apply(layer, x, join(attended), method="finish")
    x = rms_norm(x, weights.final_norm, config.arch.norm_eps)
    logits = jnp.einsum("zrd,dv->zrv", x, weights.head, preferred_element_type=jnp.float32)
    uniform = uniforms(join([state.key_UxCx2 for state in states]), step_ZxR)
    token_ZxR, logprob_ZxR = draw_token(settings.draw, logits, uniform)
    token_ZxR = jnp.where(join([s.running_UxC(c.G) for s, c in zip(states, classes, strict=True)]), token_ZxR, -1)
    advanced = [
        _advance(settings, state.replace(own=tuple(layer[j] for layer in own)), token_UxC)
        for j, (state, token_UxC) in enumerate(zip(states, split(token_ZxR), strict=True))
    ]
    return tuple(advanced), token_ZxR, logprob_ZxR


def _advance(settings: DecodeSettings, state: SlotState, token_UxC: jax.Array) -> SlotState:
    """Takes in the drawn tokens; -1 leaves a trace as it is."""
    drew = token_UxC >= 0
    step_U = state.step_U + jnp.any(drew, axis=1)
    ended = is_stop(settings.stop_ids, token_UxC) | (step_U[:, None] >= state.limit_UxC)
    return state.replace(
        step_U=step_U,
        token_UxC=jnp.where(drew, token_UxC, state.token_UxC),
        ended_UxC=state.ended_UxC | (drew & ended),
    )


def _write_token(
    cache: Cache, k_UxCxJxE: jax.Array, v_UxCxJxE: jax.Array, index_U: jax.Array, dtype: jnp.dtype
) -> Cache:
    """Writes one key and value of every trace at its group's index, in place."""
    entries = cache_entries(k_UxCxJxE[:, :, None], v_UxCxJxE[:, :, None], dtype)
    return jax.vmap(write_entries)(cache, entries, index_U)
