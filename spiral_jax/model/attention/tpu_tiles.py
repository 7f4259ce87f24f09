"""How attention on TPUs is cut into tiles: block sizes, which tiles exist, what of one counts.

A tile is a block of queries against a block of keys of one key head. Lengths are known before
blocks are fetched (scalar prefetch): a tile across which nothing attends is not computed, and for
it the index maps name blocks that are there already, so that nothing is fetched either. Blocks may
reach over the arrays' ends; what is read there has no meaning and is masked like everything behind
the lengths.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

Ref = Any  # a block in fast memory, or the lengths, as a kernel sees them

LANES = 128  # of a vector register; E and both blocks are multiples of it

# Rows (queries times heads that share a key) and keys of a tile, by bytes a number. The rows of a
# tile read each key once: 1,024 rows are 1,024 operations a byte, where a v6e needs 560 to be
# bound by its matrix units. The scores of a tile are 2 MiB of float32; the two to four arrays of
# that size that live at once, and the double-buffered blocks, stay below the 16 MiB that the
# compiler grants a kernel on v5e by default.
ROWS = {2: 1024, 4: 512}
KEYS = {2: 512, 4: 256}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a call: R query heads share one of J key heads, E is padded to whole lanes."""

    B: int
    T: int
    S: int
    J: int
    R: int
    E: int
    block_q: int
    block_k: int
    dtype: jnp.dtype
    causal: bool

    @property
    def rows(self) -> int:
        return self.R * self.block_q

    @property
    def query_blocks(self) -> int:
        return pl.cdiv(self.T, self.block_q)

    @property
    def key_blocks(self) -> int:
        return pl.cdiv(self.S, self.block_k)


