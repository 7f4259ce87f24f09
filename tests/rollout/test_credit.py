"""What the traces of each stage are trained with, and that its expectation is a gradient."""

import itertools
from typing import NamedTuple

import numpy as np
import pytest

from spiral_jax.core.groups import GroupRequests, Groups, Stop
from spiral_jax.objective import of_sets
from spiral_jax.objective.advantages import compute_advantages
from spiral_jax.objective.settings import ObjectiveSettings
from spiral_jax.rollout.credit import give_credit
from spiral_jax.rollout.traces import Rollouts, Round

NAN = float("nan")


def groups_of(reward_UxC, length_UxC=1, max_tokens=10):
    """Groups with these rewards, whose traces end by a stop id after so many tokens."""
    U, C = reward_UxC.shape
    one_U = np.ones(U, np.int32)
    requests = GroupRequests(one_U[:, None], one_U, np.zeros((U, 6), np.int32), C, max_tokens)
    trace = np.ones((U, C, max_tokens), np.int32)
    length = np.broadcast_to(np.int32(length_UxC), (U, C))
    stop = np.full((U, C), Stop.STOP, np.int32)
    return Groups(requests, trace, length, np.zeros(trace.shape, np.float32), stop, reward_UxC)


def rollouts_of(own_BxN, rounds):
    """Rollouts with these rewards; of each round (reward [B, K, M], member [B, K, S])."""
    made = []
    for reward, member in rounds:
        B, K, M = reward.shape
        member_BxKxS = np.broadcast_to(member, (B, K, np.shape(member)[-1]))
        made.append(Round(member_BxKxS, groups_of(reward.reshape(B * K, M))))
    B = len(own_BxN)
    return Rollouts([None] * B, np.arange(B), groups_of(own_BxN), tuple(made))


def credit_of(estimator, rollouts, gate=1.0, w_search=1.0, w_aggregation=1.0):
    objective = ObjectiveSettings(estimator, "unbiased", w_search, w_aggregation, gate)
    advantages = compute_advantages(estimator, rollouts.rewards())
    return give_credit(rollouts, advantages, objective)


# --- by hand ------------------------------------------------------------------------------------

PAIRS = np.array([[0, 1], [2, 3]])  # sets of four candidates


def test_a_stage_that_is_read_and_aggregates_has_the_sum_each_part_behind_the_gate():
    # Round 1: set 0 has (1, 0), set 1 (0, 0). Round 2 reads its traces 0, 1 and 2, 3: the first
    # set scores 1, the second 0.
    first, second = np.array([[[1.0, 0], [0, 0]]]), np.array([[[1.0, 1], [0, 0]]])
    rollouts = rollouts_of(np.zeros((1, 4)), [(first, PAIRS), (second, PAIRS)])
    own = np.array([[0.5, -0.5], [0, 0]])
    read = np.array([[0.5, 0.5], [-0.5, -0.5]])
    # One problem with two sets of two samples: B K (M - 1) = 2.
    own_weight, read_weight = own / 2, read / of_sets.marginal_mean_factor(4, 2, 2)

    search, of_first, of_second = credit_of("marginal_mean", rollouts)
    search_weight = search.weight_UxC
    np.testing.assert_allclose(search.advantage_UxC, [[0.25, 0.25, -0.25, -0.25]])
    np.testing.assert_allclose(of_first.advantage_UxC, own + read)
    np.testing.assert_allclose(of_first.weight_UxC, own_weight + read_weight, rtol=1e-6)
    assert not of_second.advantage_UxC.any() and not of_second.weight_UxC.any()

    # Everything is too long: what is positive goes, of each part before they are added up.
    search, of_first, _ = credit_of("marginal_mean", rollouts, gate=0.05)
    np.testing.assert_allclose(search.advantage_UxC, [[0, 0, -0.25, -0.25]])
    gated = np.minimum(own, 0) + np.minimum(read, 0)
    np.testing.assert_allclose(of_first.advantage_UxC, gated)
    assert gated[0, 1] == -0.5 and (own + read)[0, 1] == 0

    # Each role has its own weight: both parts of an answer have that of aggregation.
    weighed = credit_of("marginal_mean", rollouts, w_search=3.0, w_aggregation=5.0)
    np.testing.assert_allclose(weighed[0].weight_UxC, 3 * search_weight, rtol=1e-6)
    expected = 5 * (own_weight + read_weight)
    np.testing.assert_allclose(weighed[1].weight_UxC, expected, rtol=1e-6)


def test_without_aggregation_the_search_traces_alone_have_credit():
    (search,) = credit_of("rloo", rollouts_of(np.array([[1.0, 0, 0]]), []))
    np.testing.assert_allclose(search.advantage_UxC, [[1, -0.5, -0.5]])
    np.testing.assert_allclose(search.weight_UxC, search.advantage_UxC / 3, rtol=1e-6)


