"""Group attention in loops over blocks of keys, in plain XLA: runs anywhere, and is the reference.

Scores of one block of queries to one block of keys exist at a time; blocks above the diagonal,
behind the longest prompt and behind the longest trace are not computed. The queries of all traces
and of all heads that share a key are rows of one matrix product with the prompt's keys. Both passes
call one loop for each set of keys (`_attend_to`, `_cotangents_of`). Scores, softmax and sums are
float32; products take the inputs' dtype. The formulas of the backward pass are in `groups`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spiral_jax.model.attention.part import (
    KeyValue,
    Lengths,
    Part,
    attend,
    join,
    nothing_seen,
    split_heads,
)
from spiral_jax.model.cache import Cache, cache_entries, read_tokens, write_entries

# Names of scopes: a plan finds the loops of a compiled program by them.
OWN_KEYS_SCOPE, PROMPT_KEYS_SCOPE = "own_keys", "prompt_keys"

# Number of a block of keys -> bool [..., N, T]: which of them the rows of queries see.
Visible = Callable[[jax.Array], jax.Array]


class KeySizes(NamedTuple):
    """Tokens a block: of queries and own keys, and of the prompt's keys."""

    own: int
    prompt: int


class KeyCounts(NamedTuple):
    """Scalars: how many blocks of queries and of the prompt's keys are computed."""

    own: jax.Array
    prompt: jax.Array


