"""Decode attention over pages on GPUs: two Pallas kernels a layer, lowered by Triton.

    read_prompts   queries of a bundle's rows -> what they see of their prompt, row by row
    read_own       each row writes its newest key and value, and goes on from what it saw of its
                   prompt, through its own tokens -> attention of the row

A token of a small model takes as long as the kernels that it starts, so these two do what is around
them too: they gather queries by bundle, write pages, and join the parts of a softmax.

A program of the grid takes the queries of one key head of a sequence, and a share of its keys: with
few long sequences there would else be fewer programs than a GPU has multiprocessors. XLA joins the
shares of a row's own tokens, where there are several.

Loads are masked by length, so nothing is read that is not used, and what lies there reaches
nothing. Page numbers behind a length are not looked at.

Why Triton, which jax deprecates from 0.11 on: such kernels can be interpreted on a CPU, and are as
fast as cuDNN's paged attention, which takes neither int8 nor float32 and has no public name in jax.
Decoding is bound by memory, so Mosaic GPU's larger matrix instructions, of at least 64 rows where
these heads have 4 to 32, would gain nothing.

Exponentials have base 2, which is what the hardware computes: inside the kernels, scores are in
units of log 2.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from spiral_jax.model.attention.pages import (
    NOWHERE,
    OWN_SCOPE,
    PROMPTS_SCOPE,
    Bundles,
    Pages,
    Places,
    Sequences,
)
from spiral_jax.model.attention.part import MASKED, Part, split_heads

Ref = Any  # an array in the GPU's memory

LOG2_E = math.log2(math.e)

# Keys of a step of a program's loop, and the steps that Triton's pipeline holds: with bfloat16 the
# fastest of 8 variants for 128 rows with prompts of 1,023 tokens, and within 2 % of it for 32 rows
# with 9,215 (one H200).
STEP_KEYS = 32
STAGES = 4
WARPS = 2
ROWS = (16, 64)  # fewest and most queries a program: 16 is the least that tensor cores multiply

# Shares of a sequence: at least as many as fill a GPU of 132 multiprocessors, and none longer than
# LONGEST keys, as the GPU waits for the last program at the end. No share is shorter than SHORTEST.
PROGRAMS = 6 * 132
LONGEST, SHORTEST = 2048, 256


def takes(size: int) -> bool:
    """Whether pages, or heads, may have this size: Triton's blocks are powers of 2."""
    return size >= 16 and size & (size - 1) == 0


