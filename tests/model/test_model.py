"""The model against itself along every way to run it.

Padding, adapters, scan, a single layer, decoding, narrow numbers.
"""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import (
    ARCH,
    C,
    G,
    Ids,
    P,
    U,
    forward,
    on_mesh,
    random_ids,
    rows_of,
)

from spiral_jax.core import mesh as meshes
from spiral_jax.learner.logprobs import group_logprobs, length_mask
from spiral_jax.model.architecture import Architecture
from spiral_jax.model.attention.groups import Lengths
from spiral_jax.model.transformer import (
    DecoderLayer,
    ModelConfig,
    init_variables,
    rms_norm,
)
from spiral_jax.model.trees import unstack_layers

SAME = 1e-5  # the same sums in another shape of program; hidden states up to about 5
# Relative, of gradients. Found on CPUs: 7e-7. A GPU may compute each shape by another kernel.
SAME_GRADIENT = 2e-6 if jax.default_backend() == "cpu" else 1e-5

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
BASE = ModelConfig(ARCH, attention_block=4)
LORA = ModelConfig(ARCH, lora_rank=4, lora_alpha=6.0)
SCALE = 6.0 / 4  # of its adapters


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(config, variables, prompt, prompt_len, trace, weight):
    """(weighted sum of trace log-probs, those), and its gradient by every collection."""

    def loss(variables):
        logprob, _ = group_logprobs(config, variables, prompt, prompt_len, trace, 1.0, 512)
        return jnp.sum(weight * logprob), logprob

    return jax.value_and_grad(loss, has_aux=True)(variables)


def random_variables(config, mesh):
    """Random parameters, and adapters whose A and B are both random, on the mesh.

    Scores are of order 1: wrong positions or masks show, and float32 is good to 1e-5. With the
    scales U(0, 6) of `qwen3_checkpoint` rounding alone moves hidden states by 4e-5 between two
    programs.
    """

    def make(path, leaf):
        name = meshes.path_name(path)
        rng = np.random.default_rng([*name.encode()])
        if "norm" in name:
            low, high = (0, 2) if name.endswith(("q_norm", "k_norm")) else (0.5, 1.5)
            return rng.uniform(low, high, leaf.shape).astype(leaf.dtype)
        return rng.normal(0, 0.1, leaf.shape).astype(leaf.dtype)

    shapes = jax.eval_shape(lambda: init_variables(config, jax.random.key(0)))
    tree = jax.tree_util.tree_map_with_path(make, shapes)
    return jax.device_put(tree, meshes.weight_shardings(tree, mesh))


def relative_l2(tree, expected):
    def flat(tree):
        return np.concatenate([np.ravel(a) for a in jax.tree.leaves(tree)], dtype=np.float64)

    return np.linalg.norm(flat(tree) - flat(expected)) / np.linalg.norm(flat(expected))


# Padding


def grown(ids, **by):
    """`ids` with more of some axes, filled with arbitrary ids, and other ids where there was
    padding.
    """
    rng = np.random.default_rng(9)
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


@pytest.mark.devices8
@pytest.mark.parametrize("by", [{}, {"P": 7, "U": 4, "C": 1, "G": 3}], ids=str)
def test_padding_changes_no_hidden_state_of_a_real_token(mesh, by):
    variables, ids = random_variables(BASE, mesh), random_ids()
    wide = grown(ids, **by)
    hidden = np.asarray(on_mesh(forward, mesh, BASE, variables, ids)[0])
    wide_hidden = np.asarray(on_mesh(forward, mesh, BASE, variables, wide)[0])
    assert np.isfinite(wide_hidden).all()
    for u, c in np.ndindex(U, C):
        expected = rows_of(hidden, ids, u, c)
        np.testing.assert_allclose(
            rows_of(wide_hidden, wide, u, c)[: 1 + G], expected, rtol=0, atol=SAME
        )


