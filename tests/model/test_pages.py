"""What page backends attend to, chunk by chunk, against a softmax over all tokens in float64."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spiral_jax.model.attention import pages_gpu, pages_gpu_write
from spiral_jax.model.attention.pages import Bundles, Places, Sequences
from spiral_jax.model.attention.pages_kernels import (
    KernelPages,
    empty_pages,
    scatter_pages,
    write_then_attend,
)
from spiral_jax.model.attention.pages_xla import XlaPages
from spiral_jax.model.attention.part import MASKED, KeyValue, Part

PAGE, J, R, E, W = 16, 2, 2, 16, 2
PROMPTS = np.array([0, 1, 16, 40])  # of four groups
GROUP_N = np.array([0, 1, 1, 2, 3, 3, 3])  # of seven rows: of the last three, two share a bundle
BUNDLES = ((0,), (1, 2), (3,), (4, 5), (6,))
OWN, TABLE = 36, 3
STEPS = ((0, 15), (15, 17), (17, OWN))  # chunks: their first tokens, and their ends

# float32 sums in another order; int8 is a step of 1/254 of each key's and value's largest entry,
# for scores and outputs of order 1
ERROR = {"float32": 1e-5, "int8": 0.05}


def write_plainly(pages, newest, page_N, offset_N):
    return {name: pool.at[page_N, :, offset_N].set(newest[name]) for name, pool in pages.items()}


def attend_plainly(q_SxJxNxE, pages, table_SxT, length_S):
    """What a kernel that attends returns, by a softmax over all tokens of the pages."""
    S, T = table_SxT.shape
    visible_SxK = jnp.arange(T * PAGE) < length_S[:, None]

    def tokens_of(name):
        a = pages[name][jnp.clip(table_SxT, 0, len(pages[name]) - 1)].astype(jnp.float32)
        if f"{name}_scale" in pages:
            a *= pages[f"{name}_scale"][table_SxT][..., None]
        a = jnp.moveaxis(a, 2, 1).reshape(S, J, T * PAGE, E)
        return jnp.where(visible_SxK[:, None, :, None], a, 0)

    score = jnp.einsum("sjne,sjke->sjnk", q_SxJxNxE, tokens_of("k"))
    score = jnp.where(visible_SxK[:, None, None], score, MASKED)
    top = jnp.max(score, axis=-1)
    weight = jnp.where(visible_SxK[:, None, None], jnp.exp(score - top[..., None]), 0)
    values = jnp.einsum("sjnk,sjke->sjne", weight, tokens_of("v"))
    return Part(values, top, jnp.sum(weight, axis=-1))


INTERPRETED = {"interpret": jax.default_backend() != "gpu"}
BACKENDS = {
    "xla": XlaPages(),
    "two kernels": KernelPages(
        empty_pages, scatter_pages, write_then_attend(write_plainly, attend_plainly)
    ),
    "gpu": KernelPages(
        empty_pages,
        functools.partial(pages_gpu_write.write_pages, **INTERPRETED),
        functools.partial(pages_gpu.attend_newest, **INTERPRETED),
    ),
}


class Tokens(NamedTuple):
    """Keys and values of all prompts and rows, and the queries of all rows' tokens."""

    prompt: list
    own: KeyValue
    q_NxTxHxE: np.ndarray


@pytest.fixture(scope="module")
def tokens():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    N = len(GROUP_N)
    prompt = [KeyValue(normal(n, J, E), normal(n, J, E)) for n in PROMPTS]
    own = KeyValue(normal(N, OWN, J, E), normal(N, OWN, J, E))
    return Tokens(prompt, own, normal(N, OWN, J * R, E))


