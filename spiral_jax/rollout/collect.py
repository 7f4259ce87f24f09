"""Dynamic sampling: which problems are tried for a batch, and which of them are kept.

The batch is the first B problems in cursor order with a non-zero advantage, never in completion
order. So it is a pure function of the policy, the step and the cursor, and a killed step is simply
run again.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from spiral_jax.core.config import ConfigError
from spiral_jax.core.errors import UserError
from spiral_jax.core.groups import Groups, Role, Stop, concat_groups
from spiral_jax.core.metrics import Mean
from spiral_jax.objective.advantages import Advantages, concat_advantages
from spiral_jax.objective.rewards import Rewards
from spiral_jax.objective.settings import ObjectiveSettings
from spiral_jax.prompts.prompts import search_prompt
from spiral_jax.prompts.scaffold import Scaffold
from spiral_jax.rollout.credit import Credit, give_credit, give_replay_credit
from spiral_jax.rollout.populations import Population
from spiral_jax.rollout.requests import Asked
from spiral_jax.rollout.settings import DynamicSampling
from spiral_jax.rollout.traces import Replayed, Rollouts, concat_replayed, concat_rollouts
from spiral_jax.tasks.problem import Problem
from spiral_jax.verifier.rewards import Status
from spiral_jax.verifier.verifier import check_failures

_PRIOR = 8  # decided problems that config.sampling.keep_rate weighs as much as
_SHOWN_REWARDS = 5
_MOST_TOO_LONG = 10_000  # in a row


class NoSignal(UserError):
    """Too few problems with a non-zero advantage: too easy, too hard, or a broken verifier."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A task's stream of training problems, with their prompts.

    Attributes:
      train: cursor -> problem.
      max_problem_tokens: problems with a longer search prompt are left out and counted.
    """

    train: Callable[[int], Problem]
    scaffold: Scaffold
    max_problem_tokens: int

    def from_cursor(self, cursor: int) -> Asked:
        """The first problem at or behind `cursor` that is not too long.

        Raises:
          ConfigError: thousands in a row are.
        """
        for at in range(cursor, cursor + _MOST_TOO_LONG):
            problem = self.train(at)
            prompt_P = search_prompt(self.scaffold, problem.text)
            if len(prompt_P) <= self.max_problem_tokens:
                return Asked(at, problem, prompt_P)
        raise ConfigError(
            f"none of {_MOST_TOO_LONG:,} problems from cursor {cursor} has a search prompt of at "
            f"most config.prompt.max_problem_tokens = {self.max_problem_tokens} tokens: raise it."
        )

    def again(self, population: Population) -> Asked:
        """The problem of a stored population."""
        problem = self.train(population.cursor)
        prompt_P = search_prompt(self.scaffold, problem.text)
        return Asked(population.cursor, problem, prompt_P, population)


@dataclasses.dataclass(frozen=True)
class Replay:
    """What a step has made of all the stored populations that it has read.

    Attributes:
      replayed: advantages behind the length gate.
      advantages: before it.
      credit: of the new answers, round by round.
    """

    replayed: Replayed
    advantages: Advantages
    credit: list[Credit]

    def with_signal(self) -> tuple[Groups, np.ndarray]:
        """Groups and loss weights [U, C], without the groups that teach nothing."""
        groups = concat_groups(self.replayed.stages)
        weight_UxC = np.concatenate([credit.weight_UxC for credit in self.credit])
        index = np.flatnonzero(weight_UxC.any(axis=1))
        return groups.take(index), weight_UxC[index]


@dataclasses.dataclass(frozen=True)
class Batch:
    """What one optimizer step learns from.

    Attributes:
      rollouts: the first B kept problems in cursor order, advantages behind the length gate.
      credit: of each of `rollouts.stages`.
      discarded: the problems before `next_cursor` that were not kept, with advantage 0; for the
        trace log alone.
      next_cursor: behind the last kept problem: where the next step starts.
      metrics: (sum, count) metrics and counts for the log, of all problems that were decided.
      replay: of stored populations; None: there were none.
    """

    rollouts: Rollouts
    credit: list[Credit]
    discarded: Rollouts
    next_cursor: int
    metrics: dict[str, Mean | float]
    replay: Replay | None = None

    def rewards(self) -> list[Rewards]:
        """Of each round, of all problems before `next_cursor` in cursor order, kept or not."""
        both = concat_rollouts([self.rollouts, self.discarded])
        return both.take(np.argsort(both.cursor_B)).rewards()

    @property
    def roles(self) -> dict[Role, tuple[Groups, np.ndarray]]:
        """Groups and loss weights [U, C] of each role; aggregations round by round.

        Behind them are those of stored populations, without the groups that teach nothing.
        """
        roles = {Role.SEARCH: (self.rollouts.search, self.credit[0].weight_UxC)}
        if self.rollouts.rounds:
            groups = [round.groups for round in self.rollouts.rounds]
            weights = [credit.weight_UxC for credit in self.credit[1:]]
            if self.replay:
                replayed, weight_UxC = self.replay.with_signal()
                groups.append(replayed)
                weights.append(weight_UxC)
            roles[Role.AGGREGATION] = (concat_groups(groups), np.concatenate(weights))
        return roles


class FirstKept:
    """The problems of a step, as they are tried, decided and kept: the `feed.Problems` of training.

    Problems enter in cursor order as long as those on the way will probably not fill the batch. At
    most `settings.most_tried` are tried; then B / 4 kept ones are enough. Problems whose stored
    populations are read stand before them, and are no part of the batch's B; but a step in which
    these alone teach something goes on.

    Args:
      cursor: where the step starts in the task's stream.
      populations: those that are read.
    """

    def __init__(
        self,
        settings: DynamicSampling,
        source: Source,
        cursor: int,
        populations: Sequence[Population] = (),
    ):
        self._settings, self._source = settings, source
        self._populations = populations
        self._replays_begun = 0
        self._replayed: dict[int, tuple[Replayed, Advantages]] = {}  # by cursor, B = 1 each
        self._cursor = cursor  # behind the last problem that was tried
        self._tried: list[int] = []  # cursors, ascending
        self._decided: dict[int, tuple[Rollouts, Advantages]] = {}  # by cursor, B = 1 each
        self._kept = 0  # of those decided
        self._too_long = 0

    def next(self) -> Asked | None:
        """The next problem to try, if one is wanted."""
        if self._replays_begun < len(self._populations):
            self._replays_begun += 1
            return self._source.again(self._populations[self._replays_begun - 1])
        if not self._wants_more():
            return None
        asked = self._source.from_cursor(self._cursor)
        self._too_long += asked.cursor - self._cursor
        self._cursor = asked.cursor + 1
        self._tried.append(asked.cursor)
        return asked

    def add(self, rollouts: Rollouts | Replayed, advantages: Advantages) -> None:
        """Decides one problem (B = 1): it is kept if it has a signal."""
        if isinstance(rollouts, Replayed):
            self._replayed[int(rollouts.cursor_B[0])] = rollouts, advantages
            return
        self._decided[int(rollouts.cursor_B[0])] = rollouts, advantages
        self._kept += int(advantages.keep_B[0])

    @property
    def exhausted(self) -> bool:
        """Whether no problem is wanted any more, whatever becomes of those on the way."""
        return self.complete

    @property
    def complete(self) -> bool:
        """Whether the first B kept problems are known, or all that may be tried are decided.

        And all that was asked of stored populations is there.
        """
        if len(self._replayed) < len(self._populations):
            return False
        kept = 0
        for cursor in self._tried:
            if cursor not in self._decided:
                return False
            kept += int(self._decided[cursor][1].keep_B[0])
            if kept == self._settings.problems:
                return True
        return len(self._tried) >= self._settings.most_tried

    def _wants_more(self) -> bool:
        """Whether those on the way will probably not fill the batch, at the rate so far."""
        s, decided = self._settings, len(self._decided)
        rate = (self._kept + _PRIOR * s.keep_rate) / (decided + _PRIOR)
        expected = self._kept + (len(self._tried) - decided) * rate
        return len(self._tried) < s.most_tried and expected < s.problems

    def decided(self) -> Rollouts | None:
        """All that is decided, with advantage 0, in cursor order; None: nothing is."""
        decided = [self._decided[cursor][0] for cursor in self._tried if cursor in self._decided]
        return concat_rollouts(decided).without_advantages() if decided else None

    def batch(self, objective: ObjectiveSettings) -> Batch:
        """The first B kept problems, with their credit.

        What is kept beyond them, and what still runs, is discarded and counted; the next step tries
        it again.

        Raises:
          NoSignal: fewer than B / 4, those of stored populations counted too; with the histogram
            of rewards.
          VerifierFailure: see `check_failures`.
        """
        decided = [self._decided[cursor] for cursor in self._tried if cursor in self._decided]
        rollouts = concat_rollouts([of_problem for of_problem, _ in decided])
        advantages = concat_advantages([of_problem for _, of_problem in decided])
        replay = self._replay(objective)
        verdicts = rollouts.verdicts + (replay.replayed.verdicts if replay else [])
        check_failures(verdicts, self._settings.failures)

        B = self._settings.problems
        kept = np.flatnonzero(advantages.keep_B)
        first = kept[:B]
        starved = int(advantages.starved_B.sum())
        taught = len(first) + (int(replay.advantages.keep_B.sum()) if replay else 0)
        if taught < max(1, B / 4):
            raise NoSignal(_no_signal_message(rollouts, len(first), starved, B))
        next_cursor = self._cursor
        if len(first) == B:
            next_cursor = int(rollouts.cursor_B[first[-1]]) + 1

        discarded = np.flatnonzero(~advantages.keep_B & (rollouts.cursor_B < next_cursor))
        counts = {
            "tried": len(self._tried),
            "kept": len(first),
            "surplus": len(kept) - len(first),
            "undecided": len(self._tried) - len(decided),
            "too_long": self._too_long,
            "starved": starved,
        }
        metrics = {f"sampling/{name}": float(count) for name, count in counts.items()}
        chosen = rollouts.take(first)
        credit = give_credit(chosen, advantages.take(first), objective)
        return Batch(
            rollouts=chosen.with_advantages([of_stage.advantage_UxC for of_stage in credit]),
            credit=credit,
            discarded=rollouts.take(discarded).without_advantages(),
            next_cursor=next_cursor,
            metrics=metrics | _rollout_metrics(rollouts, advantages, replay),
            replay=replay,
        )

    def _replay(self, objective: ObjectiveSettings) -> Replay | None:
        """What was made of the stored populations; None: there were none."""
        if not self._populations:
            return None
        decided = [self._replayed[population.cursor] for population in self._populations]
        replayed = concat_replayed([of_problem for of_problem, _ in decided])
        advantages = concat_advantages([of_problem for _, of_problem in decided])
        credit = give_replay_credit(replayed, advantages, objective)
        given = [of_round.advantage_UxC for of_round in credit]
        return Replay(replayed.with_advantages(given), advantages, credit)


def _no_signal_message(rollouts: Rollouts, kept: int, starved: int, B: int) -> str:
    last = rollouts.stages[-1]
    verdicts = last.verdict_UxC.reshape(len(rollouts), -1)
    right = Counter(sum(v.status is Status.CORRECT for v in of_problem) for of_problem in verdicts)
    histogram = ", ".join(f"{n} right: {count}" for n, count in sorted(right.items()))
    return (
        f"only {kept} of {len(rollouts)} problems have a non-zero advantage (batch.problems = {B}, "
        f"at least a quarter is needed; {starved} were lost to verifier failures). Right answers a "
        f"problem, of {verdicts[0].size}: {histogram}; {_rewards_in_words(last)} The task is too "
        "easy, too hard, or its answers are not understood: look at the traces, or change the task."
    )


def _rewards_in_words(groups: Groups) -> str:
    """Which rewards answers have earned, most frequent first."""
    valid = groups.reward_UxC[~np.isnan(groups.reward_UxC)]
    values = Counter(f"{value:.3g}" for value in valid.tolist()).most_common(_SHOWN_REWARDS)
    return f"rewards {', '.join(f'{value} ({count}x)' for value, count in values) or 'none'}."


# --- what is logged of all that was decided -------------------------------------------------------


def _rollout_metrics(
    rollouts: Rollouts, advantages: Advantages, replay: Replay | None
) -> dict[str, Mean | float]:
    metrics = {"reward/search": _mean_reward(rollouts.search)}
    metrics |= _reward_metrics("aggregated", rollouts.stages[1:])
    search, *rounds = advantages.by_stage()
    metrics |= _role_metrics(Role.SEARCH, rollouts.search, search)
    if not rollouts.rounds:
        return metrics
    groups = [round.groups for round in rollouts.rounds]
    if replay:
        metrics |= _replay_metrics(replay, sum(len(of_round) for of_round in groups))
        rounds += replay.advantages.by_stage()[1:]  # what was read has none
        groups += replay.replayed.stages
    return metrics | _role_metrics(
        Role.AGGREGATION,
        concat_groups([dataclasses.replace(each, advantage_UxC=None) for each in groups]),
        np.concatenate(rounds),
    )


def _replay_metrics(replay: Replay, fresh_groups: int) -> dict[str, Mean | float]:
    """Of the populations that were read; `fresh_groups` are all other aggregation groups."""
    replayed, read = replay.replayed, float(len(replay.replayed))
    groups = float(sum(map(len, replayed.stages)))
    signal_B = replay.advantages.keep_B
    rounds = sum(population.round + 1 for population in replayed.populations)
    return {
        "replay/read": read,
        "replay/group_share": Mean(groups, groups + fresh_groups),
        "replay/signal": Mean(float(signal_B.sum()), read),
        "replay/age": Mean(float(replayed.age_B.sum()), read),
        "replay/round": Mean(float(rounds), read),
        "reward/replay_candidates": _mean_reward(replayed.candidates),
    } | _reward_metrics("replayed", replayed.stages)


def _mean_reward(groups: Groups) -> Mean:
    valid = groups.reward_UxC[~np.isnan(groups.reward_UxC)]
    return Mean(float(valid.sum()), float(valid.size))


def _reward_metrics(name: str, rounds: Sequence[Groups]) -> dict[str, Mean]:
    """Of the last round under `name`, and of those before it by their number too."""
    rewards = {f"reward/{name}_round_{r}": _mean_reward(each) for r, each in enumerate(rounds, 1)}
    if rounds:
        rewards[f"reward/{name}"] = rewards.pop(f"reward/{name}_round_{len(rounds)}")
    return rewards


def _role_metrics(role: Role, groups: Groups, advantage: np.ndarray) -> dict[str, Mean | float]:
    label, traces = role.label, float(groups.trace_len_UxC.size)
    statuses = Counter(verdict.status for verdict in groups.verdict_UxC.reshape(-1))
    parsed = float(statuses[Status.CORRECT] + statuses[Status.WRONG])
    cut_off = float((groups.stop_UxC == Stop.LENGTH).sum())
    metrics: dict[str, Mean | float] = {
        f"length/{label}": Mean(float(groups.trace_len_UxC.sum()), traces),
        f"length/cut_off_{label}": Mean(cut_off, traces),
        f"verifier/parse_rate_{label}": Mean(parsed, traces),
    }
    for status in Status:
        metrics[f"verifier/{status.value}_{label}"] = float(statuses[status])
    size = float(advantage.size)
    metrics[f"advantage/{label}_abs"] = Mean(float(np.abs(advantage).sum()), size)
    metrics[f"advantage/{label}_nonzero"] = Mean(float((advantage != 0).sum()), size)
    return metrics
