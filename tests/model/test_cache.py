"""Attention over caches against a plain softmax, in blocks, and what int8 storage costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spiral_jax.model.attention.caches import prefix_attention
from spiral_jax.model.cache import cache_entries, empty_cache, read_tokens, write_entries

ROUNDING = 1e-5  # float32 sums of outputs of order 1 in another order

prefix = jax.jit(prefix_attention)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def softmax_attention(q_HxE, k_TxJxE, v_TxJxE):
    """One query in float64, each query head on its key/value head."""
    H, E = q_HxE.shape
    repeat = H // k_TxJxE.shape[1]
    k, v = (np.repeat(a.astype(np.float64), repeat, axis=1) for a in (k_TxJxE, v_TxJxE))
    score = np.einsum("he,the->ht", q_HxE.astype(np.float64), k) * E**-0.5
    weight = np.exp(score - score.max(-1, keepdims=True))
    return np.einsum("ht,the->he", weight / weight.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("Q", [1, 4, 12])
def test_prefix_attention_is_causal_wherever_the_chunk_starts(Q):
    U, T, H, J, E = 2, 12, 4, 2, 8
    q, (k, v) = normal(0, U, T, H, E), normal(1, 2, U, T, J, E)
    cache = cache_entries(k, v, jnp.float32)
    for start in range(0, T, Q):
        out = prefix(q[:, start : start + Q], cache, start)
        for u, i in np.ndindex(U, Q):
            n = start + i + 1
            expected = softmax_attention(q[u, n - 1], k[u, :n], v[u, :n])
            np.testing.assert_allclose(out[u, i], expected, rtol=0, atol=ROUNDING)


def test_prefix_attention_at_17k_tokens_never_holds_all_scores():
    T, Q, H, J, E = 17_920, 512, 2, 1, 16
    q, (k, v) = normal(0, 1, Q, H, E), normal(1, 2, 1, T, J, E)
    cache = cache_entries(k, v, jnp.float32)
    program = prefix.lower(q, cache, jnp.int32(0)).compile()
    out = program(q, cache, jnp.int32(T - Q))
    for i in (0, 100, Q - 1):
        n = T - Q + i + 1
        np.testing.assert_allclose(
            out[0, i], softmax_attention(q[0, i], k[0, :n], v[0, :n]), rtol=0, atol=ROUNDING
        )
    if jax.default_backend() == "cpu":  # on GPUs the libraries' workspace counts too
        # A few blocks of scores, not Q x T.
        assert program.memory_analysis().temp_size_in_bytes < 12 * 4 * H * Q * Q


def test_peaked_scores_of_any_size_stay_finite_and_exact():
    U, Q, H, J, E = 1, 6, 2, 2, 4
    q, (k, v) = 300 * normal(0, U, Q, H, E), normal(1, 2, U, Q, J, E)
    out = prefix(q[:, 3:6], cache_entries(k, v, jnp.float32), 3)
    for i in range(3):
        expected = softmax_attention(q[0, 3 + i], k[0, : 4 + i], v[0, : 4 + i])
        # Scores of order 1,000 round to 1e-4.
        np.testing.assert_allclose(out[0, i], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_what_is_written_is_read_back_where_it_was_written(dtype):
    cache = empty_cache((2, 3), 8, 10, jnp.dtype(dtype))
    k, v = normal(0, 2, 2, 4, 3, 8)
    written = write_entries(cache, cache_entries(k, v, jnp.dtype(dtype)), 5)
    found = read_tokens(written, 5, 4)
    for name, array in cache_entries(k, v, jnp.dtype(dtype)).items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
    assert not any(np.asarray(a).any() for a in read_tokens(written, 0, 5).values())


def test_int8_entries_are_within_half_a_step_of_the_largest():
    k, v = normal(3, 2, 4, 5, 2, 16)
    k[0, 0] = 0  # all zeros stay zeros
    cache = cache_entries(k, v, jnp.dtype(jnp.int8))
    for name, array in (("k", np.moveaxis(k, -3, -1)), ("v", np.moveaxis(v, -3, -2))):
        back = np.asarray(cache[name], np.float32) * np.asarray(cache[f"{name}_scale"])
        bound = np.abs(array).max(axis=-2 if name == "k" else -1, keepdims=True) / 127 / 2
        assert (np.abs(back - array) <= bound * 1.001 + 1e-12).all()
