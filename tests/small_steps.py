"""Material of the train step's tests: two small models, random groups, one step.

Adam's first moment after one step is (1 - b1) times the gradient; with b1 = 0 it is the gradient
itself.
"""

import dataclasses
import functools

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from spiral_jax.core import mesh as meshes
from spiral_jax.core.config import defaults
from spiral_jax.core.groups import GroupRequests, Groups, Role
from spiral_jax.core.metrics import divide
from spiral_jax.learner.blocks import make_blocks, place_blocks
from spiral_jax.learner.settings import LearnerSettings, RoleShapes, optimizer_settings
from spiral_jax.learner.state import init_state
from spiral_jax.learner.step import make_train_step
from spiral_jax.model.architecture import Architecture
from spiral_jax.model.transformer import ModelConfig, init_variables

ARCH = Architecture(
    V=97, D=32, F=48, L=2, H=4, J=2, E=8, norm_eps=1e-5, rope_theta=500.0, tied=True
)
MODELS = {
    "lora": ModelConfig(ARCH, lora_rank=4, lora_alpha=8.0, attention_block=4, remat="layer"),
    "full": ModelConfig(dataclasses.replace(ARCH, tied=False), remat="none"),
}
P, G = 6, 8
TRACES = {Role.SEARCH: 3, Role.AGGREGATION: 2}


def shapes_of(role, lengths=((P, G),), micro=4, most=16):
    """By default four micro-batches of a role, of which eight groups fill two."""
    return RoleShapes(tuple(lengths), micro_groups=micro, most_groups=most, traces=TRACES[role])


def optimizer(steps=1000, **settings):
    """Defaults of config.optimizer but for `settings`."""
    o = defaults().optimizer
    o.b1 = 0.0
    o.update(settings)
    return optimizer_settings(o, steps)


TEMPERATURE = {Role.SEARCH: 0.7, Role.AGGREGATION: 1.1}


def learner(kl_coef=0.0, tis_cap=0.0, **settings):
    """Settings of a learner; `settings` are those of its optimizer."""
    return LearnerSettings(
        seed=0,
        shapes={role: shapes_of(role) for role in Role},
        optimizer=optimizer(**settings),
        temperature=TEMPERATURE,
        tis_cap=tis_cap,
        kl_coef=kl_coef,
        logprob_chunk=3,  # does not divide G
    )


@functools.cache
def random_trees(kind):
    """(base, adapters or None) on the host, far from initialisation.

    Attention is peaked, and ratios are of order one.
    """
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        name = meshes.path_name(path)
        if name.endswith("norm"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        return rng.normal(0, 0.15 if "layer" in name else 0.06, leaf.shape).astype(np.float32)

    shapes = jax.eval_shape(lambda: init_variables(MODELS[kind], jax.random.key(0)))
    trees = jax.tree_util.tree_map_with_path(fill, shapes)
    return trees["params"], trees.get("lora")


@functools.cache
def fresh(kind, mesh, **settings):
    """(frozen, state on the host, its shardings) from `random_trees`.

    B of a new adapter is zero, which would hide A's gradient.
    """
    base, lora = random_trees(kind)
    placed = jax.device_put(base, meshes.weight_shardings(base, mesh))
    frozen, state = init_state(learner(**settings), MODELS[kind], mesh, placed)
    host = jax.device_get(state if lora is None else state.replace(trained=lora))
    return frozen, host, jax.tree.map(lambda a: a.sharding, state)


def start(kind, mesh, **settings):
    """(frozen, state) on `mesh`."""
    frozen, host, shardings = fresh(kind, mesh, **settings)
    return frozen, jax.device_put(host, shardings)


def random_groups(seed, role, U=8):
    """(groups, weights): prompts of 1 to 5 tokens and traces of 1 to 8, together 6 or 9.

    So the oracle has rows of two lengths. Weights lean to one side, so that the loss is no small
    difference of large sums, whose rounding would show.
    """
    rng = np.random.default_rng([seed, role])
    C = TRACES[role]
    prompt_len = rng.integers(1, 6, U).astype(np.int32)
    trace_len = (rng.choice([6, 9], (U, C)) - prompt_len[:, None]).astype(np.int32)

    def ids(*shape):
        return rng.integers(0, ARCH.V, shape).astype(np.int32)

    groups = Groups(
        GroupRequests(ids(U, P), prompt_len, np.zeros((U, 6), np.int32), C, G),
        trace_UxCxG=ids(U, C, G),
        trace_len_UxC=trace_len,
        logprob_UxCxG=rng.uniform(-5, -4, (U, C, G)).astype(np.float32),  # about -log V
        stop_UxC=np.zeros((U, C), np.int32),
    )
    return groups, rng.uniform(-0.5, 1.5, (U, C)).astype(np.float32)


def both_roles(seed=0):
    return {role: random_groups(seed, role) for role in Role}


def search_alone(seed=0):
    return {Role.SEARCH: random_groups(seed, Role.SEARCH)}


def blocks_of(roles, **cut):
    """Blocks of groups and weights by role, cut as `shapes_of` says."""
    shapes = {
        role: dataclasses.replace(shapes_of(role, **cut), traces=weight_UxC.shape[1])
        for role, (_, weight_UxC) in roles.items()
    }
    return make_blocks(roles, shapes)


def one_device():
    return Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), meshes.AXES)


@functools.cache
def step_of(kind, **settings):
    step = make_train_step(learner(**settings), MODELS[kind])
    return jax.jit(step, donate_argnums=0)


def run(kind, blocks, mesh=None, **settings):
    """One step from the start: (gradient as numpy, divided metrics, state)."""
    mesh = mesh or one_device()
    frozen, state = start(kind, mesh, **settings)
    with jax.set_mesh(mesh):
        state, metrics = step_of(kind, **settings)(state, frozen, place_blocks(blocks, mesh))
    gradient = jax.device_get(optax.tree_utils.tree_get(state.opt, "mu"))
    return gradient, divide(jax.device_get(metrics)), state
