"""Attention of one part on TPUs: three Pallas kernels, forward, d_q, and d_k with d_v.

With c = E**-0.5, and p = exp(score - lse) where lse may be that of several parts merged,

    score = c k q^T     out = p^T v / sum p     delta = sum_e out d_out
    d_score = p (v d_out^T - delta)
    d_q = c d_score^T k     d_k = c d_score q     d_v = p d_out

(FlashAttention-2, arXiv 2307.08691, section 3.1). A kernel holds the scores of one tile, a block of
queries against a block of keys, in fast memory (VMEM), float32.

Scores are [keys, queries]: keys in sublanes, queries in lanes. The queries' maxima, sums, lse and
delta are then dense [1, queries] rows that broadcast over keys for free, sums over keys add whole
registers, and lse needs no copy in every lane. The R heads that share a key are rows of one
product: N = R * block_q, head by head, which also sums d_k and d_v over them.

In HBM a query array is [B, T, H * E], as projections write and read it. A block of it, [block_q,
R * E], falls apart into heads at lanes that are multiples of 128: nothing is transposed on the way
in or out, and the same bytes serve a part that takes traces one by one and a part that takes them
as one sequence.

Exponentials have base 2, which is what the hardware computes: inside the kernels, scores and lse
are in units of log 2.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from spiral_jax.model.attention import tpu_tiles
from spiral_jax.model.attention.part import MASKED, Attended, Cotangents
from spiral_jax.model.attention.tpu_tiles import Ref, Shape, Tile

LOG2_E = math.log2(math.e)


def forward(
    q_BxTxHxE: jax.Array,
    k_BxSxJxE: jax.Array,
    v_BxSxJxE: jax.Array,
    q_len_B: jax.Array,
    kv_len_B: jax.Array,
    *,
    causal: bool,
) -> Attended:
    """Attention of queries to the first `kv_len` keys; if causal, of query t to keys s <= t.

    Args:
      q_len_B, kv_len_B: int32. What is stored behind them reaches nothing.

    Returns:
      Rows behind `q_len` are finite and have no meaning. Without a key, out is 0, lse <= -1e30.
    """
    shape = tpu_tiles.make_shape(q_BxTxHxE, k_BxSxJxE, causal)
    queries, keys = _blocks(shape, tpu_tiles.fetch_with_keys_inside)[::2]
    written = _blocks(shape, tpu_tiles.write_outer)
    rows, row = (shape.rows, shape.E), (1, shape.rows)

    call = pl.pallas_call(
        functools.partial(_forward_kernel, shape, q_BxTxHxE.shape[-1] ** -0.5),
        grid_spec=_grid(
            (shape.B, shape.J, shape.query_blocks, shape.key_blocks),
            inputs=[queries, keys, keys],
            outputs=[written.queries, written.statistics],
            scratch=[
                pltpu.VMEM(rows, shape.dtype),
                pltpu.VMEM(row, jnp.float32),
                pltpu.VMEM(row, jnp.float32),
                pltpu.VMEM(rows[::-1], jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((shape.B, shape.T, shape.J * shape.R * shape.E), shape.dtype),
            jax.ShapeDtypeStruct((shape.B, shape.J, shape.R, shape.T), jnp.float32),
        ],
        compiler_params=_INNER_LOOP_IN_ORDER,
        cost_estimate=_cost(shape, products=2, query_arrays=2, key_arrays=_reads_of_keys(shape)),
        name="attention_forward",
    )
    out, lse_BxJxRxT = call(
        *(q_len_B, kv_len_B),
        *(_flatten_heads(shape, a) for a in (q_BxTxHxE, k_BxSxJxE, v_BxSxJxE)),
    )
    return Attended(_split_heads(out, q_BxTxHxE), lse_BxJxRxT.reshape(shape.B, -1, shape.T))


def backward(
    q_BxTxHxE: jax.Array,
    k_BxSxJxE: jax.Array,
    v_BxSxJxE: jax.Array,
    q_len_B: jax.Array,
    kv_len_B: jax.Array,
    attended: Attended,
    d_out_BxTxHxE: jax.Array,
    *,
    causal: bool,
) -> Cotangents:
    """Cotangents of what `forward` takes, for an output that may be merged from several parts.

    Args:
      attended: output and log-sum-exp over all parts' keys.
      d_out_BxTxHxE: cotangent of that output.

    Returns:
      0 behind the lengths.
    """
    shape = tpu_tiles.make_shape(q_BxTxHxE, k_BxSxJxE, causal)
    scale = q_BxTxHxE.shape[-1] ** -0.5
    out_times_d = attended.out_BxTxHxE.astype(jnp.float32) * d_out_BxTxHxE.astype(jnp.float32)
    delta_BxHxT = jnp.swapaxes(jnp.sum(out_times_d, axis=-1), 1, 2)

    arrays = (
        *(q_len_B, kv_len_B),
        _flatten_heads(shape, q_BxTxHxE),
        _flatten_heads(shape, d_out_BxTxHxE.astype(q_BxTxHxE.dtype)),
        attended.lse_BxHxT.reshape(shape.B, shape.J, shape.R, shape.T),
        delta_BxHxT.reshape(shape.B, shape.J, shape.R, shape.T),
        _flatten_heads(shape, k_BxSxJxE),
        _flatten_heads(shape, v_BxSxJxE),
    )
    (d_q,) = _d_queries_call(shape, scale)(*arrays)
    d_k, d_v = _d_keys_call(shape, scale)(*arrays)
    return Cotangents(
        _split_heads(d_q, q_BxTxHxE), _split_heads(d_k, k_BxSxJxE), _split_heads(d_v, v_BxSxJxE)
    )


def _d_queries_call(shape: Shape, scale: float) -> Callable[..., Any]:
    rows = (shape.rows, shape.E)
    return pl.pallas_call(
        functools.partial(_d_queries_kernel, shape, scale),
        grid_spec=_grid(
            (shape.B, shape.J, shape.query_blocks, shape.key_blocks),
            inputs=_backward_inputs(shape, tpu_tiles.fetch_with_keys_inside),
            outputs=[_blocks(shape, tpu_tiles.write_outer).queries],
            scratch=[
                pltpu.VMEM(rows, shape.dtype),
                pltpu.VMEM(rows, shape.dtype),
                pltpu.VMEM(rows[::-1], jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((shape.B, shape.T, shape.J * shape.R * shape.E), shape.dtype)
        ],
        compiler_params=_INNER_LOOP_IN_ORDER,
        cost_estimate=_cost(shape, products=3, query_arrays=3, key_arrays=_reads_of_keys(shape)),
        name="attention_d_queries",
    )


def _d_keys_call(shape: Shape, scale: float) -> Callable[..., Any]:
    keys = (shape.block_k, shape.E)
    written = _blocks(shape, tpu_tiles.write_outer).keys
    d_keys = jax.ShapeDtypeStruct((shape.B, shape.S, shape.J * shape.E), shape.dtype)
    return pl.pallas_call(
        functools.partial(_d_keys_kernel, shape, scale),
        grid_spec=_grid(
            (shape.B, shape.J, shape.key_blocks, shape.query_blocks),
            inputs=_backward_inputs(shape, tpu_tiles.fetch_with_queries_inside),
            outputs=[written, written],
            scratch=[pltpu.VMEM(keys, jnp.float32), pltpu.VMEM(keys, jnp.float32)],
        ),
        out_shape=[d_keys, d_keys],
        compiler_params=_INNER_LOOP_IN_ORDER,
        cost_estimate=_cost(shape, products=4, query_arrays=_reads_of_queries(shape), key_arrays=4),
        name="attention_d_keys",
    )


# --- Kernels --------------------------------------------------------------------------------------


def _forward_kernel(
    shape, scale, q_len_B, kv_len_B, q, k, v, out, lse, rows_NxE, top_1xN, sum_1xN, out_ExN
) -> None:
    """Grid [B, J, query blocks, key blocks]; the last four references are kept over key blocks."""
    tile = _tile(shape, q_len_B, kv_len_B, query_axis=2, key_axis=3)

    @pl.when(tile.key_start == 0)
    def start() -> None:
        rows_NxE[...] = tile.rows(q, masked=True)
        top_1xN[...] = jnp.full_like(top_1xN, MASKED)
        sum_1xN[...] = jnp.zeros_like(sum_1xN)
        out_ExN[...] = jnp.zeros_like(out_ExN)

    def add(masked: bool) -> None:
        score_KxN = scale * LOG2_E * _dot(k[0], rows_NxE[...], (1, 1))
        if masked:
            score_KxN = jnp.where(tile.visible_KxN(), score_KxN, MASKED)

        old_top_1xN = top_1xN[...]
        new_top_1xN = jnp.maximum(old_top_1xN, jnp.max(score_KxN, axis=0, keepdims=True))
        shrink_1xN = jnp.exp2(old_top_1xN - new_top_1xN)
        weight_KxN = jnp.exp2(score_KxN - new_top_1xN)

        top_1xN[...] = new_top_1xN
        sum_1xN[...] = sum_1xN[...] * shrink_1xN + jnp.sum(weight_KxN, axis=0, keepdims=True)
        new_ExN = _dot(tile.keys(v, masked), weight_KxN.astype(v.dtype), (0, 0))
        out_ExN[...] = out_ExN[...] * shrink_1xN + new_ExN

    _when_needed(tile, add)

    @pl.when(pl.program_id(3) == shape.key_blocks - 1)
    def finish() -> None:
        some_1xN = sum_1xN[...] > 0
        divisor_1xN = jnp.where(some_1xN, sum_1xN[...], 1.0)
        lse_1xN = jnp.where(some_1xN, top_1xN[...] / LOG2_E + jnp.log(divisor_1xN), MASKED)
        tpu_tiles.write_rows(shape, out, out_ExN[...] / divisor_1xN)
        tpu_tiles.write_statistics(shape, lse, lse_1xN)


def _d_queries_kernel(
    shape, scale, q_len_B, kv_len_B, q, d_out, lse, delta, k, v, d_q, q_NxE, d_out_NxE, d_q_ExN
) -> None:
    """Grid [B, J, query blocks, key blocks]; the last three references are kept over key blocks."""
    tile = _tile(shape, q_len_B, kv_len_B, query_axis=2, key_axis=3)

    @pl.when(tile.key_start == 0)
    def start() -> None:
        q_NxE[...] = tile.rows(q, masked=True)
        d_out_NxE[...] = tile.rows(d_out, masked=True)
        d_q_ExN[...] = jnp.zeros_like(d_q_ExN)

    def add(masked: bool) -> None:
        operands = _Operands(
            q_NxE[...],
            d_out_NxE[...],
            tile.statistics(lse, masked),
            tile.statistics(delta, masked),
            tile.keys(k, masked),
            tile.keys(v, masked),
        )
        weights = _weights(tile, scale, operands, masked)
        d_q_ExN[...] += _dot(operands.k_KxE, weights.d_score_KxN, (0, 0))

    _when_needed(tile, add)

    @pl.when(pl.program_id(3) == shape.key_blocks - 1)
    def finish() -> None:
        tpu_tiles.write_rows(shape, d_q, scale * d_q_ExN[...])


def _d_keys_kernel(
    shape, scale, q_len_B, kv_len_B, q, d_out, lse, delta, k, v, d_k, d_v, d_k_KxE, d_v_KxE
) -> None:
    """Grid [B, J, key blocks, query blocks]; the last two references are kept over query blocks."""
    tile = _tile(shape, q_len_B, kv_len_B, query_axis=3, key_axis=2)

    @pl.when(tile.query_start == 0)
    def start() -> None:
        d_k_KxE[...] = jnp.zeros_like(d_k_KxE)
        d_v_KxE[...] = jnp.zeros_like(d_v_KxE)

    def add(masked: bool) -> None:
        operands = _Operands(
            tile.rows(q, masked),
            tile.rows(d_out, masked),
            tile.statistics(lse, masked),
            tile.statistics(delta, masked),
            tile.keys(k, masked),
            tile.keys(v, masked),
        )
        weights = _weights(tile, scale, operands, masked)
        d_k_KxE[...] += _dot(weights.d_score_KxN, operands.q_NxE, (1, 0))
        d_v_KxE[...] += _dot(weights.weight_KxN, operands.d_out_NxE, (1, 0))

    _when_needed(tile, add)

    @pl.when(pl.program_id(3) == shape.query_blocks - 1)
    def finish() -> None:
        d_k[0] = (scale * d_k_KxE[...]).astype(d_k.dtype)
        d_v[0] = d_v_KxE[...].astype(d_v.dtype)


class _Operands(NamedTuple):
    """What the cotangents of a tile are made of."""

    q_NxE: jax.Array
    d_out_NxE: jax.Array
    lse_1xN: jax.Array
    delta_1xN: jax.Array
    k_KxE: jax.Array
    v_KxE: jax.Array


class _Weights(NamedTuple):
    """p and d_score of the formulas above, in the inputs' dtype."""

    weight_KxN: jax.Array
    d_score_KxN: jax.Array


