"""The decode loop's compiled program copies no weight and no cache, and needs little memory."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_sampler import one_device

from spiral_jax.core import mesh as meshes
from spiral_jax.model.architecture import Architecture
from spiral_jax.model.transformer import ModelConfig
from spiral_jax.sampling.decode import Chunk, decode_chunk
from spiral_jax.sampling.draw import Draw
from spiral_jax.sampling.settings import DecodeSettings, Schedule, SlotClass
from spiral_jax.sampling.shapes import abstract_state, shardings
from spiral_jax.sampling.weights import abstract_weights

pytestmark = pytest.mark.cpu_bits("arrays and memory of XLA's program for CPUs")

ARCH = Architecture(
    V=97, D=256, F=1024, L=4, H=4, J=2, E=64, norm_eps=1e-6, rope_theta=1e4, tied=False
)
CLASSES = (SlotClass(8, 3, 48, 40), SlotClass(16, 2, 32, 80))
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
    mesh, donate=True, weights=lambda weights: weights, decode=decode_chunk, classes=CLASSES
):
    """The program, compiled from shapes alone; `weights` changes what it reads."""
    settings = DecodeSettings(ModelConfig(ARCH), jnp.float32, Draw(), 0, (1,), 16, mesh)
    schedule = Schedule(classes, chunk=8, exit_groups=1, prefill_tokens=16)
    (rows,) = schedule.decode_rows(meshes.group_count_multiple(mesh))
    states = tuple(abstract_state(settings, slots) for slots in classes)
    out = Chunk(shardings(states), None, None, None)
    program = functools.partial(decode, settings, schedule, rows)
    with jax.set_mesh(mesh):
        jitted = jax.jit(program, out_shardings=out, donate_argnums=(1,) if donate else ())
        return jitted.lower(weights(abstract_weights(settings.config, mesh)), states).compile()


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
    """Elements of the smallest kernel, and of a layer's smallest keys or values of one class."""
    heads = ARCH.J * ARCH.E // mesh.shape["tensor"]
    groups = [slots.slots // meshes.group_count_multiple(mesh) for slots in CLASSES]
    caches = [
        U * tokens * heads
        for U, c in zip(groups, CLASSES, strict=True)
        for tokens in (c.P, c.C * c.G)
    ]
    return ARCH.D * heads, min(caches)


def weight_bytes(mesh):
    weights = abstract_weights(ModelConfig(ARCH), mesh)
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * 4 for a in jax.tree.leaves(weights))


@pytest.fixture(scope="module")
def program(mesh):
    return compiled_decode(mesh)


@pytest.mark.devices8
def test_decode_loop_copies_and_gathers_neither_weights_nor_caches(mesh, program):
    assert max(moves_in_decode_loop(program)) < min(smallest_on_a_device(mesh))


@pytest.mark.devices8
def test_a_cache_of_a_single_slot_a_shard_is_not_copied_in_the_loop_either(mesh):
    slots = meshes.group_count_multiple(mesh)
    alone = compiled_decode(
        mesh, classes=(SlotClass(slots, 3, 48, 40), SlotClass(slots, 2, 32, 80))
    )
    smallest_cache = 32 * ARCH.J // mesh.shape["tensor"] * ARCH.E
    assert max(moves_in_decode_loop(alone)) < smallest_cache
    assert alone.memory_analysis().temp_size_in_bytes <= 0.1 * weight_bytes(mesh)


@pytest.mark.devices8
def test_decode_needs_a_tenth_of_the_weights_in_memory_beside_its_arguments(mesh, program):
    assert program.memory_analysis().temp_size_in_bytes <= 0.1 * weight_bytes(mesh)


@pytest.mark.devices8
def test_without_donation_the_memory_bound_fails(mesh):
    memory = compiled_decode(mesh, donate=False).memory_analysis()
    new_bytes = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert new_bytes > 0.1 * weight_bytes(mesh)


def test_the_caches_that_come_in_go_out_in_the_same_memory(program):
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

    def sliced(settings, schedule, rows, weights, states):
        def take_layer(index, i):
            return jax.tree.map(lambda a: a[jnp.where(index < 0, 0, i)], weights.layers)

        def body(carry):
            index, states = carry
            layers = tuple(take_layer(index, i) for i in range(ARCH.L))
            unstacked = dataclasses.replace(weights, layers=layers)
            one_step = dataclasses.replace(schedule, chunk=1)
            return index + 1, decode_chunk(settings, one_step, rows, unstacked, states).states

        start = jnp.int32(0), states
        _, states = jax.lax.while_loop(lambda carry: carry[0] < schedule.chunk, body, start)
        return Chunk(states, np.int32(0), np.int32(0), np.int32(0))

    program = compiled_decode(mesh, weights=stack, decode=sliced)
    assert program.memory_analysis().temp_size_in_bytes > 0.1 * weight_bytes(mesh)
