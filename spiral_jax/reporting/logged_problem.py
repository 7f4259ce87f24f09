"""The trace log's rows of one problem -> its stages, their sets and traces, and who reads whom.

A problem is a chain of stages: search, then each round of aggregation, whose sets read traces of
the stage before. Where a stored population was read, that stands in the place of search. Trace logs
of all earlier versions that have a `verdict` are read.
"""

from __future__ import annotations

import dataclasses
import itertools
import string
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from spiral_jax.evaluation.answers import CORRECT, ERROR, spelling
from spiral_jax.objective.explain import Score
from spiral_jax.verifier.rewards import Status


@dataclasses.dataclass(frozen=True)
class Trace:
    """One trace.

    Attributes:
      row: of the trace log.
      name: "3", a search trace; "A.3", an aggregation of set A.
      place: among all traces of its stage, as the sets that read them count them.
      answer: equal numbers are equal answers, see `evaluation.answers`; None: it has none.
    """

    row: dict[str, Any]
    name: str
    place: int
    answer: int | None


@dataclasses.dataclass(frozen=True)
class TraceSet:
    """Traces that continue one prompt: all search traces, or all aggregations of a set.

    Attributes:
      name: "" for the search traces.
      place: among the sets of all rounds; None for search.
      members: places of the traces that the set holds; none for search.
      listed: those that its prompt shows, in its order.
    """

    name: str
    place: int | None
    members: list[int]
    listed: list[int]
    traces: list[Trace]

    @property
    def score(self) -> Score:
        """What those of its traces have earned that were verified."""
        return Score.of(self._rewards)

    @property
    def right(self) -> int:
        """How many of its traces are right."""
        return sum(trace.row["verdict"] == Status.CORRECT for trace in self.traces)

    @property
    def is_flat(self) -> bool:
        """Whether all its traces have earned the same, so that they teach each other nothing."""
        return len(set(self._rewards)) < 2

    @property
    def _rewards(self) -> list[float]:
        """Of the traces that were verified."""
        rewards = [trace.row["reward"] for trace in self.traces]
        return [reward for reward in rewards if reward is not None]


@dataclasses.dataclass(frozen=True)
class Stage:
    """Search (round 0, one set) or a round of aggregation.

    Attributes:
      reads: the stage whose traces its sets hold; None for search.
    """

    round: int
    reads: Stage | None
    sets: list[TraceSet]

    @property
    def traces(self) -> list[Trace]:
        """All of them by `place`."""
        return [trace for of_set in self.sets for trace in of_set.traces]


@dataclasses.dataclass(frozen=True)
class LoggedProblem:
    """A problem and what was sampled for it; `first` is one of its rows, for what they share."""

    first: dict[str, Any]
    stages: list[Stage]

    @property
    def replay(self) -> dict[str, int] | None:
        """When the stored population that was read was sampled, in which round; None: search is."""
        return self.first.get("replay")

    @property
    def sets(self) -> list[TraceSet]:
        """Those of all rounds, in order."""
        return [of_set for stage in self.stages[1:] for of_set in stage.sets]

    @property
    def traces(self) -> list[Trace]:
        return [trace for stage in self.stages for trace in stage.traces]

    def reader_of(self, stage: Stage) -> Stage | None:
        """The round that reads a stage; None if it is the last."""
        return next((reader for reader in self.stages if reader.reads is stage), None)


def split_problems(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The rows of one problem after the other; rows of a problem are neighbours in the log."""
    for _, group in itertools.groupby(rows, key=lambda row: (row["cursor"], row["problem"])):
        yield list(group)


def read_problem(rows: Sequence[dict[str, Any]]) -> LoggedProblem:
    """The problem of these rows. Raises KeyError: they lack a field."""
    by_round: dict[int, dict[int, list[dict[str, Any]]]] = {}
    for row in rows:  # search has neither a round nor a set
        by_set = by_round.setdefault(row["round"] or 0, {})
        by_set.setdefault(row["set"] or 0, []).append(row)
    answer_numbers: dict[str, int] = {}
    stages: list[Stage] = []
    sets_so_far = 0
    for round in sorted(by_round):
        reads = stages[-1] if stages else None
        stage = Stage(round, reads, sets=[])
        for k in sorted(by_round[round]):
            place = sets_so_far if reads else None
            first_trace = len(stage.traces)
            of_set = _read_set(by_round[round][k], place, first_trace, answer_numbers)
            stage.sets.append(of_set)
            sets_so_far += 1 if reads else 0
        stages.append(stage)
    return LoggedProblem(rows[0], stages)


def _read_set(
    rows: Sequence[dict[str, Any]],
    place: int | None,
    first_trace: int,
    answer_numbers: dict[str, int],
) -> TraceSet:
    """The set of these rows.

    Args:
      place: of the set.
      first_trace: place of its first trace.
      answer_numbers: spelling of a wrong answer -> its number; grows by those that are new.
    """
    first = rows[0]
    name = set_name(first["set"], first["round"]) if first["round"] else ""
    traces = []
    for i, row in enumerate(rows):
        trace_name = f"{name}.{row['trace']}" if name else str(row["trace"])
        traces.append(Trace(row, trace_name, first_trace + i, _answer(row, answer_numbers)))
    return TraceSet(name, place, first["subset"] or [], first["order"] or [], traces)


def _answer(row: dict[str, Any], answer_numbers: dict[str, int]) -> int | None:
    """Its number as in `answers.number_classes`, but that of a wrong one by its spelling alone."""
    if row["verdict"] == Status.CORRECT:
        return CORRECT
    if row["reward"] is None:
        return ERROR
    if row["verdict"] == Status.UNPARSED or row.get("answer") == "":
        return None
    name = " ".join(spelling(row["text"], row.get("answer")).split())
    return answer_numbers.setdefault(name, len(answer_numbers) + 1)


def set_name(k: int, round: int = 1) -> str:
    """What pages call set k: A ... Z, A1 ...; A' those of the second round, and so on."""
    letter, again = string.ascii_uppercase[k % 26], k // 26
    return f"{letter}{again or ''}" + "'" * (round - 1)