def attend_newest(
    pages: Pages, q_NxHxE: jax.Array, newest: Pages, places: Places, *, interpret: bool = False
) -> tuple[jax.Array, Pages]:
    """Writes rows' newest tokens, and attends: see `pages_kernels.KernelPages`.

    Args:
      pages: one layer's pool on one shard: `k`, `v` [pages, J, page, E] in the queries' dtype or
        int8, then with `k_scale`, `v_scale` float32 [pages, J, page].
      newest: [N, J, E] as the pool stores them, scales [N, J].
      interpret: for tests on CPUs.

    Returns:
      attention [N, H, E] in the queries' dtype, and the pool, changed in place.

    Raises:
      ValueError: `page` or E is not a power of 2 of at least 16, or the pool is too large.
    """
    J, own, (prompts, member_UxW, place_N) = pages["k"].shape[1], places.own, places.bundles
    q_NxJxRxE = split_heads(q_NxHxE, J)
    with jax.named_scope(PROMPTS_SCOPE):
        of_prompts = attend_prompts(pages, q_NxJxRxE, places.bundles, interpret=interpret)
    prompt_N = prompts.length_S[place_N // member_UxW.shape[1]]
    rows = _Rows(own, places.runs_N, jnp.where(places.runs_N, prompt_N, 0))
    with jax.named_scope(OWN_SCOPE):
        out, pages = attend_own(pages, q_NxJxRxE, newest, rows, of_prompts, interpret=interpret)
    return out.reshape(q_NxHxE.shape), pages


class _Rows(NamedTuple):
    """What a row's program must know.

    Attributes:
      own: its tokens, the newest included.
      runs_N: bool, whether it writes.
      prompt_N: int32 tokens of its prompt in pages; 0: what it saw of them has no meaning.
    """

    own: Sequences
    runs_N: jax.Array
    prompt_N: jax.Array


@dataclasses.dataclass(frozen=True)
class _Keys:
    """How a program walks through a sequence.

    Attributes:
      page: tokens of a page.
      step: keys of a step.
      shares: programs that share a sequence's keys.
      E: head width.
    """

    page: int
    step: int
    shares: int
    E: int


def _make_keys(pages: Pages, table_SxT: jax.Array, programs: int) -> _Keys:
    """`programs`: of a grid in which nobody shares."""
    *_, page, E = pages["k"].shape
    for name, size in (("pages", page), ("heads", E)):
        if not takes(size):
            raise ValueError(
                f"{name} of {size}: Triton's blocks are powers of 2 of at least 16; choose such a "
                "size, or the xla backend."
            )
    _check_offsets(pages["k"])
    most = table_SxT.shape[1] * page
    shares = max(pl.cdiv(PROGRAMS, programs), pl.cdiv(most, LONGEST))
    return _Keys(page, min(STEP_KEYS, page), min(shares, pl.cdiv(most, SHORTEST)), E)


def _check_offsets(pool: jax.Array) -> None:
    """jax's lowering counts elements in 32 bits up to 2**32 bytes, and 2**31 is then negative."""
    if pool.size > 2**31 and pool.size * pool.dtype.itemsize <= 2**32:
        raise ValueError(
            f"a pool of {pool.size:,} {pool.dtype} keys a layer: jax's Triton lowering addresses "
            "up to 2**31, or more than 2**32 bytes. Give sampling less memory or more."
        )


def _rows_of_a_program(queries: int) -> int:
    return min(max(1 << (queries - 1).bit_length(), ROWS[0]), ROWS[1])


def _pool(pages: Pages) -> list[jax.Array]:
    """In the order in which the kernels take them."""
    return [pages[name] for name in ("k", "v", "k_scale", "v_scale") if name in pages]


# -- prompts ---------------------------------------------------------------------------------------


def attend_prompts(
    pages: Pages, q_NxJxRxE: jax.Array, bundles: Bundles, *, interpret: bool = False
) -> Part:
    """What scaled queries of rows see of their prompts.

    Returns:
      [shares, N, J, R, ..], in units of log 2. Rows of bundles whose length is 0, or of none, have
      no meaning.
    """
    (U, W), (N, J, R, E) = bundles.member_UxW.shape, q_NxJxRxE.shape
    rows = _rows_of_a_program(W * R)
    blocks = pl.cdiv(W * R, rows)
    # Bundles are full while many rows run; those that are not there take no time.
    keys = _make_keys(pages, bundles.prompts.table_SxT, pl.cdiv(N, W) * J * blocks)
    sizes = keys.shares, N, J, R
    return Part(
        *pl.pallas_call(
            functools.partial(_prompt_kernel, keys, rows, blocks),
            grid=(keys.shares, J, U * blocks),
            out_shape=[
                jax.ShapeDtypeStruct((*sizes, E), jnp.float32),
                jax.ShapeDtypeStruct(sizes, jnp.float32),
                jax.ShapeDtypeStruct(sizes, jnp.float32),
            ],
            interpret=interpret,
            compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=STAGES),
            name="read_prompts",
        )(q_NxJxRxE, bundles.member_UxW, *bundles.prompts, *_pool(pages))
    )


