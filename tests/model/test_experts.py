"""Experts against a loop over tokens, whole and cut along the axes of a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spiral_jax.core import mesh as meshes
from spiral_jax.model.architecture import Architecture
from spiral_jax.model.experts import Experts
from spiral_jax.model.families import FAMILIES, Routing

U, T, D, F, X, Y = 8, 5, 12, 6, 7, 3
SUMS = 1e-5  # float32 sums of 12 and 6 products in another order


def architecture(normalised):
    return Architecture(
        V=11,
        D=D,
        F=F,
        L=1,
        H=2,
        J=2,
        E=4,
        norm_eps=1e-6,
        rope_theta=1e4,
        tied=True,
        family=FAMILIES["qwen3_moe"],
        routing=Routing(X, Y, normalised),
    )


def random_case():
    """(hidden states, parameters); expert 3 is never among the chosen, its router being low."""
    rng = np.random.default_rng(0)
    shapes = {"router": (D, X), "gate": (X, D, F), "up": (X, D, F), "down": (X, F, D)}
    params = {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}
    x = np.abs(rng.normal(size=(U, T, D))).astype(np.float32)
    params["router"][:, 3] = -9
    return x, params


def by_hand(x, params, normalised):
    """Token by token, expert by expert, in float64."""
    params = {name: array.astype(np.float64) for name, array in params.items()}
    out = np.zeros(x.shape)
    for at in np.ndindex(x.shape[:2]):
        h = x[at].astype(np.float64)
        p = np.exp(h @ params["router"])
        p /= p.sum()
        best = np.argsort(-p)[:Y]
        share = p[best] / p[best].sum() if normalised else p[best]
        for weight, expert in zip(share, best, strict=True):
            gate = h @ params["gate"][expert]
            inner = gate / (1 + np.exp(-gate)) * (h @ params["up"][expert])
            out[at] += weight * (inner @ params["down"][expert])
    return out


def run(module, params, x):
    return module.apply({"params": params}, x)


@pytest.mark.devices8
@pytest.mark.parametrize("normalised", [True, False])
def test_a_token_gets_the_weighted_sum_of_its_experts(mesh, normalised):
    x, params = random_case()
    module = Experts(architecture(normalised), jnp.float32)
    expected = by_hand(x, params, normalised)
    assert np.abs(expected).max() > 1
    alone = jax.jit(functools.partial(run, module))(params, x)
    np.testing.assert_allclose(alone, expected, rtol=0, atol=SUMS * np.abs(expected).max())

    tree = {"experts": params}
    placed = jax.device_put(tree, meshes.weight_shardings({"layer": tree}, mesh)["layer"])
    with jax.set_mesh(mesh):
        cut = jax.jit(functools.partial(run, module))(
            placed["experts"], jax.device_put(x, meshes.group_sharding(mesh))
        )
    np.testing.assert_allclose(cut, expected, rtol=0, atol=SUMS * np.abs(expected).max())


@pytest.mark.devices8
def test_gradients_on_a_mesh_are_those_of_one_device(mesh):
    x, params = random_case()
    module = Experts(architecture(True), jnp.float32)

    weight = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)

    def loss(params, x):
        return jnp.sum(weight * run(module, params, x))

    expected = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
    with jax.set_mesh(mesh):
        found = jax.jit(jax.grad(loss, argnums=(0, 1)))(
            params, jax.device_put(x, meshes.group_sharding(mesh))
        )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=SUMS * np.abs(b).max())
    assert not np.asarray(found[0]["gate"][3]).any()  # nobody asked expert 3
    assert np.asarray(found[0]["router"]).any()
