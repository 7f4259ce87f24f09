"""Greedy and truncated draws: which tokens stay, and the log-prob of what is left."""

import functools

import jax
import numpy as np
import pytest
from scipy import stats

from spiral_jax.core.groups import Role
from spiral_jax.sampling.draw import Draw, draw_token


@functools.partial(jax.jit, static_argnums=0)
def draw_many(draw, logits, uniform):
    return draw_token(draw, logits, uniform)


def kept_tokens(draw, logits_V):
    """Probabilities in float64 after every cut, by the definitions."""
    x = logits_V.astype(np.float64) / draw.temperature
    p = np.exp(x - x.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    if draw.top_k:
        p[p < p[order[min(draw.top_k, len(p)) - 1]]] = 0
        p /= p.sum()
    if draw.top_p < 1:
        before = np.cumsum(p[order]) - p[order]
        keep = before < draw.top_p
        keep[0] = True
        p[p < p[order[keep]].min()] = 0
        p /= p.sum()
    p[p < draw.min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize("aggregation", [1.3, 0.0, 0.7])
def test_each_role_is_drawn_as_if_its_temperature_were_that_of_all(aggregation):
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 1.5, (200, 97)).astype(np.float32)
    uniform, role = rng.random(200, np.float32), rng.integers(0, 2, 200)
    both = Draw(0.7, top_k=50, aggregation_temperature=aggregation)
    drawn = jax.device_get(draw_token(both, logits, uniform, role))
    for of_role, temperature in ((Role.SEARCH, 0.7), (Role.AGGREGATION, aggregation)):
        alone = jax.device_get(draw_token(Draw(temperature, top_k=50), logits, uniform))
        token, logprob = (found[role == of_role] for found in drawn)
        np.testing.assert_array_equal(token, alone[0][role == of_role])
        # a division by a constant is compiled to a product: one unit in the last place of -8
        np.testing.assert_allclose(logprob, alone[1][role == of_role], rtol=0, atol=1e-6)
    others = jax.device_get(draw_token(Draw(0.7, top_k=50), logits, uniform))[0]
    assert (aggregation == 0.7) == bool((drawn[0] == others).all())


DRAWS = [
    Draw(1.0, top_p=0.9),
    Draw(0.7, top_p=0.5),
    Draw(1.0, top_k=5),
    Draw(0.7, top_k=1),
    Draw(1.0, top_k=1000),
    Draw(1.0, min_p=0.1),
    Draw(1.3, top_k=20, top_p=0.8, min_p=0.05),
]


@pytest.mark.parametrize("draw", DRAWS, ids=str)
def test_truncated_draws_have_the_frequencies_and_log_probs_of_what_is_left(draw):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.5, 97).astype(np.float32)
    p_V = kept_tokens(draw, logits)
    uniform = rng.random(20_000, np.float32)
    token, logprob = jax.device_get(
        draw_many(draw, np.broadcast_to(logits, (len(uniform), 97)), uniform)
    )
    assert (p_V[token] > 0).all()
    np.testing.assert_allclose(logprob, np.log(p_V[token]), rtol=1e-5, atol=1e-5)
    count, expected = np.bincount(token, minlength=97), p_V * len(uniform)
    rare = expected < 5  # too few for chi-square: one cell together
    observed = np.append(count[~rare], count[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    live = expected > 0
    if live.sum() > 1:
        statistic = ((observed - expected)[live] ** 2 / expected[live]).sum()
        assert statistic < stats.chi2.ppf(0.999, live.sum() - 1)


def test_cuts_agree_with_transformers():
    torch = pytest.importorskip("torch")
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    rng = np.random.default_rng(1)
    for draw, warper in (
        (Draw(1.0, top_k=7), TopKLogitsWarper(7)),
        (Draw(1.0, top_p=0.8), TopPLogitsWarper(0.8)),
        (Draw(1.0, min_p=0.2), MinPLogitsWarper(0.2)),
    ):
        logits = rng.normal(0, 2, (50, 60)).astype(np.float32)
        theirs = torch.isfinite(warper(None, torch.tensor(logits))).numpy()
        ours = np.array([kept_tokens(draw, row) > 0 for row in logits])
        np.testing.assert_array_equal(ours, theirs)


def test_ties_with_the_last_token_of_top_k_stay():
    logits = np.array([3.0, 1.0, 1.0, 1.0, 0.0], np.float32)
    uniform = np.linspace(0, 0.999, 200, dtype=np.float32)
    token, _ = draw_many(Draw(1.0, top_k=2), np.broadcast_to(logits, (200, 5)), uniform)
    assert set(np.asarray(token).tolist()) == {0, 1, 2, 3}


def test_greedy_takes_the_first_of_the_most_likely_tokens_whatever_the_uniform():
    logits = np.array([[0.0, 2.0, 2.0], [5.0, -np.inf, 1.0]], np.float32)
    for uniform in (0.0, 0.999):
        token, logprob = draw_many(Draw(0.0), logits, np.full(2, uniform, np.float32))
        assert token.tolist() == [1, 0] and logprob.tolist() == [0.0, 0.0]
