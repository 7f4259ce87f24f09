"""The train step's gradient against an oracle that knows no groups, and what must not change it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_steps import (
    ARCH,
    MODELS,
    TEMPERATURE,
    G,
    P,
    blocks_of,
    both_roles,
    learner,
    one_device,
    random_groups,
    random_trees,
    run,
    search_alone,
    start,
    step_of,
)

from spiral_jax.core import mesh as meshes
from spiral_jax.core.groups import Role, take_groups
from spiral_jax.core.metrics import divide
from spiral_jax.learner.blocks import place_blocks
from spiral_jax.learner.state import init_state, variables
from spiral_jax.model.transformer import Transformer, head_kernel

# fp32 sums in another order, as DESIGN section 8 states them; found on CPUs: 8e-7. A GPU may
# compute each shape by another kernel, with other partial sums: there as for the oracle.
SAME_GRADIENT, SAME_LOSS = (2e-6, 1e-6) if jax.default_backend() == "cpu" else (1e-5, 1e-5)


def norm(tree):
    return float(
        np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(tree)))
    )


def distance(tree, reference):
    """Relative L2 over the whole tree."""
    return norm(jax.tree.map(np.subtract, tree, reference)) / norm(reference)


def assert_same(step, reference):
    """Gradient (and its norms) to `SAME_GRADIENT`; loss and every other metric to `SAME_LOSS`."""
    (gradient, metrics, _), (same_gradient, same_metrics, _) = step, reference
    assert distance(gradient, same_gradient) <= SAME_GRADIENT
    assert metrics.keys() == same_metrics.keys()
    for name, value in same_metrics.items():
        limit = SAME_GRADIENT if "grad" in name else SAME_LOSS
        assert metrics[name] == pytest.approx(value, rel=limit), name


# ---- the oracle: one row a trace, no padding, no sharing, whole logits


@functools.partial(jax.jit, static_argnames="kind")
def row_loss_and_gradient(base, trained, row_T, prompt_len, recorded_T, weight, kind, temperature):
    """Of one row: -weight * sum_t exp(log pi(t) - recorded(t)), t behind the prompt."""

    def loss(trained):
        tree = variables(MODELS[kind], base, trained)
        hidden = Transformer(MODELS[kind]).apply(tree, row_T[None], jnp.array([row_T.size]), None)
        logits = hidden[0] @ head_kernel(MODELS[kind], tree["params"]) / temperature
        every_logprob = jax.nn.log_softmax(logits[:-1])
        logprob = jnp.take_along_axis(every_logprob, row_T[1:, None], axis=1)[:, 0]
        is_trace = jnp.arange(1, row_T.size) >= prompt_len
        return -weight * jnp.sum(jnp.exp(logprob - recorded_T[1:]), where=is_trace)

    return jax.value_and_grad(loss)(trained)


def oracle(kind, role, groups, weight_UxC):
    """(loss, gradient) of a role's groups, rows added in float64."""
    base, lora = random_trees(kind)
    base, trained = (base, lora) if lora is not None else (None, base)
    loss, gradient = 0.0, jax.tree.map(lambda a: np.zeros(a.shape), trained)
    for u, c in np.ndindex(weight_UxC.shape):
        length = groups.requests.prompt_len_U[u]
        row = np.concatenate([groups.requests.prompt_UxP[u, :length], groups.trace_ids(u, c)])
        recorded = np.concatenate([np.zeros(length, np.float32), groups.logprob_UxCxG[u, c]])
        recorded, weight = recorded[: row.size], weight_UxC[u, c]
        value, part = row_loss_and_gradient(
            base, trained, row, length, recorded, weight, kind, TEMPERATURE[role]
        )
        loss += float(value)
        gradient = jax.tree.map(lambda total, g: total + np.asarray(g, np.float64), gradient, part)
    return loss, gradient


