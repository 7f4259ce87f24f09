"""The 4B experiments on shapes alone: every program traces, and the budgets are the paper's."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from configs import grpo_qwen3_4b, qwen3_4b
from spiral_jax.core.config import difference, to_plain
from spiral_jax.core.mesh import AXES, group_count_multiple, path_name, weight_spec
from spiral_jax.learner.blocks import abstract_blocks
from spiral_jax.learner.state import abstract_state
from spiral_jax.learner.step import make_train_step
from spiral_jax.model import hf
from spiral_jax.model.architecture import Architecture
from spiral_jax.run.setup import check_training
from spiral_jax.sampling.engine import make_samplers
from spiral_jax.sampling.memory import Room
from spiral_jax.sampling.programs import recipes
from spiral_jax.sampling.settings import GroupLimits
from spiral_jax.sampling.shapes import abstract_pool

# config.json of Qwen3-4B-Instruct-2507
ARCH = Architecture(
    V=151936, D=2560, F=9728, L=36, H=32, J=8, E=128, norm_eps=1e-6, rope_theta=5e6, tied=True
)
CONFIGS = {"spiral": qwen3_4b.get_config, "grpo": grpo_qwen3_4b.get_config}


@pytest.fixture(params=CONFIGS)
def c(request):
    return CONFIGS[request.param]()


def learner_of(c):
    return check_training(c).training.learner


def stages_of(c):
    return check_training(c).training.stages.stages()


def longest_prompt(stage):
    """Up to 1,024 tokens of the problem, and all candidates."""
    return 1024 + (stage.set_size * stage.reads.max_tokens if stage.reads else 0)


def make_sampler(c, mesh, device=80 * 2**30):
    """Of two layers: the others are the same again."""
    limits = [
        GroupLimits(longest_prompt(stage), stage.traces, stage.max_tokens) for stage in stages_of(c)
    ]
    model = hf.model_config(dataclasses.replace(ARCH, L=2), c.model)
    room = Room(device, resident=0)
    sampler, eval_sampler = make_samplers(c, model, mesh, (151645, 151643), limits, room)
    assert sampler is eval_sampler
    return sampler


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_config_is_valid_and_every_longest_group_has_room(c, mesh):
    shapes, schedule = learner_of(c).shapes, make_sampler(c, mesh).schedule
    for stage in stages_of(c):
        longest = longest_prompt(stage), stage.max_tokens
        P, G = shapes[stage.role].lengths[-1]
        assert longest[0] <= P and longest[1] <= G
        assert longest[0] - 1 <= schedule.prompts[-1] and longest[1] <= schedule.trace


def test_both_runs_may_sample_98304_tokens_a_problem(c):
    groups = check_training(c).training.stages.groups(problems=1)
    sampled = [groups[stage.role] * stage.traces * stage.max_tokens for stage in stages_of(c)]
    assert sum(sampled) == 98_304


def test_grpo_differs_from_spiral_in_its_rollout_and_in_nothing_else():
    spiral, grpo = (to_plain(make()) for make in CONFIGS.values())
    changed = {line.split(":")[0] for line in difference(spiral, grpo)}
    assert changed == {
        "loss.estimator",
        "search.traces",
        "search.max_tokens",
        "batch.search_lengths",
        "batch.search_groups",
        # there are no aggregation groups
        "batch.aggregation_lengths",
        "batch.aggregation_groups",
    }


def shapes_and_dtypes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def test_parameters_are_4022_million_with_66_million_in_adapters(c, mesh):
    model = hf.model_config(ARCH, c.model)
    base, state = hf.abstract_params(model), abstract_state(learner_of(c), model, mesh)
    assert count(base) == ARCH.parameters == 4_022_468_096
    assert {leaf.dtype for leaf in jax.tree.leaves(base)} == {jnp.dtype("bfloat16")}
    assert count(state.trained) == 66_060_288
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trained)} == {jnp.dtype("float32")}
    assert count(state.opt) == 2 * 66_060_288 + 2  # two moments, two step counts


def test_one_host_of_eight_devices_holds_an_eighth_of_the_base_and_a_small_state(c, mesh):
    model = hf.model_config(ARCH, c.model)
    planned = AbstractMesh((1, c.mesh.fsdp, c.mesh.tensor), AXES)
    assert c.mesh.data == -1 and math.prod(planned.axis_sizes) == 8

    def bytes_a_device(tree):
        total = 0
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            spec = weight_spec(path_name(path), leaf.shape, planned)
            cuts = math.prod(planned.shape[axis] for axis in spec if axis)
            total += math.prod(leaf.shape) * leaf.dtype.itemsize // cuts
        return total

    norms = ARCH.L * (2 * ARCH.D + 2 * ARCH.E) + ARCH.D  # alone whole on every device
    assert bytes_a_device(hf.abstract_params(model)) == 2 * ((ARCH.parameters - norms) // 8 + norms)
    # an adapter's [in, rank] or [rank, out] is cut along D alone; of o, down: b, of the others: a
    whole = ARCH.L * 32 * (ARCH.H * ARCH.E + ARCH.F + (ARCH.H + 2 * ARCH.J) * ARCH.E + 2 * ARCH.F)
    adapters = whole + (66_060_288 - whole) // 8
    state = abstract_state(learner_of(c), model, mesh)
    assert bytes_a_device(state) == 4 * (3 * adapters + 3)  # weights, two moments; counts
    multiple = group_count_multiple(planned)
    assert c.batch.search_groups % multiple == c.batch.aggregation_groups % multiple == 0


def test_train_step_returns_the_state_in_its_shapes_and_dtypes(c, mesh):
    model, learner = hf.model_config(ARCH, c.model), learner_of(c)
    state, blocks = abstract_state(learner, model, mesh), abstract_blocks(learner.shapes)
    with jax.set_mesh(mesh):
        step = make_train_step(learner, model)
        after, metrics = jax.eval_shape(step, state, hf.abstract_params(model), blocks)
    assert shapes_and_dtypes(after) == shapes_and_dtypes(state)
    for role in learner.shapes:
        assert {f"{name}/{role.label}" for name in ("loss", "grad_norm", "entropy")} < set(metrics)
    assert all(leaf.shape == () and leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(metrics))


def test_every_program_of_the_sampler_traces_at_its_full_shapes(c, mesh):
    sampler = make_sampler(c, mesh)
    settings, schedule = sampler.settings, sampler.schedule
    pool = shapes_and_dtypes(abstract_pool(settings, schedule))
    shards = group_count_multiple(mesh)
    for (kind, *size), recipe in recipes(settings, schedule).items():
        with jax.set_mesh(mesh):
            made = jax.eval_shape(recipe.function, *recipe.shapes)
        if kind != "decode":
            assert shapes_and_dtypes(made) == pool
            continue
        drawn = schedule.chunk, shards, size[0]
        assert shapes_and_dtypes(made.pool) == pool
        assert shapes_and_dtypes(made.token_TxZxN) == (drawn, jnp.int32)
        assert shapes_and_dtypes(made.logprob_TxZxN) == (drawn, jnp.float32)


def test_rows_follow_from_memory(c, mesh):
    fewer, more = (make_sampler(c, mesh, device * 2**30).schedule for device in (4, 8))
    assert fewer.pages < more.pages and fewer.rows[-1] < more.rows[-1]
