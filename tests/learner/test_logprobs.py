"""Chunked log-probs are the full log-softmax; each token is predicted by the one before it."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spiral_jax.core import mesh as meshes
from spiral_jax.learner.logprobs import group_logprobs, length_mask, response_hidden, token_logprobs
from spiral_jax.model.architecture import Architecture
from spiral_jax.model.transformer import ModelConfig, Transformer, head_kernel, init_variables

U, C, G, D, V = 3, 2, 7, 16, 97
FLOAT32 = dict(rtol=1e-5, atol=1e-5)  # log-probs of order 10, sums over 97 entries
ARCH = Architecture(
    V=V, D=32, F=48, L=2, H=4, J=2, E=8, norm_eps=1e-3, rope_theta=777.0, tied=False
)
MODEL = ModelConfig(ARCH, lora_rank=4)


def random_heads():
    rng = np.random.default_rng(0)
    hidden = rng.normal(0, 1, (U, C, G, D)).astype(np.float32)
    kernel = rng.normal(0, 1, (D, V)).astype(np.float32)
    return hidden, kernel, rng.integers(0, V, (U, C, G)).astype(np.int32)


def full_logprobs(hidden, kernel, trace, temperature):
    """Log-prob of each token and entropy from the whole [U, C, G, V] log-softmax."""
    logprob = jax.nn.log_softmax(hidden @ kernel / temperature, axis=-1)
    chosen = jnp.take_along_axis(logprob, trace[..., None], axis=-1)[..., 0]
    return chosen, -jnp.sum(jnp.exp(logprob) * logprob, axis=-1)


def of_embedding(hidden, kernel, *rest):
    return token_logprobs(hidden, kernel.T, *rest, tied=True)


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def weighted(logprobs, weight, hidden, kernel, trace, temperature, chunk):
    """Log-probs, entropy, and the gradient of a weighted sum of the log-probs."""

    def loss(hidden, kernel):
        args = (hidden, kernel, trace, temperature) + (() if chunk is None else (chunk,))
        logprob, entropy = logprobs(*args)
        return jnp.sum(weight * logprob), (logprob, entropy)

    (_, found), gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, kernel)
    return found, gradient


@pytest.mark.parametrize(
    "logprobs, chunk",  # 3 and 6 do not divide G = 7
    [
        (token_logprobs, 1),
        (token_logprobs, 3),
        (of_embedding, 3),
        (token_logprobs, G - 1),
        (of_embedding, G),
        (token_logprobs, G + 4),
    ],
)
def test_chunked_is_the_full_log_softmax_in_value_and_gradient(logprobs, chunk):
    hidden, kernel, trace = random_heads()
    weight = np.random.default_rng(1).normal(size=trace.shape).astype(np.float32)
    weight[:, :, -1] *= 10  # the last chunk is the ragged one
    found, gradient = weighted(logprobs, weight, hidden, kernel, trace, 0.7, chunk)
    expected, its_gradient = weighted(full_logprobs, weight, hidden, kernel, trace, 0.7, None)
    assert [(a.shape, a.dtype) for a in found] == [((U, C, G), jnp.float32)] * 2
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, **FLOAT32)
    for a, b in zip(gradient, its_gradient, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_logprobs_and_entropies_are_those_of_the_tempered_softmax_in_float64(temperature):
    hidden, kernel, trace = random_heads()
    logits = hidden.astype(np.float64) @ kernel / temperature
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    logprob, entropy = token_logprobs(hidden, kernel, trace, temperature, 3)
    np.testing.assert_allclose(
        logprob, np.log(np.take_along_axis(p, trace[..., None], -1))[..., 0], **FLOAT32
    )
    np.testing.assert_allclose(entropy, -(p * np.log(p)).sum(-1), **FLOAT32)


def test_entropy_is_zero_of_a_certain_token_and_log_v_of_a_flat_distribution():
    trace = np.zeros((1, 1, 2), np.int32)
    kernel = np.zeros((1, V), np.float32)
    kernel[0, 5] = 1
    hidden = np.float32([0, 1e4]).reshape(1, 1, 2, 1)
    logprob, entropy = token_logprobs(hidden, kernel, trace, 1.0, 1)
    np.testing.assert_allclose(entropy[0, 0], [np.log(V), 0], atol=1e-5)
    np.testing.assert_allclose(logprob[0, 0], [-np.log(V), -1e4], rtol=1e-6)


def test_entropy_passes_no_gradient():
    hidden, kernel, trace = random_heads()
    gradient = jax.grad(lambda h: token_logprobs(h, kernel, trace, 1.0, 3)[1].sum())(hidden)
    assert not np.any(gradient)


def largest_array(program, *args):
    text = jax.jit(program).lower(*args).compile().as_text()
    shapes = re.findall(r"[fsbu]\w*\d+\[([\d,]+)\]", text)
    return max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)


@pytest.mark.cpu_bits("arrays and memory of XLA's program for CPUs")
def test_no_array_of_the_forward_and_backward_pass_holds_all_logits():
    hidden, kernel, trace = random_heads()

    def gradient(chunk, hidden, kernel):
        return jax.grad(
            lambda h, k: token_logprobs(h, k, trace, 1.0, chunk)[0].sum(), argnums=(0, 1)
        )(hidden, kernel)

    every = U * C * G * V
    assert largest_array(functools.partial(gradient, G), hidden, kernel) >= every
    chunk = max(U * C * 2 * V, kernel.size)
    assert largest_array(functools.partial(gradient, 2), hidden, kernel) <= chunk < every


def random_variables(config):
    """Far from their initial values, so that attention and adapters matter."""

    def make(path, leaf):
        name = meshes.path_name(path)
        rng = np.random.default_rng([*name.encode()])
        if "norm" in name:
            return rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)
        return rng.normal(0, 0.2, leaf.shape).astype(leaf.dtype)

    shapes = jax.eval_shape(lambda: init_variables(config, jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(make, shapes)


def random_groups(seed=0):
    """One group for each prompt length 1..8; what lies beyond a length is arbitrary."""
    rng = np.random.default_rng(seed)
    prompt_len_U = np.arange(1, 9, dtype=np.int32)
    return (
        rng.integers(0, V, (8, 8), np.int32),
        prompt_len_U,
        rng.integers(0, V, (8, 3, 5), np.int32),
    )


@functools.partial(jax.jit, static_argnums=0)
def forward(config, variables, rows_RxT):
    """Log-probs [R, T, V] of what follows each token of plain rows, without groups."""
    lengths = np.full(len(rows_RxT), rows_RxT.shape[1])
    hidden = Transformer(config).apply(variables, rows_RxT, lengths, None)
    return jax.nn.log_softmax(hidden @ head_kernel(config, variables["params"]) / 0.7, axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def grouped(config, variables, prompt, prompt_len, trace):
    return group_logprobs(config, variables, prompt, prompt_len, trace, 0.7, 2)


def row_by_row(config, variables, prompt, prompt_len, trace):
    """The same from one plain row a trace: its prompt's real tokens, then its own."""
    at = [(u, c) for u in range(len(prompt)) for c in range(trace.shape[1])]
    rows = [np.concatenate([prompt[u, : prompt_len[u]], trace[u, c]]) for u, c in at]
    width = prompt.shape[1] + trace.shape[2]
    padded = np.stack([np.pad(row, (0, width - len(row))) for row in rows])
    logprob = np.asarray(forward(config, variables, padded))
    chosen, entropy = np.zeros(trace.shape), np.zeros(trace.shape)
    for row, (u, c) in enumerate(at):
        for g in range(trace.shape[2]):
            # Token 0 is predicted by the prompt's last real token.
            p = logprob[row, prompt_len[u] + g - 1].astype(np.float64)
            chosen[u, c, g], entropy[u, c, g] = p[trace[u, c, g]], -(np.exp(p) * p).sum()
    return chosen, entropy