@pytest.mark.devices8
@pytest.mark.parametrize("kind", MODELS)
def test_gradient_and_loss_are_those_of_a_loop_over_unpadded_rows(kind, mesh):
    # 1e-5, not 2e-6: shared prompts also split softmaxes and matrix products in another way.
    material = both_roles()
    gradient, metrics, _ = run(kind, blocks_of(material), mesh)
    of_role = {role: oracle(kind, role, *pair) for role, pair in material.items()}
    total = jax.tree.map(np.add, *(gradient for _, gradient in of_role.values()))
    assert distance(gradient, total) <= 1e-5
    assert metrics["grad_norm"] == pytest.approx(norm(total), rel=1e-5)
    for role, (loss, part) in of_role.items():
        assert metrics[f"loss/{role.label}"] == pytest.approx(loss, rel=1e-5)
        assert metrics[f"grad_norm/{role.label}"] == pytest.approx(norm(part), rel=1e-5)


def test_grpo_has_search_blocks_alone():
    gradient, metrics, _ = whole()
    loss, expected = oracle("lora", Role.SEARCH, *search_alone()[Role.SEARCH])
    assert distance(gradient, expected) <= 1e-5
    assert metrics["loss/search"] == pytest.approx(loss, rel=1e-5)
    assert metrics["grad_norm"] == metrics["grad_norm/search"]
    assert not [name for name in metrics if "aggregation" in name]


# ---- what changes nothing


@functools.cache
def whole():
    """Search traces in one micro-batch: what every cut is compared with."""
    return run("lora", blocks_of(search_alone(), micro=8, most=8))


@pytest.mark.parametrize(
    "cut",
    [
        {"micro": 1, "most": 8},
        {"micro": 4, "most": 24},
        {"micro": 3, "lengths": ((P, 5), (P + 3, G + 1))},
    ],
    ids=str,
)
def test_any_cut_into_micro_batches_and_buckets_gives_the_same_gradient_and_metrics(cut):
    blocks = blocks_of(search_alone(), **cut)
    assert all(block.count > 0 for block in blocks)
    assert_same(run("lora", blocks), whole())


def test_the_order_of_groups_changes_nothing():
    (groups, weight), order = search_alone()[Role.SEARCH], np.random.default_rng(1).permutation(8)
    blocks = blocks_of({Role.SEARCH: (take_groups(groups, order), weight[order])}, micro=8, most=8)
    assert_same(run("lora", blocks), whole())


def test_a_group_split_into_groups_of_one_trace_gives_the_same_gradient():
    groups, weight = search_alone()[Role.SEARCH]
    C = weight.shape[1]
    many = take_groups(groups, np.repeat(np.arange(len(groups)), C))
    own = {}
    for name in ("trace_UxCxG", "trace_len_UxC", "logprob_UxCxG", "stop_UxC"):
        array = getattr(groups, name)
        own[name] = array.reshape(-1, 1, *array.shape[2:])
    many = dataclasses.replace(many, requests=dataclasses.replace(many.requests, traces=1), **own)
    blocks = blocks_of({Role.SEARCH: (many, weight.reshape(-1, 1))}, micro=8, most=24)
    assert_same(run("lora", blocks), whole())


def test_padding_of_any_content_changes_nothing():
    """No bit on a CPU; a GPU adds gradients of equal ids in an order that others move."""
    clean, dirty = blocks_of(both_roles()), blocks_of(both_roles())
    rng = np.random.default_rng(2)
    for block in dirty:
        past_prompt = np.arange(P) >= block.prompt_len_AxU[..., None]
        past_trace = np.arange(G) >= block.trace_len_AxUxC[..., None]
        block.prompt_AxUxP[past_prompt] = rng.integers(0, ARCH.V, past_prompt.sum())
        block.trace_AxUxCxG[past_trace] = rng.integers(0, ARCH.V, past_trace.sum())
        block.logprob_AxUxCxG[past_trace] = np.nan
        assert block.count == 2
        block.trace_len_AxUxC[2:], block.weight_AxUxC[2:] = G, 7.0  # micro-batches beyond `count`
    step, expected = run("full", dirty), run("full", clean)
    if jax.default_backend() != "cpu":
        assert_same(step, expected)
        return
    (gradient, metrics, state), (same_gradient, same_metrics, same_state) = step, expected
    jax.tree.map(np.testing.assert_array_equal, gradient, same_gradient)
    jax.tree.map(np.testing.assert_array_equal, state.trained, same_state.trained)
    assert metrics == same_metrics