@pytest.mark.devices8
def test_padding_changes_neither_logprobs_nor_gradient(mesh):
    variables, ids = random_variables(LORA, mesh), random_ids()
    wide = grown(ids, P=7, G=3, U=4, C=1)
    length = np.array([[5, 2], [1, 5], [3, 0], [4, 5]], np.int32)
    weight = np.random.default_rng(1).normal(size=(U, C, 1)) * length_mask(length, G)
    wide_weight = np.zeros((U + 4, C + 1, G + 3), np.float32)
    wide_weight[:U, :C, :G] = weight
    (_, logprob), gradient = on_mesh(loss_and_gradient, mesh, LORA, variables, ids, weight)
    (_, wide_logprob), wide_gradient = on_mesh(
        loss_and_gradient, mesh, LORA, variables, wide, wide_weight
    )
    assert np.isfinite(wide_logprob).all()
    np.testing.assert_allclose(wide_logprob[:U, :C, :G], logprob, rtol=0, atol=SAME)
    assert relative_l2(wide_gradient, gradient) <= SAME_GRADIENT


# Adapters


def fresh_adapter(mesh):
    def make():
        return init_variables(LORA, jax.random.key(1))["lora"]

    return jax.jit(make, out_shardings=meshes.weight_shardings(jax.eval_shape(make), mesh))()


def test_a_fresh_adapter_changes_nothing(mesh):
    params, fresh = random_variables(LORA, mesh)["params"], fresh_adapter(mesh)
    for name in PROJECTIONS:
        layers = [layer["lora"][name] for layer in unstack_layers({"lora": fresh}, 3)]
        assert not any(np.asarray(layer["b"]).any() for layer in layers)
        a = np.stack([layer["a"] for layer in layers])
        assert len(set(a[:, 0, 0])) == 3
        np.testing.assert_allclose(a.std(), a.shape[1] ** -0.5, rtol=0.2)
    expected = on_mesh(forward, mesh, BASE, {"params": params}, random_ids())
    found = on_mesh(forward, mesh, LORA, {"params": params, "lora": fresh}, random_ids())
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=SAME)


def merged_by_hand(variables):
    """The parameters with every adapter in its kernel, summed in float64."""
    merged = jax.tree.map(np.array, variables["params"])
    for room, name in itertools.product(("layers", "last_layer"), PROJECTIONS):
        adapter = variables["lora"][room][name]
        a, b = (np.asarray(adapter[part], np.float64) for part in "ab")
        update = SCALE * a @ b  # of each layer, where they are stacked
        assert np.abs(update).max() > 0.01
        kernel = merged[room][name]["kernel"]
        merged[room][name]["kernel"] = (kernel + update).astype(np.float32)
    return merged


@pytest.mark.devices8
def test_an_adapter_equals_weights_merged_by_hand(mesh):
    variables, ids = random_variables(LORA, mesh), random_ids()
    merged = merged_by_hand(variables)
    merged = jax.device_put(merged, meshes.weight_shardings(merged, mesh))
    expected = on_mesh(forward, mesh, BASE, {"params": merged}, ids)
    found = on_mesh(forward, mesh, LORA, variables, ids)
    unadapted = on_mesh(forward, mesh, BASE, {"params": variables["params"]}, ids)
    for a, b, off in zip(found, expected, unadapted, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=SAME)
        assert np.abs(a - off).max() > 0.1


