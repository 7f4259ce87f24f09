"""The train step: its gradient against an oracle without groups, and what must not change it.

Adam's first moment after one step is (1 - b1) times the gradient; with b1 = 0 it is the gradient itself.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from spiral_jax import mesh as meshes
from spiral_jax.batching import make_blocks
from spiral_jax.config import defaults
from spiral_jax.groups import GroupRequests, Groups, Role, take_groups
from spiral_jax.metrics import divide
from spiral_jax.model.architecture import Architecture
from spiral_jax.model.qwen3 import ModelConfig, Transformer, head_kernel, init_variables
from spiral_jax.train_step import init_state, make_train_step, variables

ARCH = Architecture(V=97, D=32, F=48, L=2, H=4, J=2, E=8, norm_eps=1e-5, rope_theta=500.0, tied=True)
MODELS = {
    "lora": ModelConfig(ARCH, lora_rank=4, lora_alpha=8.0, query_block=4, remat=True),
    "full": ModelConfig(dataclasses.replace(ARCH, tied=False), remat=False),
}
P, G = 6, 8
TRACES = {Role.SEARCH: 3, Role.AGGREGATION: 2}
# fp32 sums in another order, as DESIGN section 8 states them
SAME_GRADIENT, SAME_LOSS = 2e-6, 1e-6


# ---- material


def config(**optimizer):
    c = defaults()
    c.sampling.temperature = 0.7
    c.loss.logprob_chunk = 3  # does not divide G
    c.optimizer.b1 = 0.0
    c.optimizer.update(optimizer)
    return c


@functools.cache
def random_trees(kind):
    """(base, trained or None) on the host, far from initialisation: logits and attention scores of order one."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        if meshes.path_name(path).endswith("norm"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        return (0.15 * rng.normal(size=leaf.shape)).astype(np.float32)

    shapes = jax.eval_shape(lambda: init_variables(MODELS[kind], jax.random.key(0)))
    trees = jax.tree_util.tree_map_with_path(fill, shapes)
    return trees["params"], trees.get("lora")


def start(kind, mesh, c):
    """(frozen, state) on `mesh` from `random_trees`; a fresh adapter's B of zero would hide the gradient of A."""
    base, lora = random_trees(kind)
    frozen, state = init_state(c, MODELS[kind], jax.device_put(base, meshes.weight_shardings(base, mesh)), mesh)
    if lora is not None:
        state = state.replace(trained=jax.device_put(lora, meshes.weight_shardings(lora, mesh)))
    return frozen, state


def random_groups(seed, role, U=8):
    """(groups, weights): prompts of 1 to 6 tokens, traces of 1 to 8; prompt and trace are 6 or 9 together, so that the
    oracle compiles for two lengths only."""
    rng = np.random.default_rng([seed, role])
    C = TRACES[role]
    prompt_len = rng.integers(1, 6, U).astype(np.int32)
    trace_len = (rng.choice([6, 9], (U, C)) - prompt_len[:, None]).astype(np.int32)
    trace_len[0, 0] = 6 - prompt_len[0]
    ids = lambda *shape: rng.integers(0, ARCH.V, shape).astype(np.int32)  # noqa: E731
    groups = Groups(
        GroupRequests(ids(U, P), prompt_len, np.zeros((U, 6), np.int32), C, G),
        trace_UxCxG=ids(U, C, G),
        trace_len_UxC=trace_len,
        logprob_UxCxG=rng.uniform(-5.5, -3.5, (U, C, G)).astype(np.float32),  # about -log V: ratios of order one
        stop_UxC=np.zeros((U, C), np.int32),
    )
    return groups, rng.normal(size=(U, C)).astype(np.float32)


def both_roles(seed=0):
    return {role: random_groups(seed, role) for role in Role}


def blocks_of(material, micro=4, lengths=((P, G),), most=8):
    blocks = [make_blocks(role, *pair, list(lengths), micro, most) for role, pair in material.items()]
    return [block for of_role in blocks for block in of_role]


def one_device():
    return Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), meshes.AXES)


@functools.cache
def step_of(kind, **optimizer):
    return make_train_step(config(**optimizer), MODELS[kind])


def run(kind, blocks, mesh=None, **optimizer):
    """One step from the start: (gradient as numpy, divided metrics, state)."""
    mesh = mesh or one_device()
    frozen, state = start(kind, mesh, config(**optimizer))
    place = lambda a: jax.device_put(a, meshes.group_sharding(mesh, leading=1)) if np.ndim(a) else a  # noqa: E731
    with jax.set_mesh(mesh):
        state, metrics = step_of(kind, **optimizer)(state, frozen, jax.tree.map(place, blocks))
    gradient = jax.device_get(optax.tree_utils.tree_get(state.opt, "mu"))
    return gradient, divide(jax.device_get(metrics)), state


