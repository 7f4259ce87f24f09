"""The model against transformers on random peaked checkpoints, and against itself along every other way to run it."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spiral_jax import mesh as meshes
from spiral_jax.model import hf
from spiral_jax.model.architecture import Architecture, read_architecture
from spiral_jax.model.qwen3 import Block, ModelConfig, Transformer, head_kernel, init_variables, rms_norm
from spiral_jax.objective.logprobs import group_logprobs, length_mask

pytestmark = pytest.mark.devices8

PARITY = 1e-4  # float32 against float32 in another order of sums, logits up to about 3
MUTATED = 10 * PARITY  # a wrong constant must stand out from that
SAME = 1e-5  # the same sums in another shape of program; hidden states up to about 5

U, C, P, G = 4, 2, 9, 5
PROMPT_LEN = np.array([9, 6, 1, 4], np.int32)
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
ARCH = Architecture(V=97, D=48, F=80, L=3, H=6, J=3, E=16, norm_eps=1e-3, rope_theta=777.0, tied=False)


@dataclasses.dataclass(frozen=True)
class Ids:
    """Random groups whose padding is arbitrary ids, not zeros."""

    prompt: np.ndarray
    prompt_len: np.ndarray
    trace: np.ndarray


def random_ids(seed=0):
    rng = np.random.default_rng(seed)
    return Ids(rng.integers(0, 97, (U, P), np.int32), PROMPT_LEN, rng.integers(0, 97, (U, C, G), np.int32))


def on_mesh(program, mesh, config, variables, ids, *rest):
    """Runs a jitted `program(config, variables, prompt, prompt_len, trace)` with groups along the mesh."""
    place = functools.partial(jax.device_put, device=meshes.group_sharding(mesh))
    with jax.set_mesh(mesh):
        return program(config, variables, place(ids.prompt), place(ids.prompt_len), place(ids.trace), *rest)


@functools.partial(jax.jit, static_argnums=0)
def forward(config, variables, prompt, prompt_len, trace):
    """Hidden states [U, T, D], logits [U, T, V], log-probs of trace tokens [U, C, G]."""
    hidden, _ = Transformer(config).apply(variables, prompt, prompt_len, trace)
    logprob, _ = group_logprobs(config, variables, prompt, prompt_len, trace, 1.0, 2)
    return hidden, hidden @ head_kernel(config, variables["params"]), logprob


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(config, variables, prompt, prompt_len, trace, weight):
    """A weighted sum of trace log-probs, and its gradient with respect to every collection."""

    def loss(variables):
        return jnp.sum(weight * group_logprobs(config, variables, prompt, prompt_len, trace, 1.0, 2)[0])

    return jax.value_and_grad(loss)(variables)


def rows_of(out_UxTx, ids, u, c):
    """The entries of the real tokens of (prompt u, trace c), one after the other."""
    start = ids.prompt.shape[1] + c * ids.trace.shape[2]
    prompt, trace = out_UxTx[u, : ids.prompt_len[u]], out_UxTx[u, start : start + ids.trace.shape[2]]
    return np.concatenate([prompt, trace])


def peaked_variables(config, mesh, seed=0):
    """Parameters as in `qwen3_checkpoint`, and adapters whose A and B are both random, on the mesh."""

    def make(path, leaf):
        name = meshes.path_name(path)
        rng = np.random.default_rng([seed, *name.encode()])
        if "norm" in name:
            low, high = (0, 6) if name.endswith(("q_norm", "k_norm")) else (0.5, 1.5)
            return rng.uniform(low, high, leaf.shape).astype(leaf.dtype)
        return rng.normal(0, 0.1, leaf.shape).astype(leaf.dtype)

    shapes = jax.eval_shape(lambda: init_variables(config, jax.random.key(0)))
    tree = jax.tree_util.tree_map_with_path(make, shapes)
    return jax.device_put(tree, meshes.weight_shardings(tree, mesh))


def relative_l2(tree, expected):
    difference, norm = (
        math.sqrt(sum(float(np.sum(np.square(np.asarray(a, np.float64)))) for a in jax.tree.leaves(t)))
        for t in (jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, tree, expected), expected)
    )
    return difference / norm


# Parity with transformers


@functools.cache
def their_logits(model, ids_key):
    """(u, c) -> logits [prompt_len + G, V] of the concatenated row, run alone and without padding."""
    import torch

    ids = random_ids(ids_key)
    logits = {}
    for u, c in np.ndindex(U, C):
        row = np.concatenate([ids.prompt[u, : ids.prompt_len[u]], ids.trace[u, c]])
        with torch.no_grad():
            logits[u, c] = model(torch.tensor(row, dtype=torch.long)[None]).logits[0].numpy()
    return logits


def gap_to_transformers(model, mesh, config, params):
    """Largest differences of logits (prompt and trace positions) and of trace log-probs."""
    ids = random_ids()
    _, logits, logprob = on_mesh(forward, mesh, config, {"params": params}, ids)
    logits, logprob = np.asarray(logits), np.asarray(logprob)
    gaps = []
    for (u, c), theirs in their_logits(model, 0).items():
        last = ids.prompt_len[u] - 1 + np.arange(G)
        log_softmax = theirs - np.log(np.exp(theirs.astype(np.float64)).sum(-1, keepdims=True))
        logprob_gap = np.abs(log_softmax[last, ids.trace[u, c]] - logprob[u, c]).max()
        gaps.append((np.abs(theirs - rows_of(logits, ids, u, c)).max(), logprob_gap))
    return np.max(gaps, axis=0)


def load(directory, mesh, **options):
    config = ModelConfig(read_architecture(directory), **options)
    return config, hf.load_params(directory, config, mesh)


@pytest.mark.parametrize("kv_heads, tied, block", [(6, True, 512), (3, False, 4), (2, True, 2)])
def test_logits_and_logprobs_are_those_of_transformers(qwen3_checkpoint, mesh, kv_heads, tied, block):
    directory, model = qwen3_checkpoint(num_key_value_heads=kv_heads, tie_word_embeddings=tied)
    config, params = load(directory, mesh, query_block=block)
    assert config.arch == dataclasses.replace(ARCH, J=kv_heads, tied=tied) and 16 != 48 / 6
    np.testing.assert_array_less(gap_to_transformers(model, mesh, config, params), PARITY)


def of_layers(name, change):
    return lambda params: params | {"layers": params["layers"] | {name: change(params["layers"][name])}}


def interleaved_heads(params):
    """Key/value heads in an order that gives query head h another one than h // (H / J)."""
    layers = dict(params["layers"])
    for name in ("k", "v"):
        kernel = layers[name]["kernel"]
        layers[name] = {"kernel": kernel.reshape(3, 48, 3, 16)[:, :, [1, 2, 0]].reshape(kernel.shape)}
    return params | {"layers": layers}


