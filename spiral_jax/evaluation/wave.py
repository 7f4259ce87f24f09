"""Held-out problems -> records of what the policy made of them (`measures.py` says what is in one).

held-out problems -> N search traces -> disjoint subsets -> aggregation traces -> rounds of
self-aggregation

Training calls `evaluate` every `eval.every` steps; `python -m spiral_jax.evaluate` calls
`evaluate_wave` itself, wave by wave. Both make the same results.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from spiral_jax.core.config import ConfigError, digest, eval_subset_size, uses_aggregation
from spiral_jax.core.groups import Groups, Purpose, Stop
from spiral_jax.evaluation.measures import Answers, accuracy, any_correct, set_votes
from spiral_jax.evaluation.results import make_results
from spiral_jax.evaluation.statistics import mean_and_interval
from spiral_jax.rollout.evaluation_feed import EvaluationFeed
from spiral_jax.rollout.requests import Actor, Rollouts, Round, fits, load_strategy, search, verify
from spiral_jax.tasks.problem import Problem
from spiral_jax.verifier.rewards import Status, Verdict
from spiral_jax.verifier.verifier import count_verdicts, number_classes


@dataclasses.dataclass(frozen=True)
class Stage:
    """Verified traces of B problems, as many for each.

    Attributes:
      groups: in problem order.
      texts, verdicts: of every trace, in order.
      answers: B rows, numbered by `number_classes`.
    """

    groups: Groups
    texts: list[str]
    verdicts: list[Verdict]
    answers: list[Answers]

    def rows(self) -> list[dict[str, Any]]:
        """The stage's part of each problem's record."""
        B = len(self.answers)
        length = self.groups.trace_len_UxC.reshape(B, -1)
        cut_off = (self.groups.stop_UxC == Stop.LENGTH).astype(int).reshape(B, -1)
        return [
            {
                "answer": self.answers[b],
                "length": length[b].tolist(),
                "cut_off": cut_off[b].tolist(),
            }
            for b in range(B)
        ]

    def counts(self, role: str) -> Counter:
        """Verdicts and sampled tokens of the stage."""
        counts = count_verdicts(self.verdicts) | {"sampled_tokens": self.groups.sampled_tokens}
        return Counter({f"{role}_{name}": count for name, count in counts.items()})


def held_out(actor: Actor) -> dict[int, Problem]:
    """The first `eval.problems` held-out problems by index, without those whose search prompt is
    too long.

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