def test_an_adapters_gradient_is_that_of_the_merged_weights(mesh):
    """Of W + s A B, with d the gradient by this sum: s d B^T by A, s A^T d by B."""
    variables, ids = random_variables(LORA, mesh), random_ids()
    weight = np.random.default_rng(1).normal(size=(U, C, G)).astype(np.float32)
    merged = merged_by_hand(variables)
    merged = jax.device_put(merged, meshes.weight_shardings(merged, mesh))
    _, of_merged = on_mesh(loss_and_gradient, mesh, BASE, {"params": merged}, ids, weight)
    _, found = on_mesh(loss_and_gradient, mesh, LORA, variables, ids, weight)
    for room, name in itertools.product(("layers", "last_layer"), PROJECTIONS):
        adapter = variables["lora"][room][name]
        a, b = (np.asarray(adapter[part], np.float64) for part in "ab")
        d_merged = np.asarray(of_merged["params"][room][name]["kernel"], np.float64)
        expected = {
            "a": SCALE * d_merged @ np.swapaxes(b, -1, -2),
            "b": SCALE * np.swapaxes(a, -1, -2) @ d_merged,
        }
        for part in "ab":
            # two programs in float32, whose merged weights are rounded at 6e-8
            assert relative_l2(found["lora"][room][name][part], expected[part]) <= 1e-5, (
                room,
                name,
            )


@pytest.mark.parametrize("fresh", [False, True])
def test_every_adapter_matrix_of_every_layer_gets_a_gradient(mesh, fresh):
    variables = random_variables(LORA, mesh)
    if fresh:  # the start of training: B = 0 hides A
        variables = variables | {"lora": fresh_adapter(mesh)}
    weight = np.random.default_rng(1).normal(size=(U, C, G)).astype(np.float32)
    _, gradient = on_mesh(loss_and_gradient, mesh, LORA, variables, random_ids(), weight)
    leaves = jax.tree_util.tree_leaves_with_path(gradient["lora"])
    assert len(leaves) == 2 * 14
    for path, leaf in leaves:
        name = meshes.path_name(path)
        layers = 2 if name.startswith("layers/") else 1
        norm_L = np.linalg.norm(np.asarray(leaf).reshape(layers, -1), axis=1)
        as_expected = norm_L == 0 if fresh and name.endswith("/a") else norm_L > 1e-4
        assert np.isfinite(leaf).all() and as_expected.all(), (name, norm_L)


def test_the_4b_model_has_the_papers_number_of_parameters():
    arch = Architecture(
        V=151936, D=2560, F=9728, L=36, H=32, J=8, E=128, norm_eps=1e-6, rope_theta=5e6, tied=True
    )
    config = ModelConfig(arch, lora_rank=32, lora_alpha=32.0)
    shapes = jax.eval_shape(lambda: init_variables(config, jax.random.key(0)))
    count = {
        name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
        for name, tree in shapes.items()
    }
    # rank x (in + out) of q, k, v, o, gate, up, down; 66.06 M beside 4.022 G
    per_layer = 32 * (2 * (2560 + 4096) + 2 * (2560 + 1024) + 3 * (2560 + 9728))
    assert (
        count == {"lora": 36 * per_layer, "params": 4_022_468_096} and 36 * per_layer == 66_060_288
    )
    assert arch.parameters == count["params"]


# Other ways to run the same layers


@pytest.mark.parametrize("remat", ["layer", "attention", "dots"])
def test_rematerialisation_changes_neither_loss_nor_gradient(mesh, remat):
    variables, ids = random_variables(LORA, mesh), random_ids()
    weight = np.random.default_rng(1).normal(size=(U, C, G)).astype(np.float32)

    def under(remat):
        config = dataclasses.replace(LORA, remat=remat)
        return on_mesh(loss_and_gradient, mesh, config, variables, ids, weight)

    assert relative_l2(under(remat), under("none")) <= SAME_GRADIENT


def test_policies_compute_again_what_they_do_not_keep():
    shapes = jax.eval_shape(lambda: init_variables(LORA, jax.random.key(0)))

    def products(remat):
        config = dataclasses.replace(LORA, remat=remat)

        def loss(lora, rest):
            return group_logprobs(config, rest | {"lora": lora}, *random_ids(), 1.0, 2)[0].sum()

        trees = shapes["lora"], {"params": shapes["params"]}
        return jax.jit(jax.grad(loss)).lower(*trees).as_text().count("dot_general")

    # in the body of the scan and in the last layer: x W and x A B of all but `down`
    of_projections = 2 * 6 * 2
    of_last_token = 2  # its scores and its output, which no policy keeps
    assert products("dots") == products("none") + of_last_token
    assert products("attention") == products("dots") + of_projections


