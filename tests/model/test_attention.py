"""Attention over groups against loops in float64, with any blocks, and blind to padding."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spiral_jax.model.attention import groups
from spiral_jax.model.attention.kernels import Kernels
from spiral_jax.model.attention.part import Attended, Cotangents, KeyValue, Lengths
from spiral_jax.model.attention.prompts import KernelPrompts, XlaPrompts
from spiral_jax.model.attention.xla import Xla

# float32 against float64: scores reach about 20, each off by 20 * 6e-8 * a few roundings, and so is
# the softmax.
FLOAT32 = dict(atol=2e-5, rtol=0)
U, C, P, G, E = 3, 2, 7, 5, 8
# (H, J, block): 1, 2 and 3 query heads a key/value head; most blocks divide neither 7 nor 5
CASES = [(4, 4, 1), (4, 2, 2), (6, 2, 3), (3, 1, 4), (6, 2, 6), (4, 4, 7), (6, 2, 512)]
PROMPT_LEN = np.array([7, 1, 4], np.int32)
OF_CPU_PROGRAM = pytest.mark.cpu_bits("arrays and memory of XLA's program for CPUs")


def lengths(prompt_len=PROMPT_LEN, longest_prompt=P, longest_trace=G):
    trace_len = jnp.full((len(prompt_len), C), longest_trace, jnp.int32)
    return Lengths(
        jnp.asarray(prompt_len), trace_len, jnp.int32(longest_prompt), jnp.int32(longest_trace)
    )


def of_prompts(q, k, v, of, backend):
    """With blocks of xla's, or by a backend."""
    backend = Xla(backend) if isinstance(backend, int) else backend
    return groups.prompt_attention(backend, q, KeyValue(k, v), of)


def of_traces(q, prompt_kv, own_kv, of, backend):
    backend = Xla(backend) if isinstance(backend, int) else backend
    return groups.trace_attention(backend, q, KeyValue(*prompt_kv), KeyValue(*own_kv), of)


prompt_attention = jax.jit(of_prompts, static_argnums=4)
trace_attention = jax.jit(of_traces, static_argnums=4)


# ---- a kernel that is none: whole scores, so that what `Kernels` makes of parts can be seen


def dense_scores(q, k, q_len, kv_len, causal):
    """([B, H, T, S] scores, which of them count)."""
    T, S = q.shape[1], k.shape[1]
    score = jnp.einsum("bthe,bshe->bhts", q, k) / np.sqrt(E)
    visible = jnp.arange(S) < kv_len[:, None, None, None]
    if causal:
        visible = visible & (jnp.arange(S) <= jnp.arange(T)[:, None])
    return score, visible & (jnp.arange(T)[:, None] < q_len[:, None, None, None])


def repeat_heads(q, k, v):
    R = q.shape[2] // k.shape[2]
    return jnp.repeat(k, R, axis=2), jnp.repeat(v, R, axis=2)


def dense_forward(q, k, v, q_len, kv_len, *, causal):
    k, v = repeat_heads(q, k, v)
    score, visible = dense_scores(q, k, q_len, kv_len, causal)
    top = jnp.max(jnp.where(visible, score, -1e30), axis=-1, keepdims=True)
    weight = jnp.where(visible, jnp.exp(score - top), 0)
    total = jnp.sum(weight, axis=-1, keepdims=True)
    out = jnp.einsum("bhts,bshe->bthe", weight / jnp.maximum(total, 1e-30), v)
    lse = jnp.where(total > 0, top + jnp.log(jnp.maximum(total, 1e-30)), -1e30)[..., 0]
    return Attended(out, lse)


def dense_backward(q, k, v, q_len, kv_len, attended, d_out, *, causal):
    J = k.shape[2]
    wide_k, wide_v = repeat_heads(q, k, v)
    score, visible = dense_scores(q, wide_k, q_len, kv_len, causal)
    weight = jnp.where(visible, jnp.exp(score - attended.lse_BxHxT[..., None]), 0)
    delta = jnp.einsum("bthe,bthe->bht", attended.out_BxTxHxE, d_out)
    d_score = weight * (jnp.einsum("bthe,bshe->bhts", d_out, wide_v) - delta[..., None])
    d_score /= np.sqrt(E)

    def sum_heads(d):
        return d.reshape(*d.shape[:2], J, -1, E).sum(axis=3)

    return Cotangents(
        jnp.einsum("bhts,bshe->bthe", d_score, wide_k),
        sum_heads(jnp.einsum("bhts,bthe->bshe", d_score, q)),
        sum_heads(jnp.einsum("bhts,bthe->bshe", weight, d_out)),
    )


