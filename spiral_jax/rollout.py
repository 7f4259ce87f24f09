"""The stages of a rollout: problems -> search groups -> subsets -> aggregation groups -> rewards.

Each is a function of (actor, weights, ...) that training and evaluation share. Randomness is named by integers:
purpose, step, cursor, round, role, set, trace.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from spiral_jax import prompts
from spiral_jax.groups import (
    GroupRequests,
    Groups,
    Purpose,
    Role,
    Stop,
    concat_groups,
    pad_rows,
    take_groups,
)
from spiral_jax.objective.advantages import Rewards
from spiral_jax.progress import Progress
from spiral_jax.prompts import Scaffold
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
class Rollouts:
    """B problems with all their traces.

    Attributes:
      problems: B of them, in cursor order.
      cursor_B: where each stands in the task's stream.
      search: U = B groups. Their rewards are own correctness: a diagnostic for the estimators over drawn sets.
      member_BxKxS: which traces each subset holds; None without an aggregation stage.
      aggregation: U = B * K groups in (problem, subset) order; None without an aggregation stage.
      strategy_BxN: numbers of the search traces' strategies in each problem, -1 = none; None unless asked for.
    """

    problems: list[Problem]
    cursor_B: np.ndarray
    search: Groups
    member_BxKxS: np.ndarray | None
    aggregation: Groups | None
    strategy_BxN: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.problems)

    @property
    def sampled_tokens(self) -> int:
        return self.search.sampled_tokens + (self.aggregation.sampled_tokens if self.aggregation else 0)

    def aggregated_reward_BxKxM(self) -> np.ndarray:
        return self.aggregation.reward_UxC.reshape(len(self), -1, self.aggregation.requests.traces)

    def rewards(self) -> Rewards:
        """What the objective is made from."""
        aggregated_BxKxM = None if self.aggregation is None else self.aggregated_reward_BxKxM()
        return Rewards(self.search.reward_UxC, aggregated_BxKxM, self.member_BxKxS, self.strategy_BxN)

    def take(self, index: np.ndarray) -> Rollouts:
        """The problems at `index`, with their groups."""
        if self.aggregation is None:
            member, aggregation = None, None
        else:
            K = self.member_BxKxS.shape[1]
            member = self.member_BxKxS[index]
            aggregation = take_groups(self.aggregation, (index[:, None] * K + np.arange(K)).reshape(-1))
        problems = [self.problems[b] for b in index]
        strategy = None if self.strategy_BxN is None else self.strategy_BxN[index]
        return Rollouts(problems, self.cursor_B[index], take_groups(self.search, index), member, aggregation, strategy)


def concat_rollouts(parts: list[Rollouts]) -> Rollouts:
    """The problems of all parts, one after the other."""
    with_aggregation, with_strategies = parts[0].aggregation is not None, parts[0].strategy_BxN is not None
    return Rollouts(
        problems=[problem for part in parts for problem in part.problems],
        cursor_B=np.concatenate([part.cursor_B for part in parts]),
        search=concat_groups([part.search for part in parts]),
        member_BxKxS=np.concatenate([part.member_BxKxS for part in parts]) if with_aggregation else None,
        aggregation=concat_groups([part.aggregation for part in parts]) if with_aggregation else None,
        strategy_BxN=np.concatenate([part.strategy_BxN for part in parts]) if with_strategies else None,
    )


def fits(actor: Actor, problem: Problem) -> bool:
    """Whether its search prompt is within `config.prompt.max_problem_tokens`; others are left out and counted."""
    return len(prompts.search_prompt(actor.scaffold, problem.text)) <= actor.c.prompt.max_problem_tokens


def search(
    actor: Actor, weights: Any, problems: list[Problem], cursor_B: np.ndarray, purpose: Purpose, step: int
) -> Groups:
    """N traces of each problem: U = B groups."""
    with actor.progress.phase("sampling search"):
        return sample(actor.sampler, weights, search_requests(actor, problems, cursor_B, purpose, step))


def search_requests(
    actor: Actor, problems: list[Problem], cursor_B: np.ndarray, purpose: Purpose, step: int
) -> GroupRequests:
    """What `search` asks for: U = B."""
    prompt_UxP, prompt_len_U = pad_rows([prompts.search_prompt(actor.scaffold, p.text) for p in problems])
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
    """`traces` aggregation traces for each subset of `candidates`: U = B * K groups, and what cleaning removed."""
    requests, cleaned = aggregation_requests(actor, problems, candidates, member_BxKxS, traces, round)
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

    Prompts are spliced from sampled ids, candidates in config.aggregation.order. `round` is 1 for aggregations of
    search traces.
    """
    rows, ids, cleaned = [], [], Counter()
    for b, problem in enumerate(problems):
        purpose, step, cursor = (int(x) for x in candidates.requests.id_Ux6[b, :3])
        for k, member_S in enumerate(member_BxKxS[b]):
            shown = [(candidates.trace_ids(b, n), Stop(candidates.stop_UxC[b, n])) for n in member_S]
            order = prompts.listed_order(actor.c, Purpose(purpose), step, cursor, round, k, len(shown))
            prompt = prompts.aggregation_prompt(actor.scaffold, problem.text, shown, order)
            cleaned.update(
                removed_special=prompt.removed_special,
                dropped=prompt.dropped,
                empty=prompt.empty,
                candidates=len(shown),
            )
            rows.append(prompt.ids)
            ids.append([purpose, step, cursor, round, Role.AGGREGATION, k])
    prompt_UxP, prompt_len_U = pad_rows(rows)
    max_tokens = actor.c.aggregation.max_tokens
    return GroupRequests(prompt_UxP, prompt_len_U, np.array(ids, np.int32), traces, max_tokens), cleaned


def verify(actor: Actor, problems: list[Problem], groups: Groups) -> tuple[Groups, list[str], list[Verdict]]:
    """Rewards every trace against its problem (groups are in problem order).

    Returns:
      the groups with `reward_UxC`, and text and verdict of every trace, U * C of each.

    Raises:
      VerifierFailure: our own failures exceed `config.verifier.max_error_rate`.
    """
    texts = trace_texts(actor, groups)
    per_problem = len(texts) // len(problems)
    with actor.progress.phase("verifying"):
        verdicts = actor.verifier.verify([(text, problems[i // per_problem]) for i, text in enumerate(texts)])
    check_error_rate(verdicts, actor.c.verifier.max_error_rate)
    return rewarded(groups, verdicts), texts, verdicts


def trace_texts(actor: Actor, groups: Groups, which: Iterable[int] | None = None) -> list[str]:
    """Texts without special tokens of all U * C traces, or of those at `which` in that order."""
    C = groups.trace_len_UxC.shape[1]
    rows = [groups.trace_ids(*divmod(i, C)) for i in (range(groups.trace_len_UxC.size) if which is None else which)]
    return actor.scaffold.tokenizer.batch_decode(rows, skip_special_tokens=True)


def load_strategy(c: ConfigDict, task: Task) -> Callable[[str, Problem], Hashable | None] | None:
    """The function that names a trace's strategy; None where neither the config nor the task has one.

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
    return dataclasses.replace(groups, reward_UxC=reward_UxC, verdict_UxC=np.array(verdicts, object).reshape(shape))