def eight_wide_heads(params):
    """Norm scales for heads of half the width, so that twice as many of them fit the same kernels."""
    halve = lambda scale: scale[:, :8]  # noqa: E731
    return of_layers("q_norm", halve)(of_layers("k_norm", halve)(params))


MUTATIONS = {
    "norm_eps": ({"norm_eps": 1e-6}, None),
    "rope_theta": ({"rope_theta": 1e4}, None),
    "tied": ({"tied": True}, None),
    "L": ({"L": 2}, lambda params: params | {"layers": jax.tree.map(lambda a: a[:2], params["layers"])}),
    "H, J and E with the same products": ({"H": 12, "J": 6, "E": 8}, eight_wide_heads),
    "which heads share a key": ({}, interleaved_heads),
    "no q_norm": ({}, of_layers("q_norm", jnp.ones_like)),
    "no k_norm": ({}, of_layers("k_norm", jnp.ones_like)),
    "no attention_norm": ({}, of_layers("attention_norm", jnp.ones_like)),
    "no mlp_norm": ({}, of_layers("mlp_norm", jnp.ones_like)),
    "no final_norm": ({}, lambda params: params | {"final_norm": jnp.ones_like(params["final_norm"])}),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_parity_would_fail_with_one_field_changed(qwen3_checkpoint, mesh, mutation):
    directory, model = qwen3_checkpoint(num_key_value_heads=3, tie_word_embeddings=False)
    config, params = load(directory, mesh, query_block=4)
    fields, change = MUTATIONS[mutation]
    mutated = dataclasses.replace(config, arch=dataclasses.replace(config.arch, **fields))
    gaps = gap_to_transformers(model, mesh, mutated, change(params) if change else params)
    assert (gaps > MUTATED).all(), gaps


# Padding


def grown(ids, seed=9, **by):
    """`ids` with more of some axes, filled with arbitrary ids, and other ids where there was padding."""
    rng = np.random.default_rng(seed)
    more = {"U": 0, "C": 0, "P": 0, "G": 0} | by
    u, p = ids.prompt.shape
    prompt = rng.integers(0, 97, (u + more["U"], p + more["P"]), np.int32)
    shape = tuple(size + more[axis] for size, axis in zip(ids.trace.shape, "UCG", strict=True))
    trace = rng.integers(0, 97, shape, np.int32)
    length = np.concatenate([ids.prompt_len, np.full(more["U"], 3, np.int32)])
    for at, n in enumerate(ids.prompt_len):
        prompt[at, :n] = ids.prompt[at, :n]
    trace[: ids.trace.shape[0], : ids.trace.shape[1], : ids.trace.shape[2]] = ids.trace
    return Ids(prompt, length, trace)


@pytest.mark.parametrize("by", [{}, {"P": 7}, {"G": 3}, {"U": 4}, {"C": 1}], ids=str)
def test_padding_changes_no_real_token(mesh, by):
    config = ModelConfig(ARCH, query_block=4)
    variables, ids = peaked_variables(config, mesh), random_ids()
    wide = grown(ids, **by)
    hidden, _, logprob = map(np.asarray, on_mesh(forward, mesh, config, variables, ids))
    wide_hidden, _, wide_logprob = map(np.asarray, on_mesh(forward, mesh, config, variables, wide))
    assert np.isfinite(wide_hidden).all() and np.isfinite(wide_logprob).all()
    np.testing.assert_allclose(wide_logprob[:U, :C, :G], logprob, rtol=0, atol=SAME)
    for u, c in np.ndindex(U, C):
        n = ids.prompt_len[u] + G
        np.testing.assert_allclose(
            rows_of(wide_hidden, wide, u, c)[:n], rows_of(hidden, ids, u, c), rtol=0, atol=SAME
        )


def test_padding_changes_no_gradient(mesh):
    config = ModelConfig(ARCH, query_block=4)
    variables, ids = peaked_variables(config, mesh), random_ids()
    wide = grown(ids, P=7, G=3, U=4, C=1)
    weight = np.random.default_rng(1).normal(size=(U, C, 1)).astype(np.float32)
    length = np.array([[5, 2], [1, 5], [3, 0], [4, 5]], np.int32)
    wide_weight, wide_length = np.zeros((U + 4, C + 1, 1), np.float32), np.zeros((U + 4, C + 1), np.int32)
    wide_weight[:U, :C], wide_length[:U, :C] = weight, length
    loss, gradient = on_mesh(loss_and_gradient, mesh, config, variables, ids, weight * length_mask(length, G))
    wide_weight = wide_weight * length_mask(wide_length, G + 3)
    wide_loss, wide_gradient = on_mesh(loss_and_gradient, mesh, config, variables, wide, wide_weight)
    np.testing.assert_allclose(wide_loss, loss, rtol=1e-6)
    assert relative_l2(wide_gradient, gradient) <= 2e-6


# Adapters

LORA = ModelConfig(ARCH, lora_rank=4, lora_alpha=6.0)
BASE = dataclasses.replace(LORA, lora_rank=0)


def test_a_fresh_adapter_changes_nothing_and_gets_a_gradient(mesh):
    variables = peaked_variables(LORA, mesh)
    fresh = init_variables(LORA, jax.random.key(1))["lora"]
    for name in PROJECTIONS:
        a, b = fresh["layers"][name]["a"], fresh["layers"][name]["b"]
        assert not np.any(b) and len({float(a[layer, 0, 0]) for layer in range(3)}) == 3
        np.testing.assert_allclose(np.std(a), a.shape[1] ** -0.5, rtol=0.2)
    ids = random_ids()
    expected = on_mesh(forward, mesh, BASE, {"params": variables["params"]}, ids)
    found = on_mesh(forward, mesh, LORA, {"params": variables["params"], "lora": fresh}, ids)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_an_adapter_equals_weights_merged_by_hand(mesh):
    variables, ids = peaked_variables(LORA, mesh), random_ids()
    merged = jax.tree.map(np.asarray, variables["params"])
    for name in PROJECTIONS:
        a, b = (np.asarray(variables["lora"]["layers"][name][part], np.float64) for part in "ab")
        kernel = merged["layers"][name]["kernel"]
        update = np.stack([6.0 / 4 * a[layer] @ b[layer] for layer in range(3)])
        assert np.abs(update).max() > 0.01
        merged["layers"][name]["kernel"] = (kernel + update).astype(np.float32)
    expected = on_mesh(forward, mesh, BASE, {"params": merged}, ids)
    found = on_mesh(forward, mesh, LORA, variables, ids)
    unadapted = on_mesh(forward, mesh, BASE, {"params": variables["params"]}, ids)
    for a, b, off in zip(found, expected, unadapted, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=SAME)
        assert np.abs(a - off).max() > 0.1


@pytest.mark.parametrize("fresh", [False, True])
def test_every_adapter_matrix_of_every_layer_gets_a_gradient(mesh, fresh):
    variables = peaked_variables(LORA, mesh)
    if fresh:  # the start of training: B = 0 hides A
        variables = variables | {"lora": jax.tree.map(jnp.asarray, init_variables(LORA, jax.random.key(1))["lora"])}
    weight = np.random.default_rng(1).normal(size=(U, C, G)).astype(np.float32)
    _, gradient = on_mesh(loss_and_gradient, mesh, LORA, variables, random_ids(), weight)
    leaves = jax.tree_util.tree_leaves_with_path(gradient["lora"])
    assert len(leaves) == 14
    for path, leaf in leaves:
        norm_L = np.linalg.norm(np.asarray(leaf).reshape(3, -1), axis=1)
        expected_zero = fresh and meshes.path_name(path).endswith("/a")
        assert np.isfinite(leaf).all() and ((norm_L == 0) if expected_zero else (norm_L > 1e-4)).all(), (path, norm_L)


def test_the_4b_model_has_the_papers_number_of_parameters():
    arch = Architecture(V=151936, D=2560, F=9728, L=36, H=32, J=8, E=128, norm_eps=1e-6, rope_theta=5e6, tied=True)
    config = ModelConfig(arch, lora_rank=32, lora_alpha=32.0)
    shapes = jax.eval_shape(lambda: init_variables(config, jax.random.key(0)))
    count = {name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) for name, tree in shapes.items()}
    # rank x (in + out) of q, k, v, o, gate, up, down; 66.06 M beside 4.022 G
    per_layer = 32 * (2 * (2560 + 4096) + 2 * (2560 + 1024) + 3 * (2560 + 9728))
    assert count == {"lora": 36 * per_layer, "params": 4_022_468_096} and 36 * per_layer == 66_060_288
    assert arch.parameters == count["params"]


