"""The stages of a rollout: problems -> search groups -> subsets -> aggregation groups -> rewards.

With several rounds of aggregation the traces of one are the candidates of the next.

Each is a function of (actor, weights, ...) that training and evaluation share. Randomness is named
by integers: purpose, step, cursor, round, role, set, trace.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from spiral_jax.core.groups import (
    GroupRequests,
    Groups,
    Purpose,
    Role,
    Stop,
    concat_groups,
    pad_rows,
    take_groups,
)
from spiral_jax.core.progress import Progress
from spiral_jax.objective.estimators import Rewards
from spiral_jax.prompts import prompts
from spiral_jax.prompts.scaffold import Scaffold
from spiral_jax.sampling.protocol import Sampler, sample
from spiral_jax.tasks.problem import Problem, Task
from spiral_jax.verifier.rewards import Verdict, load_function
from spiral_jax.verifier.verifier import Verifier, check_error_rate


@dataclasses.dataclass(frozen=True)
class Actor:
    """What turns problems into verified traces; the policy's weights are an argument of each stage."""

    c: ConfigDict
    task: Task
    scaffold: Scaffold
    sampler: Sampler
    verifier: Verifier
    progress: Progress


@dataclasses.dataclass(frozen=True)
class Round:
    """One round of aggregation of B problems.

    Attributes:
      member_BxKxS: which traces of the stage before each set holds: search traces in the first
        round, in a later one the K * M of the round before, numbered set by set.
      groups: U = B * K in (problem, set) order.
    """

    member_BxKxS: np.ndarray
    groups: Groups

    @property
    def reward_BxKxM(self) -> np.ndarray:
        return self.groups.reward_UxC.reshape(*self.member_BxKxS.shape[:2], -1)


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """B problems with all their traces, stage by stage: search, then every round of aggregation.

    Attributes:
      problems: B of them, in cursor order.
      cursor_B: where each stands in the task's stream.
      search: U = B groups. Their rewards are own correctness: a diagnostic for the estimators over
      drawn sets.
      rounds: config.aggregation.rounds of them; none without an aggregation stage.
      strategy_BxN: numbers of the search traces' strategies in each problem, -1 = none; None unless
      asked for.
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
        """Search, then every round: round r reads stage r - 1 and writes stage r."""
        return [self.search, *(round.groups for round in self.rounds)]

    @property
    def aggregation(self) -> Groups | None:
        """U = R * B * K, round by round; None without that stage."""
        return concat_groups([round.groups for round in self.rounds]) if self.rounds else None

    @property
    def sampled_tokens(self) -> int:
        return sum(groups.sampled_tokens for groups in self.stages)

    def rewards(self) -> list[Rewards]:
        """What the objective is made from, one a round: the traces that it reads as those of
        search, and its own.

        Without aggregation it is one, of the search traces alone.
        """
        if not self.rounds:
            return [Rewards(self.search.reward_UxC, strategy_BxN=self.strategy_BxN)]
        read = [groups.reward_UxC.reshape(len(self), -1) for groups in self.stages[:-1]]
        strategies = [self.strategy_BxN] + [None] * (len(self.rounds) - 1)
        return [
            Rewards(own_BxN, round.reward_BxKxM, round.member_BxKxS, strategy_BxN)
            for own_BxN, round, strategy_BxN in zip(read, self.rounds, strategies, strict=True)
        ]

    def take(self, index: np.ndarray) -> Rollouts:
        """The problems at `index`, with their groups."""
        rounds = []
        for round in self.rounds:
            K = round.member_BxKxS.shape[1]
            groups = take_groups(round.groups, (index[:, None] * K + np.arange(K)).reshape(-1))
            rounds.append(Round(round.member_BxKxS[index], groups))
        problems = [self.problems[b] for b in index]
        strategy = None if self.strategy_BxN is None else self.strategy_BxN[index]
        return Rollouts(
            problems, self.cursor_B[index], take_groups(self.search, index), tuple(rounds), strategy
        )

    def with_advantages(self, advantage: list[np.ndarray]) -> Rollouts:
        """The same with advantages [U, C] of each stage."""
        search, *read = (
            dataclasses.replace(groups, advantage_UxC=advantage_UxC)
            for groups, advantage_UxC in zip(self.stages, advantage, strict=True)
        )
        rounds = [
            dataclasses.replace(r, groups=groups)
            for r, groups in zip(self.rounds, read, strict=True)
        ]
        return dataclasses.replace(self, search=search, rounds=tuple(rounds))


def concat_rollouts(parts: list[Rollouts]) -> Rollouts:
    """The problems of all parts, one after the other."""
    with_strategies = parts[0].strategy_BxN is not None
    return Rollouts(
        problems=[problem for part in parts for problem in part.problems],
        cursor_B=np.concatenate([part.cursor_B for part in parts]),
        search=concat_groups([part.search for part in parts]),
        rounds=tuple(
            Round(
                np.concatenate([r.member_BxKxS for r in same]),
                concat_groups([r.groups for r in same]),
            )
            for same in zip(*(part.rounds for part in parts), strict=True)
        ),
        strategy_BxN=np.concatenate([part.strategy_BxN for part in parts])
        if with_strategies
        else None,
    )


def fits(actor: Actor, problem: Problem) -> bool:
    """Whether its search prompt is within `config.prompt.max_problem_tokens`; others are left out
    and counted.
    """
    return (
        len(prompts.search_prompt(actor.scaffold, problem.text))
        <= actor.c.prompt.max_problem_tokens
    )


def search(
    actor: Actor,
    weights: Any,
    problems: list[Problem],
    cursor_B: np.ndarray,
    purpose: Purpose,
    step: int,
) -> Groups:
    """N traces of each problem: U = B groups."""
    with actor.progress.phase("sampling search"):
        return sample(
            actor.sampler, weights, search_requests(actor, problems, cursor_B, purpose, step)
        )


def search_requests(
    actor: Actor, problems: list[Problem], cursor_B: np.ndarray, purpose: Purpose, step: int
) -> GroupRequests:
    """What `search` asks for: U = B."""
    prompt_UxP, prompt_len_U = pad_rows(
        [prompts.search_prompt(actor.scaffold, p.text) for p in problems]
    )
    id_Ux6 = np.array([[purpose, step, cursor, 0, Role.SEARCH, 0] for cursor in cursor_B], np.int32)
    c = actor.c.search
    return GroupRequests(prompt_UxP, prompt_len_U, id_Ux6, c.traces, c.max_tokens)


def aggregate(
    actor: Actor,
    weights: Any,
    problems: list[Problem],
    candidates: Groups,
    member_BxKxS: np.ndarray,
    traces: int,
    round: int = 1,
) -> tuple[Groups, Counter]:
    """`traces` aggregation traces for each subset of `candidates`: U = B * K groups, and what
    cleaning removed.
    """
    requests, cleaned = aggregation_requests(
        actor, problems, candidates, member_BxKxS, traces, round
    )
    with actor.progress.phase("sampling aggregation"):
        return sample(actor.sampler, weights, requests), cleaned


def aggregation_requests(
    actor: Actor,
    problems: list[Problem],
    candidates: Groups,
    member_BxKxS: np.ndarray,
    traces: int,
    round: int = 1,
) -> tuple[GroupRequests, Counter]:
    """What `aggregate` asks for: U = B * K.

    Prompts are spliced from sampled ids, candidates in config.aggregation.order. `round` is 1 for
    aggregations of search traces.
    """
    rows, ids, cleaned = [], [], Counter()
    for b, problem in enumerate(problems):
        purpose, step, cursor = (int(x) for x in candidates.requests.id_Ux6[b, :3])
        for k, member_S in enumerate(member_BxKxS[b]):
            shown = [
                (candidates.trace_ids(b, n), Stop(candidates.stop_UxC[b, n])) for n in member_S
            ]
            id_6 = [purpose, step, cursor, round, Role.AGGREGATION, k]
            order = prompts.listed_order(
                actor.c.aggregation.order, actor.c.seed, id_6, len(shown)
            )
            prompt = prompts.aggregation_prompt(actor.scaffold, problem.text, shown, order)
            cleaned.update(
                removed_special=prompt.removed_special,
                dropped=prompt.dropped,
                empty=prompt.empty,
                candidates=len(shown),
            )
            rows.append(prompt.ids)
            ids.append(id_6)
    prompt_UxP, prompt_len_U = pad_rows(rows)
    max_tokens = actor.c.aggregation.max_tokens
    return GroupRequests(
        prompt_UxP, prompt_len_U, np.array(ids, np.int32), traces, max_tokens
    ), cleaned


def as_population(groups: Groups, search: Groups) -> Groups:
    """One group (U = 1) of all traces of one problem's groups, set by set, so that sets can be made
    of them.

    Prompt and id are those of the problem's search group.
    """
    G = groups.requests.max_tokens
    return dataclasses.replace(
        search,
        requests=dataclasses.replace(
            search.requests, traces=groups.trace_len_UxC.size, max_tokens=G
        ),
        trace_UxCxG=groups.trace_UxCxG.reshape(1, -1, G),
        trace_len_UxC=groups.trace_len_UxC.reshape(1, -1),
        logprob_UxCxG=groups.logprob_UxCxG.reshape(1, -1, G),
        stop_UxC=groups.stop_UxC.reshape(1, -1),
    )


def verify(
    actor: Actor, problems: list[Problem], groups: Groups
) -> tuple[Groups, list[str], list[Verdict]]:
    """Rewards every trace against its problem (groups are in problem order).

    Returns:
      the groups with `reward_UxC`, and text and verdict of every trace, U * C of each.

    Raises:
      VerifierFailure: our own failures exceed `config.verifier.max_error_rate`.
    """
    texts = trace_texts(actor, groups)
    per_problem = len(texts) // len(problems)
    with actor.progress.phase("verifying"):
        verdicts = actor.verifier.verify(
            [(text, problems[i // per_problem]) for i, text in enumerate(texts)]
        )
    check_error_rate(verdicts, actor.c.verifier.max_error_rate)
    return rewarded(groups, verdicts), texts, verdicts


def trace_texts(actor: Actor, groups: Groups, which: Iterable[int] | None = None) -> list[str]:
    """Texts without special tokens of all U * C traces, or of those at `which` in that order."""
    C = groups.trace_len_UxC.shape[1]
    rows = [
        groups.trace_ids(*divmod(i, C))
        for i in (range(groups.trace_len_UxC.size) if which is None else which)
    ]
    return actor.scaffold.tokenizer.batch_decode(rows, skip_special_tokens=True)


def load_strategy(c: ConfigDict, task: Task) -> Callable[[str, Problem], Hashable | None] | None:
    """The function that names a trace's strategy; None where neither the config nor the task has
    one.

    Raises:
      ConfigError: it cannot be loaded, or there is none for the estimator that asks for one.
    """
    named = c.task.strategy or task.strategy
    if not named and c.loss.estimator != "polychromic":
        return None
    return load_function(
        "task.strategy", named,
        f'must be "package.module:function" for polychromic, since the task {c.task.name} names no strategies.',
    )  # fmt: skip


def number_strategies(names: list[Hashable | None]) -> np.ndarray:
    """int32 [N]: equal names have equal numbers, in order of appearance; None is -1."""
    number: dict[Hashable | None, int] = {None: -1}
    return np.array([number.setdefault(name, len(number) - 1) for name in names], np.int32)


def rewarded(groups: Groups, verdicts: list[Verdict]) -> Groups:
    """The groups with their traces' verdicts and rewards."""
    shape = groups.trace_len_UxC.shape
    reward_UxC = np.array([verdict.reward for verdict in verdicts], np.float32).reshape(shape)
    return dataclasses.replace(
        groups, reward_UxC=reward_UxC, verdict_UxC=np.array(verdicts, object).reshape(shape)
    )
