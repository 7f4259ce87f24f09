"""Problems with all their traces, stage by stage: what was drawn and what it has earned."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from spiral_jax.core.groups import Groups, concat_groups, take_groups
from spiral_jax.objective.rewards import Rewards
from spiral_jax.rollout.populations import Population
from spiral_jax.tasks.problem import Problem
from spiral_jax.verifier.rewards import Verdict


@dataclasses.dataclass(frozen=True)
class Round:
    """One round of aggregation of B problems.

    Attributes:
      member_BxKxS: which candidates each set holds: search traces in the first round, in a later
        one the K * M traces of the round before, numbered set by set.
      groups: U = B * K in (problem, set) order.
    """

    member_BxKxS: np.ndarray
    groups: Groups

    @property
    def reward_BxKxM(self) -> np.ndarray:
        return self.groups.reward_UxC.reshape(*self.member_BxKxS.shape[:2], -1)

    def of_problem(self, b: int) -> Groups:
        """The groups of one problem."""
        return self.take(np.array([b])).groups

    def take(self, index: np.ndarray) -> Round:
        """Of the problems at `index`."""
        K = self.member_BxKxS.shape[1]
        of_problems = (index[:, None] * K + np.arange(K)).reshape(-1)
        return Round(self.member_BxKxS[index], take_groups(self.groups, of_problems))


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """B problems with their traces: search, then every round of aggregation.

    Attributes:
      problems: B of them, in cursor order.
      cursor_B: where each stands in the task's stream.
      search: U = B groups. Their rewards are own correctness: a diagnostic for the estimators over
        drawn sets.
      rounds: those of aggregation; none without that stage.
      strategy_BxN: numbers of the search traces' strategies in each problem, -1 = none; None unless
        the estimator needs them.
    """

    problems: list[Problem]
    cursor_B: np.ndarray
    search: Groups
    rounds: tuple[Round, ...] = ()
    strategy_BxN: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.problems)

    @property
    def stages(self) -> list[Groups]:
        """Search, then every round: round r reads stage r - 1 and is stage r."""
        return [self.search, *(round.groups for round in self.rounds)]

    @property
    def verdicts(self) -> list[Verdict]:
        """Of all traces, stage by stage."""
        return [verdict for groups in self.stages for verdict in groups.verdict_UxC.reshape(-1)]

    @property
    def aggregation(self) -> Groups | None:
        """U = R * B * K, round by round; None without that stage."""
        return concat_groups([round.groups for round in self.rounds]) if self.rounds else None

    def answers(self) -> list[Population]:
        """The population of each problem: the first round's answers.

        So what is kept has earned by being read too, where there is a second round.
        """
        return [
            Population.of(cursor, 1, self.rounds[0].of_problem(b))
            for b, cursor in enumerate(self.cursor_B.tolist())
        ]

    def rewards(self) -> list[Rewards]:
        """What the objective is made from: of each round, its candidates' rewards and its own.

        Without aggregation it is one, of the search traces alone.
        """
        if not self.rounds:
            return [Rewards(self.search.reward_UxC, strategy_BxN=self.strategy_BxN)]
        rewards = []
        for r, round in enumerate(self.rounds):
            own_BxN = self.stages[r].reward_UxC.reshape(len(self), -1)
            strategy_BxN = self.strategy_BxN if r == 0 else None
            rewards.append(Rewards(own_BxN, round.reward_BxKxM, round.member_BxKxS, strategy_BxN))
        return rewards

    def take(self, index: np.ndarray) -> Rollouts:
        """The problems at `index`, with their groups."""
        return Rollouts(
            problems=[self.problems[b] for b in index],
            cursor_B=self.cursor_B[index],
            search=take_groups(self.search, index),
            rounds=tuple(round.take(index) for round in self.rounds),
            strategy_BxN=None if self.strategy_BxN is None else self.strategy_BxN[index],
        )

    def without_advantages(self) -> Rollouts:
        """The same with advantages that are all 0: nothing is trained on."""
        return self.with_advantages(
            [np.zeros(groups.trace_len_UxC.shape, np.float32) for groups in self.stages]
        )

    def with_advantages(self, advantages: Sequence[np.ndarray]) -> Rollouts:
        """The same with advantages [U, C] of each of `stages`."""
        stages = [
            dataclasses.replace(groups, advantage_UxC=advantage_UxC)
            for groups, advantage_UxC in zip(self.stages, advantages, strict=True)
        ]
        rounds = [
            dataclasses.replace(round, groups=groups)
            for round, groups in zip(self.rounds, stages[1:], strict=True)
        ]
        return dataclasses.replace(self, search=stages[0], rounds=tuple(rounds))


@dataclasses.dataclass(frozen=True)
class Replayed:
    """B problems of earlier steps whose stored populations were aggregated once more.

    Attributes:
      problems: B of them, in cursor order.
      populations: what was read, of each problem.
      candidates: U = B: the same as groups, with rewards and verdicts of when they were sampled.
      rounds: what this step has made of them, round by round.
    """

    problems: list[Problem]
    populations: list[Population]
    candidates: Groups
    rounds: tuple[Round, ...]

    def __len__(self) -> int:
        return len(self.problems)

    @property
    def cursor_B(self) -> np.ndarray:
        """Where each problem stands in the task's stream."""
        return np.array([population.cursor for population in self.populations])

    @property
    def stages(self) -> list[Groups]:
        """What this step has sampled."""
        return [round.groups for round in self.rounds]

    @property
    def verdicts(self) -> list[Verdict]:
        """Of what this step has sampled."""
        return [verdict for groups in self.stages for verdict in groups.verdict_UxC.reshape(-1)]

    def rewards(self) -> list[Rewards]:
        """Of each round; the candidates of the first are stale."""
        read, rewards = self.candidates, []
        for r, round in enumerate(self.rounds):
            own_BxN = read.reward_UxC.reshape(len(self), -1)
            rewards.append(Rewards(own_BxN, round.reward_BxKxM, round.member_BxKxS, stale=r == 0))
            read = round.groups
        return rewards

    @property
    def age_B(self) -> np.ndarray:
        """Steps from the sampling of each population to that of the answers to it."""
        step = self.stages[0].requests.id_Ux6[0, 1]
        return step - np.array([population.step for population in self.populations])

    def answers(self) -> list[list[Population]]:
        """The populations of each problem that are one round deeper, two, and so on."""
        return [
            [
                Population.of(read.cursor, read.round + r, round.of_problem(b))
                for r, round in enumerate(self.rounds, start=1)
            ]
            for b, read in enumerate(self.populations)
        ]

    def take(self, index: np.ndarray) -> Replayed:
        """The problems at `index`, with their groups."""
        return Replayed(
            problems=[self.problems[b] for b in index],
            populations=[self.populations[b] for b in index],
            candidates=take_groups(self.candidates, index),
            rounds=tuple(round.take(index) for round in self.rounds),
        )

    def with_advantages(self, advantages: Sequence[np.ndarray]) -> Replayed:
        """The same with advantages [U, C] of each of `stages`."""
        rounds = [
            dataclasses.replace(round, groups=dataclasses.replace(round.groups, advantage_UxC=each))
            for round, each in zip(self.rounds, advantages, strict=True)
        ]
        return dataclasses.replace(self, rounds=tuple(rounds))