@pytest.mark.devices8
def test_every_token_is_predicted_by_the_one_before_it_for_every_prompt_length(mesh):
    variables, groups = random_variables(MODEL), random_groups()
    expected = row_by_row(MODEL, variables, *groups)
    with jax.set_mesh(mesh):
        placed = jax.device_put(variables, meshes.weight_shardings(variables, mesh))
        found = grouped(MODEL, placed, *jax.device_put(groups, meshes.group_sharding(mesh)))
    # Far from uniform: a token that is off by one position would show.
    assert np.ptp(expected[0]) > 5
    for a, b in zip(found, expected, strict=True):
        # 2 layers in float32, log-probs down to -50
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


@pytest.mark.devices8
def test_a_log_prob_sees_real_prompt_tokens_and_earlier_tokens_alone(mesh):
    variables, (prompt, prompt_len, trace) = random_variables(MODEL), random_groups()
    with jax.set_mesh(mesh):
        variables = jax.device_put(variables, meshes.weight_shardings(variables, mesh))

        def run(*arrays):
            placed = jax.device_put(arrays, meshes.group_sharding(mesh))
            return np.asarray(grouped(MODEL, variables, *placed)[0])

        base = run(prompt, prompt_len, trace)
        padding = np.where(np.arange(8) < prompt_len[:, None], prompt, (prompt + 1) % V)
        np.testing.assert_array_equal(run(padding, prompt_len, trace), base)
        last = np.where(np.arange(8) == prompt_len[:, None] - 1, (prompt + 1) % V, prompt)
        assert (run(last, prompt_len, trace)[:, :, 0] != base[:, :, 0]).all()
        late = trace.copy()
        late[:, 1, 3] = (late[:, 1, 3] + 1) % V
        found = run(prompt, prompt_len, late)
    np.testing.assert_array_equal(found[:, [0, 2]], base[:, [0, 2]])  # other traces of the group
    np.testing.assert_array_equal(found[:, 1, :3], base[:, 1, :3])  # earlier tokens
    assert (found[:, 1, 3:] != base[:, 1, 3:]).all()


def test_response_hidden_has_one_state_a_trace_token():
    variables, (prompt, prompt_len, trace) = random_variables(MODEL), random_groups()
    shape = jax.eval_shape(
        functools.partial(response_hidden, MODEL), variables, prompt, prompt_len, trace
    )
    assert shape.shape == (8, 3, 5, ARCH.D)


def test_tied_heads_use_the_embedding():
    tied = ModelConfig(dataclasses.replace(ARCH, tied=True))
    variables = random_variables(tied)
    assert "head" not in variables["params"]
    params = variables["params"]
    untied = variables | {"params": params | {"head": params["embed"].T}}
    groups = random_groups()
    same = grouped(ModelConfig(ARCH), untied, *groups)
    for a, b in zip(grouped(tied, variables, *groups), same, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_mask_comes_from_lengths_alone():
    lengths = np.array([[0, 1], [4, 3]], np.int32)
    expected = [[[0, 0, 0, 0], [1, 0, 0, 0]], [[1, 1, 1, 1], [1, 1, 1, 0]]]
    mask = length_mask(jnp.asarray(lengths), 4)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, np.array(expected, bool))
