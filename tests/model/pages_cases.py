"""Sequences in pages, poisoned wherever nothing may be read, and attention to them in float64."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from spiral_jax.model.attention.part import MASKED

SPARE = 3  # pages that belong to no sequence

# Scores reach 30 here: float32 holds them to 2e-6, which is then their weight's relative error.
# Where weights are rounded to bfloat16, they are off by up to 2**-8 of themselves, and what they
# weigh by no more than that of the largest value. Sums of weights stay float32.
FLOAT32_ERROR = 1e-5
OUTPUT_ERRORS = {"float32": FLOAT32_ERROR, "bfloat16": 2**-8, "int8": 2**-8}
DTYPES = tuple(OUTPUT_ERRORS)


class Case(NamedTuple):
    """What a kernel takes; and what its numbers are, by sequence: k, v [length, J, E], float64."""

    q: jnp.ndarray
    pages: dict
    table: jnp.ndarray
    length: jnp.ndarray
    keys: list
    values: list


def make_case(lengths, pages, page, *, J=2, N=4, E=128, dtype="float32", width=None):
    """Sequences of those lengths in tables of `pages` pages, shuffled in the pool.

    Args:
      dtype: of the pool; the queries' too, but bfloat16 for an int8 pool.
      width: what heads are padded to in the pool, with zeros.
    """
    rng = np.random.default_rng(0)
    S = len(lengths)
    count = S * pages + SPARE
    taken = rng.permutation(count)[: S * pages].reshape(S, pages)
    stored = _stored(rng, (count, J, page, E), dtype)

    used = np.zeros((count, page), bool)
    table = rng.integers(10**6, 10**9, size=(S, pages))  # no such page
    for s, length in enumerate(lengths):
        for t in range(length):
            used[taken[s, t // page], t % page] = True
        needed = -(-length // page)
        table[s, :needed] = taken[s, :needed]

    q_dtype = jnp.bfloat16 if dtype == "int8" else dtype
    # Queries of this size make sharp softmaxes next to flat ones.
    q = rng.normal(size=(S, J, N, E)) * 2.0 ** rng.integers(-5, 0, size=(S, J, N, 1))
    q = jnp.asarray(q, q_dtype)
    poisoned = {name: _poisoned(a, used, width or E) for name, a in stored.items()}
    by_sequence = [
        [_tokens(stored, name, taken[s], length) for s, length in enumerate(lengths)]
        for name in ("k", "v")
    ]
    indices = jnp.asarray(table, jnp.int32), jnp.asarray(lengths, jnp.int32)
    return Case(q, poisoned, *indices, *by_sequence)


def _stored(rng, shape, dtype):
    if dtype != "int8":
        return {name: jnp.asarray(rng.normal(size=shape), dtype) for name in ("k", "v")}
    numbers = {name: rng.integers(-127, 128, size=shape).astype(np.int8) for name in ("k", "v")}
    scales = {f"{name}_scale": rng.uniform(0.005, 0.02, size=shape[:3]) for name in ("k", "v")}
    return numbers | {name: scale.astype(np.float32) for name, scale in scales.items()}


def _poisoned(a, used, width):
    a = np.asarray(a)
    shape = (used.shape[0], 1, used.shape[1]) + (1,) * (a.ndim - 3)
    poison = 127 if a.dtype == np.int8 else np.nan
    a = np.where(used.reshape(shape), a, np.asarray(poison, a.dtype))
    padding = [(0, 0)] * 3 + [(0, width - a.shape[3])] if a.ndim == 4 else 0
    return jnp.asarray(np.pad(a, padding))


def _tokens(stored, name, pages, length):
    """[length, J, E] of a sequence."""
    a = np.asarray(stored[name], np.float64)
    if f"{name}_scale" in stored:
        a = a * np.asarray(stored[f"{name}_scale"], np.float64)[..., None]
    J, E = a.shape[1], a.shape[3]
    return a[pages].swapaxes(1, 2).reshape(-1, J, E)[:length]


def assert_agrees(part, case):
    """Output and log-sum-exp are those of float64; exactly nothing where nothing is seen."""
    error = OUTPUT_ERRORS[case.pages["k"].dtype.name]
    assert part.values.shape == case.q.shape
    assert part.top.shape == part.weight.shape == case.q.shape[:3]
    assert all(a.dtype == jnp.float32 and np.isfinite(a).all() for a in part)
    q = np.asarray(case.q, np.float64)
    for s, length in enumerate(case.length):
        values, top, weight = (np.asarray(a[s], np.float64) for a in part)
        if length == 0:
            assert not values.any() and not weight.any() and (top == np.float32(MASKED)).all()
            continue
        score = np.einsum("jne,tje->jnt", q[s], case.keys[s])
        most = score.max(axis=-1, keepdims=True)
        p = np.exp(score - most)
        total = p.sum(axis=-1, keepdims=True)
        out = np.einsum("jnt,tje->jne", p / total, case.values[s])
        largest = max(np.abs(case.values[s]).max(), 1.0)
        np.testing.assert_allclose(values / weight[..., None], out, rtol=0, atol=error * largest)
        lse = (most + np.log(total))[..., 0]
        np.testing.assert_allclose(top + np.log(weight), lse, rtol=0, atol=FLOAT32_ERROR)
