"""Sampling from a frozen base in int8: the same tokens as from its floats, and no copy of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from plain_sampler import plain_sample
from small_int8 import in_floats, in_int8
from small_sampler import (
    AMPLE,
    MODEL,
    assert_same_up_to_rounding,
    make_engine,
    make_settings,
    mixed_requests,
    one_device,
    random_variables,
)

from spiral_jax.core import mesh as meshes
from spiral_jax.core.mesh import bytes_on_a_device, make_mesh
from spiral_jax.sampling.protocol import sample
from spiral_jax.sampling.weights import abstract_weights, bytes_laid_out

EXACT = dataclasses.replace(MODEL, arch=dataclasses.replace(MODEL.arch, tied=True))
QUANTISED = dataclasses.replace(EXACT, param_dtype=jnp.int8)


def place(tree, mesh):
    return jax.device_put(tree, meshes.weight_shardings(tree, mesh))


def both_on(mesh):
    """(with a base in int8, the same in floats)."""
    tree = jax.device_get(random_variables(EXACT, mesh))
    base = in_int8(tree["params"])
    return place(tree | {"params": base}, mesh), place(tree | {"params": in_floats(base)}, mesh)


@pytest.mark.devices8
@pytest.mark.parametrize("fsdp", [1, 2])
def test_it_draws_what_the_floats_that_it_stands_for_draw(fsdp):
    """Where the base is cut along fsdp, the sampler gathers it; else it reads it as it is."""
    if jax.device_count() % 8 and fsdp > 1:
        pytest.skip("one device has nothing to cut")
    tensor = 1 if jax.device_count() % 8 else 2
    mesh = make_mesh(ConfigDict({"data": -1, "fsdp": fsdp, "tensor": tensor}))
    quantised, exact = both_on(mesh)
    engine = make_engine(mesh, (3, 7), AMPLE, config=QUANTISED)
    found = sample(engine, engine.prepare(quantised), mixed_requests())
    settings = make_settings(mesh, (3, 7), config=EXACT)
    assert_same_up_to_rounding(found, plain_sample(settings, exact, mixed_requests()))


def addresses(tree):
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


def test_on_one_device_there_is_one_copy_and_the_adapters_alone_are_laid_out():
    mesh = one_device()
    variables, _ = both_on(mesh)
    weights = make_engine(mesh, config=QUANTISED).prepare(variables)
    base, lora = variables["params"], variables["lora"]
    read = [weights.embed, weights.final_norm, *(layer["params"] for layer in weights.layers)]
    assert sorted(addresses(read)) == sorted(addresses(base))
    assert weights.head is None  # the embedding is read for it
    assert np.dtype(np.int8) in {leaf.dtype for leaf in jax.tree.leaves(read)}

    adapters = bytes_on_a_device(lora)  # float32, as the model computes
    assert bytes_laid_out(QUANTISED, mesh) == adapters
    assert bytes_on_a_device(abstract_weights(QUANTISED, mesh)) == (
        adapters + bytes_on_a_device(base)
    )