def expected(tokens, n, t):
    """float64 [H, E] of row n at its token t."""
    prompt = tokens.prompt[GROUP_N[n]]
    k, v = (
        np.concatenate([a, b[n, : t + 1]]).astype(np.float64)
        for a, b in zip(prompt, tokens.own, strict=True)
    )
    q = tokens.q_NxTxHxE[n, t].reshape(J, R, E).astype(np.float64) * E**-0.5
    score = np.einsum("jre,tje->jrt", q, k)
    weight = np.exp(score - score.max(-1, keepdims=True))
    weight /= weight.sum(-1, keepdims=True)
    return np.einsum("jrt,tje->jre", weight, v).reshape(J * R, E)


def make_tables(rng):
    """Shuffled pages of prompts and rows; behind lengths stand others' pages."""
    N, count = len(GROUP_N), 1 + len(PROMPTS) * TABLE + len(GROUP_N) * TABLE + 4
    numbers = 1 + rng.permutation(count - 1)
    prompt_UxT = numbers[: len(PROMPTS) * TABLE].reshape(-1, TABLE)
    own_NxT = numbers[len(PROMPTS) * TABLE :][: N * TABLE].reshape(-1, TABLE)
    return count, prompt_UxT.astype(np.int32), own_NxT.astype(np.int32)


def places_at(prompt_UxT, own_NxT, t, runs_N):
    member_UxW = np.full((len(BUNDLES), W), -1, np.int32)
    place_N = np.zeros(len(GROUP_N), np.int32)
    for u, rows in enumerate(BUNDLES):
        for w, n in enumerate(rows):
            member_UxW[u, w], place_N[n] = n, u * W + w
    group_U = [GROUP_N[rows[0]] for rows in BUNDLES]
    length_U = [
        PROMPTS[g] if runs_N[list(rows)].any() else 0
        for g, rows in zip(group_U, BUNDLES, strict=True)
    ]
    prompts = Sequences(jnp.asarray(prompt_UxT[group_U]), jnp.asarray(length_U, jnp.int32))
    own = Sequences(jnp.asarray(own_NxT), jnp.asarray(np.where(runs_N, t + 1, 1), jnp.int32))
    bundles = Bundles(prompts, jnp.asarray(member_UxW), jnp.asarray(place_N))
    return Places(jnp.asarray(runs_N), own, bundles)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("kind", BACKENDS)
def test_rows_attend_to_their_prompts_and_to_their_own_tokens_through_pages(tokens, kind, dtype):
    backend, rng = BACKENDS[kind], np.random.default_rng(1)
    count, prompt_UxT, own_NxT = make_tables(rng)
    pages = backend.empty(count, PAGE, J, E, jnp.dtype(dtype))
    pages = {
        name: jnp.full_like(a, 127 if a.dtype == jnp.int8 else np.nan) for name, a in pages.items()
    }

    longest = PROMPTS.max()
    padded = [
        jnp.asarray(np.stack([np.pad(a, ((0, longest - len(a)), (0, 0), (0, 0))) for a in arrays]))
        for arrays in zip(*tokens.prompt, strict=True)
    ]
    used_UxT = np.arange(TABLE) * PAGE < PROMPTS[:, None]
    table_UxT = np.where(used_UxT, prompt_UxT, 0)
    pages = backend.write_prompts(pages, KeyValue(*padded), jnp.asarray(table_UxT))

    begin, step, end = jax.jit(backend.begin), jax.jit(backend.step), jax.jit(backend.end)
    stops_N = np.array([OWN, 3, OWN, 16, OWN, 20, OWN])  # tokens of each row
    for first, after in STEPS:
        at = functools.partial(places_at, prompt_UxT, own_NxT)
        view = begin(pages, at(first, first < stops_N))
        for t in range(first, after):
            runs_N = t < stops_N
            new = KeyValue(*(jnp.asarray(a[:, t]) for a in tokens.own))
            found, view = step(view, jnp.asarray(tokens.q_NxTxHxE[:, t]), new, at(t, runs_N))
            for n in np.flatnonzero(runs_N):
                error = np.abs(np.asarray(found[n]) - expected(tokens, n, t)).max()
                assert error < ERROR[dtype], (n, t)
        pages = end(view, jnp.asarray(own_NxT))