DENSE = Kernels(dense_forward, dense_backward)


def attend(q_HxE, k_NxJxE, v_NxJxE):
    """One query over the keys that it may see, head by head, in float64."""
    q, k, v = (a.astype(np.float64) for a in (q_HxE, k_NxJxE, v_NxJxE))
    out = np.zeros_like(q)
    for h in range(len(q)):
        j = h // (len(q) // k.shape[1])
        weight = np.exp(k[:, j] @ q[h] / np.sqrt(E))  # scores stay below 100: no shift needed
        out[h] = weight @ v[:, j] / weight.sum()
    return out


def random(rng, *shape):
    return rng.normal(0, 2, size=shape).astype(np.float32)


def prompt_arrays(H, J, seed=0):
    rng = np.random.default_rng(seed)
    return random(rng, U, P, H, E), random(rng, U, P, J, E), random(rng, U, P, J, E)


def trace_arrays(H, J, seed=0):
    rng = np.random.default_rng(seed)
    prompt_kv = random(rng, U, P, J, E), random(rng, U, P, J, E)
    return (
        random(rng, U, C, G, H, E),
        prompt_kv,
        (random(rng, U, C, G, J, E), random(rng, U, C, G, J, E)),
    )


def trace_oracle(q, prompt_kv, own_kv, prompt_len=PROMPT_LEN):
    out = np.zeros(q.shape)
    for u, c, i in np.ndindex(*q.shape[:3]):
        k, v = (
            np.concatenate([prompt_kv[a][u, : prompt_len[u]], own_kv[a][u, c, : i + 1]])
            for a in (0, 1)
        )
        out[u, c, i] = attend(q[u, c, i], k, v)
    return out


@pytest.mark.parametrize("H, J, block", CASES)
def test_a_prompt_token_attends_to_itself_and_what_is_before_it(H, J, block):
    q, k, v = prompt_arrays(H, J, seed=block)
    expected = np.zeros(q.shape)
    for u, p in np.ndindex(U, P):
        expected[u, p] = attend(q[u, p], k[u, : p + 1], v[u, : p + 1])
    np.testing.assert_allclose(prompt_attention(q, k, v, lengths(), block), expected, **FLOAT32)


@pytest.mark.parametrize("H, J, block", CASES)
def test_a_trace_token_attends_to_the_real_prompt_and_to_its_own_past_under_one_softmax(
    H, J, block
):
    arrays = trace_arrays(H, J, seed=block)
    expected = trace_oracle(*arrays)
    for backend in (block, DENSE):
        out = trace_attention(*arrays, lengths(), backend)
        np.testing.assert_allclose(out, expected, **FLOAT32)


def test_with_one_visible_key_the_output_is_its_value():
    # up to the rounding of weight / weight
    q, k, v = prompt_arrays(6, 2)
    first = np.asarray(prompt_attention(q, 5 * k, v, lengths(), 3))[:, 0]
    np.testing.assert_allclose(first, np.repeat(v[:, 0], 3, axis=1), rtol=1e-6)
    q, prompt_kv, own_kv = trace_arrays(6, 2)
    for nothing in (
        lengths(np.zeros(U, np.int32)),
        lengths(np.zeros(U, np.int32), longest_prompt=0),
    ):
        first = np.asarray(trace_attention(q, prompt_kv, own_kv, nothing, 3))[:, :, 0]
        np.testing.assert_allclose(first, np.repeat(own_kv[1][:, :, 0], 3, axis=2), rtol=1e-6)


# ---- gradients: of softmax attention over whole rows, the prompt repeated for each trace, by JAX's
# own rules


def plain_attention(q_CxTxHxE, k_CxTxJxE, v_CxTxJxE, visible_TxT):
    R = q_CxTxHxE.shape[2] // k_CxTxJxE.shape[2]
    k, v = (jnp.repeat(a, R, axis=2) for a in (k_CxTxJxE, v_CxTxJxE))
    score = jnp.einsum("cqhe,ckhe->chqk", q_CxTxHxE, k) / np.sqrt(E)
    weight = jax.nn.softmax(jnp.where(visible_TxT, score, -jnp.inf), axis=-1)
    return jnp.einsum("chqk,ckhe->cqhe", weight, v)


