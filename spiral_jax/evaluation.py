"""Held-out problems -> records of what the policy made of them (`measures.py` says what is in one).

held-out problems -> N search traces -> disjoint subsets -> aggregation traces -> rounds of self-aggregation

`evaluate` is what training calls every `eval.every` steps; `evaluate_wave` is what `python -m spiral_jax.evaluate` is
made of.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from spiral_jax.config import ConfigError, eval_subset_size, uses_aggregation
from spiral_jax.estimators import mean_and_interval
from spiral_jax.groups import Groups, Purpose, Stop
from spiral_jax.measures import Answers, accuracy, any_correct, set_votes
from spiral_jax.objective import subsets
from spiral_jax.rollout import Actor, Rollouts, aggregate, fits, search, verify
from spiral_jax.tasks.problem import Problem
from spiral_jax.verifier.rewards import Verdict
from spiral_jax.verifier.verifier import count_verdicts, number_classes


@dataclasses.dataclass(frozen=True)
class Stage:
    """Verified traces of B problems, as many for each.

    Attributes:
      groups: in problem order.
      verdicts: of every trace, in order.
      answers: B rows, numbered by `number_classes`.
    """

    groups: Groups
    verdicts: list[Verdict]
    answers: list[Answers]

    def rows(self) -> list[dict[str, Any]]:
        """The stage's part of each problem's record."""
        B = len(self.answers)
        length = self.groups.trace_len_UxC.reshape(B, -1)
        cut_off = (self.groups.stop_UxC == Stop.LENGTH).astype(int).reshape(B, -1)
        return [
            {"answer": self.answers[b], "length": length[b].tolist(), "cut_off": cut_off[b].tolist()} for b in range(B)
        ]

    def counts(self, role: str) -> Counter:
        """Verdicts and sampled tokens of the stage."""
        counts = count_verdicts(self.verdicts) | {"sampled_tokens": self.groups.sampled_tokens}
        return Counter({f"{role}_{name}": count for name, count in counts.items()})


def held_out(actor: Actor) -> dict[int, Problem]:
    """The first `eval.problems` held-out problems by index, without those whose search prompt is too long.

    Raises:
      ConfigError: none is left.
    """
    c = actor.c
    asked = {index: actor.task.held_out(index) for index in range(c.eval.problems)}
    fitting = {index: problem for index, problem in asked.items() if fits(actor, problem)}
    if not fitting:
        raise ConfigError(
            f"none of the {c.eval.problems} held-out problems has a search prompt of at most "
            f"config.prompt.max_problem_tokens = {c.prompt.max_problem_tokens} tokens: raise it."
        )
    return fitting


def evaluate(actor: Actor, weights: Any, step: int) -> dict[str, Any]:
    """Evaluates `eval.problems` held-out problems at the training temperature.

    Measures with mean, 95 % interval over problems, standard error and count: `single` (mean own correctness of the N
    traces), `pass_at_n` (some trace is right), and with an aggregation stage `majority` (tie-aware vote of each
    aggregated subset's S candidates) and `aggregated` (mean over the `eval.subsets` disjoint subsets and their
    `eval.traces` traces). Shares: parse rate, cut-off share and mean length of each role. Problems whose prompt is too
    long are left out and counted (`too_long`).
    """
    c = actor.c
    asked = held_out(actor)
    problems, index_B = list(asked.values()), np.array(list(asked))
    found = _searched(actor, weights, problems, index_B, step)
    searched = found.rows()
    result = {"step": step, "problems": len(problems), "too_long": c.eval.problems - len(problems)}
    result |= {"traces": c.search.traces, "sampled_tokens": found.groups.sampled_tokens}
    measures = {
        "single": [accuracy(row["answer"]) for row in searched],
        "pass_at_n": [any_correct(row["answer"]) for row in searched],
    }
    result |= _shares("search", found)
    if uses_aggregation(c):
        member_BxKxS = _disjoint(c, index_B, step)
        read, _ = _aggregated(actor, weights, problems, found.groups, member_BxKxS, c.eval.traces, round=1)
        votes = [set_votes(row, member) for row, member in zip(searched, member_BxKxS.tolist(), strict=True)]
        measures["majority"] = [np.mean(votes_K) for votes_K in votes]
        measures["aggregated"] = [accuracy(row["answer"]) for row in read.rows()]
        result |= _shares("aggregation", read)
        result |= {"subsets": c.eval.subsets, "subset_size": eval_subset_size(c), "aggregation_traces": c.eval.traces}
        result["sampled_tokens"] += read.groups.sampled_tokens
    estimates = {name: mean_and_interval(np.array(value_B)) for name, value_B in measures.items()}
    return result | {name: dataclasses.asdict(estimate) for name, estimate in estimates.items()}


def evaluate_wave(
    actor: Actor, weights: Any, problems: list[Problem], index_B: np.ndarray
) -> tuple[list[dict[str, Any]], Counter, Rollouts]:
    """All stages of `python -m spiral_jax.evaluate` for B held-out problems; `actor.c` is that of `for_evaluation`.

    Search and plain aggregation draw the random numbers of an evaluation at step 0 of training.

    Returns:
      a record of each problem; counts: verdicts, sampled tokens and what cleaning removed from candidates, by stage
      (`search_*`, `aggregation_*`, `rsa_*`); and the traces of search and plain aggregation, for a person to read.
    """
    c, step = actor.c, 0
    found = _searched(actor, weights, problems, index_B, step)
    member_BxKxS = _disjoint(c, index_B, step)
    read, cleaned = _aggregated(actor, weights, problems, found.groups, member_BxKxS, c.eval.traces, round=1)
    counts = found.counts("search") + read.counts("aggregation") + cleaned
    rounds, of_rounds = _self_aggregated(actor, weights, problems, index_B, found.groups, step)
    limits = {limit: _verified(actor, problems, cut_at(found.groups, limit)).answers for limit in c.eval.limits}
    searched, aggregated = found.rows(), read.rows()
    records = [
        {
            "index": int(index_B[b]),
            "id": problem.id,
            "search": searched[b],
            "limits": [{"limit": limit, "answer": answers[b]} for limit, answers in limits.items()],
            "aggregation": {"member": member_BxKxS[b].tolist()} | aggregated[b],
            "rsa": [rows[b] for rows in rounds],
        }
        for b, problem in enumerate(problems)
    ]
    return records, counts + of_rounds, Rollouts(problems, index_B, found.groups, member_BxKxS, read.groups)


def cut_at(groups: Groups, limit: int) -> Groups:
    """The same traces under a smaller limit on their length.

    Exactly what the sampler would have given with it: a trace's tokens depend on those before them, never on its limit.
    """
    cut_UxC = groups.trace_len_UxC > limit
    return dataclasses.replace(
        groups,
        requests=dataclasses.replace(groups.requests, max_tokens=limit),
        trace_UxCxG=groups.trace_UxCxG[:, :, :limit],
        trace_len_UxC=np.minimum(groups.trace_len_UxC, limit),
        logprob_UxCxG=groups.logprob_UxCxG[:, :, :limit],
        stop_UxC=np.where(cut_UxC, Stop.LENGTH, groups.stop_UxC),
        reward_UxC=None,
    )


def _self_aggregated(
    actor: Actor, weights: Any, problems: list[Problem], index_B: np.ndarray, found: Groups, step: int
) -> tuple[list[list[dict]], Counter]:
    """Recursive self-aggregation (arXiv 2509.26626): each round, each member of the next population reads its own
    `eval.set_size` distinct members of this one and is one new trace. The first population are search traces.

    Returns:
      for each of `eval.rounds` rounds the B problems' rows, and the counts.
    """
    c, e = actor.c, actor.c.eval
    population, rows, counts = _first_traces(found, e.population), [], Counter()
    for round in range(1, e.rounds + 1):
        member_BxKxS = np.stack([
            subsets.independent_subsets(
                c.seed, int(Purpose.EVALUATION), step, int(index), round, e.population, e.set_size, e.population
            )
            for index in index_B
        ])  # fmt: skip
        # round 1 of the random keys is plain aggregation
        stage, cleaned = _aggregated(actor, weights, problems, population, member_BxKxS, 1, round + 1)
        population = _as_population(stage.groups, population)
        rows.append(stage.rows())
        counts += stage.counts("rsa") + Counter(
            {f"rsa_{k.removeprefix('aggregation_')}": n for k, n in cleaned.items()}
        )
    return rows, counts


def _first_traces(groups: Groups, size: int) -> Groups:
    """The first `size` traces of each group."""
    return dataclasses.replace(
        groups,
        requests=dataclasses.replace(groups.requests, traces=size),
        trace_UxCxG=groups.trace_UxCxG[:, :size],
        trace_len_UxC=groups.trace_len_UxC[:, :size],
        logprob_UxCxG=groups.logprob_UxCxG[:, :size],
        stop_UxC=groups.stop_UxC[:, :size],
        reward_UxC=None,
    )


def _as_population(groups: Groups, before: Groups) -> Groups:
    """One group a problem of what were U = B * population groups of one trace; prompts and ids are the problem's."""
    B, size, G = len(before), before.requests.traces, groups.requests.max_tokens
    return dataclasses.replace(
        before,
        requests=dataclasses.replace(before.requests, max_tokens=G),
        trace_UxCxG=groups.trace_UxCxG.reshape(B, size, G),
        trace_len_UxC=groups.trace_len_UxC.reshape(B, size),
        logprob_UxCxG=groups.logprob_UxCxG.reshape(B, size, G),
        stop_UxC=groups.stop_UxC.reshape(B, size),
    )


