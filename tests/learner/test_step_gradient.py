"""Every loss's gradient in the train step against a loop over unpadded rows, by JAX's own rules.

Rows have whole logits. 1e-5 in relative L2, as for the plain loss: shared prompts split every softmax and product in
another way.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_steps import MODELS, QUICK, blocks_of, both_roles, one_device, start, step_of

from spiral_jax.core.groups import Role
from spiral_jax.core.metrics import divide
from spiral_jax.learner.blocks import place_blocks
from spiral_jax.learner.loss import policy_loss, reference_kl
from spiral_jax.learner.state import variables
from spiral_jax.model.transformer import Transformer, head_kernel

SAME = 1e-5


def row_logprobs(kind, params, lora, row_T):
    tree = {"params": params} if lora is None else {"params": params, "lora": lora}
    config = MODELS[kind]
    hidden = Transformer(config).apply(tree, row_T[None], jnp.array([row_T.size]), None)
    logits = hidden[0] @ head_kernel(config, params) / 0.7
    return jnp.take_along_axis(jax.nn.log_softmax(logits[:-1]), row_T[1:, None], axis=1)[:, 0]


def token_loss(ratio, weight, tis_cap=0.0):
    """As the papers say it; the value where it has a gradient of its own, else a number."""
    if tis_cap:
        return -weight * jax.lax.stop_gradient(jnp.minimum(ratio, tis_cap) / ratio) * ratio
    return -weight * ratio


@functools.partial(jax.jit, static_argnames=("kind", "kl", "bounds"), compiler_options=QUICK)
def row_gradient(base, trained, row_T, prompt_len, recorded_T, weight, tokens, kind, kl, bounds):
    real = jnp.arange(1, row_T.size) >= prompt_len
    no_adapters = jax.tree.map(jnp.zeros_like, trained) if kind == "lora" else None

    def loss(trained):
        tree = variables(MODELS[kind], base, trained)
        logprob = row_logprobs(kind, tree["params"], tree.get("lora"), row_T)
        value = token_loss(jnp.exp(logprob - recorded_T[1:]), weight, **dict(bounds))
        if kl:
            u = row_logprobs(kind, base, no_adapters, row_T) - logprob
            value += kl / tokens * (jnp.exp(u) - 1 - u)
        return jnp.where(real, value, 0.0).sum()

    return jax.value_and_grad(loss)(trained)


def oracle(kind, base, trained, material, kl_coef=0.0, **bounds):
    total, gradient = {}, jax.tree.map(lambda a: np.zeros(a.shape), trained)
    for role, (groups, weight_UxC) in material.items():
        total[role], tokens = 0.0, groups.trace_len_UxC.sum()
        for u, c in np.ndindex(weight_UxC.shape):
            length = groups.requests.prompt_len_U[u]
            row = np.concatenate([groups.requests.prompt_UxP[u, :length], groups.trace_ids(u, c)])
            recorded = np.concatenate([np.zeros(length, np.float32), groups.logprob_UxCxG[u, c]])
            value, part = row_gradient(
                base,
                trained,
                row,
                length,
                recorded[: row.size],
                weight_UxC[u, c],
                tokens,
                kind=kind,
                kl=kl_coef,
                bounds=tuple(bounds.items()),
            )
            total[role] += float(value)
            gradient = jax.tree.map(
                lambda total, g: total + np.asarray(g, np.float64), gradient, part
            )
    return total, gradient


def norm(tree):
    return float(
        np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(tree)))
    )


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("lora", {"tis_cap": 1.1}),
        ("lora", {"kl_coef": 0.7}),
        ("full", {"kl_coef": 0.7, "tis_cap": 1.1}),
    ],
    ids=str,
)
def test_the_steps_gradient_is_that_of_the_formula_on_unpadded_rows(kind, settings):
    material, mesh = both_roles(3), one_device()
    frozen, state = start(kind, mesh, **settings)
    if kind == "full":  # away from its reference
        rng = np.random.default_rng(5)
        moved = jax.tree.map(
            lambda a: a + rng.normal(0, 0.02, a.shape).astype(a.dtype),
            jax.device_get(state.trained),
        )
        state = state.replace(
            trained=jax.device_put(moved, jax.tree.map(lambda a: a.sharding, state.trained))
        )
    trained = jax.device_get(state.trained)
    losses, expected = oracle(kind, frozen, trained, material, **settings)
    with jax.set_mesh(mesh):
        state, metrics = step_of(kind, **settings)(
            state, frozen, place_blocks(blocks_of(material, micro=4), mesh)
        )
    found = jax.device_get(optax.tree_utils.tree_get(state.opt, "mu"))
    assert norm(jax.tree.map(np.subtract, found, expected)) <= SAME * norm(expected)
    metrics = divide(jax.device_get(metrics))
    for role in Role:
        assert metrics[f"loss/{role.label}"] == pytest.approx(losses[role], rel=SAME)
        assert ("reference_kl/search" in metrics) == ("kl_coef" in settings)
    if "tis_cap" in settings:  # it bounds some tokens and not others
        assert 0.05 < metrics["loss/bounded_share"] < 0.95


def one_token(ratio, weight, **bounds):
    """(loss, its derivative by the log-prob) of a single token."""

    def loss(logprob):
        arrays = [jnp.reshape(a, (1, 1, 1)) for a in (logprob, 0.0, 0.0)]
        mask = jnp.ones((1, 1, 1), bool)
        return policy_loss(*arrays, jnp.full((1, 1), weight), mask, **bounds)[0]

    value, slope = jax.value_and_grad(loss)(jnp.log(jnp.float32(ratio)))
    return float(value), float(slope)


@pytest.mark.parametrize(
    ("ratio", "weight", "bounds", "expected"),
    [
        (1.5, 2.0, {}, (-3.0, -3.0)),
        (4.0, 2.0, {"tis_cap": 3.0}, (-6.0, -6.0)),  # bounded, and still learnt from
        (0.5, 2.0, {"tis_cap": 3.0}, (-1.0, -1.0)),
    ],
    ids=str,
)
def test_a_tokens_loss_and_slope_are_those_worked_out_by_hand(ratio, weight, bounds, expected):
    assert one_token(ratio, weight, **bounds) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_reference_kl_is_k3_over_tokens_and_unbiased():
    rng = np.random.default_rng(0)
    p, q = (rng.dirichlet(np.ones(5)).astype(np.float32) for _ in range(2))
    logprob, reference = (np.log(a).reshape(1, 1, 5) for a in (p, q))
    each = [
        float(reference_kl(logprob, reference, np.arange(5).reshape(1, 1, 5) == i).total)
        for i in range(5)
    ]
    assert min(each) >= 0 and np.dot(p, each) == pytest.approx(np.sum(p * np.log(p / q)), rel=1e-5)
    kl = reference_kl(logprob, reference, np.ones((1, 1, 5), bool))
    assert float(kl.total) == pytest.approx(sum(each), rel=1e-6) and int(kl.count) == 5
