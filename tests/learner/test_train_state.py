"""What a train step does to its state, and how far trainer and sampler are apart."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_steps import (
    MODELS,
    TRACES,
    G,
    P,
    blocks_of,
    learner,
    one_device,
    optimizer,
    random_trees,
    run,
    search_alone,
    start,
)

from spiral_jax.core.groups import Role
from spiral_jax.core.mesh import path_name
from spiral_jax.learner import step as step_module
from spiral_jax.learner.state import make_optimizer, variables
from spiral_jax.learner.step import make_train_step
from spiral_jax.sampling.draw import Draw
from spiral_jax.sampling.engine import Engine
from spiral_jax.sampling.protocol import sample
from spiral_jax.sampling.settings import DecodeSettings, Schedule

# ---- optimizer


def updates_of(settings, gradient, trained):
    """The updates of settings.steps steps with one and the same gradient and parameters."""
    adam = make_optimizer(settings)
    state, updates = adam.init(trained), []
    update = jax.jit(adam.update)
    for _ in range(settings.steps):
        update_now, state = update(gradient, state, trained)
        updates.append(update_now)
    return updates


@pytest.mark.parametrize("warmup", [0, 1, 3])
@pytest.mark.parametrize(
    ("schedule", "share"),
    [
        ("constant", lambda done: 1.0),
        ("linear", lambda done: 1 - done),
        ("cosine", lambda done: (1 + math.cos(math.pi * done)) / 2),
    ],
)
def test_learning_rate_rises_linearly_to_its_peak_and_then_follows_the_schedule(
    schedule, share, warmup
):
    # Under a constant gradient of one Adam's update is -lr, up to rounding of its bias correction.
    steps = 9
    settings = optimizer(steps, lr=0.5, schedule=schedule, warmup_steps=warmup, b1=0.9)
    ones = {"kernel": np.ones((2, 2), np.float32)}
    lr = [-float(update["kernel"][0, 0]) for update in updates_of(settings, ones, ones)]
    rise = [0.5 * (step + 1) / (warmup + 1) for step in range(warmup)]
    fall = [0.5 * share((step - warmup) / (steps - warmup)) for step in range(warmup, steps)]
    assert lr == pytest.approx(rise + fall, rel=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_weight_decay_shrinks_every_matrix_and_no_norm_or_bias(kind):
    base, lora = random_trees(kind)
    trained = base if lora is None else lora
    trained = trained | {"bias": np.ones((2, 3), np.float32)}
    settings = optimizer(steps=1, lr=0.5, weight_decay=0.1)
    (update,) = updates_of(settings, jax.tree.map(np.zeros_like, trained), trained)
    changes, values = jax.tree_util.tree_leaves_with_path(update), jax.tree.leaves(trained)
    for (path, change), value in zip(changes, values, strict=True):
        factor = 0.0 if path_name(path).endswith(("norm", "bias")) else -0.5 * 0.1
        np.testing.assert_allclose(change, factor * value, rtol=1e-6, err_msg=path_name(path))


# ---- buffers and programs


@pytest.mark.parametrize("kind", MODELS)
def test_the_state_alone_is_donated_and_only_what_is_trained_has_moments(kind):
    frozen, state = start(kind, one_device())
    lowered = make_train_step(learner(), MODELS[kind]).lower(
        state, frozen, blocks_of(search_alone())
    )
    donated, *kept = (jax.tree.leaves(argument) for argument in lowered.args_info[0])
    assert len(donated) == len(jax.tree.leaves(state)) and all(leaf.donated for leaf in donated)
    assert not any(leaf.donated for leaf in sum(kept, []))
    base, lora = random_trees(kind)
    assert (frozen is None) == (lora is None)
    moments = [optax.tree_utils.tree_get(state.opt, name) for name in ("mu", "nu")]
    for tree in (state.trained, *moments):
        assert jax.tree.structure(tree) == jax.tree.structure(base if lora is None else lora)


def test_a_micro_batch_is_traced_once(monkeypatch):
    """Its shapes are asked for before its loop; tracing a model takes seconds."""
    traced, loss = [], step_module.policy_loss

    def counted(*arguments):
        traced.append(arguments)
        return loss(*arguments)

    monkeypatch.setattr(step_module, "policy_loss", counted)
    frozen, state = start("full", one_device())
    make_train_step(learner(), MODELS["full"]).trace(state, frozen, blocks_of(search_alone()))
    assert len(traced) == 1


@pytest.mark.cpu_bits("arrays and memory of XLA's program for CPUs")
def test_the_optimizer_works_where_the_state_lies():
    """Copies of the moments would be two thirds of the state."""
    frozen, state = start("full", one_device())
    step = make_train_step(learner(b1=0.9), MODELS["full"])
    text = step.lower(state, frozen, blocks_of(search_alone())).compile().as_text()
    assert re.search(r"%state_opt\S*__mu__embed__", text)  # how the program calls what it gets
    assert not re.findall(r"copy\(%state_(?:opt|trained)\S*__embed__\S*\)", text)


# ---- sampler against trainer


def test_sampled_logprobs_give_ratio_one_and_shifted_ones_the_ratio_of_the_shift():
    mesh, kind = one_device(), "lora"
    frozen, state = start(kind, mesh)
    settings = DecodeSettings(MODELS[kind], jnp.float32, Draw(0.7), 0, (5, 6, 7), 4, mesh)
    C = TRACES[Role.SEARCH]
    schedule = Schedule(
        page=4,
        pages=1 + 8 * (-(-P // 4) + C * -(-G // 4)),
        rows=(8 * C,),
        width=C,
        together=C,
        prompts=(P,),
        trace=G,
        chunk=8,
        prefill_tokens=64,
    )
    sampler = Engine(settings, schedule)
    requests = search_alone()[Role.SEARCH][0].requests
    requests.id_Ux6[:, 2] = np.arange(8)
    policy = sampler.prepare(variables(MODELS[kind], frozen, state.trained))
    groups = sample(sampler, policy, requests)
    length = groups.trace_len_UxC
    assert length.min() < G

    def mismatch(logprob_UxCxG):
        replaced = dataclasses.replace(groups, logprob_UxCxG=logprob_UxCxG)
        weight_UxC = np.ones(length.shape, np.float32)
        blocks = blocks_of({Role.SEARCH: (replaced, weight_UxC)}, micro=8, most=8)
        _, metrics, _ = run(kind, blocks)
        return {name.removeprefix("mismatch/"): value for name, value in metrics.items()}

    same = mismatch(groups.logprob_UxCxG)
    assert 0 < same["max_abs_log_ratio"] <= 1e-4  # 0 would mean that nothing was compared
    assert same["ratio"] == pytest.approx(1, abs=1e-5)
    assert same["kl"] == pytest.approx(0, abs=1e-6)

    shift = np.random.default_rng(3).normal(0, 0.5, groups.logprob_UxCxG.shape).astype(np.float32)
    shifted = mismatch(groups.logprob_UxCxG - shift)
    d = shift[np.arange(G) < length[..., None]].astype(np.float64)
    expected = {
        "max_abs_log_ratio": np.abs(d).max(),
        "kl": (np.exp(d) - 1 - d).mean(),
        "ratio": np.exp(d).mean(),
        "ratio_squared": np.exp(2 * d).mean(),
    }
    measured = {name: shifted[name] for name in expected}
    assert measured == pytest.approx(expected, abs=1e-4)  # as the log-ratio above