def test_a_problem_whose_second_round_was_lost_to_our_failures_is_not_kept():
    reward = np.zeros((1, 4, 4))
    reward[:, 0] = 1
    lost = np.where(np.arange(4)[:, None] > 0, NAN, reward)  # one set is left
    member = np.arange(4)[:, None] + np.arange(4)
    for second, starved in ((reward, False), (lost, True)):
        rollouts = rollouts_of(np.zeros((1, 8)), [(reward, member), (second, member)])
        advantages = compute_advantages("marginal_mean", rollouts.rewards())
        assert advantages.starved_B.tolist() == [starved]
        assert advantages.keep_B.tolist() == [not starved]


# --- an enumerable policy of two rounds: bits, whose chances depend on the ones they read ---------

N, K, S, M = 3, 2, 2, 2
THETA = [np.array([0.4]), np.array([-0.7, 0.2, 0.9]), np.array([0.5, -0.3, 1.1])]  # by shown ones


class Outcomes(NamedTuple):
    """Every rollout of one problem.

    Attributes:
      bits: of the traces of search, the first and the second round.
      member: the drawn sets of each round.
      shown: of each stage, how many ones each trace reads.
      draws: how many pairs of draws there are.
    """

    bits: list[np.ndarray]
    member: list[np.ndarray]
    shown: list[np.ndarray]
    draws: int


def bits_of(number, size):
    return (number[:, None] >> np.arange(size)) & 1


def every_draw(candidates):
    """All K distinct sets of S candidates."""
    sets = itertools.combinations(range(candidates), S)
    return np.array(list(itertools.combinations(sets, K)))


def shown_ones(candidate_BxN, member_BxKxS):
    each = np.arange(len(candidate_BxN))[:, None, None]
    return np.repeat(candidate_BxN[each, member_BxKxS].sum(axis=-1), M, axis=-1)


@pytest.fixture(scope="module")
def outcomes():
    draws = [every_draw(N), every_draw(K * M)]
    sizes = (2**N, len(draws[0]), 2 ** (K * M), len(draws[1]), 2 ** (K * M))
    number = [index.ravel() for index in np.indices(sizes)]
    search, first, second = (
        bits_of(number[stage], size) for stage, size in ((0, N), (2, K * M), (4, K * M))
    )
    member = [draws[0][number[1]], draws[1][number[3]]]
    shown = [np.zeros_like(search), shown_ones(search, member[0]), shown_ones(first, member[1])]
    return Outcomes([search, first, second], member, shown, len(draws[0]) * len(draws[1]))


def chance_of_one(theta, shown):
    return 1 / (1 + np.exp(-theta[shown]))


def probability(theta, outcomes):
    """Of each outcome."""
    product = np.full(len(outcomes.bits[0]), 1 / outcomes.draws)
    for theta_of_stage, bits, shown in zip(theta, outcomes.bits, outcomes.shown, strict=True):
        one = chance_of_one(theta_of_stage, shown)
        product = product * np.where(bits == 1, one, 1 - one).prod(axis=1)
    return product


def slope_of_objective(outcomes, stage, i):
    """By theta[stage][i], a central difference: of both rounds' success; search climbs the first's.

    A trace that is read by the second round is judged by it too.
    """
    _, first, second = outcomes.bits
    value = first.mean(axis=1) + (second.mean(axis=1) if stage else 0.0)

    def objective(step):
        moved = [part.copy() for part in THETA]
        moved[stage][i] += step
        return (probability(moved, outcomes) * value).sum()

    return (objective(1e-4) - objective(-1e-4)) / 2e-4


@pytest.mark.parametrize("estimator", ["marginal_mean", "with_without"])
def test_the_expected_update_is_the_gradient_of_both_rounds_and_of_the_first_alone_for_search(
    estimator, outcomes
):
    """The exact mean of weight * grad log pi; 1e-6: float32 weights."""
    search, first, second = outcomes.bits
    rounds = [
        (reward.reshape(-1, K, M).astype(float), member)
        for reward, member in zip((first, second), outcomes.member, strict=True)
    ]
    credit = credit_of(estimator, rollouts_of(search.astype(float), rounds))
    p = probability(THETA, outcomes)
    assert p.sum() == pytest.approx(1, abs=1e-12)
    for stage, (bits, shown) in enumerate(zip(outcomes.bits, outcomes.shown, strict=True)):
        # the weights are of a batch of all outcomes
        weight = len(p) * credit[stage].weight_UxC.reshape(bits.shape)
        score = bits - chance_of_one(THETA[stage], shown)
        for i in range(len(THETA[stage])):
            score_i = np.where(shown == i, score, 0.0)  # d log pi / d theta_i
            update = (p[:, None] * weight * score_i).sum()
            slope = slope_of_objective(outcomes, stage, i)
            assert abs(slope) > 1e-3 and update == pytest.approx(slope, abs=1e-6)