def _weights(tile: Tile, scale: float, given: _Operands, masked: bool) -> _Weights:
    score_KxN = scale * LOG2_E * _dot(given.k_KxE, given.q_NxE, (1, 1))
    weight_KxN = jnp.exp2(score_KxN - LOG2_E * given.lse_1xN)
    if masked:
        weight_KxN = jnp.where(tile.visible_KxN(), weight_KxN, 0.0)

    d_weight_KxN = _dot(given.v_KxE, given.d_out_NxE, (1, 1))
    d_score_KxN = weight_KxN * (d_weight_KxN - given.delta_1xN)
    return _Weights(weight_KxN.astype(given.k_KxE.dtype), d_score_KxN.astype(given.k_KxE.dtype))


def _dot(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Product in the inputs' dtype over one axis of each, summed in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    contract = ((axes[0],), (axes[1],)), ((), ())
    return jax.lax.dot_general(a, b, contract, precision, preferred_element_type=jnp.float32)


def _tile(shape: Shape, q_len_B: Ref, kv_len_B: Ref, *, query_axis: int, key_axis: int) -> Tile:
    b = pl.program_id(0)
    query_start = pl.program_id(query_axis) * shape.block_q
    key_start = pl.program_id(key_axis) * shape.block_k
    return Tile(shape, query_start, key_start, q_len_B[b], kv_len_B[b])


def _when_needed(tile: Tile, add: Callable[[bool], None]) -> None:
    """Runs `add(masked)`; masks cost vector operations, which most tiles need not pay for."""
    needed, complete = tile.is_needed(), tile.is_complete()
    pl.when(needed & complete)(functools.partial(add, False))
    pl.when(needed & ~complete)(functools.partial(add, True))


# --- Calls ----------------------------------------------------------------------------------------


def _flatten_heads(shape: Shape, a_BxTxHxE: jax.Array) -> jax.Array:
    """[B, T, H * E] with each head padded with zeros to whole lanes, which changes no product."""
    B, T, H, E = a_BxTxHxE.shape
    padded = jnp.pad(a_BxTxHxE, [(0, 0)] * 3 + [(0, shape.E - E)])
    return padded.reshape(B, T, H * shape.E)


def _split_heads(a_BxTxF: jax.Array, like_BxTxHxE: jax.Array) -> jax.Array:
    B, T, H, E = like_BxTxHxE.shape
    return a_BxTxF.reshape(B, T, H, -1)[..., :E]


class _Blocks(NamedTuple):
    """Blocks of arrays of queries [B, T, H * E], of their statistics [B, J, R, T], of keys."""

    queries: pl.BlockSpec
    statistics: pl.BlockSpec
    keys: pl.BlockSpec


def _blocks(shape: Shape, place: Callable[..., tpu_tiles.Pair]) -> _Blocks:
    """`place`: from (shape, b, outer, inner, lengths) to the blocks' places."""

    def queries(b, j, outer, inner, *lengths):
        return b, place(shape, b, outer, inner, *lengths).query, j

    def statistics(b, j, outer, inner, *lengths):
        return b, j, 0, place(shape, b, outer, inner, *lengths).query

    def keys(b, j, outer, inner, *lengths):
        return b, place(shape, b, outer, inner, *lengths).key, j

    return _Blocks(
        pl.BlockSpec((1, shape.block_q, shape.R * shape.E), queries),
        pl.BlockSpec((1, 1, shape.R, shape.block_q), statistics),
        pl.BlockSpec((1, shape.block_k, shape.E), keys),
    )


def _backward_inputs(
    shape: Shape, place: Callable[..., tpu_tiles.Pair]
) -> tuple[pl.BlockSpec, ...]:
    """Of q, d_out, lse, delta, k, v."""
    queries, statistics, keys = _blocks(shape, place)
    return queries, queries, statistics, statistics, keys, keys


def _grid(
    sizes: tuple[int, ...],
    *,
    inputs: Sequence[pl.BlockSpec],
    outputs: Sequence[pl.BlockSpec],
    scratch: Sequence[Any],
) -> pltpu.PrefetchScalarGridSpec:
    """The two lengths are there before the blocks."""
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=sizes,
        in_specs=inputs,
        out_specs=outputs,
        scratch_shapes=scratch,
    )


