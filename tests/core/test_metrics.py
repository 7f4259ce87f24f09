"""Metrics are added before they are divided, on the device and on the host."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spiral_jax.core.metrics import Max, Mean, divide, empty, merge


def measure(values, mask):
    return {
        "loss": Mean((values * mask).sum(), mask.sum()),
        "gap": Max(jnp.where(mask > 0, values, -jnp.inf).max()),
    }


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("parts", [1, 2, 5, 30])
def test_any_cut_into_micro_batches_in_a_jitted_loop_gives_the_mean_and_maximum_of_the_whole(
    seed, parts
):
    rng = np.random.default_rng(seed)
    values = rng.normal(-5, 1, size=30).astype(np.float32)  # a maximum that is not above zero
    mask = (rng.random(30) < 0.4).astype(np.float32)  # uneven parts, some of them empty
    mask[7] = 1

    @jax.jit
    def run(values_PxT, mask_PxT):
        start = empty(jax.eval_shape(measure, values_PxT[0], mask_PxT[0]))

        def add_part(p, carry):
            return merge(carry, measure(values_PxT[p], mask_PxT[p]))

        return jax.lax.fori_loop(0, parts, add_part, start)

    result = divide(jax.device_get(run(values.reshape(parts, -1), mask.reshape(parts, -1))))
    kept = values[mask > 0].astype(np.float64)
    # float32 sums of up to 30 values near -5: each addition rounds by at most 150 * 6e-8, the mean
    # of them too
    np.testing.assert_allclose(result["loss"], kept.mean(), atol=1e-5)
    assert result["gap"] == kept.max()


def test_uneven_parts_are_weighted_by_their_counts():
    merged = merge({"reward": Mean(1.0, 1)}, {"reward": Mean(0.0, 3)})
    assert divide(merged) == {"reward": 0.25}


def test_merging_on_the_host_stays_in_numpy_and_on_the_device_in_jax():
    host = {"a": Mean(np.float64(1), np.float64(2)), "b": Max(np.float64(3))}
    device = jax.tree.map(jnp.asarray, host)
    assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(merge(host, host)))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(merge(device, device)))
    assert (
        divide(merge(host, host))
        == divide(jax.device_get(merge(device, device)))
        == {"a": 0.5, "b": 3.0}
    )


def test_a_name_that_one_part_lacks_is_kept():
    merged = merge({"a": Mean(1, 2), "both": Max(1.0)}, {"b": Mean(3, 4), "both": Max(-1.0)})
    assert divide(merged) == {"a": 0.5, "b": 0.75, "both": 1.0}


@pytest.mark.parametrize("lib", [np, jnp])
def test_nan_is_not_hidden_by_merging(lib):
    bad, good = lib.asarray(float("nan")), lib.asarray(1.0)
    for first, second in ((bad, good), (good, bad)):
        merged = merge(
            {"m": Max(first), "t": Mean(first, good)}, {"m": Max(second), "t": Mean(second, good)}
        )
        assert all(math.isnan(value) for value in divide(jax.device_get(merged)).values())


def test_nothing_to_divide_is_null_and_zero_is_zero():
    metrics = {
        "none": Mean(0.0, 0),
        "no_max": Max(-np.inf),
        "zero": Mean(0.0, 5),
        "max_zero": Max(0.0),
        "plain": 2,
    }
    assert divide(metrics) == {
        "none": None,
        "no_max": None,
        "zero": 0.0,
        "max_zero": 0.0,
        "plain": 2.0,
    }


def test_divided_metrics_are_json():
    metrics = {
        "a": Mean(np.float32(1), np.int32(4)),
        "b": Max(jax.device_get(jnp.float32(2))),
        "c": np.float32(0.5),
    }
    assert json.loads(json.dumps(divide(metrics))) == {"a": 0.25, "b": 2.0, "c": 0.5}


def test_one_name_with_two_types_is_an_error_that_names_it():
    with pytest.raises(TypeError, match="'x' is Mean and Max"):
        merge({"x": Mean(1, 1)}, {"x": Max(1.0)})