def evaluate(actor: Actor, weights: Any, step: int) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Evaluates `eval.problems` held-out problems; `actor.c` is that of
    `for_evaluation_in_training`.

    Returns:
      the row of evaluations.jsonl, see `summary`; and the content of a results.json, with all
      measures of `python -m spiral_jax.evaluate` and comparable with its files: None without an
      aggregation stage.
    """
    c = actor.c
    asked = held_out(actor)
    problems, index_B = list(asked.values()), np.array(list(asked))
    if not uses_aggregation(c):
        found = _verified(actor, problems, _search(actor, weights, problems, index_B, step))
        return summary(
            c, step, [{"search": row} for row in found.rows()], found.counts("search")
        ), None
    records, counts, _ = evaluate_wave(actor, weights, problems, index_B, step)
    results = make_results(c, f"step {step} of {digest(c)}", asked, records, counts)
    return summary(c, step, records, counts), results


def summary(
    c: ConfigDict, step: int, records: list[dict[str, Any]], counts: Counter
) -> dict[str, Any]:
    """An evaluation during training, in short.

    Measures with mean, 95 % interval over problems, standard error and count: `single` (mean own
    correctness of the N traces), `pass_at_n` (some trace is right), and with an aggregation stage
    `majority` (tie-aware vote of each aggregated subset's S candidates) and `aggregated` (mean over
    the `eval.subsets` disjoint subsets and their `eval.traces` traces). Shares: parse rate, cut-off
    share and mean length of each role. Problems whose prompt is too long are left out and counted
    (`too_long`).
    """
    search = [record["search"] for record in records]
    measures = {
        "single": [accuracy(row["answer"]) for row in search],
        "pass_at_n": [any_correct(row["answer"]) for row in search],
    }
    sampled = sum(count for name, count in counts.items() if name.endswith("_sampled_tokens"))
    row = {
        "step": step,
        "problems": len(records),
        "too_long": c.eval.problems - len(records),
        "traces": c.eval.n,
    }
    row |= {"sampled_tokens": sampled} | _shares("search", search, counts)
    if uses_aggregation(c):
        read = [record["aggregation"] for record in records]
        votes = [
            set_votes(row, of_sets["member"]) for row, of_sets in zip(search, read, strict=True)
        ]
        measures["majority"] = [np.mean(votes_K) for votes_K in votes]
        measures["aggregated"] = [accuracy(row["answer"]) for row in read]
        row |= _shares("aggregation", read, counts)
        row |= {
            "subsets": c.eval.subsets,
            "subset_size": eval_subset_size(c),
            "aggregation_traces": c.eval.traces,
        }
    estimates = {name: mean_and_interval(np.array(value_B)) for name, value_B in measures.items()}
    return row | {name: dataclasses.asdict(estimate) for name, estimate in estimates.items()}


def _shares(role: str, rows: list[dict[str, Any]], counts: Counter) -> dict[str, float]:
    verdicts = sum(counts[f"{role}_{status.value}"] for status in Status)
    return {
        f"parse_rate_{role}": (counts[f"{role}_correct"] + counts[f"{role}_wrong"]) / verdicts,
        f"cut_off_{role}": float(np.mean([row["cut_off"] for row in rows])),
        f"length_{role}": float(np.mean([row["length"] for row in rows])),
    }


def evaluate_wave(
    actor: Actor,
    weights: Any,
    problems: list[Problem],
    index_B: np.ndarray,
    step: int = 0,
    search_weights: Any = None,
) -> tuple[list[dict[str, Any]], Counter, Rollouts]:
    """All stages of an evaluation for B held-out problems; `actor.c` is that of one of the
    `config.for_evaluation*`.

    `step` of training has its own random numbers; `python -m spiral_jax.evaluate` draws those of
    step 0. `search_weights` draw the search traces; None: `weights` do.

    Returns:
      a record of each problem; counts: verdicts, sampled tokens and what cleaning removed from
      candidates, by stage (`search_*`, `aggregation_*`, `rsa_*`); and the traces of search and
      plain aggregation, for a person to read.
    """
    given = (
        None if search_weights is None else _search(actor, search_weights, problems, index_B, step)
    )
    feed = EvaluationFeed(actor, problems, index_B, step, given)
    with actor.progress.phase("sampling"):
        for _ in actor.sampler.stream(weights, feed):
            pass
    sampled = feed.sampled()
    found, read = (
        _verified(actor, problems, groups) for groups in (sampled.search, sampled.aggregation)
    )
    rounds = [_verified(actor, problems, groups) for groups in sampled.rounds]
    counts = found.counts("search") + read.counts("aggregation") + sampled.cleaned
    counts += sum((stage.counts("rsa") for stage in rounds), Counter())
    limits = {
        limit: _verified(actor, problems, cut_at(found.groups, limit)).answers
        for limit in actor.c.eval.limits
    }
    searched, aggregated = _with_strategies(actor, problems, found), read.rows()
    rows_of_rounds = [stage.rows() for stage in rounds]
    records = [
        {
            "index": int(index_B[b]),
            "id": problem.id,
            "search": searched[b],
            "limits": [{"limit": limit, "answer": answers[b]} for limit, answers in limits.items()],
            "aggregation": {"member": sampled.member_BxKxS[b].tolist()} | aggregated[b],
            "rsa": [rows[b] for rows in rows_of_rounds],
        }
        for b, problem in enumerate(problems)
    ]
    return (
        records,
        counts,
        Rollouts(problems, index_B, found.groups, (Round(sampled.member_BxKxS, read.groups),)),
    )


def _with_strategies(actor: Actor, problems: list[Problem], found: Stage) -> list[dict[str, Any]]:
    """Rows of search traces; where something names strategies (config.task.strategy), with the name
    of each one's.
    """
    rows, strategy = found.rows(), load_strategy(actor.c, actor.task)
    if strategy is None:
        return rows
    N = len(found.texts) // len(problems)
    names = [strategy(text, problems[i // N]) for i, text in enumerate(found.texts)]
    said = [None if name is None else str(name) for name in names]
    return [row | {"strategy": said[b * N : (b + 1) * N]} for b, row in enumerate(rows)]


def cut_at(groups: Groups, limit: int) -> Groups:
    """The same traces under a smaller limit on their length.

    Exactly what the sampler would have given with it: a trace's tokens depend on those before them,
    never on its limit.
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
        verdict_UxC=None,
    )


def _search(
    actor: Actor, weights: Any, problems: list[Problem], index_B: np.ndarray, step: int
) -> Groups:
    return search(actor, weights, problems, index_B, Purpose.EVALUATION, step)


def _verified(actor: Actor, problems: list[Problem], groups: Groups) -> Stage:
    groups, texts, verdicts = verify(actor, problems, groups)
    return Stage(groups, texts, verdicts, number_classes(actor.verifier, problems, texts, verdicts))
