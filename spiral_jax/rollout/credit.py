"""What each trace of the kept problems is trained with: gated advantages, and loss weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from spiral_jax.core.groups import Groups, Role
from spiral_jax.objective.advantages import Advantages, RoundAdvantages, length_gate
from spiral_jax.objective.rewards import Rewards
from spiral_jax.objective.settings import ObjectiveSettings
from spiral_jax.objective.weights import aggregation_weights, candidate_weights
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
    if not len(kept):  # a step that learns from stored populations alone
        return [_nothing(groups) for groups in kept.stages]
    return _credit(kept.stages, advantages, kept.rewards(), objective)


def give_replay_credit(
    replayed: Replayed, advantages: Advantages, objective: ObjectiveSettings
) -> list[Credit]:
    """The credit of the new answers to stored populations, by round; what was read gets none.

    They weigh as all rounds of aggregation do: "unbiased" is the mean over all populations that the
    step has read, those without a signal too, but for those that our own failures have starved.
    """
    valid = np.flatnonzero(~advantages.starved_B)
    if not valid.size:
        return [_nothing(groups) for groups in replayed.stages]
    part = replayed.take(valid)
    stages = [part.candidates, *part.stages]
    of_valid = _credit(stages, advantages.take(valid), part.rewards(), objective)[1:]
    K = replayed.rounds[0].member_BxKxS.shape[1]
    rows = (valid[:, None] * K + np.arange(K)).reshape(-1)
    return [
        _put(_nothing(groups), rows, credit)
        for groups, credit in zip(replayed.stages, of_valid, strict=True)
    ]


def _put(nothing: Credit, rows: np.ndarray, credit: Credit) -> Credit:
    """That of all groups, of which those at `rows` have some."""
    advantage_UxC, weight_UxC = nothing.advantage_UxC.copy(), nothing.weight_UxC.copy()
    advantage_UxC[rows], weight_UxC[rows] = credit.advantage_UxC, credit.weight_UxC
    return Credit(advantage_UxC, weight_UxC)


def _credit(
    stages: Sequence[Groups],
    advantages: Advantages,
    rewards: Sequence[Rewards],
    objective: ObjectiveSettings,
) -> list[Credit]:
    """Of each stage; round r reads stage r and is stage r + 1."""
    credit = [_nothing(groups) for groups in stages]
    for r, (of_round, earned) in enumerate(zip(advantages.rounds, rewards, strict=True)):
        if not earned.stale:
            role = Role.SEARCH if r == 0 else Role.AGGREGATION
            credit[r] += _of_candidates(stages[r], role, of_round, earned, objective)
        if of_round.aggregation_BxKxM is not None:
            credit[r + 1] += _of_aggregations(stages[r + 1], of_round, earned, objective)
    return credit


def _nothing(groups: Groups) -> Credit:
    zero_UxC = np.zeros(groups.trace_len_UxC.shape, np.float32)
    return Credit(zero_UxC, zero_UxC)


def _of_candidates(
    groups: Groups,
    role: Role,
    advantages: RoundAdvantages,
    rewards: Rewards,
    objective: ObjectiveSettings,
) -> Credit:
    gated_BxN = _gate(groups, advantages.candidate_BxN, objective)
    length_BxN = groups.trace_len_UxC.reshape(gated_BxN.shape)
    weight_BxN = candidate_weights(objective, gated_BxN, rewards, length_BxN, role)
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