def _prompt_kernel(keys: _Keys, rows: int, blocks: int, q, member, table, length_U, *refs) -> None:
    """Grid [shares, J, U * blocks]; `refs`: k, v, with int8 their scales, three results."""
    pool, (values, top, weight) = refs[:-3], refs[-3:]
    share, j, program = (pl.program_id(axis) for axis in range(3))
    u, block = program // blocks, program % blocks
    N, R, W = q.shape[0], q.shape[2], member.shape[1]
    length = length_U[u]

    query_I = block * rows + jnp.arange(rows)
    is_query_I = query_I < W * R
    n_I = plgpu.load(member.at[u, query_I // R], mask=is_query_I, other=-1)
    exists_I = is_query_I & (n_I >= 0) & (length > 0)
    n_I = jnp.where(exists_I, n_I, N)  # nobody's
    places = _Queries(n_I, j, query_I % R, exists_I, keys.E)
    q_IxE = places.load(q)
    seen = _walk(keys, q_IxE, pool, table, u, j, length, share, _nothing(rows, keys.E))
    places.store_part(Part(values, top, weight), share, seen)


# -- rows' own tokens ------------------------------------------------------------------------------


def attend_own(
    pages: Pages,
    q_NxJxRxE: jax.Array,
    newest: Pages,
    rows: _Rows,
    of_prompts: Part,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, Pages]:
    """Attention [N, J, R, E] of rows to their prompts and to their own tokens, and the pool."""
    N, J, R, E = q_NxJxRxE.shape
    keys = _make_keys(pages, rows.own.table_SxT, N * J)
    pool = _pool(pages)
    inputs = (
        *(q_NxJxRxE, *rows.own, rows.runs_N.astype(jnp.int32), rows.prompt_N),
        *(*of_prompts, *_pool(newest)),
    )
    sizes = keys.shares, N, J, R
    results = [jax.ShapeDtypeStruct((*sizes, E), q_NxJxRxE.dtype)]
    if keys.shares > 1:
        results = [jax.ShapeDtypeStruct((*sizes, E), jnp.float32)]
        results += [jax.ShapeDtypeStruct(sizes, jnp.float32)] * 2
    found = pl.pallas_call(
        functools.partial(_own_kernel, keys, max(ROWS[0], pl.next_power_of_2(R)), len(pool)),
        grid=(keys.shares, J, N),
        out_shape=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in pool] + results,
        input_output_aliases={len(inputs) + i: i for i in range(len(pool))},
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        name="read_own",
    )(*inputs, *pool)
    names = [name for name in ("k", "v", "k_scale", "v_scale") if name in pages]
    pages = dict(zip(names, found[: len(pool)], strict=True))
    if keys.shares == 1:
        return found[-1][0], pages
    return _joined(Part(*found[len(pool) :])).output(q_NxJxRxE.dtype), pages


def _joined(shares: Part) -> Part:
    """The part of all shares. One without keys adds exact zeros."""
    top = jnp.max(shares.top, axis=0)
    shrink = jnp.exp2(shares.top - top)
    values = jnp.sum(shares.values * shrink[..., None], axis=0)
    return Part(values, top, jnp.sum(shares.weight * shrink, axis=0))


def _own_kernel(
    keys: _Keys, rows: int, arrays: int, q, table, length_N, runs_N, prompt_N, *refs
) -> None:
    """Grid [shares, J, N].

    refs: of the prompts values, top, weight; `arrays` of the newest tokens; as many of the pool
    as it comes in, and as it goes out, which is the same memory; results.
    """
    of_prompts, newest = Part(*refs[:3]), refs[3 : 3 + arrays]
    pool, results = refs[3 + 2 * arrays : 3 + 3 * arrays], refs[3 + 3 * arrays :]
    share, j, n = (pl.program_id(axis) for axis in range(3))
    R, is_first = q.shape[2], share == 0
    older = length_N[n] - 1
    r_I = jnp.arange(rows)
    places = _Queries(jnp.full_like(r_I, n), j, r_I, r_I < R, keys.E)
    q_IxE = places.load(q)

    new = [plgpu.load(ref.at[n, j, :] if ref.ndim == 3 else ref.at[n, j]) for ref in newest]
    page, offset = table[n, older // keys.page], older % keys.page
    page = jnp.where((runs_N[n] > 0) & is_first, page, NOWHERE)
    for ref, value in zip(pool, new, strict=True):
        plgpu.store(ref.at[page, j, offset, :] if ref.ndim == 4 else ref.at[page, j, offset], value)

    # The newest token is not read back: other threads of this program may still be writing it.
    seen = _see_one(q_IxE, new, is_first)
    sees_prompt = places._replace(exists_I=places.exists_I & (prompt_N[n] > 0) & is_first)
    for of_share in range(of_prompts.values.shape[0]):
        seen = _join(seen, sees_prompt.load_part(of_prompts, of_share))
    seen = _walk(keys, q_IxE, pool, table, n, j, older, share, seen)

    if keys.shares == 1:
        places.store(results[0], seen.output(results[0].dtype), first=0)
    else:
        places.store_part(Part(*results), share, seen)


def _see_one(q_IxE: jax.Array, token: list[jax.Array], is_seen: jax.Array) -> Part:
    """Of one key and value, with int8 their scales."""
    k_E, v_E, *scales = token
    score_I = LOG2_E * jnp.sum(q_IxE.astype(jnp.float32) * k_E.astype(jnp.float32), axis=1)
    v_E = v_E.astype(jnp.float32)
    if scales:
        score_I, v_E = score_I * scales[0], v_E * scales[1]
    weight_I = jnp.where(is_seen, jnp.ones_like(score_I), 0.0)
    return Part(weight_I[:, None] * v_E[None, :], jnp.where(is_seen, score_I, MASKED), weight_I)


# -- both ------------------------------------------------------------------------------------------


class _Queries(NamedTuple):
    """Where a program's queries lie in arrays [.., N, J, R], and [.., N, J, R, E].

    Indices are arrays throughout, as the interpreter takes no others that gather.
    """

    n_I: jax.Array
    j: jax.Array
    r_I: jax.Array
    exists_I: jax.Array
    E: int

    def load(self, ref: Ref) -> jax.Array:
        mask = _over(self.exists_I[:, None], len(self.n_I), self.E)
        return plgpu.load(ref.at[self._each()], mask=mask, other=0.0)

    def store(self, ref: Ref, values_IxE: jax.Array, first: jax.Array) -> None:
        mask = _over(self.exists_I[:, None], len(self.n_I), self.E)
        plgpu.store(ref.at[self._each(first)], values_IxE, mask=mask)

    def load_part(self, refs: Part, share: int) -> Part:
        """What is not there is no key's."""
        mask = _over(self.exists_I[:, None], len(self.n_I), self.E)
        at_I = self._of_heads(share)
        return Part(
            plgpu.load(refs.values.at[self._each(share)], mask=mask, other=0.0),
            plgpu.load(refs.top.at[at_I], mask=self.exists_I, other=MASKED),
            plgpu.load(refs.weight.at[at_I], mask=self.exists_I, other=0.0),
        )

    def store_part(self, refs: Part, share: jax.Array, part: Part) -> None:
        at_I = self._of_heads(share)
        self.store(refs.values, part.values, share)
        plgpu.store(refs.top.at[at_I], part.top, mask=self.exists_I)
        plgpu.store(refs.weight.at[at_I], part.weight, mask=self.exists_I)

    def _of_heads(self, *first: jax.Array | int) -> tuple[jax.Array, ...]:
        n_I = self.n_I
        return *(jnp.full_like(n_I, i) for i in first), n_I, jnp.full_like(n_I, self.j), self.r_I

    def _each(self, *first: jax.Array | int) -> tuple[jax.Array, ...]:
        rows, E = len(self.n_I), self.E
        at = [_over(index_I[:, None], rows, E) for index_I in self._of_heads(*first)]
        return *at, _over(jnp.arange(E)[None, :], rows, E)


def _walk(
    keys: _Keys,
    q_IxE: jax.Array,
    pool: tuple[Ref, ...],
    table: Ref,
    s: jax.Array,
    j: jax.Array,
    length: jax.Array,
    share: jax.Array,
    seen: Part,
) -> Part:
    """`seen`, and this share of the first `length` tokens of sequence s."""
    k, v, *scales = pool
    steps = pl.cdiv(length, keys.step)
    of_a_share = jnp.maximum(pl.cdiv(steps, keys.shares), pl.cdiv(SHORTEST, keys.step))
    first = share * of_a_share
    end = jnp.minimum(first + of_a_share, steps)

    def add(step: jax.Array, seen: Part) -> Part:
        start = step * keys.step
        at = table[s, start // keys.page], j, pl.ds(start % keys.page, keys.step)
        visible_K = start + jnp.arange(keys.step) < length
        visible_KxE = _over(visible_K[:, None], keys.step, keys.E)

        k_KxE = plgpu.load(k.at[*at, :], mask=visible_KxE, other=0).astype(q_IxE.dtype)
        score_IxK = LOG2_E * _dot(q_IxE, k_KxE, (1, 1))
        if scales:
            score_IxK *= plgpu.load(scales[0].at[at], mask=visible_K, other=0.0)[None, :]
        score_IxK = jnp.where(visible_K[None, :], score_IxK, MASKED)

        top_I = jnp.maximum(seen.top, jnp.max(score_IxK, axis=1))
        shrink_I = jnp.exp2(seen.top - top_I)
        weight_IxK = jnp.exp2(score_IxK - top_I[:, None])
        weight_I = seen.weight * shrink_I + jnp.sum(weight_IxK, axis=1)

        v_KxE = plgpu.load(v.at[*at, :], mask=visible_KxE, other=0).astype(q_IxE.dtype)
        if scales:
            weight_IxK *= plgpu.load(scales[1].at[at], mask=visible_K, other=0.0)[None, :]
        values_IxE = _dot(weight_IxK.astype(q_IxE.dtype), v_KxE, (1, 0))
        return Part(seen.values * shrink_I[:, None] + values_IxE, top_I, weight_I)

    return jax.lax.fori_loop(first, end, add, seen)


def _nothing(rows: int, E: int) -> Part:
    return Part(
        jnp.zeros((rows, E), jnp.float32),
        jnp.full((rows,), MASKED, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
    )


def _join(a: Part, b: Part) -> Part:
    """As `part.join`, in units of log 2."""
    top = jnp.maximum(a.top, b.top)
    shrink_a, shrink_b = jnp.exp2(a.top - top), jnp.exp2(b.top - top)
    values = a.values * shrink_a[:, None] + b.values * shrink_b[:, None]
    return Part(values, top, a.weight * shrink_a + b.weight * shrink_b)


def _over(mask: jax.Array, rows: int, columns: int) -> jax.Array:
    return jnp.broadcast_to(mask, (rows, columns))


def _dot(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Product in the inputs' dtype over one axis of each, summed in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    contract = ((axes[0],), (axes[1],)), ((), ())
    return jax.lax.dot_general(a, b, contract, precision, preferred_element_type=jnp.float32)