# Other ways to run the same layers


def test_rematerialisation_changes_neither_loss_nor_gradient(mesh):
    variables, ids = peaked_variables(LORA, mesh), random_ids()
    weight = np.random.default_rng(1).normal(size=(U, C, G)).astype(np.float32)
    assert LORA.remat
    kept = on_mesh(loss_and_gradient, mesh, dataclasses.replace(LORA, remat=False), variables, ids, weight)
    again = on_mesh(loss_and_gradient, mesh, LORA, variables, ids, weight)
    np.testing.assert_allclose(again[0], kept[0], rtol=1e-6)
    assert relative_l2(again[1], kept[1]) <= 2e-6


def layer_of(variables, layer):
    return {name: jax.tree.map(lambda a: a[layer], tree["layers"]) for name, tree in variables.items()}


@functools.partial(jax.jit, static_argnums=0)
def unrolled(config, variables, prompt, prompt_len, trace):
    """One `Block.apply` a layer instead of a scan over stacked layers."""
    params = variables["params"]
    own = prompt_len[:, None, None] + np.arange(G) + np.zeros((U, C, 1), np.int32)
    position = jnp.concatenate([np.tile(np.arange(P), (U, 1)), own.reshape(U, -1)], axis=1)
    x = params["embed"][jnp.concatenate([prompt, trace.reshape(U, -1)], axis=1)].astype(config.compute_dtype)
    prompt_kv = []
    for layer in range(config.arch.L):
        x, kv = Block(config, P, C, keep_keys=True).apply(layer_of(variables, layer), x, position, prompt_len)
        prompt_kv.append(kv)
    return rms_norm(x, params["final_norm"], config.arch.norm_eps), prompt_kv


