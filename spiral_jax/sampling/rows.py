"""The rows of all classes side by side, as the decode program's linear layers compute them.

A row is a place for a trace. The R rows of a shard are those of all its slots, class after class;
N of them are computed: all, or those that run, packed.
"""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from flax import struct

from spiral_jax.core.mesh import constrain_groups
from spiral_jax.sampling.settings import SlotClass


@struct.dataclass
class Packing:
    """Which rows of a shard are computed.

    Attributes:
      row_ZxN: int32, the row at each of the N packed places.
      place_ZxR: int32, the packed place of each row; N for rows that are not computed.
    """

    row_ZxN: jax.Array
    place_ZxR: jax.Array


def pack_rows(running_ZxR: jax.Array, rows: int) -> Packing:
    """Places for the running rows of each shard, at most `rows`; others fill up what is left."""
    order_ZxR = jnp.argsort(~running_ZxR, axis=1, stable=True)
    place_ZxR = jnp.argsort(order_ZxR, axis=1)  # the inverse permutation
    return Packing(order_ZxR[:, :rows], jnp.minimum(place_ZxR, rows))


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """From arrays [U, C, ...] of each class to rows of all of them, and back.

    Attributes:
      classes: of slots.
      shards: Z.
      packing: of the rows that are computed; None: all, as they lie.
    """

    classes: tuple[SlotClass, ...]
    shards: int
    packing: Packing | None = None

    def join(self, parts: list[jax.Array]) -> jax.Array:
        """Arrays [U, C, ...] of all classes as rows [Z, R, ...]."""
        rows = [a.reshape(self.shards, -1, *a.shape[2:]) for a in parts]
        return jnp.concatenate(rows, axis=1)

    def rows(self, parts: list[jax.Array]) -> jax.Array:
        """Arrays [U, C, ...] of all classes as the rows [Z, N, ...] that are computed."""
        joined = self.join(parts)
        if self.packing:
            joined = _take_rows(joined, self.packing.row_ZxN)
        return constrain_groups(joined)

    def rows_of_groups(self, parts: list[jax.Array]) -> jax.Array:
        """A value [U] of each group of all classes, at each of its rows: [Z, N]."""
        at_each_trace = [
            jnp.broadcast_to(value_U[:, None], (slots.slots, slots.C))
            for value_U, slots in zip(parts, self.classes, strict=True)
        ]
        return self.rows(at_each_trace)

    def unpack(self, a_ZxNx: jax.Array, missing: int = 0) -> jax.Array:
        """[Z, R, ...] from the rows that are computed; `missing` for the others."""
        if self.packing is None:
            return a_ZxNx
        one_more = ((0, 0), (0, 1)) + ((0, 0),) * (a_ZxNx.ndim - 2)
        padded = jnp.pad(a_ZxNx, one_more, constant_values=missing)
        return _take_rows(padded, self.packing.place_ZxR)

    def split(self, a_ZxNx: jax.Array, missing: int = 0) -> list[jax.Array]:
        """Arrays [U, C, ...] of all classes from the rows that are computed."""
        ends = list(itertools.accumulate(slots.rows // self.shards for slots in self.classes))
        parts = jnp.split(self.unpack(a_ZxNx, missing), ends[:-1], axis=1)
        return [
            part.reshape(slots.slots, slots.C, *part.shape[2:])
            for part, slots in zip(parts, self.classes, strict=True)
        ]


def _take_rows(a_ZxRx: jax.Array, row_ZxN: jax.Array) -> jax.Array:
    return jax.vmap(lambda a_Rx, row_N: a_Rx[row_N])(a_ZxRx, row_ZxN)