def concat_replayed(parts: Sequence[Replayed]) -> Replayed:
    """The problems of all parts, one after the other."""
    by_round = zip(*(part.rounds for part in parts), strict=True)
    return Replayed(
        problems=[problem for part in parts for problem in part.problems],
        populations=[population for part in parts for population in part.populations],
        candidates=concat_groups([part.candidates for part in parts]),
        rounds=tuple(concat_rounds(of_round) for of_round in by_round),
    )


def concat_rounds(parts: Sequence[Round]) -> Round:
    """The problems of all parts, one after the other."""
    member_BxKxS = np.concatenate([part.member_BxKxS for part in parts])
    return Round(member_BxKxS, concat_groups([part.groups for part in parts]))


def concat_rollouts(parts: Sequence[Rollouts]) -> Rollouts:
    """The problems of all parts, one after the other."""
    by_round = zip(*(part.rounds for part in parts), strict=True)
    strategy_BxN = None
    if parts[0].strategy_BxN is not None:
        strategy_BxN = np.concatenate([part.strategy_BxN for part in parts])
    return Rollouts(
        problems=[problem for part in parts for problem in part.problems],
        cursor_B=np.concatenate([part.cursor_B for part in parts]),
        search=concat_groups([part.search for part in parts]),
        rounds=tuple(concat_rounds(of_round) for of_round in by_round),
        strategy_BxN=strategy_BxN,
    )
