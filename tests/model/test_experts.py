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
RANK, ALPHA = 2, 3.0
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


def random_adapters():
    """Their update is about as large as the matrices are."""
    rng = np.random.default_rng(1)
    sizes = {"gate": (D, F), "up": (D, F), "down": (F, D)}
    shapes = {f"{name}_a": (X, width, RANK) for name, (width, _) in sizes.items()}
    shapes |= {f"{name}_b": (X, RANK, features) for name, (_, features) in sizes.items()}
    return {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}


def with_adapters_added(params, lora):
    """The experts' matrices W + (alpha / rank) A B, in float64."""
    added = {name: array.astype(np.float64) for name, array in params.items()}
    for name in ("gate", "up", "down"):
        for expert in range(X):
            a, b = (lora[f"{name}_{side}"][expert].astype(np.float64) for side in "ab")
            added[name][expert] += ALPHA / RANK * (a @ b)
    return added


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


def run_with_adapters(module, lora, params, x):
    return module.apply({"params": params, "lora": lora}, x)


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


@pytest.mark.devices8
def test_adapters_add_to_each_expert_and_have_the_gradients_of_what_they_add_to(mesh):
    x, params = random_case()
    lora = random_adapters()
    module = Experts(architecture(True), jnp.float32, RANK, ALPHA)
    expected = by_hand(x, with_adapters_added(params, lora), True)
    assert np.abs(expected - by_hand(x, params, True)).max() > 1

    weight = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)

    def loss(lora, params, x):
        y = run_with_adapters(module, lora, params, x)
        return jnp.sum(weight * y), y

    def loss_of_sums(lora, params, x):
        sums = {
            name: params[name] + ALPHA / RANK * lora[f"{name}_a"] @ lora[f"{name}_b"]
            for name in ("gate", "up", "down")
        }
        return jnp.sum(weight * run(Experts(architecture(True), jnp.float32), params | sums, x))

    gradient = jax.jit(jax.grad(loss_of_sums, argnums=(0, 2)))(lora, params, x)
    of_ours = jax.jit(jax.grad(loss, argnums=(0, 2), has_aux=True))
    alone = of_ours(lora, params, x)
    tree = {"params": {"experts": params}, "lora": {"experts": lora}}
    place = meshes.weight_shardings(tree, mesh)
    placed = jax.device_put(tree, place)
    with jax.set_mesh(mesh):
        cut = of_ours(
            placed["lora"]["experts"],
            placed["params"]["experts"],
            jax.device_put(x, meshes.group_sharding(mesh)),
        )
    for found, y in (alone, cut):
        np.testing.assert_allclose(y, expected, rtol=0, atol=SUMS * np.abs(expected).max())
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(gradient), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=SUMS * np.abs(b).max())
    assert not np.asarray(alone[0][0]["gate_b"][3]).any()  # nobody asked expert 3


def test_gradients_of_adapters_are_summed_in_float32_beside_bfloat16_activations():
    x, params = random_case()
    module = Experts(architecture(True), jnp.bfloat16, RANK, ALPHA)
    weights = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)

    def loss(lora):
        return jnp.sum(run_with_adapters(module, lora, weights, x.astype(jnp.bfloat16)))

    gradient = jax.jit(jax.grad(loss))(random_adapters())
    for leaf in jax.tree.leaves(gradient):
        assert leaf.dtype == jnp.float32
        assert (leaf != leaf.astype(jnp.bfloat16)).any()  # was not rounded


def test_fresh_adapters_change_nothing():
    x, params = random_case()
    module = Experts(architecture(True), jnp.float32, RANK, ALPHA)
    lora = module.init(jax.random.key(0), x)["lora"]
    assert all(lora[f"{name}_a"].std() > 0 for name in ("gate", "up", "down"))
    alone = run(Experts(architecture(True), jnp.float32), params, x)
    np.testing.assert_array_equal(run_with_adapters(module, lora, params, x), alone)
