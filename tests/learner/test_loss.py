"""The policy loss and its mismatch metrics against float64 loops over tokens.

Sums of a few dozen float32 terms of order one: 1e-5 relative leaves room for rounding and for exp's
few ulps.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spiral_jax.core.metrics import Max, divide
from spiral_jax.learner.logprobs import length_mask
from spiral_jax.learner.loss import policy_loss

SHAPE = U, C, G = 3, 4, 6
LENGTH_UxC = np.array([[6, 1, 0, 3], [2, 5, 6, 1], [0, 0, 0, 0]])


def arrays(seed=0, noise=0.5):
    """(logprob, entropy, recorded log-prob, weight, mask)"""
    rng = np.random.default_rng(seed)
    logprob = -rng.exponential(2.0, SHAPE).astype(np.float32)
    recorded = (logprob + noise * rng.normal(size=SHAPE)).astype(np.float32)
    weight = rng.normal(size=(U, C)).astype(np.float32)
    entropy = rng.uniform(0, 3, SHAPE).astype(np.float32)
    return logprob, entropy, recorded, weight, np.asarray(length_mask(LENGTH_UxC, G))


def tokens():
    """(u, c, g) of every token, from the lengths."""
    return [(u, c, g) for u in range(U) for c in range(C) for g in range(LENGTH_UxC[u, c])]


def test_length_mask_holds_exactly_the_tokens():
    mask = np.asarray(length_mask(LENGTH_UxC, G))
    assert mask.dtype == bool
    assert sorted(map(tuple, np.argwhere(mask))) == tokens()


@pytest.mark.parametrize("seed", range(3))
def test_loss_and_metrics_equal_their_definitions_token_by_token(seed):
    logprob, entropy, recorded, weight, mask = arrays(seed)
    loss, metrics = policy_loss(logprob, entropy, recorded, weight, mask)
    log_ratio = [float(logprob[i]) - float(recorded[i]) for i in tokens()]
    ratio = [math.exp(d) for d in log_ratio]
    expected = -sum(float(weight[i[:2]]) * r for i, r in zip(tokens(), ratio, strict=True))
    assert float(loss) == pytest.approx(expected, rel=1e-5)

    def mean(values):
        return sum(values) / len(tokens())

    assert divide(metrics) == pytest.approx(
        {
            "entropy": mean([float(entropy[i]) for i in tokens()]),
            "mismatch/kl": mean([r - 1 - d for r, d in zip(ratio, log_ratio, strict=True)]),
            "mismatch/ratio": mean(ratio),
            "mismatch/ratio_squared": mean([r * r for r in ratio]),
            "mismatch/max_abs_log_ratio": max(abs(d) for d in log_ratio),
        },
        rel=1e-5,
    )
    counts = {float(m.count) for m in metrics.values() if not isinstance(m, Max)}
    assert counts == {len(tokens())}


def test_gradient_is_minus_weight_times_ratio_at_tokens_and_exactly_zero_elsewhere():
    logprob, entropy, recorded, weight, mask = arrays(1)
    gradient = jax.grad(lambda x: policy_loss(x, entropy, recorded, weight, mask)[0])(logprob)
    expected = np.zeros(SHAPE)
    for i in tokens():
        expected[i] = -weight[i[:2]] * math.exp(float(logprob[i]) - float(recorded[i]))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=0)
    assert (np.asarray(gradient)[~mask] == 0).all()


def test_on_policy_the_gradient_is_that_of_reinforce_and_the_mismatch_is_none():
    logprob, entropy, _, weight, mask = arrays(2)
    (_, metrics), gradient = jax.value_and_grad(
        lambda x: policy_loss(x, entropy, logprob, weight, mask), has_aux=True
    )(jnp.asarray(logprob))
    reinforce = jax.grad(lambda x: -jnp.sum(jnp.where(mask, weight[..., None] * x, 0.0)))(logprob)
    np.testing.assert_array_equal(gradient, reinforce)
    found = divide(metrics)
    assert found["mismatch/kl"] == found["mismatch/max_abs_log_ratio"] == 0
    assert found["mismatch/ratio"] == found["mismatch/ratio_squared"] == 1


def test_metrics_carry_no_gradient():
    logprob, entropy, recorded, weight, mask = arrays(3)

    def total_of_metrics(x):
        return sum(jax.tree.leaves(policy_loss(x, entropy, recorded, weight, mask)[1]))

    # entropy reaches the loss as a number of its own; token_logprobs stops its gradient
    assert (np.asarray(jax.grad(total_of_metrics)(logprob)) == 0).all()


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30])
def test_what_lies_behind_the_end_of_a_trace_reaches_nothing(garbage):
    logprob, entropy, recorded, weight, mask = arrays(4)
    both = jax.value_and_grad(policy_loss, has_aux=True)
    clean = both(logprob, entropy, recorded, weight, mask)

    def spoil(a):
        return np.where(mask, a, np.float32(garbage))

    dirty = both(logprob, spoil(entropy), spoil(recorded), weight, mask)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)


def test_without_tokens_the_loss_is_zero_and_there_is_nothing_to_average():
    logprob, entropy, recorded, weight, mask = arrays(5)
    (loss, metrics), gradient = jax.value_and_grad(policy_loss, has_aux=True)(
        logprob, entropy, recorded, weight, np.zeros_like(mask)
    )
    assert loss == 0 and (np.asarray(gradient) == 0).all()
    assert divide(metrics) == {
        "entropy": None,
        "mismatch/kl": None,
        "mismatch/ratio": None,
        "mismatch/ratio_squared": None,
        "mismatch/max_abs_log_ratio": 0.0,
    }