# Steps of the inner loop add to one result; the others may go to several cores.
_INNER_LOOP_IN_ORDER = pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
)


def _cost(
    shape: Shape, *, products: int, query_arrays: float, key_arrays: float
) -> pl.CostEstimate:
    """Of full lengths. `query_arrays`, `key_arrays`: how often as many bytes as one has move."""
    pairs = _visible_share(shape) * shape.B * shape.J * shape.R * shape.T * shape.S
    query_numbers = shape.B * shape.J * shape.R * shape.T * shape.E
    key_numbers = shape.B * shape.J * shape.S * shape.E
    moved = query_arrays * query_numbers + key_arrays * key_numbers
    return pl.CostEstimate(
        flops=int(2 * products * pairs * shape.E),
        bytes_accessed=int(moved * shape.dtype.itemsize),
        transcendentals=int(pairs),
    )


def _reads_of_keys(shape: Shape) -> float:
    """How often as many bytes as the keys have are read: k and v, for every block of queries."""
    return 2 * _visible_share(shape) * shape.query_blocks


def _reads_of_queries(shape: Shape) -> float:
    """How often as many bytes as the queries have are read: q and d_out, for every key block."""
    return 2 * _visible_share(shape) * shape.key_blocks


def _visible_share(shape: Shape) -> float:
    return 0.5 if shape.causal else 1.0