@pytest.mark.devices8
@pytest.mark.parametrize("kind", MODELS)
def test_a_sharded_step_is_that_of_one_device(kind, mesh):
    blocks = blocks_of(both_roles())
    assert_same(run(kind, blocks, mesh), run(kind, blocks))


# ---- where the arrays lie

COLUMNS, ROWS = ("q", "k", "v", "gate", "up"), ("o", "down")
# The mesh axis of every dimension, of one layer. Embed's 97 rows are odd, so they stay whole.
CUTS = {
    "embed": (None, "fsdp"),
    "head": ("fsdp", None),
    "final_norm": (None,),
    **{f"{name}_norm": (None,) for name in ("attention", "mlp", "q", "k")},
    **{f"{name}/kernel": ("fsdp", "tensor") for name in COLUMNS},
    **{f"{name}/kernel": ("tensor", "fsdp") for name in ROWS},
    **{f"{name}/a": ("fsdp", None) for name in COLUMNS},
    **{f"{name}/b": (None, "tensor") for name in COLUMNS},
    **{f"{name}/a": ("tensor", None) for name in ROWS},
    **{f"{name}/b": (None, "fsdp") for name in ROWS},
    "step": (),
    "count": (),
}
CUTS |= {
    name.replace("layers/", "last_layer/"): cut[1:]
    for name, cut in CUTS.items()
    if name.startswith("layers/")
}


@pytest.mark.devices8
@pytest.mark.parametrize("kind", MODELS)
def test_every_device_holds_its_share_of_each_array_before_and_after_a_step(kind, mesh):
    _, before = start(kind, mesh)
    _, _, after = run(kind, blocks_of(both_roles()), mesh)
    for state in (before, after):
        seen = set()
        for path, array in jax.tree_util.tree_leaves_with_path(state):
            name = meshes.path_name(path)
            key = next(key for key in CUTS if name == key or name.endswith(f"/{key}"))
            seen.add(key)
            stacked = (None,) * (array.ndim - len(CUTS[key]))  # layers are whole on every device
            cuts = zip(array.shape, stacked + CUTS[key], strict=True)
            shape = [n // (mesh.shape[axis] if axis else 1) for n, axis in cuts]
            assert len(array.addressable_shards) == mesh.size
            for shard in array.addressable_shards:
                assert shard.data.nbytes == 4 * np.prod(shape, initial=1, dtype=int), name
        adapters = {key for key in CUTS if key.endswith(("/a", "/b"))}
        assert seen == (adapters if kind == "lora" else CUTS.keys() - adapters) | {"step", "count"}


# ---- degenerate batches


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_without_a_finite_gradient_changes_no_bit_of_the_state_and_says_so(bad):
    material = both_roles()
    _, weight = material[Role.SEARCH]
    weight[1, 1] = bad
    frozen, state = start("lora", one_device())
    before = jax.device_get(state)
    state, metrics = step_of("lora")(state, frozen, place_blocks(blocks_of(material), one_device()))
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state))
    assert divide(jax.device_get(metrics))["skipped_update"] == 1
    weight[1, 1] = 0.5
    state, metrics = step_of("lora")(state, frozen, place_blocks(blocks_of(material), one_device()))
    assert int(state.step) == 1 and divide(jax.device_get(metrics))["skipped_update"] == 0


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_batches_of_equal_weights_and_cut_off_traces_are_finite(sign):
    """All right, all wrong, all cut off: whatever weights a user's estimator gives them."""
    material = both_roles()
    for groups, weight in material.values():
        weight[:] = sign
        groups.requests.prompt_len_U[:], groups.trace_len_UxC[:] = 1, G
    _, metrics, state = run("lora", blocks_of(material))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state)))
    assert all(value is None or np.isfinite(value) for value in metrics.values())
    assert metrics["skipped_update"] == 0