def _searched(actor: Actor, weights: Any, problems: list[Problem], index_B: np.ndarray, step: int) -> Stage:
    return _verified(actor, problems, search(actor, weights, problems, index_B, Purpose.EVALUATION, step))


def _aggregated(
    actor: Actor, weights: Any, problems: list[Problem], candidates: Groups, member_BxKxS: np.ndarray, traces: int,
    round: int,
) -> tuple[Stage, Counter]:  # fmt: skip
    groups, cleaned = aggregate(actor, weights, problems, candidates, member_BxKxS, traces, round)
    return _verified(actor, problems, groups), Counter({f"aggregation_{k}": n for k, n in cleaned.items()})


def _verified(actor: Actor, problems: list[Problem], groups: Groups) -> Stage:
    groups, texts, verdicts = verify(actor, problems, groups)
    return Stage(groups, verdicts, number_classes(actor.verifier, problems, texts, verdicts))


def _disjoint(c: ConfigDict, index_B: np.ndarray, step: int) -> np.ndarray:
    """int32 [B, K, S]: which traces are aggregated together."""
    N, S, K = c.search.traces, eval_subset_size(c), c.eval.subsets
    draw = lambda index: subsets.disjoint_subsets(c.seed, int(Purpose.EVALUATION), step, index, 0, N, S, K)  # noqa: E731
    return np.stack([draw(int(index)) for index in index_B])


def _shares(role: str, stage: Stage) -> dict[str, float]:
    counts = count_verdicts(stage.verdicts)
    return {
        f"parse_rate_{role}": (counts["correct"] + counts["wrong"]) / len(stage.verdicts),
        f"cut_off_{role}": float((stage.groups.stop_UxC == Stop.LENGTH).mean()),
        f"length_{role}": float(stage.groups.trace_len_UxC.mean()),
    }
