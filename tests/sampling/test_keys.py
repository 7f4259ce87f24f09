"""Draws follow the exact distribution; a trace's numbers depend on its own integers alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from spiral_jax.sampling.draw import Draw, draw_token
from spiral_jax.sampling.keys import trace_keys, uniforms


@functools.partial(jax.jit, static_argnums=2)
def draw(logits, uniform, temperature):
    return draw_token(Draw(temperature), logits, uniform)


@functools.partial(jax.jit, static_argnums=(0, 2))
def numbers(seed, id_Ux6, traces, position):
    shape = len(id_Ux6), traces
    id_UxCx6 = jnp.broadcast_to(id_Ux6[:, None], (*shape, 6))
    keys = trace_keys(seed, id_UxCx6, jnp.broadcast_to(jnp.arange(traces), shape))
    return uniforms(keys, jnp.full(shape, position))


BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))
# Cumulative sums of float32: each of a few dozen roundings (additions of a blocked sum, the
# exponential, division by the temperature) moves a boundary by at most 2**-24 of the whole. Found:
# 2.4e-7.
BOUND = 32 * 2.0**-24
IDS = np.array([[0, 5, 17, 1, 0, 3]], np.int32)  # purpose, step, cursor, round, role, set


def oracle(logits_V, temperature):
    """Probabilities and cumulative distribution in float64."""
    x = logits_V.astype(np.float64) / temperature
    mass = np.exp(x - x.max())
    return mass / mass.sum(), np.cumsum(mass) / mass.sum()


def hard_uniforms(cumulative_V, rng):
    """2,048 numbers in [0, 1): both ends, some near boundaries, the rest random.

    Near: within 5 roundings of up to 150 boundaries.
    """
    at = rng.choice(np.unique(cumulative_V.astype(np.float32)), 150)
    near = [at]
    for end in (np.float32(-1), np.float32(2)):
        step = at
        for _ in range(5):
            near.append(step := np.nextafter(step, end))
    chosen = np.unique(np.concatenate([*near, [np.float32(0), BELOW_ONE]]))
    chosen = chosen[(chosen >= 0) & (chosen < 1)]
    return np.concatenate([chosen, rng.random(2048 - len(chosen), np.float32)])


def many_logits(V, rng):
    """Rows of every kind: flat, ordinary, peaked, one token far above the rest, most banned."""
    rows = {"flat": np.zeros(V), "ordinary": rng.normal(0, 2, V), "peaked": rng.normal(0, 30, V)}
    # exp(-200) is zero in float32
    rows["certain"] = np.where(np.arange(V) == rng.integers(V), 0, -200.0)
    for share in (0.1, 0.5, 0.9):
        banned = rng.random(V) < share
        banned[rng.integers(V)] = False
        rows[f"banned {share}"] = np.where(banned, -np.inf, rng.normal(0, 2, V))
    for name, live in (("only the first", 0), ("only the last", V - 1)):
        rows[name] = np.where(np.arange(V) == live, rng.normal(), -np.inf)
    return {name: row.astype(np.float32) for name, row in rows.items()}


@pytest.mark.parametrize("V", [1, 2, 40, 511, 512, 513, 1100, 1536])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_draw_is_the_inverse_of_the_cumulative_distribution_and_never_a_token_of_probability_zero(
    V, temperature
):
    rng = np.random.default_rng(V)
    for name, row_V in many_logits(V, rng).items():
        p_V, cumulative_V = oracle(row_V, temperature)
        uniform = hard_uniforms(cumulative_V, rng)
        token, logprob = jax.device_get(
            draw(np.broadcast_to(row_V, (len(uniform), V)), uniform, temperature)
        )
        assert token.dtype == np.int32 and token.min() >= 0 and token.max() < V, name
        in_float32 = np.exp((row_V - row_V.max()) / np.float32(temperature))
        assert (in_float32[token] > 0).all(), name
        # how far the uniform lies outside of the token's own interval
        below = np.concatenate([[0], cumulative_V])[token] - uniform
        above = uniform - cumulative_V[token]
        assert np.maximum(below, above).max() <= BOUND, name
        np.testing.assert_allclose(logprob, np.log(p_V[token]), rtol=1e-6, atol=1e-5, err_msg=name)


def test_draw_is_the_oracles_token_for_all_but_5_in_10_000_random_uniforms():
    # 1,100 boundaries, each off by about 1e-7: a uniform falls between ours and the oracle's with
    # probability 1e-4
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, 1100).astype(np.float32)
    uniform = rng.random(20_000, np.float32)
    token, _ = draw(np.broadcast_to(logits, (len(uniform), 1100)), uniform, 1.0)
    expected = np.searchsorted(oracle(logits, 1.0)[1], uniform, side="right")
    assert (np.asarray(token) != expected).mean() <= 5e-4


def test_draw_takes_any_leading_axes():
    rng = np.random.default_rng(0)
    logits, uniform = (
        rng.normal(size=(3, 2, 600)).astype(np.float32),
        rng.random((3, 2), np.float32),
    )
    token, logprob = draw(logits, uniform, 1.0)
    assert token.shape == logprob.shape == (3, 2) and logprob.dtype == jnp.float32
    for at in np.ndindex(3, 2):
        one = draw(logits[at], uniform[at], 1.0)
        assert one[0] == token[at]
        # another shape may sum in another order
        np.testing.assert_allclose(one[1], logprob[at], rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_sampled_frequencies_are_the_probabilities(temperature):
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 1.5, 97).astype(np.float32)
    ids_Ux6 = np.tile(IDS, (40, 1))
    ids_Ux6[:, 2] = np.arange(40)
    uniform = np.ravel([numbers(0, ids_Ux6, 25, position) for position in range(20)])
    token, _ = draw(np.broadcast_to(logits, (len(uniform), 97)), uniform, temperature)
    count = np.bincount(token, minlength=97)
    expected = oracle(logits, temperature)[0] * count.sum()
    rare = expected < 5  # too few for chi-square: one cell together
    observed = np.append(count[~rare], count[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    assert count.sum() == 20_000 and len(observed) > 50
    statistic = ((observed - expected) ** 2 / expected)[expected > 0].sum()
    assert statistic < stats.chi2.ppf(0.999, len(observed) - 1)


def test_numbers_are_uniform_and_those_of_traces_positions_and_groups_are_uncorrelated():
    ids_Ux6 = np.tile(IDS, (40, 1))
    ids_Ux6[:, 5] = np.arange(40)
    x = np.stack([numbers(0, ids_Ux6, 25, position) for position in range(25)], axis=-1)
    assert x.dtype == np.float32 and x.min() >= 0 and x.max() < 1
    assert len(np.unique(x)) > 0.99 * x.size  # 2**23 values: a few of the 25,000 coincide by chance
    assert stats.kstest(x.ravel(), "uniform").pvalue > 1e-3
    centred = (x - 0.5) * np.sqrt(12)
    for axis in range(3):
        neighbours = np.take(centred, range(1, x.shape[axis]), axis) * np.take(
            centred, range(x.shape[axis] - 1), axis
        )
        assert abs(neighbours.mean()) * np.sqrt(neighbours.size) < 4  # standard deviations


def number(seed, ids, trace, position):
    return numbers(seed, np.array([ids], np.int32), 8, position)[0, trace].item()


def test_changing_any_one_integer_changes_the_number():
    base = {"seed": 0, "ids": (0, 5, 17, 1, 0, 3), "trace": 2, "position": 7}
    changed = [base, base | {"seed": 1}, base | {"trace": 3}, base | {"position": 8}]
    for i in range(6):
        for by in (1, 1000):
            changed.append(
                base | {"ids": tuple(v + by * (i == j) for j, v in enumerate(base["ids"]))}
            )
    changed.append(base | {"ids": (0, 17, 5, 1, 0, 3)})  # which integer is which matters
    changed.append(base | {"trace": 7, "position": 2})
    assert len({number(**what) for what in changed}) == len(changed)


def test_a_groups_numbers_depend_neither_on_batch_nor_order_nor_on_the_number_of_traces():
    rng = np.random.default_rng(0)
    ids_Ux6 = rng.integers(0, 1000, (9, 6)).astype(np.int32)
    whole = np.asarray(numbers(0, ids_Ux6, 4, 6))
    order = rng.permutation(9)
    np.testing.assert_array_equal(numbers(0, ids_Ux6[order], 4, 6), whole[order])
    np.testing.assert_array_equal(numbers(0, ids_Ux6[4:5], 4, 6), whole[4:5])
    np.testing.assert_array_equal(numbers(0, ids_Ux6, 7, 6)[:, :4], whole)


def test_regression_one_trace_has_the_numbers_that_it_always_had():
    """Golden values of (seed 0, ids 0 5 17 1 0 3, trace 2).

    A change here breaks the replay of recorded runs.
    """
    found = [number(0, (0, 5, 17, 1, 0, 3), 2, position) for position in (0, 1, 4095)]
    np.testing.assert_array_equal(
        np.float32(found), np.float32([0.9242995977401733, 0.8880860805511475, 0.9512561559677124])
    )