def plain_total(prompt, trace, target, prompt_len, trace_len):
    """sum target * attention over real tokens; rows of a group are plain causal ones without
    padding.
    """
    total = 0.0
    for u, length in enumerate(prompt_len):
        for c, own in enumerate(trace_len[u]):
            row = [
                jnp.concatenate([a[u, :length], b[u, c, :own]])[None]
                for a, b in zip(prompt, trace, strict=True)
            ]
            out = plain_attention(*row, np.tril(np.ones((length + own,) * 2, bool)))[0]
            total += jnp.sum(target[1][u, c, :own] * out[length:])
            if c == 0:  # the prompt's own outputs count once
                total += jnp.sum(target[0][u, :length] * out[:length])
    return total


def grouped_total(backend, prompt, trace, target, prompt_len, trace_len):
    longest = jnp.int32(prompt_len.max()), jnp.int32(trace_len.max())
    of = Lengths(jnp.asarray(prompt_len), jnp.asarray(trace_len), *longest)
    out = of_prompts(*prompt, of, backend)
    own = of_traces(trace[0], prompt[1:], trace[1:], of, backend)
    in_prompt = (np.arange(out.shape[1]) < prompt_len[:, None])[..., None, None]
    in_trace = (np.arange(own.shape[2]) < trace_len[..., None])[..., None, None]
    return jnp.sum(target[0] * jnp.where(in_prompt, out, 0)) + jnp.sum(
        target[1] * jnp.where(in_trace, own, 0)
    )


@pytest.mark.parametrize("backend", [1, 3, 4, 512, DENSE], ids=["1", "3", "4", "512", "kernels"])
def test_gradients_of_uneven_groups_are_those_of_plain_rows(backend):
    rng = np.random.default_rng(0)
    H, J = 6, 2
    prompt, trace = (
        prompt_arrays(H, J, 0),
        tuple(random(rng, U, C, G, heads, E) for heads in (H, J, J)),
    )
    target = random(rng, U, P, H, E), random(rng, U, C, G, H, E)
    prompt_len, trace_len = (
        np.array([5, 1, 4], np.int32),
        np.array([[4, 0], [1, 3], [0, 0]], np.int32),
    )
    gradient = jax.jit(
        jax.grad(functools.partial(grouped_total, backend), argnums=(0, 1)),
    )
    found = gradient(prompt, trace, target, prompt_len, trace_len)
    oracle = jax.grad(plain_total, argnums=(0, 1))
    expected = jax.jit(oracle, static_argnums=(3, 4))(
        prompt, trace, target, tuple(prompt_len), tuple(map(tuple, trace_len))
    )
    # entries of order ten; sums over queries and keys run in another order
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), found, expected
    )


def test_keys_and_values_of_padding_never_leak_into_outputs_or_gradients():
    q, prompt_kv, own_kv = trace_arrays(4, 2)
    padded_UxP = np.arange(P) >= PROMPT_LEN[:, None]
    poisoned_kv = tuple(
        np.where(padded_UxP[..., None, None], np.float32(1e6), a) for a in prompt_kv
    )

    def total(q, prompt_kv, own_kv):
        return jnp.sum(jnp.sin(of_traces(q, prompt_kv, own_kv, lengths(), 2)))

    both = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))
    clean, poisoned = both(q, prompt_kv, own_kv), both(q, poisoned_kv, own_kv)
    jax.tree.map(np.testing.assert_array_equal, clean, poisoned)
    of_keys, of_values = poisoned[1][1]
    assert not np.any(np.asarray(of_keys)[padded_UxP]) and not np.any(
        np.asarray(of_values)[padded_UxP]
    )
    assert np.any(np.asarray(of_keys)[~padded_UxP]), "the real prompt has a gradient"


def test_a_padded_prompt_token_changes_no_real_one():
    q, k, v = prompt_arrays(4, 2)
    poison = np.where((np.arange(P) >= PROMPT_LEN[:, None])[..., None, None], np.float32(1e6), 0)
    clean = prompt_attention(q, k, v, lengths(), 3)
    poisoned = prompt_attention(q + poison, k + poison, v + poison, lengths(), 3)
    for u, length in enumerate(PROMPT_LEN):
        np.testing.assert_array_equal(clean[u, :length], poisoned[u, :length])
    assert np.isfinite(poisoned).all()


