"""float32 means float32: JAX's default is TF32 on GPUs and bfloat16 on TPUs.

On an H100 sampler and trainer of `configs/tiny.py` parted by 8.9e-4 nat a token, so that the run
ended at its first step. CPUs compute both the same, so what is looked at is what the compiler is
asked for.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict
from small_sampler import make_schedule, make_settings, one_device
from small_steps import (
    MODELS,
    blocks_of,
    both_roles,
    learner,
    random_groups,
    random_trees,
    start,
)

from spiral_jax import sft
from spiral_jax.core.groups import Role
from spiral_jax.learner.blocks import place_blocks
from spiral_jax.learner.step import make_train_step
from spiral_jax.sampling.programs import recipes


@pytest.fixture(autouse=True)
def as_users_have_it():
    """On accelerators tests ask for float32 everywhere, see conftest; users do not."""
    with jax.default_matmul_precision(None):
        yield


BFLOAT16 = {"param_dtype": jnp.bfloat16, "compute_dtype": jnp.bfloat16}


def products(lowered):
    """The precision of each matrix product that the compiler is asked for."""
    lines = [line for line in lowered.as_text().splitlines() if "stablehlo.dot_general" in line]
    found = [re.search(r"precision = \[(\w+), (\w+)\]", line) for line in lines]
    return [match.groups() if match else ("DEFAULT", "DEFAULT") for match in found]


def train_step(changes, **settings):
    mesh, kind = one_device(), "lora"
    frozen, state = start(kind, mesh)
    with jax.set_mesh(mesh):
        step = make_train_step(learner(**settings), dataclasses.replace(MODELS[kind], **changes))
        return step.lower(state, frozen, place_blocks(blocks_of(both_roles()), mesh))


def sampler(changes):
    settings = make_settings(one_device())
    model = dataclasses.replace(settings.config, **changes)
    settings = dataclasses.replace(settings, config=model, cache_dtype=model.compute_dtype)
    return {name: recipe.lower() for name, recipe in recipes(settings, make_schedule()).items()}


@pytest.mark.parametrize("settings", [{}, {"kl_coef": 0.1}], ids=["policy", "reference"])
def test_a_float32_train_step_multiplies_in_float32(settings):
    found = products(train_step({}, **settings))
    assert len(found) > 50 and set(found) == {("HIGHEST", "HIGHEST")}


def test_a_float32_sampler_multiplies_in_float32():
    lowered = sampler({})
    for kind in ("prefill", "decode"):
        assert all(
            len(products(program)) > 10 for name, program in lowered.items() if name[0] == kind
        )
    assert {pair for program in lowered.values() for pair in products(program)} == {
        ("HIGHEST", "HIGHEST")
    }


def test_fine_tuning_multiplies_in_float32(monkeypatch):
    lowered, jit = [], jax.jit

    def recorded(function, **options):
        def call(*args):
            lowered.append(jit(function, **options).lower(*args))
            return jit(function, **options)(*args)

        return call

    monkeypatch.setattr(sft.jax, "jit", recorded)
    c = ConfigDict(
        {"optimizer": {"lr": 1e-3, "warmup_steps": 1, "steps": 2, "clip_norm": 1.0, "b2": 0.99}}
    )
    params, _ = random_trees("full")
    sft.fit(MODELS["full"], params, iter([(some_groups(0), some_groups(1))]), c.optimizer)
    (step,) = lowered
    assert len(products(step)) > 50 and set(products(step)) == {("HIGHEST", "HIGHEST")}


def some_groups(seed):
    groups, _ = random_groups(seed, Role.SEARCH)
    arrays = {name: getattr(groups, name) for name in ("trace_UxCxG", "trace_len_UxC")}
    arrays |= {name: getattr(groups.requests, name) for name in ("prompt_UxP", "prompt_len_U")}
    return sft.Demonstrated(**arrays)


def test_bfloat16_programs_ask_for_nothing_slower():
    lowered = [train_step(BFLOAT16), *sampler(BFLOAT16).values()]
    assert {pair for program in lowered for pair in products(program)} == {("DEFAULT", "DEFAULT")}