@pytest.mark.devices8
@pytest.mark.cpu_bits("arrays and memory of XLA's program for CPUs")
@pytest.mark.parametrize(
    ("config", "trained"), [(BASE, "params"), (LORA, "lora")], ids=["full", "lora"]
)
def test_a_gradient_copies_no_stacked_weights(config, trained):
    shapes = jax.eval_shape(lambda: init_variables(config, jax.random.key(0)))

    def loss(part, rest):
        tree = rest | {trained: part}
        return group_logprobs(config, tree, *random_ids(), 1.0, 2)[0].sum()

    text = jax.jit(jax.grad(loss)).lower(shapes.pop(trained), shapes).compile().as_text()
    of_stacks = re.findall(r"= f32\[2,(\d+),(\d+)\]\S* ([\w-]+)\(", text)
    assert ("48", "80", "parameter") in of_stacks  # two layers' gates
    moves = {"slice", "concatenate", "transpose"}
    assert not [found for found in of_stacks if found[-1] in moves]
    if trained == "lora":  # in full fine-tuning the stacks of gradients begin as copied zeros
        assert not [found for found in of_stacks if found[-1] == "copy" and "4" not in found[:2]]


def of_traces(hidden_UxTxD):
    return np.asarray(hidden_UxTxD, np.float32)[:, 1:].reshape(U, C, G, -1)


@functools.partial(jax.jit, static_argnums=0)
def unrolled(config, variables, prompt, prompt_len, trace):
    """What `forward` returns, from a loop over whole layers: no scan, all rows in all layers."""
    params = variables["params"]
    own = prompt_len[:, None, None] + np.arange(G) + np.zeros((U, C, 1), np.int32)
    position = jnp.concatenate([np.tile(np.arange(P), (U, 1)), own.reshape(U, -1)], axis=1)
    x = params["embed"][jnp.concatenate([prompt, trace.reshape(U, -1)], axis=1)].astype(
        config.compute_dtype
    )
    lengths = Lengths(prompt_len, jnp.full((len(prompt_len), C), G), jnp.int32(P), jnp.int32(G))
    for layer in unstack_layers(variables, config.arch.L):
        x, _ = DecoderLayer(config, P, C).apply(layer, x, position, lengths)
    x = jnp.concatenate([x[np.arange(U), prompt_len - 1][:, None], x[:, P:]], axis=1)
    return rms_norm(x, params["final_norm"], config.arch.norm_eps)


@pytest.mark.parametrize("L", [3, 1])
def test_scan_and_last_layer_are_a_loop_over_whole_layers(mesh, L):
    config = dataclasses.replace(LORA, arch=dataclasses.replace(ARCH, L=L))
    variables, ids = random_variables(config, mesh), random_ids()
    assert ("layers" in variables["params"]) == ("layers" in variables["lora"]) == (L > 1)
    hidden = on_mesh(unrolled, mesh, config, variables, ids)
    found = on_mesh(forward, mesh, config, variables, ids)[0]
    np.testing.assert_allclose(found, hidden, rtol=0, atol=SAME)


def test_bfloat16_stays_near_float32(mesh):
    narrow = dataclasses.replace(LORA, param_dtype=jnp.bfloat16, compute_dtype=jnp.bfloat16)
    variables, ids = random_variables(narrow, mesh), random_ids()
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["lora"])} == {jnp.dtype(jnp.float32)}
    hidden, _ = on_mesh(forward, mesh, narrow, variables, ids)
    assert hidden.dtype == jnp.bfloat16
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), variables)
    expected = of_traces(on_mesh(forward, mesh, LORA, wide, ids)[0])
    # 8 bits of mantissa through three layers: on average a few per cent of states of order 1
    assert np.abs(of_traces(hidden) - expected).mean() < 0.05
