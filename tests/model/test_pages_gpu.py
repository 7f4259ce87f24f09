"""Attention to pages on GPUs: interpreted on CPUs, run on a GPU, compiled for one that is not here.

Reads of absent pages are undone by masks, so poison behind the lengths shows them, and numbers of
pages that do not exist.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from pages_cases import DTYPES, FLOAT32_ERROR, OUTPUT_ERRORS, assert_agrees, make_case

from spiral_jax.model.attention import pages_gpu
from spiral_jax.model.attention.pages import Bundles, Places, Sequences
from spiral_jax.model.attention.part import MASKED, Part
from spiral_jax.planning.gpus import missing_compiler
from spiral_jax.planning.hlo import parse
from spiral_jax.planning.topology import find_topology

NEEDS_COMPILER = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

PAGE = 64
PAGES = 10  # of a table: several programs share it

# Idle sequences lie first, between busy ones, and last.
LENGTHS = [0, 1, PAGE - 1, 0, 0, PAGE, PAGE + 1, PAGE * PAGES, PAGE * PAGES - 1, 0]


INTERPRET = jax.default_backend() != "gpu"


def of_prompts(case):
    """The case's sequences as prompts, each of a bundle of one row; joined over their shares."""
    S = len(case.length)
    rows = jnp.arange(S, dtype=jnp.int32)
    bundles = Bundles(Sequences(case.table, case.length), rows[:, None], rows)
    attend = jax.jit(functools.partial(pages_gpu.attend_prompts, interpret=INTERPRET))
    shares = attend(case.pages, case.q, bundles)
    top = jnp.max(shares.top, axis=0)
    shrink = jnp.exp2(shares.top - top)
    part = Part(
        jnp.sum(shares.values * shrink[..., None], axis=0),
        top * math.log(2),
        jnp.sum(shares.weight * shrink, axis=0),
    )
    sees_any = case.length[:, None, None] > 0  # else nothing is written
    return Part(
        jnp.where(sees_any[..., None], part.values, 0),
        jnp.where(sees_any, part.top, MASKED),
        jnp.where(sees_any, part.weight, 0),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_float64_and_what_is_not_visible_reaches_nothing(dtype):
    case = make_case(LENGTHS, PAGES, PAGE, dtype=dtype)
    assert_agrees(of_prompts(case), case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_larger_pages_and_smaller_heads(dtype):
    case = make_case([0, 127, 128, 129, 640, 1], 5, 128, E=32, J=1, dtype=dtype)
    assert_agrees(of_prompts(case), case)


@pytest.mark.parametrize("N", [1, 3, 16, 17, 70])
def test_any_number_of_queries(N):
    """Fewer than a program multiplies, no power of 2, more than a program takes."""
    case = make_case([65, 0, 200], 4, PAGE, N=N, E=16, J=1)
    assert_agrees(of_prompts(case), case)


def test_rows_in_any_order_see_the_prompt_of_their_bundle():
    """Bundles that are full, that are not, that are empty; rows that belong to none."""
    case = make_case([70, 130, 0, 1], 4, PAGE, N=3, E=16)
    row_of = {(0, 0): 4, (0, 1): 0, (1, 0): 5, (1, 2): 1, (3, 1): 2}
    member_UxW = np.full((4, 3), -1, np.int32)
    q = np.full((7, *case.q.shape[1:]), np.nan, np.float32)  # rows 3 and 6 are in no bundle
    for (u, w), n in row_of.items():
        member_UxW[u, w] = n
        q[n] = case.q[u]
    bundles = Bundles(Sequences(case.table, case.length), jnp.asarray(member_UxW), None)
    attend = jax.jit(functools.partial(pages_gpu.attend_prompts, interpret=INTERPRET))
    shares = attend(case.pages, jnp.asarray(q), bundles)
    for (u, _), n in row_of.items():
        score = np.einsum("jne,tje->jnt", np.asarray(case.q[u], np.float64), case.keys[u])
        weight = np.exp(score - score.max(-1, keepdims=True))
        expected = np.einsum("jnt,tje->jne", weight, case.values[u])
        expected /= weight.sum(-1)[..., None]
        shrink = np.exp2(shares.top[:, n] - np.max(shares.top[:, n], axis=0))
        total = np.sum(shares.weight[:, n] * shrink, axis=0)
        found = np.sum(shares.values[:, n] * shrink[..., None], axis=0) / total[..., None]
        np.testing.assert_allclose(found, expected, rtol=0, atol=5 * FLOAT32_ERROR)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("programs", [1, 100])
def test_rows_write_their_newest_token_and_go_on_from_their_prompts(dtype, programs, monkeypatch):
    """One program has all tokens of a row, or several share them, where a GPU wants so many."""
    monkeypatch.setattr(pages_gpu, "PROGRAMS", programs)
    prompts = make_case([0, 90, 200, 0], 4, PAGE, dtype=dtype)
    own = make_case([1, PAGE, PAGE + 1, 600], PAGES, PAGE, dtype=dtype)
    newest, emptied = without_newest(own)
    # one page before them that is nobody's
    pages = {name: jnp.concatenate([a[:1], a, prompts.pages[name]]) for name, a in emptied.items()}
    own = own._replace(table=own.table + 1)
    prompt_UxT = prompts.table + 1 + len(own.pages["k"])
    index_N = jnp.arange(4, dtype=jnp.int32)
    bundles = Bundles(Sequences(prompt_UxT, prompts.length), index_N[:, None], index_N)
    runs_N = jnp.asarray([True, True, False, True])
    length_N = jnp.where(runs_N, own.length, 1)
    places = Places(runs_N, Sequences(own.table, length_N), bundles)

    S, J, R, E = own.q.shape
    q_NxHxE = (own.q * E**0.5).astype(own.q.dtype).reshape(S, J * R, E)
    attend = jax.jit(functools.partial(pages_gpu.attend_newest, interpret=INTERPRET))
    out, written = attend(pages, q_NxHxE, newest, places)

    error = OUTPUT_ERRORS[pages["k"].dtype.name]
    for n in np.flatnonzero(runs_N):
        k = np.concatenate([prompts.keys[n], own.keys[n]])
        v = np.concatenate([prompts.values[n], own.values[n]])
        score = np.einsum("jre,tje->jrt", np.asarray(own.q[n], np.float64), k)
        weight = np.exp(score - score.max(-1, keepdims=True))
        expected = np.einsum("jrt,tje->jre", weight / weight.sum(-1, keepdims=True), v)
        largest = max(np.abs(v).max(), 1.0)
        found = np.asarray(out[n], np.float64).reshape(J, R, E)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2 * error * largest)
    assert_only_newest_are_written(pages, written, own, newest, runs_N)


def without_newest(case):
    """(the last token's entries of each sequence, the pool with poison in their place)."""
    page = case.pages["k"].shape[2]
    at = np.array(case.length) - 1
    number = np.take_along_axis(np.asarray(case.table), (at // page)[:, None], 1)[:, 0]
    newest = {name: a[number, :, at % page] for name, a in case.pages.items()}
    poisoned = {
        name: a.at[number, :, at % page].set(127 if a.dtype == jnp.int8 else jnp.nan)
        for name, a in case.pages.items()
    }
    return newest, poisoned


def assert_only_newest_are_written(before, after, case, newest, runs_N):
    page = case.pages["k"].shape[2]
    for name, a in before.items():
        expected = np.array(a, np.float32)
        for n in np.flatnonzero(runs_N):
            t = int(case.length[n]) - 1
            expected[int(case.table[n, t // page]), :, t % page] = newest[name][n]
        # page 0 is nobody's: there goes what rows that do not run would write
        np.testing.assert_array_equal(np.asarray(after[name], np.float32)[1:], expected[1:])


@pytest.mark.parametrize(
    ("page", "E", "message"), [(48, 32, "pages of 48"), (64, 96, "heads of 96"), (8, 32, "of 8")]
)
def test_sizes_that_triton_does_not_take_are_refused(page, E, message):
    with pytest.raises(ValueError, match=message):
        of_prompts(make_case([1], 2, page, E=E))


def test_a_pool_that_jax_would_address_wrongly_is_refused():
    pool = jax.ShapeDtypeStruct((20_000, 8, 128, 128), jnp.int8)  # 2.6e9 bytes
    scale = jax.ShapeDtypeStruct((20_000, 8, 128), jnp.float32)
    pages = {"k": pool, "v": pool, "k_scale": scale, "v_scale": scale}
    q = jax.ShapeDtypeStruct((2, 8, 4, 128), jnp.bfloat16)
    table, member = (jax.ShapeDtypeStruct(sizes, jnp.int32) for sizes in ((2, 4), (2, 1)))
    length = jax.ShapeDtypeStruct((2,), jnp.int32)
    with pytest.raises(ValueError, match="int8 keys a layer"):
        jax.eval_shape(
            pages_gpu.attend_prompts, pages, q, Bundles(Sequences(table, length), member, length)
        )


@NEEDS_COMPILER
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
def test_compiles_for_an_h100_to_two_calls_that_copy_no_page(dtype):
    """With the 4B model's heads: 128 rows of 16 groups."""
    N, U, W, J, R, E, T, page, count = 128, 16, 8, 8, 4, 128, 72, 128, 2048
    topology = find_topology("h100:1")
    mesh = Mesh(np.array(topology.devices), ("x",))
    replicated = NamedSharding(mesh, PartitionSpec())

    def array(dtype, *sizes):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=replicated)

    pages = {name: array(dtype, count, J, page, E) for name in ("k", "v")}
    newest = {name: array(dtype, N, J, E) for name in ("k", "v")}
    if dtype == jnp.int8:
        pages |= {f"{name}_scale": array(jnp.float32, count, J, page) for name in ("k", "v")}
        newest |= {f"{name}_scale": array(jnp.float32, N, J) for name in ("k", "v")}
    prompts = Sequences(array(jnp.int32, U, T), array(jnp.int32, U))
    bundles = Bundles(prompts, array(jnp.int32, U, W), array(jnp.int32, N))
    own = Sequences(array(jnp.int32, N, T), array(jnp.int32, N))
    q = array(jnp.bfloat16, N, J * R, E)
    with jax.set_mesh(mesh):  # as programs are; jax from 0.11 on finds the device there
        lowered = jax.jit(pages_gpu.attend_newest, donate_argnums=0).lower(
            pages, q, newest, Places(array(jnp.bool_, N), own, bundles)
        )
    compiled = lowered.compile(compiler_options=topology.compiler_options)

    module = parse(compiled.as_text())
    calls = [each for each in module.instructions() if each.operation == "custom-call"]
    assert len(calls) == 2
    # What rows saw of their prompts, by share, and of their own tokens: far below `k` or `v`.
    part = N * J * R * (E + 2) * 4
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < 16 * part < math.prod((count, J, page, E)) / 4
