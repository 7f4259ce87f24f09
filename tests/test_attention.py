"""Attention over groups against explicit loops in float64, with any query blocks, and blind to what is padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spiral_jax.model import attention

prompt_attention = jax.jit(attention.prompt_attention, static_argnums=3)
trace_attention = jax.jit(attention.trace_attention, static_argnums=5)

# float32 against float64: scores reach about 20, each off by 20 * 6e-8 * a few roundings, and so is the softmax.
FLOAT32 = dict(atol=2e-5, rtol=0)
U, C, P, G, E = 3, 2, 7, 5, 8
# (H, J, block): 1, 2 and 3 query heads a key/value head; most blocks divide neither 7 nor 5
CASES = [(4, 4, 1), (4, 2, 2), (6, 2, 3), (3, 1, 4), (6, 2, 6), (4, 4, 7), (6, 2, 512)]
PROMPT_LEN = np.array([7, 1, 4], np.int32)
IN_TRAINING = np.tile(np.arange(G, dtype=np.int32), (U, 1))


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


def trace_arrays(H, J, seed=0, Q=G):
    rng = np.random.default_rng(seed)
    prompt_kv = random(rng, U, P, J, E), random(rng, U, P, J, E)
    own_kv = random(rng, U, C, G, J, E), random(rng, U, C, G, J, E)
    return random(rng, U, C, Q, H, E), prompt_kv, PROMPT_LEN, own_kv


def trace_oracle(q, prompt_kv, prompt_len, own_kv, index):
    out = np.zeros(q.shape)
    for u, c, i in np.ndindex(*q.shape[:3]):
        k, v = (np.concatenate([prompt_kv[a][u, : prompt_len[u]], own_kv[a][u, c, : index[u, i] + 1]]) for a in (0, 1))
        out[u, c, i] = attend(q[u, c, i], k, v)
    return out


@pytest.mark.parametrize("H, J, block", CASES)
def test_a_prompt_token_attends_to_itself_and_what_is_before_it(H, J, block):
    q, k, v = prompt_arrays(H, J, seed=block)
    expected = np.zeros(q.shape)
    for u, p in np.ndindex(U, P):
        expected[u, p] = attend(q[u, p], k[u, : p + 1], v[u, : p + 1])
    np.testing.assert_allclose(prompt_attention(q, k, v, block), expected, **FLOAT32)


@pytest.mark.parametrize("H, J, block", CASES)
def test_a_trace_token_attends_to_the_real_prompt_and_to_its_own_past_under_one_softmax(H, J, block):
    arrays = trace_arrays(H, J, seed=block)
    out = trace_attention(*arrays, IN_TRAINING, block)
    np.testing.assert_allclose(out, trace_oracle(*arrays, IN_TRAINING), **FLOAT32)


def test_in_decoding_each_group_may_be_at_another_step():
    arrays = trace_arrays(4, 2, Q=1)
    index = np.array([[0], [4], [2]], np.int32)
    np.testing.assert_allclose(trace_attention(*arrays, index, 512), trace_oracle(*arrays, index), **FLOAT32)


def test_with_one_visible_key_the_output_is_its_value():
    q, k, v = prompt_arrays(6, 2)
    first = np.asarray(prompt_attention(q, 5 * k, v, 3))[:, 0]
    np.testing.assert_array_equal(first, np.repeat(v[:, 0], 3, axis=1))
    q, prompt_kv, _, own_kv = trace_arrays(6, 2)
    first = np.asarray(trace_attention(q, prompt_kv, np.zeros(U, np.int32), own_kv, IN_TRAINING, 3))[:, :, 0]
    np.testing.assert_array_equal(first, np.repeat(own_kv[1][:, :, 0], 3, axis=2))


DECODING = np.array([[0], [2], [4]], np.int32)  # what is behind a group's index is not written yet


@pytest.mark.parametrize("index, block, huge", [(IN_TRAINING, 2, 1e6), (DECODING, 512, -1e6)])
def test_keys_and_values_of_padding_never_leak_into_outputs_or_gradients(index, block, huge):
    q, prompt_kv, prompt_len, own_kv = trace_arrays(4, 2, Q=index.shape[1])
    padded_UxP = np.arange(P) >= prompt_len[:, None]
    unwritten_UxG = np.arange(G) > index[:, -1:]
    poisoned_prompt = tuple(np.where(padded_UxP[..., None, None], np.float32(huge), a) for a in prompt_kv)
    poisoned_own = tuple(np.where(unwritten_UxG[:, None, :, None, None], np.float32(huge), a) for a in own_kv)

    def total(q, prompt_kv, own_kv):
        return jnp.sum(jnp.sin(trace_attention(q, prompt_kv, prompt_len, own_kv, index, block)))

    both = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))
    clean, poisoned = both(q, prompt_kv, own_kv), both(q, poisoned_prompt, poisoned_own)
    jax.tree.map(np.testing.assert_array_equal, clean, poisoned)
    of_keys, of_values = poisoned[1][1]
    assert not np.any(np.asarray(of_keys)[padded_UxP]) and not np.any(np.asarray(of_values)[padded_UxP])
    assert np.any(np.asarray(of_keys)[~padded_UxP]), "the real prompt has a gradient"


def test_a_padded_prompt_token_changes_no_real_one():
    q, k, v = prompt_arrays(4, 2)
    poison = np.where((np.arange(P) >= PROMPT_LEN[:, None])[..., None, None], np.float32(1e6), 0)
    clean, poisoned = prompt_attention(q, k, v, 3), prompt_attention(q + poison, k + poison, v + poison, 3)
    for u, length in enumerate(PROMPT_LEN):
        np.testing.assert_array_equal(clean[u, :length], poisoned[u, :length])
    assert np.isfinite(poisoned).all()


def test_gradients_with_blocks_are_those_without():
    arrays, trace = prompt_arrays(6, 2), trace_arrays(6, 2)
    rng = np.random.default_rng(1)
    target, trace_target = rng.normal(size=arrays[0].shape), rng.normal(size=trace[0].shape)

    def total(block, arrays, q, prompt_kv, own_kv):
        out = trace_attention(q, prompt_kv, PROMPT_LEN, own_kv, IN_TRAINING, block)
        return jnp.sum(target * prompt_attention(*arrays, block)) + jnp.sum(trace_target * out)

    gradient = jax.jit(
        jax.grad(total, argnums=(1, 2, 3, 4)),
        static_argnums=0,
        compiler_options={"xla_backend_optimization_level": 0},  # of LLVM: compiled for one run
    )
    floats = (arrays, trace[0], trace[1], trace[3])
    # Sums over queries run in another order: 1e-5 relative to entries of order 1, plus 1e-5 for those near zero.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, gradient(3, *floats), gradient(512, *floats))


@pytest.mark.parametrize("differentiate", [False, True])
def test_with_blocks_the_scores_of_all_queries_never_exist_at_once(differentiate):
    shape = jax.ShapeDtypeStruct((1, 256, 4, 8), jnp.float32)

    def temporaries(block):
        def total(q, k, v):
            return jnp.sum(jnp.sin(prompt_attention(q, k, v, block)))

        program = jax.jit(jax.grad(total, argnums=(0, 1, 2)) if differentiate else total)
        return program.lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes

    scores = 256 * 256 * 4 * 4
    assert temporaries(256) >= scores
    assert temporaries(16) < scores / 2


def test_bfloat16_stays_bfloat16_and_softmax_is_float32():
    arrays = trace_arrays(4, 2)
    narrow = jax.tree.map(lambda a: jnp.asarray(a).astype(jnp.bfloat16) if a.dtype == np.float32 else a, arrays)
    out = trace_attention(*narrow, IN_TRAINING, 2)
    assert out.dtype == jnp.bfloat16
    wide = jax.tree.map(lambda a: np.asarray(a, np.float32) if a.dtype == jnp.bfloat16 else a, narrow)
    # Output, weights and scaled queries are rounded to 8 bits: |v| <= 8, so 8 * 2^-8 * about 2.
    np.testing.assert_allclose(np.asarray(out, np.float32), trace_oracle(*wide, IN_TRAINING), atol=0.07, rtol=0)
