"""Decode attention over pages on GPUs: one Pallas kernel, lowered by Triton.

A program of the grid takes the queries of one key head of a sequence, and a share of its keys: with
few long sequences there would else be fewer programs than a GPU has multiprocessors (16 groups of 8
key heads are 128 on the 132 of an H100, and each would wait for its own copies alone). XLA joins
the shares.

Loads are masked by length, so nothing is read that is not used, and what lies there reaches
nothing. Page numbers behind a length are not looked at.

Why Triton, which jax deprecates from 0.11 on: its example of such a kernel was measured as fast as
cuDNN's paged attention, which takes neither int8 nor float32 and has no public name in jax; and
such kernels can be interpreted on a CPU. Decoding is bound by memory, so Mosaic GPU's larger matrix
instructions, of at least 64 rows where these heads have 4 to 32, would gain nothing. This kernel
has been interpreted and compiled for an H100; it has not run on one.

Exponentials have base 2, which is what the hardware computes: inside the kernel, scores are in
units of log 2.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from spiral_jax.model.attention.pages import Pages
from spiral_jax.model.attention.part import MASKED, Part

Ref = Any  # an array in the GPU's memory

LOG2_E = math.log2(math.e)

# Keys and values of a step of a program's loop: 64 keys of 128 bfloat16 numbers. With STAGES,
# Triton's pipeline holds two steps in shared memory, as the page's number takes stages too: each
# of 2 or 3 programs a multiprocessor then has one step under way while it computes. An H100 needs
# some 25 KiB a multiprocessor under way.
STEP_BYTES = 32 * 1024
STAGES = 5
ROWS = (16, 64)  # fewest and most queries a program: 16 is the least that tensor cores multiply

# Shares of a sequence: at least as many as fill a GPU of 132 multiprocessors, and none longer than
# LONGEST keys, as the GPU waits for the last program at the end. No share is shorter than SHORTEST.
PROGRAMS = 3 * 132
LONGEST, SHORTEST = 2048, 256


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Sizes of a call: S sequences of up to T pages, N queries for each of J key heads.

    Attributes:
      rows: queries a program.
      keys: keys a step.
      shares: programs that share a sequence's keys.
    """

    S: int
    T: int
    J: int
    N: int
    E: int
    page: int
    rows: int
    keys: int
    shares: int

    @property
    def query_blocks(self) -> int:
        return pl.cdiv(self.N, self.rows)


def takes(size: int) -> bool:
    """Whether pages, or heads, may have this size: Triton's blocks are powers of 2."""
    return size >= 16 and size & (size - 1) == 0


def attend_pages(
    q_SxJxNxE: jax.Array,
    pages: Pages,
    table_SxT: jax.Array,
    length_S: jax.Array,
    *,
    interpret: bool = False,
) -> Part:
    """Attention of each sequence's queries to the first `length` tokens of its pages.

    Args:
      q_SxJxNxE: scaled queries: all those of a sequence that share a key head.
      pages: one layer's pool on one shard: `k`, `v` [pages, J, page, E] in the queries' dtype or
        int8, then with `k_scale`, `v_scale` float32 [pages, J, page].
      table_SxT: int32, pages of each sequence in order; of no meaning behind its length.
      length_S: int32, 0 to T * page; where it is 0, nothing is seen.
      interpret: for tests on CPUs.

    Raises:
      ValueError: `page` or E is not a power of 2 of at least 16, or the pool is too large.
    """
    shape = _make_shape(q_SxJxNxE, pages, table_SxT)
    arrays = [pages[name] for name in ("k", "v", "k_scale", "v_scale") if name in pages]

    def of_program(share: int, j: int, program: int) -> tuple[int, ...]:
        return share, program // shape.query_blocks, j, program % shape.query_blocks

    def results(*width: int) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        array = (shape.shares, shape.S, shape.J, shape.N, *width)
        block = (None, None, None, shape.rows, *width)
        spec = pl.BlockSpec(block, lambda *program: (*of_program(*program), *(0 for _ in width)))
        return jax.ShapeDtypeStruct(array, jnp.float32), spec

    out_shapes, out_specs = zip(results(shape.E), results(), results(), strict=True)
    queries = pl.BlockSpec(
        (None, None, shape.rows, shape.E), lambda *program: (*of_program(*program)[1:], 0)
    )
    values, top, weight = pl.pallas_call(
        functools.partial(_kernel, shape),
        grid=(shape.shares, shape.J, shape.S * shape.query_blocks),
        in_specs=[queries] + [pl.BlockSpec()] * (2 + len(arrays)),
        out_specs=out_specs,
        out_shape=out_shapes,
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=STAGES),
        cost_estimate=_cost(shape, q_SxJxNxE, arrays),
        name="attention_pages",
    )(q_SxJxNxE, table_SxT, length_S, *arrays)
    return _joined(values, top, weight)


def _make_shape(q_SxJxNxE: jax.Array, pages: Pages, table_SxT: jax.Array) -> _Shape:
    S, J, N, E = q_SxJxNxE.shape
    T, page = table_SxT.shape[1], pages["k"].shape[2]
    for name, size in (("pages", page), ("heads", E)):
        if not takes(size):
            raise ValueError(
                f"{name} of {size}: Triton's blocks are powers of 2 of at least 16; choose such a "
                "size, or the xla backend."
            )
    _check_offsets(pages["k"])
    rows = min(max(1 << (N - 1).bit_length(), ROWS[0]), ROWS[1])
    programs = S * J * pl.cdiv(N, rows)
    shares = max(pl.cdiv(PROGRAMS, programs), pl.cdiv(T * page, LONGEST))
    shares = min(shares, pl.cdiv(T * page, SHORTEST))
    step_keys = STEP_BYTES // (2 * E * pages["k"].dtype.itemsize)
    return _Shape(S, T, J, N, E, page, rows, min(step_keys, page), shares)


