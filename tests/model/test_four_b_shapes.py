"""The 4B experiments on shapes alone: every program traces, nothing is allocated, and the budgets
are the paper's.
"""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh
from spiral_jax.core.config_checks import validate

from configs import grpo_qwen3_4b, qwen3_4b
from spiral_jax.core.config import difference, to_plain, uses_aggregation
from spiral_jax.core.groups import Role
from spiral_jax.core.mesh import AXES, group_count_multiple, path_name, weight_spec
from spiral_jax.learner.blocks import abstract_block
from spiral_jax.learner.step import abstract_state, make_train_step
from spiral_jax.model import hf
from spiral_jax.model.architecture import Architecture
from spiral_jax.sampling.decode import decode_step
from spiral_jax.sampling.engine import make_samplers
from spiral_jax.sampling.rows import RowLayout
from spiral_jax.sampling.settings import SlotClass
from spiral_jax.sampling.shapes import abstract_prefilled, admission_shapes
from spiral_jax.sampling.shapes import abstract_state as abstract_state_of
from spiral_jax.sampling.slots import enter
from spiral_jax.sampling.weights import abstract_weights

# config.json of Qwen3-4B-Instruct-2507
ARCH = Architecture(
    V=151936, D=2560, F=9728, L=36, H=32, J=8, E=128, norm_eps=1e-6, rope_theta=5e6, tied=True
)
CONFIGS = {"spiral": qwen3_4b.get_config, "grpo": grpo_qwen3_4b.get_config}


@pytest.fixture(params=CONFIGS)
def c(request):
    return CONFIGS[request.param]()


def stages(c):
    """(role, groups of a step, C, longest prompt, longest trace) of each stage of the rollout."""
    found = [(Role.SEARCH, c.batch.problems, c.search.traces, 1024, c.search.max_tokens)]
    if uses_aggregation(c):
        a = c.aggregation
        longest = 1024 + a.subset_size * c.search.max_tokens
        found.append(
            (Role.AGGREGATION, c.batch.problems * a.subsets, a.traces, longest, a.max_tokens)
        )
    return found


def blocks_of(c):
    return [
        abstract_block(role, groups, c.batch[f"{role.label}_groups"], C, P, G)
        for role, groups, C, _, _ in stages(c)
        for P, G in c.batch[f"{role.label}_lengths"]
    ]


def classes_of(c):
    return tuple(SlotClass(*row) for row in c.sampling.classes)


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_config_is_valid_and_every_longest_group_has_a_bucket(c):
    validate(c)
    for role, _, _, P, G in stages(c):
        assert (
            c.batch[f"{role.label}_lengths"][-1][0] >= P
            and c.batch[f"{role.label}_lengths"][-1][1] >= G
        )
        assert any(slots.P >= P and slots.G >= G for slots in classes_of(c))


def test_both_runs_may_sample_98304_tokens_a_problem(c):
    assert sum(groups // c.batch.problems * C * G for _, groups, C, _, G in stages(c)) == 98_304


def test_grpo_differs_from_spiral_in_its_rollout_and_in_nothing_else():
    changed = {
        line.split(":")[0] for line in difference(*(to_plain(make()) for make in CONFIGS.values()))
    }
    assert changed == {
        "loss.estimator", "search.traces", "search.max_tokens", "batch.search_lengths",
        "batch.search_groups", "sampling.classes",
    }  # fmt: skip


def test_parameters_are_4022_million_with_66_million_in_adapters(c, mesh):
    model = hf.model_config(ARCH, c.model)
    base, state = hf.abstract_params(model), abstract_state(c, model, mesh)
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
            total += (
                math.prod(leaf.shape)
                * leaf.dtype.itemsize
                // math.prod(planned.shape[a] for a in spec if a)
            )
        return total

    norms = ARCH.L * (2 * ARCH.D + 2 * ARCH.E) + ARCH.D  # alone whole on every device
    assert bytes_a_device(hf.abstract_params(model)) == 2 * ((ARCH.parameters - norms) // 8 + norms)
    # an adapter's [in, rank] or [rank, out] is cut along D alone; of o, down: b, of the others: a
    whole = ARCH.L * 32 * (ARCH.H * ARCH.E + ARCH.F + (ARCH.H + 2 * ARCH.J) * ARCH.E + 2 * ARCH.F)
    adapters = whole + (66_060_288 - whole) // 8
    assert bytes_a_device(abstract_state(c, model, mesh)) == 4 * (
        3 * adapters + 3
    )  # weights, two moments; counts
    multiple = group_count_multiple(planned)
    assert c.batch.search_groups % multiple == c.batch.aggregation_groups % multiple == 0
    assert not any(slots.slots % multiple for slots in classes_of(c))


def test_train_step_returns_the_state_in_its_shapes_and_dtypes(c, mesh):
    model = hf.model_config(ARCH, c.model)
    state = abstract_state(c, model, mesh)
    with jax.set_mesh(mesh):
        after, metrics = jax.eval_shape(
            make_train_step(c, model), state, hf.abstract_params(model), blocks_of(c)
        )
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
    assert shapes(after) == shapes(state)
    roles = [role.label for role, *_ in stages(c)]
    assert {f"{name}/{role}" for name in ("loss", "grad_norm", "entropy") for role in roles} < set(
        metrics
    )
    assert all(leaf.shape == () and leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(metrics))


def test_every_program_of_the_sampler_traces_at_its_full_shapes(c, mesh):
    model = hf.model_config(ARCH, c.model)
    sampler, eval_sampler = make_samplers(c, model, mesh, (151645, 151643))
    assert sampler is eval_sampler
    settings, schedule, classes = sampler.settings, sampler.schedule, classes_of(c)
    weights = abstract_weights(model, mesh)
    states = [abstract_state_of(settings, slots) for slots in classes]
    with jax.set_mesh(mesh):
        for i in schedule.entries():
            ready, new = (
                abstract_prefilled(settings, schedule, i),
                admission_shapes(settings, schedule, i),
            )
            _, token, logprob = jax.eval_shape(
                functools.partial(enter, settings), states[i], ready, new
            )
            assert token.shape == logprob.shape == (*new.slot_ZxW.shape, classes[i].C)
        layout = RowLayout(classes, group_count_multiple(mesh))
        step = functools.partial(decode_step, settings, layout)
        after, token, logprob = jax.eval_shape(step, weights, tuple(states))
    assert schedule.moves()
    assert (
        math.prod(token.shape) == sum(slots.rows for slots in classes)
        and logprob.dtype == jnp.float32
    )
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
    assert shapes(after) == shapes(tuple(states))
