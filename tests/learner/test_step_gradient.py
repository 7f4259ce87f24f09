"""The train step's gradient with bounded ratios and a reference KL, by the formula.

The oracle is a loop over unpadded rows with whole logits, by JAX's own rules. 1e-5 in relative L2,
as for the plain loss: shared prompts split every softmax and product in another way.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_steps import (
    MODELS,
    TEMPERATURE,
    blocks_of,
    both_roles,
    one_device,
    search_alone,
    start,
    step_of,
)

from spiral_jax.core.metrics import divide
from spiral_jax.learner.blocks import place_blocks
from spiral_jax.learner.state import variables
from spiral_jax.model.transformer import Transformer, head_kernel

SAME = 1e-5
TIS_CAP, KL_COEF = 1.1, 0.7


class Row(NamedTuple):
    """A trace behind its prompt, without padding; `recorded_T` is of the sampler."""

    ids_T: np.ndarray
    prompt_len: int
    recorded_T: np.ndarray
    weight: float
    temperature: float


def rows_of(role, groups, weight_UxC):
    for u, c in np.ndindex(weight_UxC.shape):
        length = groups.requests.prompt_len_U[u]
        ids_T = np.concatenate([groups.requests.prompt_UxP[u, :length], groups.trace_ids(u, c)])
        recorded = np.concatenate([np.zeros(length, np.float32), groups.logprob_UxCxG[u, c]])
        recorded_T = recorded[: ids_T.size]
        yield Row(ids_T, length, recorded_T, weight_UxC[u, c], TEMPERATURE[role])


def row_logprobs(kind, tree, row):
    ids_T = row.ids_T
    hidden = Transformer(MODELS[kind]).apply(tree, ids_T[None], jnp.array([ids_T.size]), None)
    logits = hidden[0] @ head_kernel(MODELS[kind], tree["params"]) / row.temperature
    every_logprob = jax.nn.log_softmax(logits[:-1])
    return jnp.take_along_axis(every_logprob, ids_T[1:, None], axis=1)[:, 0]


@functools.partial(jax.jit, static_argnames="kind")
def row_gradient(base, trained, row, tokens, kind):
    """(loss, gradient) of one row; `tokens` of its role are what the KL is a mean over."""
    is_trace = jnp.arange(1, row.ids_T.size) >= row.prompt_len
    nothing = jax.tree.map(jnp.zeros_like, trained)
    reference = variables(MODELS[kind], base, nothing) if kind == "lora" else {"params": base}

    def loss(trained):
        logprob = row_logprobs(kind, variables(MODELS[kind], base, trained), row)
        ratio = jnp.exp(logprob - row.recorded_T[1:])
        bounded = jax.lax.stop_gradient(jnp.minimum(ratio, TIS_CAP) / ratio) * ratio
        u = row_logprobs(kind, reference, row) - logprob
        kl = (jnp.exp(u) - 1 - u) / tokens
        return jnp.where(is_trace, KL_COEF * kl - row.weight * bounded, 0.0).sum()

    return jax.value_and_grad(loss)(trained)


def oracle(kind, base, trained, material):
    """(loss by role, gradient): rows added in float64."""
    loss = dict.fromkeys(material, 0.0)
    gradient = jax.tree.map(lambda a: np.zeros(a.shape), trained)
    for role, (groups, weight_UxC) in material.items():
        tokens = groups.trace_len_UxC.sum()
        for row in rows_of(role, groups, weight_UxC):
            value, part = row_gradient(base, trained, row, tokens, kind)
            loss[role] += float(value)
            gradient = jax.tree.map(np.add, gradient, jax.tree.map(np.float64, part))
    return loss, gradient


def norm(tree):
    squares = [np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(tree)]
    return float(np.sqrt(sum(squares)))


def moved(state):
    """The state away from where it started, which is its reference."""
    rng = np.random.default_rng(5)

    def move(a):
        by = rng.normal(0, 0.02, a.shape).astype(a.dtype)
        return jax.device_put(jax.device_get(a) + by, a.sharding)

    return state.replace(trained=jax.tree.map(move, state.trained))


@pytest.mark.parametrize(("kind", "draw"), [("lora", search_alone), ("full", both_roles)])
def test_the_steps_gradient_is_that_of_the_formula_on_unpadded_rows(kind, draw):
    material, mesh, settings = draw(3), one_device(), {"tis_cap": TIS_CAP, "kl_coef": KL_COEF}
    frozen, state = start(kind, mesh, **settings)
    if kind == "full":
        state = moved(state)
    losses, expected = oracle(kind, frozen, jax.device_get(state.trained), material)
    blocks = place_blocks(blocks_of(material), mesh)
    with jax.set_mesh(mesh):
        state, metrics = step_of(kind, **settings)(state, frozen, blocks)
    gradient = jax.device_get(optax.tree_utils.tree_get(state.opt, "mu"))  # b1 = 0
    assert norm(jax.tree.map(np.subtract, gradient, expected)) <= SAME * norm(expected)
    metrics = divide(jax.device_get(metrics))
    for role in material:
        assert metrics[f"loss/{role.label}"] == pytest.approx(losses[role], rel=SAME)
        assert metrics[f"reference_kl/{role.label}"] > 0
    some_and_not_others = 0.05 < metrics["loss/bounded_share"] < 0.95
    assert some_and_not_others