def test_single_token_traces_are_learnt_from():
    groups, weight = search_alone()[Role.SEARCH]
    groups.requests.prompt_len_U[:], groups.trace_len_UxC[:] = 5, 1
    gradient, metrics, _ = run("lora", blocks_of({Role.SEARCH: (groups, weight)}, micro=8, most=8))
    loss, expected = oracle("lora", Role.SEARCH, groups, weight)
    assert distance(gradient, expected) <= 1e-5
    assert metrics["loss/search"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    ("lacking", "most"), [("tokens", 16), ("weight", 16), ("groups", 16), ("groups", 4)]
)
def test_without_anything_to_learn_only_the_step_moves(lacking, most):
    material = both_roles()
    for role, (groups, weight) in material.items():
        if lacking == "tokens":
            groups.trace_len_UxC[:] = 0
        elif lacking == "weight":
            weight[:] = 0
        else:
            material[role] = take_groups(groups, np.arange(0)), weight[:0]
    blocks = blocks_of(material, most=most)  # four micro-batches of 4, or one
    gradient, metrics, state = run("full", blocks)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))
    jax.tree.map(np.testing.assert_array_equal, state.trained, random_trees("full")[0])
    counts = optax.tree_utils.tree_get_all_with_path(state.opt, "count")
    assert int(state.step) == 1
    assert [int(count) for _, count in counts] == [1, 1]  # Adam's and the schedule's
    assert all(value is None or np.isfinite(value) for value in metrics.values())
    assert metrics["grad_norm"] == metrics["loss/search"] == metrics["loss/aggregation"] == 0


# ---- the base, other groups, clipping: here, where their programs are compiled


@pytest.mark.devices8
@pytest.mark.parametrize("kind", MODELS)
def test_a_step_leaves_the_loaded_base_alone(kind, mesh):
    base, _ = random_trees(kind)
    loaded = jax.device_put(base, meshes.weight_shardings(base, mesh))
    frozen, state = init_state(learner(), MODELS[kind], mesh, loaded)
    with jax.set_mesh(mesh):
        after, _ = step_of(kind)(state, frozen, place_blocks(blocks_of(both_roles()), mesh))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.trained))
    jax.tree.map(np.testing.assert_array_equal, loaded, base)
    if kind == "full":  # so that the comparison says something
        for now, was in zip(jax.tree.leaves(after.trained), jax.tree.leaves(base), strict=True):
            assert np.any(now != was)


@pytest.mark.devices8
def test_other_lengths_and_counts_in_the_same_shapes_compile_nothing(mesh):
    compiled = []

    def listen(event, duration, **_):
        if "backend_compile" in event:
            compiled.append(event)

    frozen, state = start("lora", mesh)
    step = step_of("lora")
    with jax.set_mesh(mesh):
        state, _ = step(state, frozen, place_blocks(blocks_of(both_roles()), mesh))
        jax.block_until_ready(state)
        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            for seed, groups in enumerate((8, 11, 1, 0), start=1):
                material = {role: random_groups(seed, role, groups) for role in Role}
                state, _ = step(state, frozen, place_blocks(blocks_of(material), mesh))
            jax.block_until_ready(state)
            assert compiled == []
            jax.jit(lambda x: x + len(compiled))(1.0)
            assert compiled, "the listener hears nothing"
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
    assert int(state.step) == 5


def test_clipping_scales_the_gradient_but_not_the_logged_norm():
    blocks = blocks_of(search_alone(), micro=8, most=8)
    gradient, metrics, _ = run("lora", blocks)
    clipped, clipped_metrics, _ = run("lora", blocks, clip_norm=0.5)
    assert metrics["grad_norm"] > 1
    factor = 0.5 / metrics["grad_norm"]
    scaled = jax.tree.map(lambda leaf: leaf * factor, gradient)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-8), clipped, scaled
    )
    assert clipped_metrics["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=1e-6)
