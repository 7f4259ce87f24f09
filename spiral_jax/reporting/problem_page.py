"""A logged problem -> what its page shows, in JSON types.

step, cursor, id, kept, text, reference, flags
replay   of a stored population: step, round and uses; null where search traces are read
search   traces, see `_trace_page`; `sets` are places in the next list of those that it is in
sets     of all rounds: round, name, members, order (as the prompt lists them), listed (the same by
         name), right, verified, vote, flags; traces, each with its quotes and, unless the round is
         the last one, the `sets` it is in
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from spiral_jax.core.groups import Stop
from spiral_jax.evaluation.answers import ERROR
from spiral_jax.evaluation.measures import vote
from spiral_jax.objective.control_variate import logged_c
from spiral_jax.reporting.advantage_words import AdvantageSettings, explain_advantage
from spiral_jax.reporting.logged_problem import (
    LoggedProblem,
    Stage,
    Trace,
    TraceSet,
    read_problem,
)
from spiral_jax.reporting.quotes import Quoting
from spiral_jax.tasks.answer import after_thinking, last_boxed
from spiral_jax.verifier.rewards import Status

FLAGS = {  # what a problem or set can be filtered by, and what it means
    "rescue": "some aggregation is right although the vote among its candidates is wrong (right "
    "with a chance below one half, ties split)",
    "spoil": "some aggregation is wrong although the vote among its candidates is right (with a "
    "chance above one half)",
    "flat": "all aggregations of some set (without sets: all traces) have the same reward, so that "
    "they teach each other nothing, or the whole problem was discarded since no trace has an "
    "advantage",
    "truncated": "some trace was cut off at its limit",
    "error": "some trace could not be verified: our failure or a time-out",
    "replayed": "what its sets read are stored aggregations of an earlier step",
}


@dataclasses.dataclass(frozen=True)
class PageSettings:
    """What of a run's configuration the pages of its problems need.

    Attributes:
      full_candidates: whether aggregations were shown what their candidates thought.
    """

    objective: AdvantageSettings
    full_candidates: bool

    @classmethod
    def from_plain(cls, config: dict[str, Any]) -> PageSettings:
        """Of a run's plain configuration."""
        full = config["prompt"]["thinking"] == "full"
        return cls(AdvantageSettings.from_plain(config), full)

    def at_step(self, metrics: dict[str, Any]) -> PageSettings:
        """With what the estimator had fitted before a step, of which these are the metrics."""
        objective = dataclasses.replace(self.objective, c_R=logged_c(metrics))
        return dataclasses.replace(self, objective=objective)


def problem_page(
    step: int, rows: Sequence[dict[str, Any]], settings: PageSettings
) -> dict[str, Any]:
    """What the page of a problem shows; `rows` are all its rows of the trace log."""
    problem = read_problem(rows)
    search, *rounds = (_stage_pages(problem, stage, settings) for stage in problem.stages)
    sets = []
    for stage, pages_of_sets in zip(problem.stages[1:], rounds, strict=True):
        for of_set, traces in zip(stage.sets, pages_of_sets, strict=True):
            sets.append(_set_page(stage, of_set) | {"traces": traces})
    first = problem.first
    reference = first["reference_answer"]
    return {
        "step": step,
        "cursor": first["cursor"],
        "id": first["problem"],
        "kept": first["kept"],
        "replay": problem.replay,
        "text": first["problem_text"],
        "reference": reference if isinstance(reference, str) else " or ".join(reference),
        "flags": _in_order(_problem_flags(problem)),
        "search": search[0],
        "sets": sets,
    }


def _stage_pages(
    problem: LoggedProblem, stage: Stage, settings: PageSettings
) -> list[list[dict[str, Any]]]:
    """The pages of a stage's traces, set by set."""
    quoting = _quoting(problem, stage.reads, settings) if stage.reads else None
    is_read = problem.reader_of(stage) is not None or not stage.reads
    pages_of_sets = []
    for of_set in stage.sets:
        pages = []
        for trace in of_set.traces:
            page = _trace_page(trace)
            page["why"] = explain_advantage(problem, stage, of_set, trace, settings.objective)
            if quoting:
                page["quotes"] = _quotes(trace, of_set, stage.reads.traces, quoting)
            if is_read:
                page["sets"] = _sets_with(problem, stage, trace)
            pages.append(page)
        pages_of_sets.append(pages)
    return pages_of_sets