def _check_offsets(pool: jax.Array) -> None:
    """jax's lowering counts elements in 32 bits up to 2**32 bytes, and 2**31 is then negative."""
    if pool.size > 2**31 and pool.size * pool.dtype.itemsize <= 2**32:
        raise ValueError(
            f"a pool of {pool.size:,} {pool.dtype} keys a layer: jax's Triton lowering addresses "
            "up to 2**31, or more than 2**32 bytes. Give sampling less memory or more."
        )


def _joined(values: jax.Array, top: jax.Array, weight: jax.Array) -> Part:
    """The part of all shares, in units of log e. A share without keys adds exact zeros."""
    most = jnp.max(top, axis=0)
    shrink = jnp.exp2(top - most)
    total = jnp.sum(weight * shrink, axis=0)
    return Part(
        jnp.sum(values * shrink[..., None], axis=0),
        jnp.where(total > 0, most / LOG2_E, MASKED),
        total,
    )


def _kernel(shape, q_NxE, table_SxT, length_S, *refs) -> None:
    """Grid [shares, J, S * query blocks]; `refs`: k, v, with int8 their scales, three results."""
    k, v, *scales = refs[:-3]
    values, top, weight = refs[-3:]
    share, j, program = (pl.program_id(axis) for axis in range(3))
    s, query_block = program // shape.query_blocks, program % shape.query_blocks
    length = length_S[s]
    steps = pl.cdiv(length, shape.keys)
    share_steps = jnp.maximum(pl.cdiv(steps, shape.shares), pl.cdiv(SHORTEST, shape.keys))
    first = share * share_steps
    end = jnp.minimum(first + share_steps, steps)

    exists_N = query_block * shape.rows + jnp.arange(shape.rows) < shape.N
    exists_NxE = _over(exists_N[:, None], shape.rows, shape.E)
    q = plgpu.load(q_NxE, mask=exists_NxE, other=0.0)

    def add(step: jax.Array, seen: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        values_NxE, top_N, weight_N = seen
        start = step * shape.keys
        tokens = pl.ds(start % shape.page, shape.keys)
        at = (table_SxT[s, start // shape.page], j, tokens)
        visible_K = start + jnp.arange(shape.keys) < length
        visible_KxE = _over(visible_K[:, None], shape.keys, shape.E)

        k_KxE = plgpu.load(k.at[at], mask=visible_KxE, other=0).astype(q.dtype)
        score_NxK = LOG2_E * _dot(q, k_KxE, (1, 1))
        if scales:
            score_NxK *= plgpu.load(scales[0].at[at], mask=visible_K, other=0.0)[None, :]
        score_NxK = jnp.where(visible_K[None, :], score_NxK, MASKED)

        new_top_N = jnp.maximum(top_N, jnp.max(score_NxK, axis=1))
        shrink_N = jnp.exp2(top_N - new_top_N)
        weight_NxK = jnp.exp2(score_NxK - new_top_N[:, None])
        weight_N = weight_N * shrink_N + jnp.sum(weight_NxK, axis=1)

        v_KxE = plgpu.load(v.at[at], mask=visible_KxE, other=0).astype(q.dtype)
        if scales:
            weight_NxK *= plgpu.load(scales[1].at[at], mask=visible_K, other=0.0)[None, :]
        seen_NxE = _dot(weight_NxK.astype(q.dtype), v_KxE, (1, 0))
        return values_NxE * shrink_N[:, None] + seen_NxE, new_top_N, weight_N

    nothing = (
        jnp.zeros((shape.rows, shape.E), jnp.float32),
        jnp.full((shape.rows,), MASKED, jnp.float32),
        jnp.zeros((shape.rows,), jnp.float32),
    )
    values_NxE, top_N, weight_N = jax.lax.fori_loop(first, end, add, nothing)
    plgpu.store(values, values_NxE, mask=exists_NxE)
    plgpu.store(top, top_N, mask=exists_N)
    plgpu.store(weight, weight_N, mask=exists_N)


def _over(mask: jax.Array, rows: int, columns: int) -> jax.Array:
    return jnp.broadcast_to(mask, (rows, columns))


def _dot(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Product in the inputs' dtype over one axis of each, summed in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    contract = ((axes[0],), (axes[1],)), ((), ())
    return jax.lax.dot_general(a, b, contract, precision, preferred_element_type=jnp.float32)


def _cost(shape: _Shape, q_SxJxNxE: jax.Array, arrays: list[jax.Array]) -> pl.CostEstimate:
    """Of full tables."""
    tokens = shape.S * shape.T * shape.page
    pairs = tokens * shape.J * shape.N
    token_bytes = sum(array[0, :, 0].size * array.dtype.itemsize for array in arrays)
    read = tokens * token_bytes * shape.query_blocks
    queries = q_SxJxNxE.size * (q_SxJxNxE.dtype.itemsize + 4 * shape.shares)
    return pl.CostEstimate(
        flops=4 * pairs * shape.E, bytes_accessed=read + queries, transcendentals=pairs
    )