def norm(tree):
    return float(np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(tree))))


def distance(tree, reference):
    """Relative L2 over the whole tree."""
    return norm(jax.tree.map(np.subtract, tree, reference)) / norm(reference)


def assert_same(found, reference):
    """The gradient to 2e-6 in relative L2; loss and every other metric to 1e-6 (gradient norms as the gradient)."""
    assert distance(found[0], reference[0]) <= SAME_GRADIENT
    assert found[1].keys() == reference[1].keys()
    for name, value in reference[1].items():
        assert found[1][name] == pytest.approx(value, rel=SAME_GRADIENT if "grad" in name else SAME_LOSS), name


# ---- the oracle: one row a trace, no padding, no sharing, whole logits


@functools.partial(jax.jit, static_argnames="kind")
def row_loss_and_gradient(base, trained, row_T, prompt_len, recorded_T, weight, kind):
    """-weight * sum_t exp(log pi(t) - recorded(t)) over the tokens behind the prompt, of one row."""

    def loss(trained):
        tree = variables(MODELS[kind], base, trained)
        hidden, _ = Transformer(MODELS[kind]).apply(tree, row_T[None], jnp.array([row_T.size]), None)
        logits = hidden[0] @ head_kernel(MODELS[kind], tree["params"]) / 0.7
        logprob = jnp.take_along_axis(jax.nn.log_softmax(logits[:-1]), row_T[1:, None], axis=1)[:, 0]
        ratio = jnp.where(jnp.arange(1, row_T.size) >= prompt_len, jnp.exp(logprob - recorded_T[1:]), 0.0)
        return -weight * ratio.sum()

    return jax.value_and_grad(loss)(trained)


def oracle(kind, groups, weight_UxC):
    """(loss, gradient) of a role's groups, rows added in float64."""
    base, lora = random_trees(kind)
    base, trained = (base, lora) if lora is not None else (None, base)
    loss, gradient = 0.0, jax.tree.map(lambda a: np.zeros(a.shape), trained)
    for u, c in np.ndindex(weight_UxC.shape):
        length = groups.requests.prompt_len_U[u]
        row = np.concatenate([groups.requests.prompt_UxP[u, :length], groups.trace_ids(u, c)])
        recorded = np.concatenate([np.zeros(length, np.float32), groups.logprob_UxCxG[u, c]])[: row.size]
        value, part = row_loss_and_gradient(base, trained, row, length, recorded, weight_UxC[u, c], kind)
        loss += float(value)
        gradient = jax.tree.map(lambda total, g: total + np.asarray(g, np.float64), gradient, part)
    return loss, gradient


@pytest.mark.devices8
@pytest.mark.parametrize("kind", MODELS)
def test_gradient_and_loss_are_those_of_a_loop_over_unpadded_rows(kind, mesh):
    # 1e-5, not 2e-6: shared prompts also split every softmax and every matrix product in another way.
    material = both_roles()
    gradient, metrics, _ = run(kind, blocks_of(material), mesh)
    of_role = {role: oracle(kind, *pair) for role, pair in material.items()}
    total = jax.tree.map(np.add, *(gradient for _, gradient in of_role.values()))
    assert distance(gradient, total) <= 1e-5
    assert metrics["grad_norm"] == pytest.approx(norm(total), rel=1e-5)
    for role, (loss, part) in of_role.items():
        assert metrics[f"loss/{role.label}"] == pytest.approx(loss, rel=1e-5)
        assert metrics[f"grad_norm/{role.label}"] == pytest.approx(norm(part), rel=1e-5)


def test_grpo_has_search_blocks_alone():
    groups, weight = random_groups(3, Role.SEARCH)
    gradient, metrics, _ = run("lora", blocks_of({Role.SEARCH: (groups, weight)}))
    loss, expected = oracle("lora", groups, weight)
    assert distance(gradient, expected) <= 1e-5
    assert metrics["loss/search"] == pytest.approx(loss, rel=1e-5)
    assert metrics["grad_norm"] == metrics["grad_norm/search"]
    assert not [name for name in metrics if "aggregation" in name]


# ---- what changes nothing


@functools.cache
def reference(kind):
    return run(kind, blocks_of(both_roles(), micro=8))


@pytest.mark.parametrize(
    "cut",
    [
        {"micro": 1},
        {"micro": 2},
        {"micro": 4},
        {"micro": 5},
        {"micro": 4, "most": 24},
        {"micro": 4, "lengths": ((P, 5), (P, G))},
        {"micro": 4, "lengths": ((3, G), (9, 11))},
    ],
    ids=str,
)
def test_any_cut_into_micro_batches_and_buckets_gives_the_same_gradient_and_metrics(cut):
    assert_same(run("lora", blocks_of(both_roles(), **cut)), reference("lora"))