def _trace_page(trace: Trace) -> dict[str, Any]:
    """One trace: its answer and what became of it."""
    row = trace.row
    answer = row.get("answer")
    return {
        "trace": row["trace"],
        "answer": last_boxed(row["text"]) if answer is None else answer,
        "verdict": row["verdict"],
        "detail": row["verdict_detail"],
        "reward": row["reward"],
        "length": row["length"],
        "stop": row["stop"],
        "advantage": row["advantage"],
        "text": row["text"],
        "name": trace.name,
    }


def _sets_with(problem: LoggedProblem, stage: Stage, trace: Trace) -> list[int]:
    """Places among all sets of the problem of those that hold a trace."""
    reader = problem.reader_of(stage)
    if reader is None:
        return []
    return [of_set.place for of_set in reader.sets if trace.place in of_set.members]


def _quoting(problem: LoggedProblem, candidates: Stage, settings: PageSettings) -> Quoting:
    texts = [trace.row["text"] for trace in candidates.traces]
    if not settings.full_candidates:
        texts = [after_thinking(text) for text in texts]
    return Quoting(problem.first["problem_text"], texts)


def _quotes(
    trace: Trace, of_set: TraceSet, candidates: Sequence[Trace], quoting: Quoting
) -> list[dict[str, Any]]:
    """The candidates that an aggregation quotes, in the order of its prompt."""
    quotes = []
    shares = quoting.copied(trace.row["text"], of_set.listed)
    for place, share in zip(of_set.listed, shares, strict=True):
        candidate = candidates[place]
        has_answer = trace.answer not in (None, ERROR)
        same_answer = has_answer and trace.answer == candidate.answer
        if same_answer or share:
            quote = {"name": candidate.name, "copied": round(share, 3), "same_answer": same_answer}
            quotes.append(quote)
    return quotes


def _set_page(stage: Stage, of_set: TraceSet) -> dict[str, Any]:
    """A set and what its aggregations made of it, without their pages."""
    candidates, score = stage.reads.traces, of_set.score
    return {
        "round": stage.round,
        "name": of_set.name,
        "members": of_set.members,
        "order": of_set.listed,
        "listed": [candidates[place].name for place in of_set.listed],
        "right": of_set.right,
        "verified": score.verified,
        "vote": _vote(stage, of_set),
        "flags": _in_order(_set_flags(stage, of_set)),
    }


def _vote(stage: Stage, of_set: TraceSet) -> float:
    """The chance that a vote among the set's candidates is right."""
    candidates = stage.reads.traces
    return vote([candidates[place].answer for place in of_set.members])


def _set_flags(stage: Stage, of_set: TraceSet) -> set[str]:
    score, chance, flags = of_set.score, _vote(stage, of_set), set()
    if of_set.right and chance < 0.5:
        flags.add("rescue")
    if of_set.right < score.verified and chance > 0.5:
        flags.add("spoil")
    if of_set.is_flat:
        flags.add("flat")
    return flags


def _problem_flags(problem: LoggedProblem) -> set[str]:
    flags: set[str] = {"replayed"} if problem.replay else set()
    for stage in problem.stages[1:]:
        for of_set in stage.sets:
            flags |= _set_flags(stage, of_set)
    rows = [trace.row for trace in problem.traces]
    rewards = {row["reward"] for row in rows} - {None}
    if not problem.first["kept"] or (not problem.sets and len(rewards) < 2):
        flags.add("flat")
    if any(row["stop"] == Stop.LENGTH.name.lower() for row in rows):
        flags.add("truncated")
    if any(row["verdict"] in (Status.ERROR, Status.TIMEOUT) for row in rows):
        flags.add("error")
    return flags


def _in_order(flags: set[str]) -> list[str]:
    return [flag for flag in FLAGS if flag in flags]