@functools.partial(jax.jit, static_argnums=0)
def prefill(config, variables, prompt, prompt_len, trace):
    return Transformer(config, keep_keys=True).apply(variables, prompt, prompt_len, None)


@functools.partial(jax.jit, static_argnums=0)
def decode_step(config, variables, prompt_len, token_UxC, step_U, prompt_kv, caches):
    """One token of every trace through all layers; returns hidden states [U, C, D] and the caches."""
    x = variables["params"]["embed"][token_UxC].astype(config.compute_dtype)
    updated = []
    for layer, own_kv in enumerate(caches):
        kv = prompt_kv[0][layer], prompt_kv[1][layer]
        x, own_kv = Block(config).apply(
            layer_of(variables, layer), x, step_U, prompt_len, kv, own_kv, method="decode"
        )  # fmt: skip
        updated.append(own_kv)
    return rms_norm(x, variables["params"]["final_norm"], config.arch.norm_eps), updated


def teacher_forced(mesh, config, variables, ids, late_U):
    """Hidden states [U, C, G, D] of decoding the given tokens; group u starts `late_U[u]` rounds after the first."""
    _, prompt_kv = on_mesh(prefill, mesh, config, variables, ids)
    shape = (U, C, G, config.arch.J, config.arch.E)
    unwritten = jnp.full(shape, 1e4, config.compute_dtype)  # what an earlier group may have left there
    caches = [(unwritten, unwritten) for _ in range(config.arch.L)]
    hidden = np.zeros((U, C, G, config.arch.D), np.float32)
    for now in range(G + max(late_U)):
        step_U = np.clip(now - late_U, 0, G - 1).astype(np.int32)  # waiting and ended groups repeat a step
        token_UxC = ids.trace[np.arange(U), :, step_U]
        with jax.set_mesh(mesh):
            x, caches = decode_step(config, variables, ids.prompt_len, token_UxC, step_U, prompt_kv, caches)
        hidden[np.arange(U), :, step_U] = np.asarray(x, np.float32)
    return hidden