def test_the_order_of_groups_and_of_blocks_changes_nothing():
    order = np.random.default_rng(1).permutation(8)
    material = {role: (take_groups(groups, order), weight[order]) for role, (groups, weight) in both_roles().items()}
    assert_same(run("lora", blocks_of(material, micro=8)[::-1]), reference("lora"))


def test_a_group_split_in_two_gives_the_same_gradient():
    def split(groups, weight):
        """Each group as C groups of one trace each."""
        C = weight.shape[1]
        many = take_groups(groups, np.repeat(np.arange(len(groups)), C))
        pick = np.tile(np.arange(C), len(groups))[:, None]
        own = lambda a: np.take_along_axis(a, pick.reshape(-1, *[1] * (a.ndim - 1)), axis=1)  # noqa: E731
        names = ("trace_UxCxG", "trace_len_UxC", "logprob_UxCxG", "stop_UxC")
        requests = dataclasses.replace(many.requests, traces=1)
        many = dataclasses.replace(many, requests=requests, **{name: own(getattr(many, name)) for name in names})
        return many, weight.reshape(-1, 1)

    material = {role: split(*pair) for role, pair in both_roles().items()}
    assert_same(run("lora", blocks_of(material, micro=8, most=24)), reference("lora"))


def test_padding_of_any_content_changes_no_bit():
    clean, dirty = blocks_of(both_roles(), most=16), blocks_of(both_roles(), most=16)
    rng = np.random.default_rng(2)
    for block in dirty:
        past_prompt = np.arange(P) >= block.prompt_len_AxU[..., None]
        past_trace = np.arange(G) >= block.trace_len_AxUxC[..., None]
        block.prompt_AxUxP[past_prompt] = rng.integers(0, ARCH.V, past_prompt.sum())
        block.trace_AxUxCxG[past_trace] = rng.integers(0, ARCH.V, past_trace.sum())
        block.logprob_AxUxCxG[past_trace] = np.nan
        block.weight_AxUxC[2:] = 7.0  # micro-batches beyond `count`
    assert all(int(block.count) == 2 for block in dirty)
    (gradient, metrics, state), (expected, same_metrics, same_state) = run("full", clean), run("full", dirty)
    jax.tree.map(np.testing.assert_array_equal, gradient, expected)
    jax.tree.map(np.testing.assert_array_equal, state.trained, same_state.trained)
    assert metrics == same_metrics


@pytest.mark.devices8
@pytest.mark.parametrize("kind", MODELS)
def test_a_sharded_step_is_that_of_one_device(kind, mesh):
    blocks = blocks_of(both_roles())
    assert_same(run(kind, blocks, mesh), run(kind, blocks))


# ---- where the arrays lie

CUTS = {  # the mesh axis of every dimension; embed's 97 rows are odd, so they stay whole
    "embed": (None, "fsdp"),
    "head": ("fsdp", None),
    "final_norm": (None,),
    **{f"layers/{name}_norm": (None, None) for name in ("attention", "mlp", "q", "k")},
    **{f"layers/{name}/kernel": (None, "fsdp", "tensor") for name in ("q", "k", "v", "gate", "up")},
    **{f"layers/{name}/kernel": (None, "tensor", "fsdp") for name in ("o", "down")},
    **{f"layers/{name}/a": (None, "fsdp", None) for name in ("q", "k", "v", "gate", "up")},
    **{f"layers/{name}/b": (None, None, "tensor") for name in ("q", "k", "v", "gate", "up")},
    **{f"layers/{name}/a": (None, "tensor", None) for name in ("o", "down")},
    **{f"layers/{name}/b": (None, None, "fsdp") for name in ("o", "down")},
    "step": (),
    "count": (),
}


@pytest.mark.devices8
@pytest.mark.parametrize("kind", MODELS)
def test_every_device_holds_its_share_of_each_array_before_and_after_a_step(kind, mesh):
    _, fresh = start(kind, mesh, config())
    _, _, after = run(kind, blocks_of(both_roles()), mesh)
    for state in (fresh, after):
        seen = set()
        for path, array in jax.tree_util.tree_leaves_with_path(state):
            name = meshes.path_name(path)
            key = next(key for key in CUTS if name == key or name.endswith(f"/{key}"))
            seen.add(key)
            shape = [n // (mesh.shape[axis] if axis else 1) for n, axis in zip(array.shape, CUTS[key], strict=True)]
            assert len(array.addressable_shards) == mesh.size
            for shard in array.addressable_shards:
                assert shard.data.nbytes == 4 * np.prod(shape, initial=1, dtype=int), name
        adapters = {key for key in CUTS if key.endswith(("/a", "/b"))}
        assert seen == (adapters if kind == "lora" else CUTS.keys() - adapters) | {"step", "count"}
