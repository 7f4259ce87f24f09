"""Pages without kernels: for the time of a loop over tokens, what is read lies in one piece.

XLA's CPU backend reads scattered pages at a fraction of the speed of arrays in one piece. So what
the rows read is copied out once a call, and their own pages are written back at its end; between,
each step's products are those of dense arrays. That takes as much memory again as the running rows
have, which is why devices with kernels use those.

Products read whole arrays: slices of them would be copied. So prompts lie in several arrays, by
quarters of the bundles and by tokens, a short beginning and the rest, and those that nobody reads
are skipped. Bundles of like length stand together.

A pool is a cache (`model.cache`) with pages in front: `k` [pages, J, E, page], `v` [pages, J, page,
E], and scales.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spiral_jax.model.attention.pages import Pages, Places, Sequences, attend_two_parts
from spiral_jax.model.attention.part import KeyValue, Part, attend, join, nothing_seen
from spiral_jax.model.cache import Cache, cache_entries, empty_cache

QUARTERS = 4
BEGINNING = 8  # a short prompt is up to this fraction of the longest


class View(NamedTuple):
    """A pool, and what rows and bundles read of it in one piece.

    Attributes:
      own: [N, J, ..].
      prompts: by quarter of the bundles, then by tokens: [U / 4, J, ..] each.
    """

    pages: Pages
    own: Cache
    prompts: tuple[tuple[Cache, ...], ...]


class XlaPages:
    """See `pages.PageBackend`."""

    def empty(self, pages: int, page: int, J: int, E: int, dtype: jnp.dtype) -> Pages:
        return empty_cache((pages, J), E, page, dtype)

    def write_prompts(self, pages: Pages, new: KeyValue, table_WxT: jax.Array) -> Pages:
        page, T = _page(pages), table_WxT.shape[1]
        behind = ((0, 0), (0, T * page - new.k.shape[1]), (0, 0), (0, 0))
        k, v = (jnp.pad(a, behind) for a in new)
        return _scatter(pages, cache_entries(k, v, pages["k"].dtype), table_WxT)

    def begin(self, pages: Pages, places: Places) -> View:
        before = jnp.where(places.runs_N, places.own.length_S - 1, 0)  # without the newest
        own = places.own._replace(length_S=before)
        prompts = tuple(
            tuple(_gather(pages, part) for part in self._parts(pages, quarter))
            for quarter in _quarters(places.bundles.prompts)
        )
        return View(pages, _gather(pages, own), prompts)

    def step(
        self, view: View, q_NxHxE: jax.Array, new: KeyValue, places: Places
    ) -> tuple[jax.Array, View]:
        own = _write_newest(view.own, new, places)

        def attend_prompts(q_UxJxWRxE: jax.Array) -> Part:
            quarters = zip(
                _quarters(q_UxJxWRxE),
                view.prompts,
                _quarters(places.bundles.prompts),
                strict=True,
            )
            attended = [
                self._attend_quarter(q, caches, self._parts(view.pages, read))
                for q, caches, read in quarters
            ]
            return jax.tree.map(lambda *parts: jnp.concatenate(parts), *attended)

        def attend_own(q_NxJxRxE: jax.Array) -> Part:
            return _attend_all(q_NxJxRxE, own, places.own.length_S)

        attended = attend_two_parts(
            q_NxHxE, own["v"].shape[1], places.bundles, attend_prompts, attend_own
        )
        return attended, view._replace(own=own)

    def end(self, view: View, own_table_NxT: jax.Array) -> Pages:
        return _scatter(view.pages, view.own, own_table_NxT)

    def _parts(self, pages: Pages, read: Sequences) -> list[Sequences]:
        """The sequences' beginnings, and their rests."""
        T, page = read.table_SxT.shape[1], _page(pages)
        first = -(-T // BEGINNING)
        beginning = Sequences(read.table_SxT[:, :first], jnp.minimum(read.length_S, first * page))
        if first == T:
            return [beginning]
        rest = jnp.maximum(read.length_S - first * page, 0)
        return [beginning, Sequences(read.table_SxT[:, first:], rest)]

    def _attend_quarter(
        self, q_SxJxNxE: jax.Array, caches: tuple[Cache, ...], parts: list[Sequences]
    ) -> Part:
        seen = nothing_seen(q_SxJxNxE)
        for cache, read in zip(caches, parts, strict=True):
            is_read = jnp.any(read.length_S > 0)
            seen = jax.lax.cond(is_read, _add, _skip, seen, q_SxJxNxE, cache, read.length_S)
        return seen


def _page(pages: Pages) -> int:
    """Tokens of a page."""
    return pages["v"].shape[-2]


def _add(seen: Part, q_SxJxNxE: jax.Array, cache: Cache, length_S: jax.Array) -> Part:
    return join(seen, _attend_all(q_SxJxNxE, cache, length_S))


def _skip(seen: Part, q_SxJxNxE: jax.Array, cache: Cache, length_S: jax.Array) -> Part:
    return seen


def _quarters(tree: Any) -> tuple[Any, ...]:
    """Quarters of arrays [U, ..], as far as there are so many."""
    U = len(jax.tree.leaves(tree)[0])
    size = -(-U // QUARTERS)
    starts = range(0, U, size)
    return tuple(jax.tree.map(lambda a, i=i: a[i : i + size], tree) for i in starts)


def _attend_all(q_SxJxNxE: jax.Array, cache: Cache, length_S: jax.Array) -> Part:
    """Attention of N queries of each of S sequences to the first `length` tokens of a cache."""
    visible_SxT = jnp.arange(cache["v"].shape[-2]) < length_S[:, None]
    part = attend(q_SxJxNxE, cache, visible_SxT[:, None, None])
    seen = (length_S > 0)[:, None, None]
    return part._replace(weight=jnp.where(seen, part.weight, 0.0))


def _write_newest(own: Cache, new: KeyValue, places: Places) -> Cache:
    """Puts the newest token of each row that runs behind its others."""
    N, T = len(places.runs_N), own["v"].shape[-2]
    at_N = jnp.where(places.runs_N, places.own.length_S - 1, T)  # T: is dropped
    entries = cache_entries(new.k[:, None], new.v[:, None], own["k"].dtype)
    row_N = jnp.arange(N)

    def put(name: str) -> jax.Array:
        if name.startswith("k"):
            return own[name].at[row_N, :, :, at_N].set(entries[name][..., 0], mode="drop")
        return own[name].at[row_N, :, at_N].set(entries[name][:, :, 0], mode="drop")

    return {name: put(name) for name in own}


def _gather(pages: Pages, read: Sequences) -> Cache:
    """A cache of all tokens of the sequences; zeros behind their lengths."""
    S, T = read.table_SxT.shape
    _, J, page, E = pages["v"].shape
    exists_SxT = jnp.arange(T * page) < read.length_S[:, None]

    def copy(pages: Pages) -> Cache:
        # numbers behind a length may be any: such a read is clamped
        taken = {name: a.at[read.table_SxT].get(mode="clip") for name, a in pages.items()}
        return {
            name: jnp.where(_along_tokens(exists_SxT, name), _joined(a, name), 0)
            for name, a in taken.items()
        }

    def nothing(pages: Pages) -> Cache:
        return empty_cache((S, J), E, T * page, pages["k"].dtype)

    return jax.lax.cond(jnp.any(read.length_S > 0), copy, nothing, pages)


def _joined(a_SxTxJx: jax.Array, name: str) -> jax.Array:
    """Pages of sequences in one piece, in the layout of a cache."""
    S, T, J, *_ = a_SxTxJx.shape
    if name.startswith("k"):  # [S, T, J, E, page] -> [S, J, E, T * page]
        return jnp.moveaxis(a_SxTxJx, 1, 3).reshape(S, J, a_SxTxJx.shape[3], -1)
    return jnp.moveaxis(a_SxTxJx, 1, 2).reshape(S, J, -1, a_SxTxJx.shape[4])


def _scatter(pages: Pages, cache: Cache, table_SxT: jax.Array) -> Pages:
    """Writes all tokens of each sequence of a cache [S, J, ..] to their pages."""
    S, T = table_SxT.shape
    page = _page(pages)

    def by_page(name: str) -> jax.Array:
        a = cache[name]
        if name.startswith("k"):
            split = jnp.moveaxis(a.reshape(*a.shape[:3], T, page), 3, 1)
        else:
            split = jnp.moveaxis(a.reshape(*a.shape[:2], T, page, a.shape[3]), 2, 1)
        return split.reshape(S * T, *split.shape[2:])

    table_N = table_SxT.reshape(-1)
    return {name: a.at[table_N].set(by_page(name)) for name, a in pages.items()}


def _along_tokens(exists_SxT: jax.Array, name: str) -> jax.Array:
    """[S, T] as it lies along the tokens of that array [S, J, .., ..] of a cache."""
    if name.startswith("k"):
        return exists_SxT[:, None, None, :]
    return exists_SxT[:, None, :, None]