def test_scan_over_stacked_layers_is_a_loop_over_layers(mesh):
    variables, ids = peaked_variables(LORA, mesh), random_ids()
    hidden, prompt_kv = on_mesh(unrolled, mesh, LORA, variables, ids)
    np.testing.assert_allclose(on_mesh(forward, mesh, LORA, variables, ids)[0], hidden, rtol=0, atol=SAME)
    prefilled, kv_L = on_mesh(prefill, mesh, LORA, variables, ids)
    np.testing.assert_allclose(prefilled, hidden[:, :P], rtol=0, atol=SAME)
    for part in (0, 1):
        expected = np.stack([kv[part] for kv in prompt_kv])
        assert kv_L[part].shape == (3, U, P, ARCH.J, ARCH.E)
        np.testing.assert_allclose(kv_L[part], expected, rtol=0, atol=SAME)


@pytest.mark.parametrize("late", [(0, 0, 0, 0), (0, 2, 1, 3)])
def test_decoding_step_by_step_is_the_forward_of_the_whole_group(mesh, late):
    variables, ids = peaked_variables(LORA, mesh), random_ids()
    hidden = np.asarray(on_mesh(forward, mesh, LORA, variables, ids)[0])[:, P:].reshape(U, C, G, -1)
    decoded = teacher_forced(mesh, LORA, variables, ids, np.array(late))
    np.testing.assert_allclose(decoded, hidden, rtol=0, atol=SAME)


def test_bfloat16_runs_both_ways_and_stays_near_float32(mesh):
    narrow = dataclasses.replace(LORA, param_dtype=jnp.bfloat16, compute_dtype=jnp.bfloat16)
    variables, ids = peaked_variables(narrow, mesh), random_ids()
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["lora"])} == {jnp.dtype(jnp.float32)}
    hidden, _, logprob = on_mesh(forward, mesh, narrow, variables, ids)
    assert hidden.dtype == jnp.bfloat16 and logprob.dtype == jnp.float32
    decoded = teacher_forced(mesh, narrow, variables, ids, np.zeros(U, int))
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), variables)
    expected, _, expected_logprob = on_mesh(forward, mesh, LORA, wide, ids)
    expected = np.asarray(expected)[:, P:].reshape(U, C, G, -1)
    # 8 bits of mantissa through three peaked layers: a few per cent of hidden states of order 1, on average
    assert np.abs(decoded - expected).mean() < 0.05
    assert np.abs(np.asarray(hidden, np.float32)[:, P:].reshape(U, C, G, -1) - expected).mean() < 0.05
    assert np.abs(logprob - expected_logprob).mean() < 0.05