def even_block(length: int, block: int) -> int:
    """The smallest block with which `length` takes as few of them as with `block`."""
    return -(-length // -(-length // block))


@dataclasses.dataclass(frozen=True)
class Xla:
    """The backend that needs no kernels; see `groups.Backend`.

    Arranged are queries [U, J, C, R, Q, E], scaled, where R = H / J heads share a key, and caches,
    [U, J, C, ...] of own keys and [U, J, ...] of the prompt's: heads first, lengths in whole
    blocks.

    Attributes:
      block: queries, and keys, whose scores exist at once.
    """

    block: int

    def arrange(
        self, q_UxCxQxHxE: jax.Array, own: KeyValue, prompt: KeyValue | None
    ) -> tuple[jax.Array, Cache, Cache | None]:
        """Brings heads to the front and every length to whole blocks."""
        own_size = even_block(q_UxCxQxHxE.shape[2], self.block)
        q = split_heads(_pad_to_blocks(q_UxCxQxHxE, own_size, axis=2), own.k.shape[-2])
        q_UxJxCxRxQxE = jnp.moveaxis(q, (3, 4), (1, 3))

        k, v = (_pad_to_blocks(a, own_size, axis=2) for a in own)
        own_cache = cache_entries(k, v, q.dtype)
        own_cache = {name: jnp.swapaxes(a, 1, 2) for name, a in own_cache.items()}  # u j c . .
        if prompt is None:
            return q_UxJxCxRxQxE, own_cache, None
        prompt_size = even_block(prompt.k.shape[1], self.block)
        k, v = (_pad_to_blocks(a, prompt_size, axis=1) for a in prompt)
        return q_UxJxCxRxQxE, own_cache, cache_entries(k, v, q.dtype)  # u j . .

    def forward(
        self, q: jax.Array, own: Cache, prompt: Cache | None, lengths: Lengths
    ) -> tuple[jax.Array, jax.Array]:
        """(output like the arranged q, log-sum-exp of each query's scores, without E)."""
        sizes, counts = self._blocks(q, prompt, lengths)
        return _forward(sizes, q, own, prompt, lengths.prompt_U, counts)

    def backward(
        self,
        q: jax.Array,
        own: Cache,
        prompt: Cache | None,
        lengths: Lengths,
        out: jax.Array,
        lse: jax.Array,
        d_out: jax.Array,
    ) -> tuple[jax.Array, Cache, Cache | None]:
        """Cotangents of what is arranged."""
        sizes, counts = self._blocks(q, prompt, lengths)
        queries = _Queries(q, d_out, lse, _delta(out, d_out))
        return _backward(sizes, queries, own, prompt, lengths.prompt_U, counts)

    def restore(self, out_UxJxCxRxQxE: jax.Array, Q: int) -> jax.Array:
        """[U, C, Q, H, E] from the arranged output."""
        U, J, C, R, _, E = out_UxJxCxRxQxE.shape
        out = jnp.moveaxis(out_UxJxCxRxQxE, (1, 3), (3, 4)).reshape(U, C, -1, J * R, E)
        return out[:, :, :Q]

    def _blocks(
        self, q: jax.Array, prompt: Cache | None, lengths: Lengths
    ) -> tuple[KeySizes, KeyCounts]:
        own_size, longest = even_block(q.shape[4], self.block), lengths.trace
        prompt_size = 1
        if prompt is None:
            longest = lengths.prompt
        else:
            prompt_size = even_block(prompt["v"].shape[-2], self.block)
        counts = KeyCounts(-(-longest // own_size), -(-lengths.prompt // prompt_size))
        return KeySizes(own_size, prompt_size), counts


def _forward(
    sizes: KeySizes,
    q: jax.Array,
    own: Cache,
    prompt: Cache | None,
    prompt_len_U: jax.Array,
    counts: KeyCounts,
) -> tuple[jax.Array, jax.Array]:
    """(output [U, J, C, R, Q, E] in q's dtype, log-sum-exp of scores [U, J, C, R, Q] float32)."""
    R = q.shape[3]

    def attend_block(
        i: jax.Array, done: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        out, lse = done
        rows = _block_rows(q, i, sizes.own)
        seen = nothing_seen(rows)
        if prompt is not None:
            with jax.named_scope(PROMPT_KEYS_SCOPE):
                visible = _in_prompt(prompt_len_U, sizes.prompt)
                seen_by_all = jax.tree.map(_merge_traces, seen)
                seen_by_all = _attend_to(
                    prompt, sizes.prompt, counts.prompt, visible, _merge_traces(rows), seen_by_all
                )
                seen = jax.tree.map(lambda a, like: a.reshape(like.shape), seen_by_all, seen)
        with jax.named_scope(OWN_KEYS_SCOPE):
            seen = _attend_to(own, sizes.own, i + 1, _causal(i, sizes.own, R), rows, seen)
        return (
            _write_block(out, seen.output(q.dtype), i, sizes.own),
            _write_block(lse, seen.lse(), i, sizes.own),
        )

    nothing = jnp.zeros_like(q), jnp.zeros(q.shape[:-1], jnp.float32)
    return jax.lax.fori_loop(0, counts.own, attend_block, nothing)


def _attend_to(
    keys: Cache, size: int, count: jax.Array, visible: Visible, rows: jax.Array, seen: Part
) -> Part:
    """`seen` joined with the attention of rows [..., N, E] to the first `count` blocks of keys."""

    def add_block(j: jax.Array, seen: Part) -> Part:
        return join(seen, attend(rows, read_tokens(keys, j * size, size), visible(j)))

    return jax.lax.fori_loop(0, count, add_block, seen)


def _delta(out: jax.Array, d_out: jax.Array) -> jax.Array:
    return jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)


def _backward(
    sizes: KeySizes,
    queries: _Queries,
    own: Cache,
    prompt: Cache | None,
    prompt_len_U: jax.Array,
    counts: KeyCounts,
) -> tuple[jax.Array, Cache, Cache | None]:
    """Cotangents of queries, of own and of the prompt's keys and values."""
    q = queries.q
    R, dtype = q.shape[3], q.dtype

    def add_block(i: jax.Array, done: tuple) -> tuple:
        d_q, d_own, d_prompt = done
        rows = queries.block(i, sizes.own)
        d_rows = jnp.zeros(rows.q.shape, jnp.float32)
        with jax.named_scope(OWN_KEYS_SCOPE):
            visible = _causal(i, sizes.own, R)
            d_rows, d_own = _cotangents_of(own, sizes.own, i + 1, visible, rows, d_rows, d_own)
        if prompt is not None:
            with jax.named_scope(PROMPT_KEYS_SCOPE):
                visible, rows = _in_prompt(prompt_len_U, sizes.prompt), rows.of_all_traces()
                d_rows = d_rows.reshape(rows.q.shape)
                d_rows, d_prompt = _cotangents_of(
                    prompt, sizes.prompt, counts.prompt, visible, rows, d_rows, d_prompt
                )
        return _write_block(d_q, d_rows.astype(dtype), i, sizes.own), d_own, d_prompt

    no_keys = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), (own, prompt))
    d_q, *d_keys = jax.lax.fori_loop(0, counts.own, add_block, (jnp.zeros_like(q), *no_keys))
    return d_q, *jax.tree.map(lambda a: a.astype(dtype), d_keys)


class _Queries(NamedTuple):
    """Queries in the backward pass, all or the rows of a block, and what is known of them.

    Attributes:
      q, d_out: [U, J, C, R, Q, E]; of a block [U, J, C, N, E], of all traces [U, J, C * N, E].
      lse, delta: the same without E.
    """

    q: jax.Array
    d_out: jax.Array
    lse: jax.Array
    delta: jax.Array

    def block(self, i: jax.Array, size: int) -> _Queries:
        return _Queries(*(_block_rows(a, i, size) for a in self))

    def of_all_traces(self) -> _Queries:
        """As the prompt's keys meet the rows of a block."""
        return _Queries(*(_merge_traces(a) for a in self))


def _cotangents_of(
    keys: Cache,
    size: int,
    count: jax.Array,
    visible: Visible,
    rows: _Queries,
    d_rows: jax.Array,
    d_keys: Cache,
) -> tuple[jax.Array, Cache]:
    """(d_rows, d_keys), float32, with what the first `count` blocks of keys add to both."""
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    dtype = rows.q.dtype

    def add_block(j: jax.Array, done: tuple[jax.Array, Cache]) -> tuple[jax.Array, Cache]:
        d_rows, d_keys = done
        block = read_tokens(keys, j * size, size)
        score = dot("...ne,...et->...nt", rows.q, block["k"])
        weight = jnp.where(visible(j), jnp.exp(score - rows.lse[..., None]), 0.0)
        d_weight = dot("...ne,...te->...nt", rows.d_out, block["v"])
        d_score = (weight * (d_weight - rows.delta[..., None])).astype(dtype)
        new = {
            "k": dot("...ne,...nt->...et", rows.q, d_score),
            "v": dot("...nt,...ne->...te", weight.astype(dtype), rows.d_out),
        }
        so_far = read_tokens(d_keys, j * size, size)
        d_keys = write_entries(d_keys, jax.tree.map(jnp.add, so_far, new), j * size)
        return d_rows + dot("...nt,...et->...ne", d_score, block["k"]), d_keys

    return jax.lax.fori_loop(0, count, add_block, (d_rows, d_keys))


def _causal(i: jax.Array, size: int, R: int) -> Visible:
    """Own keys: the queries of block i, R heads of them, see their past and themselves."""

    def visible(j: jax.Array) -> jax.Array:
        query = jnp.tile(i * size + jnp.arange(size), R)
        return j * size + jnp.arange(size) <= query[:, None]  # (r q) t

    return visible


def _in_prompt(prompt_len_U: jax.Array, size: int) -> Visible:
    """The prompt's keys: every query sees all that exist."""

    def visible(j: jax.Array) -> jax.Array:
        return (j * size + jnp.arange(size) < prompt_len_U[:, None])[:, None, None]  # u 1 1 t

    return visible


def _block_rows(a_UxJxCxRxQ: jax.Array, i: jax.Array, size: int) -> jax.Array:
    """[U, J, C, R * size, ...]: block i along Q, heads that share a key below each other."""
    a = jax.lax.dynamic_slice_in_dim(a_UxJxCxRxQ, i * size, size, 4)
    return a.reshape(*a.shape[:3], -1, *a.shape[5:])


def _write_block(a_UxJxCxRxQ: jax.Array, rows: jax.Array, i: jax.Array, size: int) -> jax.Array:
    """`a` with rows [U, J, C, R * size, ...], or those of all traces as one, as its block i."""
    block = rows.reshape(*a_UxJxCxRxQ.shape[:4], size, *a_UxJxCxRxQ.shape[5:])
    return jax.lax.dynamic_update_slice_in_dim(a_UxJxCxRxQ, block, i * size, 4)


def _merge_traces(a_UxJxCxN: jax.Array) -> jax.Array:
    """[U, J, C, N, ...] -> [U, J, C * N, ...]."""
    return a_UxJxCxN.reshape(*a_UxJxCxN.shape[:2], -1, *a_UxJxCxN.shape[4:])


def _pad_to_blocks(a: jax.Array, size: int, axis: int) -> jax.Array:
    """Padded with zeros along `axis` to a multiple of `size`."""
    padding = [(0, 0)] * a.ndim
    padding[axis] = (0, -a.shape[axis] % size)
    return jnp.pad(a, padding)
