"""The decode loop's compiled program copies no weight and no cache, and needs little memory."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_sampler import make_schedule, one_device

from spiral_jax.model.architecture import Architecture
from spiral_jax.model.transformer import ModelConfig
from spiral_jax.sampling.decode import Chunk, decode_chunk
from spiral_jax.sampling.draw import Draw
from spiral_jax.sampling.programs import shardings
from spiral_jax.sampling.settings import DecodeSettings
from spiral_jax.sampling.shapes import abstract_pool, exit_shapes, row_shapes
from spiral_jax.sampling.weights import abstract_weights

pytestmark = pytest.mark.cpu_bits("arrays and memory of XLA's program for CPUs")

# Two key heads a device: of a single one XLA for CPUs lays the axes of what rows have of their own
# in another order, and copies it once a step (docs/pages.md).
ARCH = Architecture(
    V=97, D=256, F=1024, L=4, H=8, J=4, E=64, norm_eps=1e-6, rope_theta=1e4, tied=False
)
SCHEDULE = make_schedule(
    pages=1 + 16 * 8 + 8 * 8,
    rows=(16,),
    page=16,
    width=2,
    prompts=(128,),
    trace=128,
    chunk=8,
    fill=2,
)
MOVES = (
    "copy",
    "transpose",
    "convert",
    "concatenate",
    "dynamic-slice",
    "gather",
    "all-gather",
    "all-to-all",
)


def compiled_decode(
    mesh, donate=True, weights=lambda weights: weights, decode=decode_chunk, schedule=SCHEDULE
):
    """The program, compiled from shapes alone; `weights` changes what it reads."""
    settings = DecodeSettings(ModelConfig(ARCH), jnp.float32, Draw(), 0, (1,), 16, mesh)
    pool = abstract_pool(settings, schedule)
    out = Chunk(shardings(pool), None, None, None)
    program = functools.partial(decode, settings, schedule.chunk)
    rows, exit_at = row_shapes(settings, schedule, schedule.rows[-1]), exit_shapes(settings)
    with jax.set_mesh(mesh):
        jitted = jax.jit(program, out_shardings=out, donate_argnums=(1,) if donate else ())
        given = weights(abstract_weights(settings.config, mesh)), pool, rows, exit_at
        return jitted.lower(*given).compile()


def moves_in_decode_loop(program):
    """Elements of every array that the body of the decode loop, with all it calls, moves."""
    text = program.as_text()
    matches = re.finditer(r"^(?:ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", text, re.M | re.S)
    computations = {match[1]: match[2] for match in matches}

    def reach(name, seen):
        if name not in seen:
            seen.add(name)
            called = r"(?:calls|body|condition|to_apply)=%?([\w.\-]+)"
            for callee in re.findall(called, computations[name]):
                reach(callee, seen)
        return seen

    bodies = [reach(name, set()) for name in re.findall(r" while\([^\n]*body=%?([\w.\-]+)", text)]
    (loop,) = [
        names
        for names in bodies
        if any("DecoderLayer.project" in computations[name] for name in names)
    ]
    operation = rf"= \w+\[([\d,]*)\]\S* ({'|'.join(MOVES)})\("
    moves = [match for name in loop for match in re.findall(operation, computations[name])]
    return [math.prod(int(size) for size in shape.split(",") if size) for shape, _ in moves]


def smallest_on_a_device(mesh):
    """Elements of the smallest kernel, and of a layer's keys of all rows, or of a pool."""
    heads = ARCH.J * ARCH.E // mesh.shape["tensor"]
    tokens = min(SCHEDULE.rows[-1] * SCHEDULE.trace, SCHEDULE.pages * SCHEDULE.page)
    return ARCH.D * heads, tokens * heads


def read_bytes(mesh):
    """Of what a call copies out of the pages, for all layers: own tokens and prompts."""
    tokens = SCHEDULE.rows[-1] * 128 + SCHEDULE.bundles(SCHEDULE.rows[-1]) * 128
    return tokens * 2 * 4 * ARCH.L * ARCH.J * ARCH.E // mesh.shape["tensor"]


def weight_bytes(mesh):
    weights = abstract_weights(ModelConfig(ARCH), mesh)
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * 4 for a in jax.tree.leaves(weights))


@pytest.fixture(scope="module")
def program(mesh):
    return compiled_decode(mesh)


@pytest.mark.devices8
def test_decode_loop_copies_and_gathers_neither_weights_nor_pages(mesh, program):
    assert max(moves_in_decode_loop(program)) < min(smallest_on_a_device(mesh))


@pytest.mark.devices8
def test_decode_needs_a_tenth_of_the_weights_in_memory_beside_what_it_reads(mesh, program):
    """Without kernels what is read is copied once a call."""
    bound = 0.1 * weight_bytes(mesh) + read_bytes(mesh)
    assert program.memory_analysis().temp_size_in_bytes <= bound


@pytest.mark.devices8
def test_without_donation_the_memory_bound_fails(mesh):
    memory = compiled_decode(mesh, donate=False).memory_analysis()
    new_bytes = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert new_bytes > 0.1 * weight_bytes(mesh) + read_bytes(mesh)


def test_the_pages_that_come_in_go_out_in_the_same_memory(program):
    analysis = program.memory_analysis()
    assert analysis.alias_size_in_bytes >= 0.99 * analysis.output_size_in_bytes


def test_a_loop_that_slices_stacked_weights_would_fail_these_tests():
    """Each layer takes its own from stacked weights, anew at every token."""
    mesh = one_device()
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def stack(weights):
        def stack_leaves(*a):
            shape = len(a), *a[0].shape
            return jax.ShapeDtypeStruct(shape, a[0].dtype, sharding=place)

        return dataclasses.replace(weights, layers=jax.tree.map(stack_leaves, *weights.layers))

    def sliced(settings, steps, weights, pool, rows, exit_at):
        def take_layer(index, i):
            return jax.tree.map(lambda a: a[jnp.where(index < 0, 0, i)], weights.layers)

        def body(carry):
            index, pool = carry
            layers = tuple(take_layer(index, i) for i in range(ARCH.L))
            unstacked = dataclasses.replace(weights, layers=layers)
            return index + 1, decode_chunk(settings, 1, unstacked, pool, rows, exit_at).pool

        _, pool = jax.lax.while_loop(lambda carry: carry[0] < steps, body, (jnp.int32(0), pool))
        return Chunk(pool, np.int32(0), np.int32(0), np.int32(0))

    program = compiled_decode(mesh, weights=stack, decode=sliced)
    bound = 0.1 * weight_bytes(mesh) + read_bytes(mesh)
    assert program.memory_analysis().temp_size_in_bytes > bound
