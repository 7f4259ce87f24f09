"""A frozen base in int8: rounding, products, loading, and the floats that it stands for."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from small_int8 import in_floats, in_int8
from small_model import ARCH, logprobs, on_mesh, random_ids

from spiral_jax.core import mesh as meshes
from spiral_jax.core.config import ConfigError, defaults
from spiral_jax.model import hf, int8
from spiral_jax.model.architecture import read_architecture
from spiral_jax.model.families import FAMILIES
from spiral_jax.model.transformer import ModelConfig, init_variables

# With biases, and a layer without rope: two layers before the last one differ in more than weights.
LAYERS = dataclasses.replace(ARCH, family=FAMILIES["qwen2"], unrotated=(1,))
EXACT = ModelConfig(LAYERS, lora_rank=4, lora_alpha=8.0, attention_block=4)
QUANTISED = dataclasses.replace(EXACT, param_dtype=jnp.int8)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_matrix_is_rounded_to_the_nearest_of_255_values_of_each_column(dtype):
    rng = np.random.default_rng(0)
    w = (rng.normal(size=(64, 5)) * [1, 1e-3, 0, 50, 0.02]).astype(dtype)
    kernel, scale = int8.quantise(w), int8.scale_of(w)
    assert (kernel.dtype, scale.dtype) == (np.int8, np.float32)
    exact = w.astype(np.float64)
    np.testing.assert_allclose(scale, np.abs(exact).max(axis=0) / 127, rtol=1e-6)
    assert np.abs(kernel).max(axis=0).tolist() == [127, 127, 0, 127, 127]
    # half a step, and float32's rounding where an entry lies half way
    assert (np.abs(exact - kernel * np.float64(scale)) <= 0.50001 * scale).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_and_gradients_are_those_of_the_floats_that_it_stands_for(dtype):
    rng = np.random.default_rng(1)
    w = rng.normal(size=(48, 32)).astype(np.float32)
    x, d_y = (rng.normal(size=(16, n)).astype(np.float32) for n in (48, 32))
    kernel, scale = int8.quantise(w), int8.scale_of(w)
    exact = kernel * np.float64(scale)
    y, pull_back = jax.vjp(lambda x: int8.multiply(x, kernel, scale), jnp.asarray(x, dtype))
    (d_x,) = pull_back(jnp.asarray(d_y, dtype))
    assert y.dtype == d_x.dtype == dtype

    def relative(found, expected):
        return np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected)

    x, d_y = (np.asarray(jnp.asarray(a, dtype), np.float64) for a in (x, d_y))
    bound = 1e-6 if dtype == jnp.float32 else 4e-3  # rounding of results, and of d_y times scale
    assert relative(y, x @ exact) < bound and relative(d_x, d_y @ exact.T) < bound


@pytest.fixture(scope="module")
def variables():
    """(with a base in int8, the same in floats) on the host, far from their initial values."""

    def fill(path, leaf):
        name = meshes.path_name(path)
        rng = np.random.default_rng([*name.encode()])
        if name.endswith("norm"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        return rng.normal(0, 0.15, leaf.shape).astype(np.float32)

    shapes = jax.eval_shape(lambda: init_variables(EXACT, jax.random.key(0)))
    tree = jax.tree_util.tree_map_with_path(fill, shapes)
    rounded = in_int8(tree["params"])
    return tree | {"params": rounded}, tree | {"params": in_floats(rounded)}


def test_its_tree_is_what_the_model_expects(variables):
    expected = jax.eval_shape(lambda: init_variables(QUANTISED, jax.random.key(0)))

    def shapes(tree):
        return jax.tree.map(lambda a: (a.shape, a.dtype), tree)

    assert shapes(variables[0]) == shapes(expected)


@pytest.mark.devices8
def test_training_reads_it_as_the_floats_that_it_stands_for(mesh, variables):
    """Log-probs, and gradients of adapters."""

    def both(config, tree, *ids):
        def mean(lora):
            out = logprobs(config, tree | {"lora": lora}, *ids)
            return jnp.mean(out), out

        gradient, out = jax.grad(mean, has_aux=True)(tree["lora"])
        return out, gradient

    found, expected = (
        on_mesh(
            jax.jit(both, static_argnums=0),
            mesh,
            config,
            jax.device_put(tree, meshes.weight_shardings(tree, mesh)),
            random_ids(),
        )
        for config, tree in zip((QUANTISED, EXACT), variables, strict=True)
    )
    # float32 sums whose products are scaled after them: log-probs of about -5
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=2e-5)
    norms = []
    for one, other in zip(*map(jax.tree.leaves, (found[1], expected[1])), strict=True):
        norms.append(np.linalg.norm(other))
        assert np.linalg.norm(one - other) <= 1e-4 * norms[-1]
    assert min(norms) > 0


@pytest.mark.devices8
def test_loading_rounds_the_checkpoint_and_leaves_the_rest_in_the_compute_dtype(
    mesh, qwen3_checkpoint
):
    """Whole columns decide, also where each device has a part of them."""
    directory, _ = qwen3_checkpoint()
    arch = read_architecture(directory)
    exact = hf.load_params(directory, ModelConfig(arch), mesh)
    quantised = ModelConfig(arch, param_dtype=jnp.int8, compute_dtype=jnp.bfloat16)
    found = jax.tree.leaves_with_path(hf.load_params(directory, quantised, mesh))
    expected = dict(jax.tree.leaves_with_path(in_int8(exact)))
    assert [path for path, _ in found] == list(expected)
    expected = {meshes.path_name(path): array for path, array in expected.items()}
    for path, array in found:
        name = meshes.path_name(path)
        if name.endswith("kernel"):
            assert array.dtype == np.int8
            np.testing.assert_array_equal(array, expected[name], err_msg=name)
        elif name.endswith("scale"):
            np.testing.assert_allclose(array, expected[name], rtol=1e-6, err_msg=name)
        else:
            rounded = np.asarray(expected[name]).astype(ml_dtypes.bfloat16)
            np.testing.assert_array_equal(array, rounded, err_msg=name)
        at = meshes.weight_spec(name, array.shape, mesh)
        assert array.sharding.is_equivalent_to(jax.NamedSharding(mesh, at), array.ndim)


def test_experts_are_refused_by_the_field():
    c = defaults().model
    c.param_dtype = "int8"
    routed = dataclasses.replace(ARCH, routing=object())
    with pytest.raises(ConfigError, match="config.model.param_dtype = 'int8'.*experts"):
        hf.model_config(routed, c)
