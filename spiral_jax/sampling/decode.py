"""The decode program: several tokens a call of all rows of a shard.

token -> embedding -> for each layer: project | write to its page and attend | finish -> head ->
draw, until the chunk is full, nothing runs, or as many rows have ended as the host has use for

Nothing but the pages stays on the device between two calls: the host knows every token, and says
anew which rows there are and which pages they read.

Axes: Z shards (data x fsdp), N rows of a shard, U bundles of a shard, W rows of a bundle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P

from spiral_jax.core import mesh as meshes
from spiral_jax.core.groups import ROLE_OF_ID
from spiral_jax.core.mesh import GROUP_AXES, constrain_groups
from spiral_jax.model.attention.backends import make_page_backend
from spiral_jax.model.attention.pages import Bundles, PageBackend, Pages, Places, Sequences
from spiral_jax.model.attention.part import KeyValue
from spiral_jax.model.transformer import DecoderLayer, rms_norm, rope_position
from spiral_jax.sampling.draw import draw_token
from spiral_jax.sampling.keys import trace_keys, uniforms
from spiral_jax.sampling.settings import DecodeSettings
from spiral_jax.sampling.weights import DecodeWeights, decode_config

DECODE_SCOPE = "decode"  # a plan finds the loop over tokens in a compiled program by this name

Pool = tuple[Pages, ...]  # of each layer, with the shards in front: [Z, pages, J, page, ..]
HEADS_SPEC = POOL_SPEC = P(GROUP_AXES, None, "tensor")  # [Z, N, H or J, E], and a pool


@struct.dataclass
class Rows:
    """Traces that are to be decoded, on each shard; places without one have limit 0.

    A row's first own token is the last one of its prompt; the prompt's pages hold those before it.

    Attributes:
      token_ZxN: int32, the newest token, whose key and value are not in any page yet.
      drawn_ZxN: int32 tokens that the trace has: also the place of its newest among its own.
      limit_ZxN: int32 tokens that it may have before the next call.
      id_ZxNx6: int32, as in `GroupRequests`.
      trace_ZxN: int32 index of the trace in its group.
      own_table_ZxNxT: int32 pages of its own tokens.
      prefix_ZxN: int32 tokens of its prompt but the last.
      place_ZxN: int32, its place among the U * W of the bundles.
      member_ZxUxW: int32, the row at each place; -1 where there is none.
      prompt_table_ZxUxT: int32 pages of each bundle's prompt.
      prompt_ZxU: int32 tokens in them; 0 for bundles that are not there.
    """

    token_ZxN: jax.Array
    drawn_ZxN: jax.Array
    limit_ZxN: jax.Array
    id_ZxNx6: jax.Array
    trace_ZxN: jax.Array
    own_table_ZxNxT: jax.Array
    prefix_ZxN: jax.Array
    place_ZxN: jax.Array
    member_ZxUxW: jax.Array
    prompt_table_ZxUxT: jax.Array
    prompt_ZxU: jax.Array


@struct.dataclass
class Exit:
    """When a chunk ends early.

    Attributes:
      rows: int32 scalar; when no shard has more running rows.
      ended: int32 scalar; when so many rows of all shards have stopped since it began.
    """

    rows: jax.Array
    ended: jax.Array


class Chunk(NamedTuple):
    """What `decode_chunk` returns: the pages after some steps, and what was drawn in them.

    Attributes:
      token_TxZxN: int32; -1 where a row drew none. T: steps of a full chunk.
      logprob_TxZxN: float32.
      steps: int32, how many were done.
    """

    pool: Pool
    token_TxZxN: jax.Array
    logprob_TxZxN: jax.Array
    steps: jax.Array


class _Progress(NamedTuple):
    """What the loop over tokens carries.

    Attributes:
      views: of each layer's pages, as the backend reads and writes them.
      ended_ZxN: rows that drew a stop id.
      token_TxZxN, logprob_TxZxN, steps: as in `Chunk`.
    """

    views: tuple[Any, ...]
    token_ZxN: jax.Array
    drawn_ZxN: jax.Array
    ended_ZxN: jax.Array
    token_TxZxN: jax.Array
    logprob_TxZxN: jax.Array
    steps: jax.Array


def decode_chunk(
    settings: DecodeSettings,
    steps: int,
    weights: DecodeWeights,
    pool: Pool,
    rows: Rows,
    exit_at: Exit,
) -> Chunk:
    """Decodes up to `steps` tokens of every row."""
    layers = _on_shards(settings, make_page_backend(settings.config.pages))
    keys_ZxNx2 = trace_keys(settings.seed, rows.id_ZxNx6, rows.trace_ZxN)

    def runs_ZxN(now: _Progress) -> jax.Array:
        return ~now.ended_ZxN & (now.drawn_ZxN < rows.limit_ZxN)

    def go_on(now: _Progress) -> jax.Array:
        running = runs_ZxN(now)
        stopped = jnp.sum(runs_ZxN(start)) - jnp.sum(running)
        most_running = jnp.max(jnp.sum(running, axis=1))
        return (now.steps < steps) & (most_running > exit_at.rows) & (stopped < exit_at.ended)

    def step(now: _Progress) -> _Progress:
        running = runs_ZxN(now)
        views, logits_ZxNxV = _next_logits(settings, layers, weights, now, rows, running)
        uniform_ZxN = uniforms(keys_ZxNx2, now.drawn_ZxN)
        role_ZxN = rows.id_ZxNx6[..., ROLE_OF_ID]
        token_ZxN, logprob_ZxN = draw_token(settings.draw, logits_ZxNxV, uniform_ZxN, role_ZxN)
        token_ZxN = jnp.where(running, token_ZxN, -1)

        def put(all_steps: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_index_in_dim(all_steps, new, now.steps, 0)

        return _Progress(
            views,
            token_ZxN=jnp.where(running, token_ZxN, now.token_ZxN),
            drawn_ZxN=now.drawn_ZxN + running,
            ended_ZxN=now.ended_ZxN | is_stop(settings.stop_ids, token_ZxN),
            token_TxZxN=put(now.token_TxZxN, token_ZxN),
            logprob_TxZxN=put(now.logprob_TxZxN, logprob_ZxN),
            steps=now.steps + 1,
        )

    start = _start(layers, steps, pool, rows)
    with jax.named_scope(DECODE_SCOPE):
        end = jax.lax.while_loop(go_on, step, start)
    pool = tuple(layers.end(view, rows.own_table_ZxNxT) for view in end.views)
    return Chunk(pool, end.token_TxZxN, end.logprob_TxZxN, end.steps)


def _start(layers: _Layers, steps: int, pool: Pool, rows: Rows) -> _Progress:
    """Nothing is drawn yet."""
    shape = steps, *rows.token_ZxN.shape
    places = _places(rows, rows.drawn_ZxN, rows.drawn_ZxN < rows.limit_ZxN)

    def along_shards(a_TxZxN: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(a_TxZxN, P(None, GROUP_AXES))

    return _Progress(
        views=tuple(layers.begin(pages, places) for pages in pool),
        token_ZxN=rows.token_ZxN,
        drawn_ZxN=rows.drawn_ZxN,
        ended_ZxN=jnp.zeros(rows.token_ZxN.shape, bool),
        token_TxZxN=along_shards(jnp.full(shape, -1, jnp.int32)),
        logprob_TxZxN=along_shards(jnp.zeros(shape, jnp.float32)),
        steps=jnp.zeros((), jnp.int32),
    )


def is_stop(stop_ids: tuple[int, ...], token: jax.Array) -> jax.Array:
    """bool, like `token`: whether it ends its trace."""
    stops = jnp.zeros(token.shape, bool)
    for stop in stop_ids:
        stops |= token == stop
    return stops


class _Layers(NamedTuple):
    """The pages of all layers in a chunk, on the shards; Z in front of everything.

    Attributes:
      begin, step, end: those of the page backend.
    """

    begin: Callable[..., Any]
    step: Callable[..., Any]
    end: Callable[..., Any]


def _on_shards(settings: DecodeSettings, backend: PageBackend) -> _Layers:
    along = P(GROUP_AXES)

    def over(
        function: Callable[..., Any], arguments: tuple[P, ...], results: Any
    ) -> Callable[..., Any]:
        return meshes.over_shards(settings.mesh, function, arguments, results)

    return _Layers(
        begin=over(backend.begin, (POOL_SPEC, along), POOL_SPEC),
        step=over(
            backend.step, (POOL_SPEC, HEADS_SPEC, HEADS_SPEC, along), (HEADS_SPEC, POOL_SPEC)
        ),
        end=over(backend.end, (POOL_SPEC, along), POOL_SPEC),
    )


def _places(rows: Rows, drawn_ZxN: jax.Array, runs_ZxN: jax.Array) -> Places:
    """Rows that do not run read as little as there is."""

    def runs_U(member_UxW: jax.Array, runs_N: jax.Array) -> jax.Array:
        return jnp.any((member_UxW >= 0) & runs_N[member_UxW], axis=1)

    runs_ZxU = jax.vmap(runs_U)(rows.member_ZxUxW, runs_ZxN)
    prompts = Sequences(rows.prompt_table_ZxUxT, jnp.where(runs_ZxU, rows.prompt_ZxU, 0))
    return Places(
        runs_ZxN,
        own=Sequences(rows.own_table_ZxNxT, jnp.where(runs_ZxN, drawn_ZxN + 1, 1)),
        bundles=Bundles(prompts, rows.member_ZxUxW, rows.place_ZxN),
    )


def _next_logits(
    settings: DecodeSettings,
    layers: _Layers,
    weights: DecodeWeights,
    now: _Progress,
    rows: Rows,
    runs_ZxN: jax.Array,
) -> tuple[tuple[Any, ...], jax.Array]:
    """The layers' views with the newest tokens in them, and float32 logits [Z, N, V]."""
    config = settings.config
    module = DecoderLayer(decode_config(config, settings.mesh))
    position_ZxN = rows.prefix_ZxN + now.drawn_ZxN
    places = _places(rows, now.drawn_ZxN, runs_ZxN)
    views = []

    x_ZxNxD = constrain_groups(weights.embed[now.token_ZxN])
    for i, (layer, view) in enumerate(zip(weights.layers, now.views, strict=True)):
        rotated_ZxN = rope_position(config.arch, i, position_ZxN)
        q, k, v = module.apply(layer, x_ZxNxD, rotated_ZxN, method="project")
        attended, view = layers.step(view, q, KeyValue(k, v), places)
        views.append(view)
        x_ZxNxD = module.apply(layer, x_ZxNxD, attended, method="finish")

    x_ZxNxD = rms_norm(x_ZxNxD, weights.final_norm, config.arch.norm_eps)
    return tuple(views), weights.logits(x_ZxNxD)
