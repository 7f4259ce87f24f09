"""Attention to pages on TPUs: interpreted here, and compiled for TPUs that are not here."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec
from pages_cases import DTYPES, assert_agrees, make_case

from spiral_jax.model.attention import pages_tpu, pages_tpu_write
from spiral_jax.planning.costs import cost_of
from spiral_jax.planning.hlo import parse
from spiral_jax.planning.traffic import uncounted_kernels

pytestmark = pytest.mark.cpu_bits("kernels for TPUs, in Pallas's interpreter")

PAGE = 128
PAGES = 9  # of a table: two or three of the kernel's blocks

# Idle sequences lie first, between busy ones, and last.
LENGTHS = [0, 1, PAGE - 1, 0, 0, PAGE, PAGE + 1, PAGE * PAGES, PAGE * PAGES - 1, 0]


def run(case, *, copies="on_wait", cores=1):
    """Interpreted. Reads outside of the pool raise, and fast memory starts as NaN.

    Args:
      copies: "on_wait": a copy's bytes arrive when they are waited for; "eager": at once. What is
        read too early is wrong with the first, what is overwritten too early with the second.
      cores: of a chip.
    """
    params = pltpu.InterpretParams(
        detect_races=True, dma_execution_mode=copies, num_cores_or_threads=cores
    )
    arrays = case.q, case.pages, case.table, case.length
    return interpreted(pages_tpu.attend_pages, params, *arrays)


def interpreted(function, params, *arrays):
    with pltpu.force_tpu_interpret_mode(params):
        result = jax.block_until_ready(jax.jit(function)(*arrays))
    assert not interpreter.races.races_found
    return result


@pytest.mark.parametrize(
    ("dtype", "copies"), [("float32", "eager"), ("bfloat16", "on_wait"), ("int8", "on_wait")]
)
def test_agrees_with_float64_and_reads_nothing_else(dtype, copies):
    case = make_case(LENGTHS, PAGES, PAGE, dtype=dtype)
    assert_agrees(run(case, copies=copies), case)


def test_where_all_are_idle_nothing_is_seen():
    case = make_case([0, 0, 0], PAGES, PAGE)
    assert_agrees(run(case), case)


def test_more_queries_than_a_step_takes_and_heads_narrower_than_lanes():
    """As of a large group; 300 are no whole number of steps."""
    case = make_case([200, 0, 129], 2, PAGE, J=1, N=300, E=64, width=128)
    assert case.pages["k"].shape == pages_tpu.empty_pages(9, PAGE, 1, 64, jnp.float32)["k"].shape
    assert_agrees(run(case), case)


def test_larger_pages():
    case = make_case([0, 255, 256, 257, 512], 2, 256, dtype="bfloat16")
    assert_agrees(run(case), case)


@pytest.mark.parametrize("J", [2, 3])
def test_two_cores_share_the_heads_if_they_can(J, monkeypatch):
    v5p = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion.TPU_V5P, 2)
    monkeypatch.setattr(pltpu, "get_tpu_info", lambda: v5p)
    case = make_case([130, 0, 1200], 10, PAGE, J=J)
    assert_agrees(run(case, cores=2), case)


def test_pages_that_do_not_fill_lanes_are_refused():
    with pytest.raises(ValueError, match="pages of 64 tokens.*multiple of 128"):
        run(make_case([1], 2, 64))


# --- Writing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_are_written_to_their_places_and_nothing_else_changes(dtype):
    """More rows than are written at once; the first and last tokens of tiles; rows of nobody."""
    rng = np.random.default_rng(0)
    N, pages, J, E = 40, 50, 2, 64
    pool = pages_tpu.empty_pages(pages, PAGE, J, E, jnp.dtype(dtype))
    pool = {name: jnp.asarray(50 * rng.normal(size=a.shape), a.dtype) for name, a in pool.items()}
    shapes = {name: (N, J, E) if a.ndim == 4 else (N, J) for name, a in pool.items()}
    entries = {
        name: jnp.asarray(50 * rng.normal(size=shape), pool[name].dtype)
        for name, shape in shapes.items()
    }
    page_N = rng.permutation(np.arange(1, pages))[:N]
    page_N[[5, 8]] = pages_tpu_write.NOWHERE
    offset_N = rng.integers(0, PAGE, size=N)
    offset_N[:8] = [0, 7, 8, 15, 16, 31, 32, PAGE - 1]

    expected = {name: np.array(a) for name, a in pool.items()}
    for n in np.flatnonzero(page_N):
        for name, entry in entries.items():
            token = np.asarray(entry[n])
            if token.ndim == 2:
                token = np.pad(token, [(0, 0), (0, PAGE - E)])
            expected[name][page_N[n], :, offset_N[n]] = token

    places = jnp.asarray(page_N, jnp.int32), jnp.asarray(offset_N, jnp.int32)
    params = pltpu.InterpretParams(detect_races=True)
    written = interpreted(pages_tpu_write.write_tokens, params, pool, entries, *places)
    for name, array in expected.items():
        np.testing.assert_array_equal(np.asarray(written[name]), array)


# --- Compiled -------------------------------------------------------------------------------------


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, which compiles for TPUs, is absent"
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
def test_a_loop_over_tokens_copies_no_pool_on_v5e(monkeypatch, dtype):
    """Writing and reading the pages of 48 rows, two of the 4B model's key heads a chip."""
    S, J, N, E, T, count, tokens = 48, 2, 4, 128, 32, 2048, 8

    def decode(q, pages, table, length):
        def one_token(_, state):
            q, pages, length = state
            new = {name: q[:, :, 0, 0] if a.ndim == 3 else q[:, :, 0] for name, a in pages.items()}
            new = {name: a.astype(pages[name].dtype) for name, a in new.items()}
            page = jnp.take_along_axis(table, (length // PAGE)[:, None], axis=1)[:, 0]
            pages = pages_tpu_write.write_tokens(pages, new, page, length % PAGE)
            part = pages_tpu.attend_pages(q, pages, table, length + 1)
            return part.output(q.dtype), pages, length + 1

        return jax.lax.fori_loop(0, tokens, one_token, (q, pages, length))

    devices = _v5e_devices(monkeypatch)
    mesh = topologies.make_mesh(devices, (len(devices.devices),), ("x",))
    replicated = NamedSharding(mesh, PartitionSpec())
    pages = jax.eval_shape(lambda: pages_tpu.empty_pages(count, PAGE, J, E, jnp.dtype(dtype)))
    arrays = (
        jax.ShapeDtypeStruct((S, J, N, E), jnp.bfloat16),
        pages,
        jax.ShapeDtypeStruct((S, T), jnp.int32),
        jax.ShapeDtypeStruct((S,), jnp.int32),
    )
    arrays = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated), arrays
    )
    on_every_chip = jax.shard_map(
        decode, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False
    )
    compiled = jax.jit(on_every_chip, donate_argnums=1).lower(*arrays).compile()

    assert compiled.memory_analysis().temp_size_in_bytes < pages["k"].size / 20
    module = parse(compiled.as_text())  # as plans read it
    assert not uncounted_kernels(module)
    products = tokens * 2 * 2 * S * J * N * T * PAGE * E  # q k and p v, of full tables
    assert products <= cost_of(module, {}).flops < 1.1 * products


def _v5e_devices(monkeypatch):
    """Without asking a metadata server that is not there."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # other tests compile meanwhile
    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
