"""What each trace of the kept problems is trained with: gated advantages, and loss weights."""

from __future__ import annotations

import dataclasses

import numpy as np

from spiral_jax.core.groups import Groups
from spiral_jax.objective.advantages import Advantages, RoundAdvantages, length_gate
from spiral_jax.objective.rewards import Rewards
from spiral_jax.objective.settings import ObjectiveSettings
from spiral_jax.objective.weights import aggregation_weights, candidate_weights, replay_weights
from spiral_jax.rollout.traces import Replayed, Rollouts


@dataclasses.dataclass(frozen=True)
class Credit:
    """Of the traces of one stage: advantage behind the length gate, and loss weight; float32."""

    advantage_UxC: np.ndarray
    weight_UxC: np.ndarray

    def __add__(self, other: Credit) -> Credit:
        return Credit(self.advantage_UxC + other.advantage_UxC, self.weight_UxC + other.weight_UxC)


def give_credit(
    kept: Rollouts, advantages: Advantages, objective: ObjectiveSettings
) -> list[Credit]:
    """The credit of the traces of each of `Rollouts.stages`.

    Each round gives credit to its candidates, which are the stage before it, and to its own
    aggregations; a stage that is both gets the sum.
    """
    credit = [_nothing(groups) for groups in kept.stages]
    for r, (of_round, rewards) in enumerate(zip(advantages.rounds, kept.rewards(), strict=True)):
        credit[r] += _of_candidates(kept.stages[r], of_round, rewards, objective)
        if of_round.aggregation_BxKxM is not None:
            credit[r + 1] += _of_aggregations(kept.stages[r + 1], of_round, rewards, objective)
    return credit


def give_replay_credit(
    replayed: Replayed, advantages: Advantages, objective: ObjectiveSettings
) -> list[Credit]:
    """The credit of a step's answers to all its stored populations, round by round.

    "unbiased" is the mean over all that the step has read.
    """
    credit = []
    for r, (groups, rewards) in enumerate(zip(replayed.stages, replayed.rewards(), strict=True)):
        UxC = groups.trace_len_UxC.shape
        gated_BxKxM = _gate(groups, advantages.rounds[r].aggregation_BxKxM, objective)
        weight_BxKxM = replay_weights(objective, gated_BxKxM, rewards.aggregated_BxKxM)
        given = Credit(gated_BxKxM.reshape(UxC), weight_BxKxM.reshape(UxC))
        if r + 1 < len(replayed.rounds):
            gated_BxN = _gate(groups, advantages.rounds[r + 1].candidate_BxN, objective)
            weight_BxN = objective.search_weight / len(gated_BxN) * gated_BxN
            given += Credit(gated_BxN.reshape(UxC), weight_BxN.reshape(UxC))
        credit.append(given)
    return credit


def _nothing(groups: Groups) -> Credit:
    zero_UxC = np.zeros(groups.trace_len_UxC.shape, np.float32)
    return Credit(zero_UxC, zero_UxC)


def _of_candidates(
    groups: Groups, advantages: RoundAdvantages, rewards: Rewards, objective: ObjectiveSettings
) -> Credit:
    gated_BxN = _gate(groups, advantages.candidate_BxN, objective)
    length_BxN = groups.trace_len_UxC.reshape(gated_BxN.shape)
    weight_BxN = candidate_weights(objective, gated_BxN, rewards, length_BxN)
    UxC = groups.trace_len_UxC.shape
    return Credit(gated_BxN.reshape(UxC), weight_BxN.reshape(UxC))


def _of_aggregations(
    groups: Groups, advantages: RoundAdvantages, rewards: Rewards, objective: ObjectiveSettings
) -> Credit:
    gated_BxKxM = _gate(groups, advantages.aggregation_BxKxM, objective)
    weight_BxKxM = aggregation_weights(objective, gated_BxKxM, rewards.aggregated_BxKxM)
    UxC = groups.trace_len_UxC.shape
    return Credit(gated_BxKxM.reshape(UxC), weight_BxKxM.reshape(UxC))


def _gate(groups: Groups, advantage: np.ndarray, objective: ObjectiveSettings) -> np.ndarray:
    """`length_gate` on advantages of any shape that lists the stage's traces in order."""
    length = groups.trace_len_UxC.reshape(advantage.shape)
    stop = groups.stop_UxC.reshape(advantage.shape)
    return length_gate(advantage, length, stop, groups.requests.max_tokens, objective.length_gate)
