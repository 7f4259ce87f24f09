"""Advantages of several rounds and problems put together, and the length gate."""

import numpy as np
import pytest

from spiral_jax.core.groups import Stop
from spiral_jax.objective.advantages import compute_advantages, concat_advantages, length_gate
from spiral_jax.objective.rewards import Rewards

NAN = float("nan")


def two_rounds(problems, seed):
    """Rewards of N = 4 search traces, and of two rounds of K = 2 sets with M = 2 traces."""
    rng = np.random.default_rng(seed)
    own, first, second = (rng.integers(2, size=(problems, 4)).astype(float) for _ in range(3))
    member = np.tile([[0, 1], [2, 3]], (problems, 1, 1))
    first, second = first.reshape(-1, 2, 2), second.reshape(-1, 2, 2)
    return [
        Rewards(own, first, member),
        Rewards(first.reshape(-1, 4), second, member[:, :, ::-1]),
    ]


def test_a_round_that_is_read_earns_by_its_own_sets_and_by_those_that_read_it():
    advantages = compute_advantages("marginal_mean", two_rounds(8, seed=0))
    search, first, second = advantages.by_stage()
    of_first, of_second = advantages.rounds
    np.testing.assert_array_equal(search, of_first.candidate_BxN)
    read = of_second.candidate_BxN.reshape(8, 2, 2)
    assert read.any() and of_first.aggregation_BxKxM.any()
    np.testing.assert_array_equal(first, of_first.aggregation_BxKxM + read)
    np.testing.assert_array_equal(second, of_second.aggregation_BxKxM)


def test_a_problem_is_kept_if_some_round_has_a_signal_and_none_is_starved():
    flat, mixed, lost = np.ones((1, 2, 2)), np.array([[[1.0, 0], [1, 0]]]), np.full((1, 2, 2), NAN)
    member = np.array([[[0, 1], [2, 3]]])
    outcomes = []
    for first, second in ((flat, flat), (mixed, flat), (flat, mixed), (mixed, lost), (lost, mixed)):
        rewards = [Rewards(np.zeros((1, 4)), each, member) for each in (first, second)]
        advantages = compute_advantages("marginal_mean", rewards)
        outcomes.append((bool(advantages.keep_B[0]), bool(advantages.starved_B[0])))
    assert outcomes == [(False, False), (True, False), (True, False), (False, True), (False, True)]


@pytest.mark.parametrize("estimator", ["marginal_mean", "grpo"])
def test_problems_are_taken_and_put_together_with_all_that_is_known_of_them(estimator):
    rewards = two_rounds(6, seed=1)
    if estimator == "grpo":
        rewards = [Rewards(rewards[0].own_BxN)]
    advantages = compute_advantages(estimator, rewards)
    parts = [advantages.take(np.array(index, int)) for index in ([4, 1], [0], [], [5, 2, 3])]
    again = concat_advantages(parts).take(np.array([2, 1, 4, 5, 0, 3]))
    for one, other in zip(again.by_stage(), advantages.by_stage(), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(again.keep_B, advantages.keep_B)
    np.testing.assert_array_equal(again.starved_B, advantages.starved_B)


# --- the length gate ----------------------------------------------------------------------------


@pytest.mark.parametrize("gate, kept", [
    # 0: only what the limit cut off; a stop id as the last allowed token is no cut
    (0.0,  [1, 1, 1, 0]),
    (0.49, [1, 0, 0, 0]),
    (0.5,  [1, 1, 0, 0]),
    (1.0,  [1, 1, 1, 1]),
    (9,    [0, 0, 0, 0]),
    (10,   [1, 0, 0, 0]),
    (49.5, [1, 0, 0, 0]),
    (50,   [1, 1, 0, 0]),
    (51,   [1, 1, 0, 0]),
    (100,  [1, 1, 1, 1]),
    (1000, [1, 1, 1, 1]),
])  # fmt: skip
def test_length_gate_zeroes_only_positive_advantages_of_longer_traces(gate, kept):
    length = np.tile([10, 50, 100, 100], (3, 1))
    stop = np.tile([Stop.STOP, Stop.STOP, Stop.STOP, Stop.LENGTH], (3, 1))
    advantage = np.array([[0.5] * 4, [-0.5] * 4, [0.0] * 4], np.float32)
    gated = length_gate(advantage, length, stop, 100, gate)
    assert gated.dtype == np.float32
    np.testing.assert_array_equal(gated, [0.5 * np.array(kept), [-0.5] * 4, [0.0] * 4])


def test_a_trace_at_exactly_its_share_of_the_limit_passes_the_gate():
    for percent in range(1, 101):  # 0.57 * 100 < 57 in floats
        length = np.array([percent, percent + 1])
        gated = length_gate(np.ones(2), length, np.zeros(2, int), 100, percent / 100)
        assert gated.tolist() == [1, 0]


@pytest.mark.parametrize("gate", [-0.5, NAN])
def test_a_gate_that_cannot_be_is_refused_with_field_and_value(gate):
    with pytest.raises(ValueError, match=f"length_gate = {gate}"):
        length_gate(np.zeros(1), np.ones(1), np.zeros(1), 9, gate)
