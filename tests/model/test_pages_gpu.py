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
from pages_cases import DTYPES, assert_agrees, make_case

from spiral_jax.model.attention import pages_gpu
from spiral_jax.planning.gpus import missing_compiler
from spiral_jax.planning.hlo import parse
from spiral_jax.planning.topology import find_topology

NEEDS_COMPILER = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

PAGE = 64
PAGES = 10  # of a table: several programs share it

# Idle sequences lie first, between busy ones, and last.
LENGTHS = [0, 1, PAGE - 1, 0, 0, PAGE, PAGE + 1, PAGE * PAGES, PAGE * PAGES - 1, 0]


def run(case):
    interpret = jax.default_backend() != "gpu"
    attend = jax.jit(functools.partial(pages_gpu.attend_pages, interpret=interpret))
    return attend(case.q, case.pages, case.table, case.length)


@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_float64_and_what_is_not_visible_reaches_nothing(dtype):
    case = make_case(LENGTHS, PAGES, PAGE, dtype=dtype)
    assert_agrees(run(case), case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_larger_pages_and_smaller_heads(dtype):
    case = make_case([0, 127, 128, 129, 640, 1], 5, 128, E=32, J=1, dtype=dtype)
    assert_agrees(run(case), case)


@pytest.mark.parametrize("N", [1, 3, 16, 17, 70])
def test_any_number_of_queries(N):
    """Fewer than a program multiplies, no power of 2, more than a program takes."""
    case = make_case([65, 0, 200], 4, PAGE, N=N, E=16, J=1)
    assert_agrees(run(case), case)


def test_where_all_are_idle_nothing_is_seen():
    case = make_case([0, 0], PAGES, PAGE)
    assert_agrees(run(case), case)


@pytest.mark.parametrize(
    ("page", "E", "message"), [(48, 32, "pages of 48"), (64, 96, "heads of 96"), (8, 32, "of 8")]
)
def test_sizes_that_triton_does_not_take_are_refused(page, E, message):
    with pytest.raises(ValueError, match=message):
        run(make_case([1], 2, page, E=E))


def test_a_pool_that_jax_would_address_wrongly_is_refused():
    pool = jax.ShapeDtypeStruct((20_000, 8, 128, 128), jnp.int8)  # 2.6e9 bytes
    scale = jax.ShapeDtypeStruct((20_000, 8, 128), jnp.float32)
    pages = {"k": pool, "v": pool, "k_scale": scale, "v_scale": scale}
    q = jax.ShapeDtypeStruct((2, 8, 4, 128), jnp.bfloat16)
    table, length = (jax.ShapeDtypeStruct(sizes, jnp.int32) for sizes in ((2, 4), (2,)))
    with pytest.raises(ValueError, match="int8 keys a layer"):
        jax.eval_shape(pages_gpu.attend_pages, q, pages, table, length)


@NEEDS_COMPILER
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
def test_compiles_for_an_h100_to_one_call_that_copies_no_page(dtype):
    """With the 4B model's heads: 16 groups of 8 traces."""
    S, J, N, E, T, page, count = 16, 8, 32, 128, 72, 128, 2048
    topology = find_topology("h100:1")
    replicated = NamedSharding(Mesh(np.array(topology.devices), ("x",)), PartitionSpec())

    def array(dtype, *sizes):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=replicated)

    pages = {name: array(dtype, count, J, page, E) for name in ("k", "v")}
    if dtype == jnp.int8:
        pages |= {f"{name}_scale": array(jnp.float32, count, J, page) for name in ("k", "v")}
    lowered = jax.jit(pages_gpu.attend_pages).lower(
        array(jnp.bfloat16, S, J, N, E), pages, array(jnp.int32, S, T), array(jnp.int32, S)
    )
    compiled = lowered.compile(compiler_options=topology.compiler_options)

    module = parse(compiled.as_text())
    calls = [each for each in module.instructions() if each.operation == "custom-call"]
    assert len(calls) == 1
    pool = math.prod((count, J, page, E)) * jnp.dtype(dtype).itemsize
    # beside the results, the shares of each sequence, before they are joined
    assert compiled.memory_analysis().temp_size_in_bytes < pool / 20
