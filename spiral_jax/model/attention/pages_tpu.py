"""Decode attention over pages on TPUs: one Pallas kernel that reads the pages that are used.

A page [J, page, E] of keys, or of values, is one run of bytes in HBM, so it is fetched by one copy,
whatever page of the pool it is. Pages of a sequence lie anywhere, which blocks of Pallas's own
pipeline cannot follow; the kernel therefore copies by itself, into a ring of blocks of some pages
each, and computes on one block while the next ones are on their way.

Heads narrower than LANES are stored padded with zeros to whole lanes (`empty_pages`), as HBM would
pad them anyway: otherwise XLA chooses another layout for the pool and copies it for every call.

The grid's steps are the blocks that are used, of one sequence after the other. Their number is
known at run time only: an idle sequence has no step, and copies run ahead from one sequence into
the next.

Scores are [queries, keys]: a head has 4 to 32 queries here, which fill few sublanes, and keys fill
the lanes. Each head's queries are one product with its keys.

Tokens must be written by `pages_tpu_write`, or by a scatter that XLA does not change the pool's
layout for; see there. Both kernels have been interpreted and compiled; they have not run on a TPU.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from spiral_jax.model.attention.pages import Pages
from spiral_jax.model.attention.part import MASKED, Part

Ref = Any  # an array in HBM, a block in fast memory, or numbers in scalar memory

LANES = 128  # of a vector register; a page is a multiple of it

# Computing on a block takes less time than fetching it from 512 keys on, and from 1,024 where they
# are converted from int8 (counted in the programs that the compiler makes for v5e, with 32 queries
# a head). A sequence's last block costs as much as a full one, so blocks are not larger, and two of
# them with many heads must fit into fast memory.
BLOCK_KEYS = (512, 1024)
BLOCK_BYTES = (512 * 1024, 2 * 1024 * 1024)  # of keys and values

# HBM's speed is reached if about a microsecond's worth of bytes is under way: 0.8 MB on v5e, 1.6 MB
# on v6e.
BYTES_UNDER_WAY = 3 * 512 * 1024

# More queries a head than this, as of a group of 256 traces, read the pages several times: with so
# many, the matrix units need as long as the copies.
QUERIES = 256


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Sizes of a call: S sequences of up to T pages, N queries for each of J key heads.

    Attributes:
      N: queries a step.
      J: key heads a step; the cores of a chip share the rest.
      pages: pages a block.
      slots: blocks of the ring; one is read while the others are fetched.
    """

    S: int
    T: int
    J: int
    N: int
    E: int
    page: int
    pages: int
    slots: int

    @property
    def keys(self) -> int:
        return self.pages * self.page


def empty_pages(pages: int, page: int, J: int, E: int, dtype: jnp.dtype) -> Pages:
    """A pool of zeros whose heads are padded to whole lanes; int8 comes with its scales."""
    width = pl.cdiv(E, LANES) * LANES
    pool = {name: jnp.zeros((pages, J, page, width), dtype) for name in ("k", "v")}
    if dtype == jnp.int8:
        pool |= {name: jnp.zeros((pages, J, page), jnp.float32) for name in ("k_scale", "v_scale")}
    return pool


def attend_pages(
    q_SxJxNxE: jax.Array, pages: Pages, table_SxT: jax.Array, length_S: jax.Array
) -> Part:
    """Attention of each sequence's queries to the first `length` tokens of its pages.

    Args:
      q_SxJxNxE: scaled queries, bfloat16 or float32: all those of a sequence that share a key head.
      pages: one layer's pool on one shard, as `empty_pages` makes it: `k`, `v` [pages, J, page, E]
        with E padded to whole lanes, in the queries' dtype or int8, then with `k_scale`, `v_scale`
        float32 [pages, J, page].
      table_SxT: int32, pages of each sequence in order; of no meaning behind its length.
      length_S: int32, 0 to T * page; where it is 0, nothing is seen.

    Raises:
      ValueError: a page is not a multiple of 128 tokens.
    """
    width = pages["k"].shape[3] - q_SxJxNxE.shape[3]
    padded = jnp.pad(q_SxJxNxE, [(0, 0)] * 3 + [(0, width)])
    part = _attend(padded, pages, table_SxT, length_S)
    return part._replace(values=part.values[..., : q_SxJxNxE.shape[3]])