def test_blocks_behind_the_longest_prompt_and_trace_are_not_computed():
    q, prompt_kv, own_kv = trace_arrays(4, 2)
    short = lengths(np.array([2, 1, 2], np.int32), longest_prompt=2, longest_trace=3)
    out = np.asarray(trace_attention(q, prompt_kv, own_kv, short, 2))
    expected = trace_oracle(q, prompt_kv, own_kv, [2, 1, 2])[:, :, :3]
    np.testing.assert_allclose(out[:, :, :3], expected, **FLOAT32)
    assert (out[:, :, 4:] == 0).all() and (out[:, :, :4] != 0).all()
    of_prompt = np.asarray(prompt_attention(*prompt_arrays(4, 2), short, 2))
    assert (of_prompt[:, 2:] == 0).all() and (of_prompt[:, :2] != 0).all()


# ---- prefill


@pytest.mark.parametrize("chunk", [1, 2, 4, 8])
def test_prompts_in_chunks_attend_as_whole_ones_by_kernels_too(chunk):
    P, H, J = 8, 4, 2
    rng = np.random.default_rng(chunk)
    q, k, v = random(rng, U, P, H, E), random(rng, U, P, J, E), random(rng, U, P, J, E)
    prompt_len = np.array([8, 1, 5], np.int32)
    for backend in (XlaPrompts(), KernelPrompts(DENSE)):
        store = backend.empty(U, P, J, E, jnp.float32)
        for start in range(0, P, chunk):
            here = slice(start, start + chunk)
            new = KeyValue(k[:, here], v[:, here])
            out, store = backend.attend(store, q[:, here], new, jnp.int32(start), prompt_len)
            for u, p in np.ndindex(U, chunk):
                if start + p < prompt_len[u]:
                    seen = slice(0, start + p + 1)
                    expected = attend(q[u, start + p], k[u, seen], v[u, seen])
                    np.testing.assert_allclose(out[u, p], expected, **FLOAT32)
        written = backend.written(store)
        np.testing.assert_array_equal(written.k, k)
        np.testing.assert_array_equal(written.v, v)


# ---- memory


def compiled_gradient(length, block, C=2, G=64):
    """Of both attentions over one group with a prompt of `length`: two heads of eight."""

    def floats(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    prompt, own = floats(1, length, 2, E), floats(1, C, G, 2, E)
    of = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), lengths(np.array([1], np.int32))
    )

    def total(q, k, v, own_q, own_k, own_v, of):
        own = jnp.sum(jnp.sin(of_traces(own_q, (k, v), (own_k, own_v), of, block)))
        return own + jnp.sum(jnp.sin(of_prompts(q, k, v, of, block)))

    gradient = jax.jit(jax.grad(total, argnums=tuple(range(6))))
    return gradient.lower(prompt, prompt, prompt, own, own, own, of).compile()


def largest_array(program):
    shapes = re.findall(r"[fsbup]\w*\d+\[([\d,]+)\]", program.as_text())
    return max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)


@OF_CPU_PROGRAM
def test_no_array_holds_the_scores_of_all_queries_to_all_keys():
    P, G, C, block = 512, 64, 2, 32
    program = compiled_gradient(P, block, C, G)
    queries = P * 2 * E  # of all heads
    assert largest_array(program) <= queries < min(P * P, C * G * P)
    # The same count sees scores where there are some.
    assert largest_array(compiled_gradient(P, P, C, G)) >= P * P


@OF_CPU_PROGRAM
def test_memory_of_a_17_thousand_token_prompt_is_that_of_its_arrays():
    length = 17_920
    array = length * 2 * E * 4
    # queries, keys, values, output, their cotangents and transposed copies; the scores would be
    # 2,240 of them
    assert compiled_gradient(length, 512).memory_analysis().temp_size_in_bytes < 40 * array


def test_bfloat16_stays_bfloat16_and_softmax_is_float32():
    arrays = trace_arrays(4, 2)
    narrow = jax.tree.map(lambda a: jnp.asarray(a).astype(jnp.bfloat16), arrays)
    out = trace_attention(*narrow, lengths(), 2)
    assert out.dtype == jnp.bfloat16
    wide = jax.tree.map(lambda a: np.asarray(a, np.float32), narrow)
    # Output, weights and scaled queries are rounded to 8 bits: |v| <= 8, so 8 * 2^-8 * about 2.
    np.testing.assert_allclose(np.asarray(out, np.float32), trace_oracle(*wide), atol=0.07, rtol=0)
