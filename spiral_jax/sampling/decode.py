"""The decode program: some classes of slots, several tokens a call; linear layers on all rows
together.

token -> embedding -> for each layer: project (all rows) | write and attend (each class) | finish
(all rows)
      -> head -> draw, until the chunk is full, nothing runs, or enough groups ask for another slot
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P

from spiral_jax.core.mesh import GROUP_AXES, constrain_groups, group_count_multiple
from spiral_jax.model.cache import Cache, cache_entries, write_entries
from spiral_jax.model.cache_attention import decode_attention
from spiral_jax.model.transformer import DecoderLayer, rms_norm
from spiral_jax.sampling.draw import draw_token
from spiral_jax.sampling.keys import uniforms
from spiral_jax.sampling.slots import DecodeSettings, SlotClass, SlotState, is_stop
from spiral_jax.sampling.weights import DecodeWeights

DECODE_SCOPE = "decode"  # a plan finds the loop in a compiled program by this name

States = tuple[SlotState, ...]


def decode_chunk(
    settings: DecodeSettings,
    classes: tuple[SlotClass, ...],
    leave_at: tuple[int, ...],
    chunk: int,
    exit_groups: int,
    rows: int,
    fewer_rows: int,
    weights: DecodeWeights,
    states: States,
) -> tuple[States, jax.Array, jax.Array, jax.Array]:
    """Decodes up to `chunk` tokens of every running trace.

    Args:
      classes: of `states`.
      leave_at: for each class, the number of running traces at which a group can leave its slot: 0
        where there is no narrower one.
      chunk: tokens, >= 1.
      exit_groups: the chunk ends early when this many more groups than at its start can leave.
      rows: of each shard that linear layers compute, at least as many as run there; those that run
      are packed.
      fewer_rows: the chunk ends early when so few rows of each shard run: another program has
      fewer. 0: none has.

    Returns:
      the states; tokens [chunk, Z, R] int32, -1 where a row drew none; log-probs [chunk, Z, R]
      float32; steps done. R = rows of all classes on one shard, class after class.
    """
    Z = group_count_multiple(settings.mesh)
    R = sum(slots.rows for slots in classes) // Z

    def running(states: States) -> jax.Array:
        return join(
            Z, [state.running_UxC(slots.G) for state, slots in zip(states, classes, strict=True)]
        )

    def can_leave(states: States) -> jax.Array:
        """How many slots have few enough running traces; free ones count too, at the start as well
        as later.
        """
        few = [
            jnp.sum(jnp.sum(state.running_UxC(slots.G), axis=1) <= limit)
            for state, slots, limit in zip(states, classes, leave_at, strict=True)
        ]
        return sum(few)

    def go_on(carry: tuple[Any, ...]) -> jax.Array:
        states, *_, step = carry
        many = jnp.max(jnp.sum(running(states), axis=1)) > fewer_rows
        return (step < chunk) & many & (can_leave(states) - leaving_at_start < exit_groups)

    def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        states, tokens, logprobs, step = carry
        states, token_ZxR, logprob_ZxR = decode_step(settings, classes, packing, weights, states)
        put = lambda all_steps, new: jax.lax.dynamic_update_index_in_dim(all_steps, new, step, 0)  # noqa: E731
        return states, put(tokens, token_ZxR), put(logprobs, logprob_ZxR), step + 1

    along = lambda a: jax.lax.with_sharding_constraint(a, P(None, GROUP_AXES))  # noqa: E731
    packing = pack_rows(running(states), rows) if rows < R else None
    leaving_at_start = can_leave(states)
    carry = (
        states,
        along(jnp.full((chunk, Z, R), -1, jnp.int32)),
        along(jnp.zeros((chunk, Z, R), jnp.float32)),
        jnp.zeros((), jnp.int32),
    )
    with jax.named_scope(DECODE_SCOPE):
        return jax.lax.while_loop(go_on, body, carry)


@struct.dataclass
class Packing:
    """Which rows of a shard are computed.

    Attributes:
      row_ZxN: int32, the row at each of the N packed places.
      place_ZxR: int32, the packed place of each row; N for rows that are not computed.
    """

    row_ZxN: jax.Array
    place_ZxR: jax.Array

    def pack(self, a_ZxRx: jax.Array) -> jax.Array:
        return _take_rows(a_ZxRx, self.row_ZxN)

    def unpack(self, a_ZxNx: jax.Array, missing: int = 0) -> jax.Array:
        """[Z, R, ...] from packed rows; `missing` where a row is not computed."""
        wider = ((0, 0), (0, 1)) + ((0, 0),) * (a_ZxNx.ndim - 2)
        return _take_rows(jnp.pad(a_ZxNx, wider, constant_values=missing), self.place_ZxR)


def pack_rows(running_ZxR: jax.Array, rows: int) -> Packing:
    """Places for the running rows of each shard, of which there are at most `rows`; others fill up
    what is left.
    """
    order = jnp.argsort(~running_ZxR, axis=1, stable=True)
    place = jnp.argsort(order, axis=1)  # the inverse permutation
    return Packing(order[:, :rows], jnp.minimum(place, rows))


def decode_step(
    settings: DecodeSettings,
    classes: tuple[SlotClass, ...],
    packing: Packing | None,
    weights: DecodeWeights,
    states: States,
) -> tuple[States, jax.Array, jax.Array]:
    """One token of every running trace: (states, token [Z, R] or -1, log-prob [Z, R]).

    Args:
      packing: of the rows that linear layers compute; None: all, as they lie.
    """
    config, block, Z = settings.config, DecoderLayer(settings.config), group_count_multiple(settings.mesh)
    pack = packing.pack if packing else lambda a: a
    unpack = packing.unpack if packing else lambda a, missing=0: a
    gather = lambda parts: constrain_groups(pack(join(Z, parts)))  # noqa: E731

    def split(a_ZxN: jax.Array, missing: int = 0) -> list[jax.Array]:
        ends = [sum(slots.rows for slots in classes[: i + 1]) // Z for i in range(len(classes))]
        parts = jnp.split(unpack(a_ZxN, missing), ends[:-1], axis=1)
        return [
            part.reshape(c.slots, c.C, *part.shape[2:])
            for part, c in zip(parts, classes, strict=True)
        ]

    of_row = lambda value_U, c: jnp.broadcast_to(value_U[:, None], (c.slots, c.C))  # noqa: E731
    running = [state.running_UxC(c.G) for state, c in zip(states, classes, strict=True)]
    step_ZxN = gather([of_row(state.step_U, c) for state, c in zip(states, classes, strict=True)])
    prompt_ZxN = gather(
        [of_row(state.prompt_len_U, c) for state, c in zip(states, classes, strict=True)]
    )
    x = weights.embed[gather([state.token_UxC for state in states])]
    own = []
    for i, layer in enumerate(weights.layers):
        q, k, v = block.apply(layer, x, prompt_ZxN + step_ZxN - 1, method="project")
        attended, of_layer = [], []
        for state, runs, q_UxC, k_UxC, v_UxC in zip(
            states, running, split(q), split(k), split(v), strict=True
        ):
            cache = _write_token(state.own[i], k_UxC, v_UxC, state.step_U - 1, settings.cache_dtype)
            attended.append(
                jax.lax.cond(  # a class without anybody in it costs nothing
                    jnp.any(runs),
                    decode_attention,
                    lambda q_UxC, *_: jnp.zeros_like(q_UxC),
                    q_UxC,
                    state.prompt[i],
                    state.prompt_len_U,
                    cache,
                    state.step_U - 1,
                )  # fmt: skip
            )
            of_layer.append(cache)
        own.append(of_layer)
        x = block.apply(layer, x, gather(attended), method="finish")
    x = rms_norm(x, weights.final_norm, config.arch.norm_eps)
    logits = jnp.einsum("znd,dv->znv", x, weights.head, preferred_element_type=jnp.float32)
    uniform = uniforms(gather([state.key_UxCx2 for state in states]), step_ZxN)
    token_ZxN, logprob_ZxN = draw_token(settings.draw, logits, uniform)
    token_ZxN = jnp.where(gather(running), token_ZxN, -1)
    advanced = [
        _advance(settings, state.replace(own=tuple(layer[j] for layer in own)), token_UxC)
        for j, (state, token_UxC) in enumerate(
            zip(states, split(token_ZxN, missing=-1), strict=True)
        )
    ]
    return tuple(advanced), unpack(token_ZxN, -1), unpack(logprob_ZxN)


def join(Z: int, parts: list[jax.Array]) -> jax.Array:
    """Arrays [U, C, ...] of all classes as rows [Z, R, ...] of each shard, class after class."""
    return jnp.concatenate([a.reshape(Z, -1, *a.shape[2:]) for a in parts], axis=1)


def _take_rows(a_ZxRx: jax.Array, row_ZxN: jax.Array) -> jax.Array:
    return jax.vmap(lambda a, rows: a[rows])(a_ZxRx, row_ZxN)


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