def _attend(q_SxJxNxE: jax.Array, pages: Pages, table_SxT: jax.Array, length_S: jax.Array) -> Part:
    S, J, N, E = q_SxJxNxE.shape
    shape = _make_shape(q_SxJxNxE, pages, table_SxT)
    first_S, sequence, steps = _schedule(length_S, shape.keys, S * pl.cdiv(shape.T, shape.pages))
    arrays = [pages[name] for name in ("k", "v", "k_scale", "v_scale") if name in pages]

    def of_sequence(width: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (1, shape.J, shape.N, width), lambda j, n, step, sequence, *_: (sequence[step], j, n, 0)
        )

    def rows(width: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((S, J, N, width), jnp.float32)

    block = shape.slots, shape.pages, shape.J
    ring = [pltpu.VMEM((*block, *array.shape[2:]), array.dtype) for array in arrays]
    values, top, weight = pl.pallas_call(
        functools.partial(_kernel, shape),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(J // shape.J, pl.cdiv(N, shape.N), steps),
            in_specs=[of_sequence(E)] + [pl.BlockSpec(memory_space=pl.ANY)] * len(arrays),
            out_specs=[of_sequence(E), of_sequence(LANES), of_sequence(LANES)],
            scratch_shapes=[*ring, pltpu.SemaphoreType.DMA((shape.slots,))],
        ),
        out_shape=[rows(E), rows(LANES), rows(LANES)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=_cost(shape, q_SxJxNxE, arrays),
        name="attention_pages",
    )(sequence, first_S, length_S, table_SxT.reshape(-1), q_SxJxNxE, *arrays)
    return _without_idle(Part(values, top[..., 0], weight[..., 0]), length_S)


def _make_shape(q_SxJxNxE: jax.Array, pages: Pages, table_SxT: jax.Array) -> _Shape:
    S, J, N, E = q_SxJxNxE.shape
    T, page = table_SxT.shape[1], pages["k"].shape[2]
    if page % LANES:
        raise ValueError(
            f"pages of {page} tokens: on TPUs a page is a multiple of {LANES}; choose {LANES}."
        )
    heads = J // _cores() if J % _cores() == 0 else J
    token_bytes = 2 * heads * E * pages["k"].dtype.itemsize
    keys = min(max(BLOCK_BYTES[0] // token_bytes, BLOCK_KEYS[0]), BLOCK_KEYS[1])
    block = max(min(keys, BLOCK_BYTES[1] // token_bytes, T * page) // page, 1)
    slots = 1 + pl.cdiv(BYTES_UNDER_WAY, block * page * token_bytes)
    return _Shape(S, T, heads, min(N, QUERIES), E, page, pages=block, slots=slots)


def _cores() -> int:
    """Cores that share a kernel's grid: two of a v4 or v5p, which are one device."""
    try:
        info = pltpu.get_tpu_info()
    except ValueError:  # no TPU: the kernel is interpreted
        return 1
    return info.num_cores if info.is_megacore else 1


def _schedule(length_S: jax.Array, keys: int, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which block of which sequence a step of the grid is.

    Returns:
      Each sequence's first step [S]; each step's sequence [most]; the number of steps, which is at
      least 1, as results of a grid without any step are not defined.
    """
    blocks_S = pl.cdiv(length_S, keys)
    end_S = jnp.cumsum(blocks_S)
    sequence = jnp.sum(jnp.arange(most)[:, None] >= end_S, axis=1, dtype=jnp.int32)
    last = length_S.shape[0] - 1
    return end_S - blocks_S, jnp.minimum(sequence, last), jnp.maximum(end_S[-1], 1)


def _without_idle(part: Part, length_S: jax.Array) -> Part:
    """The kernel has no step for idle sequences, so what it returns of them is not even finite."""
    busy = length_S[:, None, None] > 0
    return Part(
        jnp.where(busy[..., None], part.values, 0.0),
        jnp.where(busy, part.top, MASKED),
        jnp.where(busy, part.weight, 0.0),
    )


def _kernel(shape, sequence, first_S, length_S, table, q, *refs) -> None:
    """Grid [J blocks, N blocks, steps]; the results of a sequence stay over its steps.

    `refs`: 2 or 4 arrays in HBM, the three results, as many rings, the ring's semaphores.
    """
    count = (len(refs) - 4) // 2
    arrays, results, rings, arrived = (
        *(refs[:count], refs[count : count + 3]),
        *(refs[count + 3 : -1], refs[-1]),
    )
    step, steps = pl.program_id(2), pl.num_programs(2)
    heads = pl.ds(pl.program_id(0) * shape.J, shape.J)

    def each_copy(of_step: jax.Array, act: Callable[[Any], None]) -> None:
        """Does something with the copies of a step's pages into its slot of the ring."""
        s, slot = sequence[of_step], of_step % shape.slots
        start = (of_step - first_S[s]) * shape.pages
        used = pl.cdiv(length_S[s], shape.page) - start

        @pl.loop(0, jnp.minimum(used, shape.pages))
        def one_page(g: jax.Array) -> None:
            page = table[s * shape.T + start + g]
            for array, ring in zip(arrays, rings, strict=True):
                place = ring.at[slot, g]
                act(pltpu.make_async_copy(array.at[page, heads], place, arrived.at[slot]))

    # A step fetches into the slot that the step before it has read; the first one, into all.
    ahead = shape.slots - 1
    end = jnp.minimum(step + ahead + 1, steps)

    @pl.loop(jnp.where(step == 0, 0, step + ahead), end)
    def fetch(of_step: jax.Array) -> None:
        each_copy(of_step, lambda copy: copy.start())

    each_copy(step, lambda copy: copy.wait())

    block = step - first_S[sequence[step]]
    visible = length_S[sequence[step]] - block * shape.keys
    slot = step % shape.slots

    @pl.when(block == 0)
    def begin() -> None:
        values, top, weight = results
        values[...] = jnp.zeros_like(values)
        top[...] = jnp.full_like(top, MASKED)
        weight[...] = jnp.zeros_like(weight)

    add = functools.partial(_add, shape, q, [ring.at[slot] for ring in rings], results)
    pl.when(visible >= shape.keys)(functools.partial(add, None))
    pl.when(visible < shape.keys)(functools.partial(add, visible))


def _add(
    shape: _Shape, q: Ref, block: list[Ref], results: tuple[Ref, ...], visible: jax.Array | None
) -> None:
    """Adds a block of keys to the results.

    Args:
      block: k, v [pages, J, page, E], then with int8 their scales [pages, J, page].
      visible: keys that are visible, None if all are. Others are whatever was in fast memory.
    """
    values, top, weight = results
    k, v, *scales = block
    for j in range(shape.J):
        dtype = q.dtype
        score_NxK = _dot(q[0, j], _keys(shape, k, j).astype(dtype), (1, 1))
        if scales:
            score_NxK *= _scales(shape, scales[0], j)
        if visible is not None:
            score_NxK = jnp.where(_iota(shape.keys, axis=1) < visible, score_NxK, MASKED)

        old_top = top[0, j]  # the same number in all lanes, as is the sum of weights
        new_top = jnp.maximum(old_top, jnp.max(score_NxK, axis=1, keepdims=True))
        shrink = jnp.exp(old_top - new_top)
        weight_NxK = jnp.exp(score_NxK - new_top[:, :1])
        top[0, j] = new_top
        weight[0, j] = weight[0, j] * shrink + jnp.sum(weight_NxK, axis=1, keepdims=True)

        v_KxE = _keys(shape, v, j)
        if scales:
            weight_NxK *= _scales(shape, scales[1], j)
        if visible is not None:  # 0 x NaN is no 0; int8 is never NaN, its scale may be
            if scales:
                weight_NxK = _zero_unless(_iota(shape.keys, axis=1) < visible, weight_NxK)
            else:
                v_KxE = _zero_unless(_iota(shape.keys, axis=0) < visible, v_KxE)
        seen_NxE = _dot(weight_NxK.astype(dtype), v_KxE.astype(dtype), (1, 0))
        values[0, j] = values[0, j] * shrink[:, :1] + seen_NxE


def _keys(shape: _Shape, block: Ref, j: int) -> jax.Array:
    """[K, E] of a head."""
    return block[:, j].reshape(shape.keys, shape.E)


def _scales(shape: _Shape, block: Ref, j: int) -> jax.Array:
    """[1, K] of a head."""
    return jnp.concatenate([block[g, j : j + 1, :] for g in range(shape.pages)], axis=1)


def _dot(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Product in the inputs' dtype over one axis of each, summed in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    contract = ((axes[0],), (axes[1],)), ((), ())
    return jax.lax.dot_general(a, b, contract, precision, preferred_element_type=jnp.float32)


def _iota(size: int, axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, (size, 1) if axis == 0 else (1, size), axis)


def _zero_unless(condition: jax.Array, a: jax.Array) -> jax.Array:
    """By way of float32: v5e selects no narrower numbers by such a condition."""
    return jnp.where(condition, a.astype(jnp.float32), 0.0).astype(a.dtype)


def _cost(shape: _Shape, q_SxJxNxE: jax.Array, arrays: list[jax.Array]) -> pl.CostEstimate:
    """Of full tables."""
    S, J, N, E = q_SxJxNxE.shape
    pairs = S * J * N * shape.T * shape.page
    page_bytes = sum(array[0].size * array.dtype.itemsize for array in arrays)
    read = S * shape.T * page_bytes * pl.cdiv(N, shape.N)
    queries = S * J * N * (E * q_SxJxNxE.dtype.itemsize + 4 * (E + 2 * LANES))  # and results
    return pl.CostEstimate(
        flops=4 * pairs * E, bytes_accessed=read + queries, transcendentals=pairs
    )