def make_shape(q_BxTxHxE: jax.Array, k_BxSxJxE: jax.Array, causal: bool) -> Shape:
    """The call's sizes, with blocks from the table, no longer than the arrays."""
    B, T, H, E = q_BxTxHxE.shape
    _, S, J, _ = k_BxSxJxE.shape
    rows, keys = ROWS[q_BxTxHxE.dtype.itemsize], KEYS[q_BxTxHxE.dtype.itemsize]
    R = H // J

    # Many heads a key make more rows than the table has: fewer keys then keep the scores' size.
    block_q = max(rows // R // LANES * LANES, LANES)
    block_k = max(min(keys, rows * keys // (R * block_q)) // LANES * LANES, LANES)
    return Shape(
        *(B, T, S, J, R, whole_lanes(E)),
        block_q=min(block_q, whole_lanes(T)),
        block_k=min(block_k, whole_lanes(S)),
        dtype=q_BxTxHxE.dtype,
        causal=causal,
    )


def whole_lanes(size: int) -> int:
    """`size` rounded up to lanes."""
    return pl.cdiv(size, LANES) * LANES


class Tile(NamedTuple):
    """Where a tile lies, and the lengths of its batch entry."""

    shape: Shape
    query_start: jax.Array
    key_start: jax.Array
    q_len: jax.Array
    kv_len: jax.Array

    def is_needed(self) -> jax.Array:
        """Whether some query attends to some key."""
        queries_end = jnp.minimum(self.query_start + self.shape.block_q, self.q_len)
        exists = (self.query_start < queries_end) & (self.key_start < self.kv_len)
        return exists & self._reaches(queries_end - 1, self.key_start)

    def is_complete(self) -> jax.Array:
        """Whether every query attends to every key."""
        queries_end = self.query_start + self.shape.block_q
        keys_end = self.key_start + self.shape.block_k
        exists = (queries_end <= self.q_len) & (keys_end <= self.kv_len)
        return exists & self._reaches(self.query_start, keys_end - 1)

    def _reaches(self, query: jax.Array, key: jax.Array) -> jax.Array | bool:
        return key <= query if self.shape.causal else True

    def visible_KxN(self) -> jax.Array:
        """bool: which rows attend to which keys."""
        query_1xN = self._query_1xN()
        seen_1xN = jnp.where(query_1xN < self.q_len, self.kv_len, 0)
        if self.shape.causal:
            seen_1xN = jnp.minimum(seen_1xN, query_1xN + 1)
        return self._key_Kx1() < seen_1xN

    def keys(self, ref: Ref, masked: bool) -> jax.Array:
        """[K, E] of a block of keys or values; 0 behind the length if masked."""
        return _zero_unless(self._key_Kx1() < self.kv_len, ref[0]) if masked else ref[0]

    def rows(self, ref: Ref, masked: bool) -> jax.Array:
        """[N, E] of a block of queries, heads below each other; 0 behind the length if masked."""
        heads_QxF = ref[0]
        if masked:
            query_Qx1 = self.query_start + _iota(self.shape.block_q, axis=0)
            heads_QxF = _zero_unless(query_Qx1 < self.q_len, heads_QxF)
        E = self.shape.E
        heads = [heads_QxF[:, r * E : (r + 1) * E] for r in range(self.shape.R)]
        return jnp.concatenate(heads, axis=0)

    def statistics(self, ref: Ref, masked: bool) -> jax.Array:
        """[1, N], heads beside each other; 0 behind the length if masked."""
        heads = [ref[0, 0, r : r + 1, :] for r in range(self.shape.R)]
        row_1xN = jnp.concatenate(heads, axis=1)
        return _zero_unless(self._query_1xN() < self.q_len, row_1xN) if masked else row_1xN

    def _query_1xN(self) -> jax.Array:
        query_1xQ = self.query_start + _iota(self.shape.block_q, axis=1)
        return jnp.concatenate([query_1xQ] * self.shape.R, axis=1)

    def _key_Kx1(self) -> jax.Array:
        return self.key_start + _iota(self.shape.block_k, axis=0)


def write_rows(shape: Shape, ref: Ref, a_ExN: jax.Array) -> None:
    """Writes what `Tile.rows` reads, from its transpose."""
    rows_NxE = a_ExN.T
    for r in range(shape.R):
        head_QxE = rows_NxE[r * shape.block_q : (r + 1) * shape.block_q]
        ref[0, :, r * shape.E : (r + 1) * shape.E] = head_QxE.astype(ref.dtype)


def write_statistics(shape: Shape, ref: Ref, a_1xN: jax.Array) -> None:
    """Writes what `Tile.statistics` reads."""
    for r in range(shape.R):
        ref[0, 0, r : r + 1, :] = a_1xN[:, r * shape.block_q : (r + 1) * shape.block_q]


def _iota(size: int, axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, (size, 1) if axis == 0 else (1, size), axis)


def _zero_unless(condition: jax.Array, a: jax.Array) -> jax.Array:
    """By way of float32: v5e selects no narrower numbers by such a condition."""
    return jnp.where(condition, a.astype(jnp.float32), 0.0).astype(a.dtype)


class Pair(NamedTuple):
    """Numbers of a block of queries and of a block of keys."""

    query: jax.Array
    key: jax.Array


def fetch_with_keys_inside(
    shape: Shape, b: jax.Array, query: jax.Array, key: jax.Array, q_len_B: Ref, kv_len_B: Ref
) -> Pair:
    """Blocks to fetch for a step where the loop over keys is the inner one."""
    seen = kv_len_B[b]
    if shape.causal:
        seen = jnp.minimum(seen, jnp.minimum((query + 1) * shape.block_q, q_len_B[b]))
    seen = jnp.where(query * shape.block_q < q_len_B[b], seen, 0)

    last_query = _last_block(q_len_B[b], shape.block_q)
    last_key = _last_block(seen, shape.block_k)
    return Pair(jnp.minimum(query, last_query), jnp.minimum(key, last_key))


def fetch_with_queries_inside(
    shape: Shape, b: jax.Array, key: jax.Array, query: jax.Array, q_len_B: Ref, kv_len_B: Ref
) -> Pair:
    """Blocks to fetch for a step where the loop over queries is the inner one."""
    seen = jnp.where(q_len_B[b] > 0, kv_len_B[b], 0)
    if shape.causal:
        seen = jnp.minimum(seen, q_len_B[b])

    first_query = key * shape.block_k // shape.block_q if shape.causal else 0
    last_query = _last_block(q_len_B[b], shape.block_q)
    needed_query = jnp.minimum(jnp.maximum(query, first_query), last_query)
    last_key = _last_block(seen, shape.block_k)
    return Pair(jnp.where(key * shape.block_k < seen, needed_query, 0), jnp.minimum(key, last_key))


def write_outer(shape: Shape, b: jax.Array, outer: jax.Array, *_: Any) -> Pair:
    """Results exist for every block of the outer loop, also where nothing is computed."""
    return Pair(outer, outer)


def _last_block(length: jax.Array, block: int) -> jax.Array:
    return jnp.maximum(length - 1, 0) // block
