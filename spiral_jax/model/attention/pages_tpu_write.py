"""Writes decoded tokens into pages on TPUs, in place: a Pallas kernel.

XLA's scatter of [J, E] into [pages, J, page, E] wants another layout than the kernel of
`pages_tpu` reads, and copies the whole pool for each token; with one index for each head it does
not, but goes through them one after the other. This kernel has all copies under way at once.

Memory is written in tiles of 8 to 32 tokens, by the size of a number. The kernel fetches the tile
of each row's new token, puts the token in, and writes the tile back.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from spiral_jax.model.attention.pages import NOWHERE, Pages

Ref = Any  # an array in HBM, a block in fast memory, or numbers in scalar memory

ROWS = 32  # at once: 2 MiB of fast memory with 8 heads of 128 numbers


def write_tokens(pages: Pages, entries: Pages, page_N: jax.Array, offset_N: jax.Array) -> Pages:
    """The pool with one token of each of N rows written, in place if it is donated.

    Args:
      pages: as `pages_tpu.empty_pages` makes it.
      entries: what is to be stored, by the pool's names and in its dtypes: `k`, `v` [N, J, E],
        `k_scale`, `v_scale` [N, J]. E may be less than the pool's.
      page_N: int32. Each row has a page of its own; rows of page 0 write nothing.
      offset_N: int32, place in the page.
    """
    N = page_N.shape[0]
    rows = min(N, ROWS)
    names = list(pages)
    pools = [pages[name] for name in names]
    new = [_wide(pages[name], entries[name]) for name in names]
    tiles = [pltpu.VMEM((rows, pool.shape[1], *_tile(pool)), pool.dtype) for pool in pools]
    written = pl.pallas_call(
        functools.partial(_kernel, N, rows, len(pools)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(pl.cdiv(N, rows),),
            in_specs=[
                *(pl.BlockSpec((rows, *a.shape[1:]), lambda i, *_: (i, 0, 0)) for a in new),
                *([pl.BlockSpec(memory_space=pl.ANY)] * len(pools)),
            ],
            out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(pools),
            scratch_shapes=[
                *tiles,
                pltpu.SemaphoreType.DMA((rows,)),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in pools],
        input_output_aliases={2 + len(new) + i: i for i in range(len(pools))},
        cost_estimate=_cost(N, pools, new),
        name="write_tokens",
    )(page_N, offset_N, *new, *pools)
    return dict(zip(names, written, strict=True))


def _tile(pool: jax.Array) -> tuple[int, ...]:
    """Tokens, and numbers of one, that are written at once, of each head."""
    page, *width = pool.shape[2:]
    return (32 // pool.dtype.itemsize, *width) if width else (page,)


def _wide(pool: jax.Array, entry: jax.Array) -> jax.Array:
    """[N, J, E], or [N, J, 1] of scales, in 32 bits: v5e selects no narrower numbers."""
    wide = entry.astype(jnp.int32 if pool.dtype == jnp.int8 else jnp.float32)
    if pool.ndim == 3:
        return wide[..., None]
    return jnp.pad(wide, [(0, 0), (0, 0), (0, pool.shape[3] - entry.shape[2])])


def _kernel(N: int, rows: int, count: int, page_N: Ref, offset_N: Ref, *refs: Ref) -> None:
    """Grid [blocks of rows]; `refs`: new tokens, pools as inputs and as results, tiles, semaphores.

    Inputs and results are the same memory; the results are read and written.
    """
    new, pools = refs[:count], refs[2 * count : 3 * count]
    tiles, (fetched, stored) = refs[3 * count : 4 * count], refs[4 * count :]
    first = pl.program_id(0) * rows

    def place(pool: Ref, tile: Ref, row: jax.Array) -> Ref:
        """The tile of a row's token in the pool."""
        page = pool.at[page_N[first + row]]
        if pool.ndim == 3:
            return page
        tokens = tile.shape[2]
        start = pl.multiple_of(offset_N[first + row] // tokens * tokens, tokens)
        return page.at[:, pl.ds(start, tokens)]

    def each_row(act: Callable[[jax.Array], None]) -> None:
        @pl.loop(0, rows)
        def one_row(row: jax.Array) -> None:
            exists = first + row < N
            page = page_N[jnp.minimum(first + row, N - 1)]
            pl.when(exists & (page != NOWHERE))(functools.partial(act, row))

    def fetches(row: jax.Array) -> list[Any]:
        return [
            pltpu.make_async_copy(place(pool, tile, row), tile.at[row], fetched.at[row])
            for pool, tile in zip(pools, tiles, strict=True)
        ]

    def stores(row: jax.Array) -> list[Any]:
        return [
            pltpu.make_async_copy(tile.at[row], place(pool, tile, row), stored)
            for pool, tile in zip(pools, tiles, strict=True)
        ]

    def fetch(row: jax.Array) -> None:
        for copy in fetches(row):
            copy.start()

    def put_in(row: jax.Array) -> None:
        for copy in fetches(row):
            copy.wait()
        for token, tile in zip(new, tiles, strict=True):
            _put(tile, token, row, offset_N[first + row])
        for copy in stores(row):
            copy.start()

    def finish(row: jax.Array) -> None:
        for copy in stores(row):
            copy.wait()

    for act in (fetch, put_in, finish):
        each_row(act)


def _put(tile: Ref, new: Ref, row: jax.Array, offset: jax.Array) -> None:
    """Puts a row's token into its tile [J, tokens, E], or its scale into [J, tokens]."""
    axis = 1  # tokens
    old = tile[row].astype(new.dtype)
    here = jax.lax.broadcasted_iota(jnp.int32, old.shape, axis) == offset % old.shape[axis]
    token = new[row] if old.ndim == 2 else new[row][:, None, :]
    tile[row] = jnp.where(here, token, old).astype(tile.dtype)


def _cost(N: int, pools: list[jax.Array], new: list[jax.Array]) -> pl.CostEstimate:
    """Of rows that all write."""
    read = sum(a.size * a.dtype.itemsize for a in new)
    tiles = sum(math.prod((N, pool.shape[1], *_tile(pool))) * pool.dtype.itemsize for pool in pools)
    return pl.CostEstimate(flops=0, bytes_accessed=read + 2 * tiles, transcendentals=0)
