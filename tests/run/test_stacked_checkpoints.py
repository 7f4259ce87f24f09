"""Checkpoints with all layers in one stack are read as trees whose last layer lies apart."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from spiral_jax.core.mesh import make_mesh, weight_shardings
from spiral_jax.run.checkpoint import Checkpoints, Damaged

OPTIMIZER = optax.adam(1e-3)


def stacked_params(L, seed=0):
    """As the model's tree was: all L layers in one stack."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    layers = {"q": {"kernel": normal(L, 8, 4)}, "q_norm": normal(L, 4)}
    return {"embed": normal(16, 8), "layers": layers, "final_norm": normal(8)}


def split_params(stacked):
    """The same as the model's tree is now."""
    layers = stacked["layers"]
    last_layer = jax.tree.map(lambda a: a[-1], layers)
    rest = {name: leaf for name, leaf in stacked.items() if name != "layers"}
    if len(layers["q_norm"]) == 1:
        return rest | {"last_layer": last_layer}
    return rest | {"last_layer": last_layer, "layers": jax.tree.map(lambda a: a[:-1], layers)}


def state_of(make_params, L):
    """Parameters and both moments, all of them random."""
    trained, mu, nu = (make_params(stacked_params(L, seed)) for seed in range(3))
    adam, rest = OPTIMIZER.init(trained)
    return {"trained": trained, "opt": (adam._replace(mu=mu, nu=nu), rest), "step": jnp.int32(7)}


def save_stacked(directory, L):
    with Checkpoints(directory, keep=1) as checkpoints:
        checkpoints.save(3, state_of(lambda params: params, L), {"cursor": 5})


def shapes_of(state):
    mesh = make_mesh(ConfigDict({"data": 1, "fsdp": -1, "tensor": 1}))
    return jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        state,
        weight_shardings(state, mesh),
    )


@pytest.mark.devices8
@pytest.mark.parametrize("L", [1, 3])
def test_parameters_and_both_moments_are_read_whole_or_in_part(tmp_path, L):
    save_stacked(tmp_path, L)
    expected = state_of(split_params, L)
    target = shapes_of(expected)
    with Checkpoints(tmp_path, keep=None) as checkpoints:
        state, record = checkpoints.restore(target)
        jax.tree.map(np.testing.assert_array_equal, state, expected)
        assert jax.tree.all(jax.tree.map(lambda a, s: a.sharding == s.sharding, state, target))
        assert record == {"cursor": 5}

        for room in target["trained"].keys() & {"layers", "last_layer", "embed"}:
            part = checkpoints.restore_part({"trained": {room: target["trained"][room]}})
            found, wanted = part["trained"][room], expected["trained"][room]
            jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_their_checksums_are_verified(tmp_path):
    save_stacked(tmp_path / "old", 3)
    other = state_of(lambda params: params, 3)
    other["trained"]["layers"]["q_norm"] += 1
    with Checkpoints(tmp_path / "other", keep=1) as checkpoints:
        checkpoints.save(3, other, {})
    shutil.rmtree(tmp_path / "old/3/state")
    shutil.copytree(tmp_path / "other/3/state", tmp_path / "old/3/state")
    with (
        Checkpoints(tmp_path / "old", keep=None) as checkpoints,
        pytest.raises(Damaged, match="checksum of trained/layers/q_norm"),
    ):
        checkpoints.restore(shapes_of(state_of(split_params, 3)))
