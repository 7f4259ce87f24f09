"""Pages where kernels read them: each token from where it lies, as many as are used.

A pool is what the kernels read: `k` and `v` [pages, J, page, E], E perhaps padded; stored as int8
also `k_scale` and `v_scale` [pages, J, page], float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from spiral_jax.model.attention.pages import (
    NOWHERE,
    WRITE_SCOPE,
    Pages,
    Places,
    attend_two_parts,
)
from spiral_jax.model.attention.part import KeyValue, Part
from spiral_jax.model.cache import to_int8


class AttendNewest(Protocol):
    def __call__(
        self, pages: Pages, q_NxHxE: jax.Array, newest: Pages, places: Places
    ) -> tuple[jax.Array, Pages]:
        """Writes the newest tokens, entries [N, J, ..] by the pool's names, and attends.

        Returns attention [N, H, E], and the pool, changed in place.
        """


@dataclasses.dataclass(frozen=True)
class KernelPages:
    """See `pages.PageBackend`; what the loop over tokens carries is the pool itself.

    Attributes:
      empty_pages: as `PageBackend.empty`.
      write_pages: (pages, entries of W prompts [W, S, J, ..] by the pool's names, table_WxT) ->
        pages, in place; behind the S tokens, what stands in the pages has no meaning.
      attend_newest: of one layer.
    """

    empty_pages: Callable[[int, int, int, int, jnp.dtype], Pages]
    write_pages: Callable[[Pages, Pages, jax.Array], Pages]
    attend_newest: AttendNewest

    def empty(self, pages: int, page: int, J: int, E: int, dtype: jnp.dtype) -> Pages:
        return self.empty_pages(pages, page, J, E, dtype)

    def write_prompts(self, pages: Pages, new: KeyValue, table_WxT: jax.Array) -> Pages:
        return self.write_pages(pages, stored(new, pages["k"].dtype), table_WxT)

    def begin(self, pages: Pages, places: Places) -> Pages:
        del places
        return pages

    def step(
        self, view: Pages, q_NxHxE: jax.Array, new: KeyValue, places: Places
    ) -> tuple[jax.Array, Pages]:
        return self.attend_newest(view, q_NxHxE, stored(new, view["k"].dtype), places)

    def end(self, view: Pages, own_table_NxT: jax.Array) -> Pages:
        del own_table_NxT
        return view


def write_then_attend(
    write_tokens: Callable[[Pages, Pages, jax.Array, jax.Array], Pages],
    attend_pages: Callable[[jax.Array, Pages, jax.Array, jax.Array], Part],
) -> AttendNewest:
    """`AttendNewest` of a kernel that writes, and one that attends to either part.

    Args:
      write_tokens: (pages, entries, page_N, offset_N) -> pages, in place.
      attend_pages: (queries [S, J, N, E], pages, table_SxT, length_S) -> Part.
    """

    def attend_newest(
        pages: Pages, q_NxHxE: jax.Array, newest: Pages, places: Places
    ) -> tuple[jax.Array, Pages]:
        own, page = places.own, pages["k"].shape[2]
        at_N = own.length_S - 1
        table_N = jnp.take_along_axis(own.table_SxT, (at_N // page)[:, None], axis=1)[:, 0]
        page_N = jnp.where(places.runs_N, table_N, NOWHERE)
        with jax.named_scope(WRITE_SCOPE):
            written = write_tokens(pages, newest, page_N, at_N % page)

        def attend_prompts(q_UxJxWRxE: jax.Array) -> Part:
            return attend_pages(q_UxJxWRxE, written, *places.bundles.prompts)

        def attend_own(q_NxJxRxE: jax.Array) -> Part:
            return attend_pages(q_NxJxRxE, written, *own)

        J = written["k"].shape[1]
        out = attend_two_parts(q_NxHxE, J, places.bundles, attend_prompts, attend_own)
        return out, written

    return attend_newest


def empty_pages(pages: int, page: int, J: int, E: int, dtype: jnp.dtype) -> Pages:
    """A pool of zeros."""
    pool = {name: jnp.zeros((pages, J, page, E), dtype) for name in ("k", "v")}
    if dtype == jnp.int8:
        scales = jnp.zeros((pages, J, page), jnp.float32)
        pool |= {"k_scale": scales, "v_scale": scales}
    return pool


def scatter_pages(pages: Pages, entries: Pages, table_WxT: jax.Array) -> Pages:
    """`KernelPages.write_pages` by XLA."""
    (W, T), page = table_WxT.shape, pages["k"].shape[2]

    def put(name: str) -> jax.Array:
        pool, a_WxSxJx = pages[name], entries[name]
        behind = [(0, 0), (0, T * page - a_WxSxJx.shape[1]), (0, 0)]
        if a_WxSxJx.ndim == 4:
            behind += [(0, pool.shape[3] - a_WxSxJx.shape[3])]
        padded = jnp.pad(a_WxSxJx, behind)
        by_page = padded.reshape(W * T, page, *padded.shape[2:])
        return pool.at[table_WxT.reshape(-1)].set(jnp.swapaxes(by_page, 1, 2))

    return {name: put(name) for name in pages}


def stored(new: KeyValue, dtype: jnp.dtype) -> Pages:
    """Keys and values [.., E] as a pool stores them, by its names; scales [..]."""
    if dtype != jnp.int8:
        return {"k": new.k.astype(dtype), "v": new.v.astype(dtype)}
    (k, k_scale), (v, v_scale) = to_int8(new.k, -1), to_int8(new.v, -1)
    return {"k": k, "v": v, "k_scale": k_scale[..., 0], "v_scale": v_scale[..., 0]}
