"""Rewards of some problems, round by round -> advantages, and which problems have a signal."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from spiral_jax.core.errors import UserError
from spiral_jax.core.groups import Stop
from spiral_jax.objective.estimators import (
    ESTIMATORS,
    OF_AGGREGATIONS_ALONE,
    estimator_named,
)
from spiral_jax.objective.of_own_answers import varies
from spiral_jax.objective.of_sets import aggregation_advantage
from spiral_jax.objective.rewards import Rewards


class FractionalRewards(UserError):
    """The estimator needs to know which traces are right, and some are so in part."""


@dataclasses.dataclass(frozen=True)
class RoundAdvantages:
    """What an estimator makes of one round's rewards of B problems, before the length gate.

    Attributes:
      candidate_BxN: float32, what the traces that are read earn by it.
      aggregation_BxKxM: float32, of the aggregation traces; None without an aggregation stage.
      informative_B: bool, some advantage is not zero, decided exactly.
      starved_B: bool, our own failures have left the problem without a signal.
    """

    candidate_BxN: np.ndarray
    aggregation_BxKxM: np.ndarray | None
    informative_B: np.ndarray
    starved_B: np.ndarray

    def take(self, index: np.ndarray) -> RoundAdvantages:
        aggregation = None if self.aggregation_BxKxM is None else self.aggregation_BxKxM[index]
        return RoundAdvantages(
            self.candidate_BxN[index],
            aggregation,
            self.informative_B[index],
            self.starved_B[index],
        )


@dataclasses.dataclass(frozen=True)
class Advantages:
    """Of B problems: the advantages of each round of aggregation; of one round without that stage.

    The traces of a round that another one reads earn both: against the others of their own set,
    and by the sets of the next round that they are in. So the rounds' objectives are added up, as
    any of them may be the last one at evaluation; how search serves the second round and later ones
    is left to the first.
    """

    rounds: tuple[RoundAdvantages, ...]

    @property
    def starved_B(self) -> np.ndarray:
        """Problems that our own failures have left without a signal in some round."""
        return np.any([of_round.starved_B for of_round in self.rounds], axis=0)

    @property
    def keep_B(self) -> np.ndarray:
        """The keep rule of dynamic sampling: not starved, and some advantage is not zero."""
        informative_B = np.any([of_round.informative_B for of_round in self.rounds], axis=0)
        return informative_B & ~self.starved_B

    def take(self, index: np.ndarray) -> Advantages:
        """Those of the problems at `index`."""
        return Advantages(tuple(of_round.take(index) for of_round in self.rounds))

    def by_stage(self) -> list[np.ndarray]:
        """Of the traces of search [B, N], then of each round [B, K, M]; both kinds added up."""
        stages = [self.rounds[0].candidate_BxN]
        for of_round in self.rounds:
            if of_round.aggregation_BxKxM is not None:
                stages.append(of_round.aggregation_BxKxM)
        for r, of_round in enumerate(self.rounds[1:], start=1):
            stages[r] = stages[r] + of_round.candidate_BxN.reshape(stages[r].shape)
        return stages


def concat_advantages(parts: Sequence[Advantages]) -> Advantages:
    """The problems of all parts, one after the other."""
    rounds = []
    for of_round in zip(*(part.rounds for part in parts), strict=True):
        without = of_round[0].aggregation_BxKxM is None
        rounds.append(
            RoundAdvantages(
                np.concatenate([each.candidate_BxN for each in of_round]),
                None if without else np.concatenate([each.aggregation_BxKxM for each in of_round]),
                np.concatenate([each.informative_B for each in of_round]),
                np.concatenate([each.starved_B for each in of_round]),
            )
        )
    return Advantages(tuple(rounds))


def compute_advantages(
    estimator: str, rewards: Sequence[Rewards], c_R: Sequence[float] = ()
) -> Advantages:
    """The advantages of B problems under one of `ESTIMATORS`, before the length gate.

    Stale candidates earn nothing for being read, whatever the estimator: they are not the policy's.

    Args:
      rewards: of each round of aggregation; of search alone, one.
      c_R: of each round, what an estimator with a `fit` has fitted on earlier steps; (): 0.

    Raises:
      ValueError: another estimator; or another number of c than of rounds.
      FractionalRewards: own rewards other than 0, 1 and NaN where sets are scored by them.
    """
    if c_R:
        rewards = [
            dataclasses.replace(of_round, c=c) for of_round, c in zip(rewards, c_R, strict=True)
        ]
    return Advantages(tuple(_of_round(estimator, of_round) for of_round in rewards))


def _of_round(name: str, rewards: Rewards) -> RoundAdvantages:
    estimator = estimator_named(OF_AGGREGATIONS_ALONE if rewards.stale else name)
    if estimator.needs.bits:
        _check_bits(name, rewards)
    informative_B = estimator.informative(rewards)
    aggregation_BxKxM = None
    if rewards.aggregated_BxKxM is not None:
        aggregation_BxKxM = aggregation_advantage(rewards.aggregated_BxKxM)
        informative_B = informative_B | varies(rewards.aggregated_BxKxM).any(axis=-1)
    return RoundAdvantages(
        estimator.advantage(rewards), aggregation_BxKxM, informative_B, estimator.starved(rewards)
    )


def _check_bits(name: str, rewards: Rewards) -> None:
    own_BxN = rewards.own_BxN
    fractional = own_BxN[~np.isnan(own_BxN) & (own_BxN != 0) & (own_BxN != 1)]
    if fractional.size:
        others = [other for other, row in ESTIMATORS.items() if not row.needs.bits]
        raise FractionalRewards(
            f"config.loss.estimator = {name!r}: scores sets by which of their traces are right, so "
            f"rewards must be 0 or 1, and a trace has earned {fractional[0]:g}. Let the reward "
            f"function return True or False, or choose one of {', '.join(others)}."
        )


def length_gate(
    advantage: np.ndarray, length: np.ndarray, stop: np.ndarray, limit_tokens: int, gate: float
) -> np.ndarray:
    """Positive advantages of too long traces become 0, negative ones stay.

    Paper Eq. 8, whose limit is unpublished.

    Args:
      advantage, length, stop: arrays of one shape; tokens, values of `Stop`.
      limit_tokens: the role's limit on a trace.
      gate: > 1: tokens; 0 < gate <= 1: share of the limit; 0: traces that the limit cut off. A
        trace is too long if strictly longer, so gate = 1 changes nothing.

    Returns:
      float32 of the same shape.

    Raises:
      ValueError: gate is negative or NaN.
    """
    if not gate >= 0:
        raise ValueError(
            f"loss.length_gate = {gate}: must be >= 0 (0: cut-off traces; <= 1: share; else tokens)"
        )
    if gate == 0:
        too_long = stop == Stop.LENGTH
    elif gate <= 1:
        too_long = length / limit_tokens > gate  # not length > gate * limit: 57 > 0.57 * 100
    else:
        too_long = length > gate
    return np.where((advantage > 0) & too_long, 0.0, advantage).astype(np.float32)
