"""The decode loop's compiled program: no copy of a weight or a cache, and little memory beside its
arguments.
"""

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
from spiral_jax.sampling.decode import decode_chunk
from spiral_jax.sampling.draw import Draw
from spiral_jax.sampling.programs import abstract_state
from spiral_jax.sampling.slots import DecodeSettings, SlotClass
from spiral_jax.sampling.weights import abstract_weights

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
    """The program, compiled from shapes alone; `weights(abstract weights)` replaces what it reads."""
    settings = DecodeSettings(ModelConfig(ARCH), jnp.float32, Draw(), 0, (1,), 16, mesh)
    rows = sum(slots.rows for slots in classes) // meshes.group_count_multiple(mesh)
    states = tuple(abstract_state(settings, slots) for slots in classes)
    out = (jax.tree.map(lambda a: a.sharding, states), None, None, None)
    program = functools.partial(decode, settings, classes, (0,) * len(classes), 8, 1, rows, 0)
    with jax.set_mesh(mesh):
        jitted = jax.jit(program, out_shardings=out, donate_argnums=(1,) if donate else ())
        return jitted.lower(weights(abstract_weights(settings.config, mesh)), states).compile()


def moves_in_decode_loop(program):
    """Elements of every array that the body of the decode loop, and all it calls, copies or
    gathers.
    """
    text = program.as_text()
    found = re.finditer(r"^(?:ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", text, re.M | re.S)
    computations = {match[1]: match[2] for match in found}

    def reach(name, seen):
        if name not in seen:
            seen.add(name)
            called = r"(?:calls|body|condition|to_apply)=%?([\w.\-]+)"
            for callee in re.findall(called, computations[name]):
                reach(callee, seen)
        return seen

    bodies = [reach(name, set()) for name in re.findall(r" while\([^\n]*body=%?([\w.\-]+)", text)]
    (loop,) = [
        names for names in bodies if any("DecoderLayer.project" in computations[name] for name in names)
    ]
    operation = rf"= \w+\[([\d,]*)\]\S* ({'|'.join(MOVES)})\("
    moves = [match for name in loop for match in re.findall(operation, computations[name])]
    return [math.prod(int(size) for size in shape.split(",") if size) for shape, _ in moves]


def smallest_on_a_device(mesh):
    """Elements of the smallest kernel and of the smallest cache (a layer's keys or values of one
    class).
    """
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
    assert (
        max(moves_in_decode_loop(alone)) < 32 * ARCH.J // mesh.shape["tensor"] * ARCH.E
    )  # the smallest cache
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
        stacked = jax.tree.map(lambda *a: jax.ShapeDtypeStruct((len(a), *a[0].shape), a[0].dtype, sharding=place),
                               *weights.layers)  # fmt: skip
        return dataclasses.replace(weights, layers=stacked)

    def sliced(settings, classes, leave_at, chunk, exit_groups, rows, fewer, weights, states):
        def body(carry):
            index, states = carry
            own = [
                jax.tree.map(lambda a: a[jnp.where(index < 0, 0, i)], weights.layers)
                for i in range(ARCH.L)
            ]  # noqa: B023
            unstacked = dataclasses.replace(weights, layers=tuple(own))
            out = decode_chunk(settings, classes, leave_at, 1, 1, rows, fewer, unstacked, states)
            return index + 1, out[0]

        states = jax.lax.while_loop(lambda carry: carry[0] < chunk, body, (jnp.int32(0), states))[1]
        return states, np.int32(0), np.int32(0), np.int32(0)

    program = compiled_decode(mesh, weights=stack, decode=sliced)
    assert program.memory_analysis().temp_size_in_bytes > 0.1 * weight_bytes(mesh)
