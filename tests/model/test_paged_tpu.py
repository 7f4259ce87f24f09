"""Attention to pages on TPUs: interpreted here, and compiled for TPUs that are not here."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding, PartitionSpec
from paged_cases import DTYPES, assert_agrees, make_case

from spiral_jax.model.attention import paged_tpu
from spiral_jax.planning.costs import cost_of
from spiral_jax.planning.hlo import parse
from spiral_jax.planning.traffic import uncounted_kernels

pytestmark = pytest.mark.cpu_bits("kernels for TPUs, in Pallas's interpreter")

PAGE = 128
PAGES = 9  # of a table: three blocks of pages at most

# Idle sequences lie first, between busy ones, and last.
LENGTHS = [0, 1, PAGE - 1, 0, 0, PAGE, PAGE + 1, PAGE * PAGES, PAGE * PAGES - 1, 0]



def run(case, *, copies="on_wait", cores=1):
    """Interpreted. Reads outside of the pool raise, and fast memory starts as NaN.

    Args:
      copies: "on_wait": a copy's bytes arrive when they are waited for; "eager": at once. What is
        read too early is wrong with the first, what is overwritten too early with the second.
    """
    params = pltpu.InterpretParams(
        detect_races=True, dma_execution_mode=copies, num_cores_or_threads=cores
    )
    with pltpu.force_tpu_interpret_mode(params):
        part = jax.jit(paged_tpu.attend_pages)(case.q, case.pages, case.table, case.length)
        jax.block_until_ready(part)
    assert not interpreter.races.races_found
    return part


@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_float64_and_reads_nothing_else(dtype):
    case = make_case(LENGTHS, PAGES, PAGE, dtype=dtype)
    assert_agrees(run(case), case)


def test_no_block_is_overwritten_before_it_was_read():
    """Long sequences after short ones, so that copies run ahead from one into the next."""
    case = make_case([1, PAGE * PAGES, 0, 1, PAGE * PAGES], PAGES, PAGE)
    assert_agrees(run(case, copies="eager"), case)


@pytest.mark.parametrize("lengths", [[0], [0, 0, 0]])
def test_where_all_are_idle_nothing_is_seen(lengths):
    case = make_case(lengths, PAGES, PAGE)
    assert_agrees(run(case), case)


def test_more_queries_than_a_step_takes_and_heads_narrower_than_lanes():
    """As of a large group; 300 are no whole number of steps."""
    case = make_case([200, 0, 129], 2, PAGE, J=1, N=300, E=64, width=128)
    assert case.pages["k"].shape == paged_tpu.empty_pages(9, PAGE, 1, 64, jnp.float32)["k"].shape
    assert_agrees(run(case), case)


def test_larger_pages():
    case = make_case([0, 255, 256, 257, 512], 2, 256, dtype="bfloat16")
    assert_agrees(run(case), case)


@pytest.mark.parametrize("J", [2, 3])
def test_two_cores_share_the_heads_if_they_can(J):
    v5p = AbstractDevice("TPU v5", 2, "tpu")
    case = make_case([130, 0, 1200], 10, PAGE, J=J)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=v5p)):
        part = run(case, cores=2)
    assert_agrees(part, case)


def test_pages_that_do_not_fill_lanes_are_refused():
    with pytest.raises(ValueError, match="pages of 64 tokens.*multiple of 128"):
        run(make_case([1], 2, 64))
