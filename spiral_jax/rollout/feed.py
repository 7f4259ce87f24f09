"""Problems on their way through the stages: what a sampler is fed with, and what comes back.

    problem -> search group -> sets -> aggregation groups -> sets of them -> ...
    problem, stored population -> sets -> aggregation groups

Nothing waits for another problem's stage: as soon as the last group of a stage has ended, the
stages that read it are asked for. A trace's tokens depend on its key and its prompt alone, so they
are those of one stage after the other.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from spiral_jax.core.groups import GroupRequests, Groups, concat_groups
from spiral_jax.rollout.requests import Asked, Writer
from spiral_jax.rollout.stages import Stage


class Problems(Protocol):
    """Where problems come from, one by one."""

    def next(self) -> Asked | None:
        """The next problem to begin; None if there is none at this time."""

    @property
    def exhausted(self) -> bool:
        """Whether no other problem will come."""


class Listed:
    """`Problems` that are all there from the start."""

    def __init__(self, asked: Sequence[Asked]):
        self._waiting = list(reversed(asked))

    def next(self) -> Asked | None:
        return self._waiting.pop() if self._waiting else None

    @property
    def exhausted(self) -> bool:
        return not self._waiting


@dataclasses.dataclass
class Course:
    """One problem on its way.

    Attributes:
      stages: that are sampled for it, in order.
      groups: by stage and set, as they come back.
      member: of each stage that has begun, int32 [K, S]: which candidates each set reads.
    """

    asked: Asked
    stages: Sequence[Stage]
    groups: dict[str, dict[int, Groups]] = dataclasses.field(default_factory=dict)
    member: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def of_stage(self, stage: Stage) -> Groups:
        """The groups of a complete stage, in the order of their sets."""
        by_set = self.groups[stage.name]
        return concat_groups([by_set[k] for k in range(len(by_set))])

    def is_complete(self, stage: Stage) -> bool:
        sets = len(self.member[stage.name]) if stage.reads else 1
        return len(self.groups[stage.name]) == sets


class Completed(NamedTuple):
    """A stage of a problem whose last group ended at `now`, in decode chunks."""

    course: Course
    stage: Stage
    now: int


class Feed:
    """A `sampling.protocol.Feed` of a list of stages.

    Args:
      stages: search first; each after the one that it reads.
      replay: what reads a problem's stored population, round by round; (): no problem has one.

    Attributes:
      courses: every problem that has begun, by cursor, in the order in which they began.
      cleaned: what cleaning took out of candidates, by the stages' labels.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        writer: Writer,
        problems: Problems,
        replay: Sequence[Stage] = (),
    ):
        self._stages, self._replay = stages, replay
        self._search = stages[0]
        self._writer, self._problems = writer, problems
        self._ready: deque[GroupRequests] = deque()  # sets: they go before new problems
        self._open = 0  # groups that are ready or on their way
        self._completed: list[Completed] = []
        self.courses: dict[int, Course] = {}
        self.cleaned: Counter[str] = Counter()

    def finished(self) -> bool:
        """Whether every problem has been through all stages, and no other will come."""
        return self._problems.exhausted and not self._open

    def next(self, now: int) -> GroupRequests | None:
        """A set whose candidates are there, else a new problem's search group, else None."""
        if self._ready:
            return self._ready.popleft()
        asked = self._problems.next()
        if asked is None:
            return None
        if asked.population is not None:
            self._begin_replay(asked)
            return self._ready.popleft()
        self.courses[asked.cursor] = Course(asked, self._stages)
        self._open += 1
        return self._writer.search(self._search, asked)

    def done(self, group: Groups, now: int) -> None:
        """Takes a group, and asks for what reads its stage if it was the last one of that."""
        cursor, round, k = (int(group.requests.id_Ux6[0, i]) for i in (2, 3, 5))
        self._open -= 1
        course = self.courses[cursor]
        stage = next(stage for stage in course.stages if stage.round == round)
        self._take(course, stage, k, group, now)

    def begin_with(self, asked: Asked, search: Groups) -> None:
        """Takes a problem whose search group (U = 1) other weights have drawn."""
        self.courses[asked.cursor] = Course(asked, self._stages)
        self._take(self.courses[asked.cursor], self._search, 0, search, 0)

    def take_completed(self) -> list[Completed]:
        """The stages that have become complete since the last call."""
        completed, self._completed = self._completed, []
        return completed

    def _begin_replay(self, asked: Asked) -> None:
        """Asks for the sets of a problem's stored population."""
        course, first = Course(asked, self._replay), self._replay[0]
        self.courses[asked.cursor] = course
        search = self._writer.search(self._search, asked)
        course.groups[first.reads.name] = {0: asked.population.as_group(search, first.max_tokens)}
        self._ask(course, first)

    def _take(self, course: Course, stage: Stage, k: int, group: Groups, now: int) -> None:
        course.groups.setdefault(stage.name, {})[k] = group
        if not course.is_complete(stage):
            return
        self._completed.append(Completed(course, stage, now))
        for reader in course.stages:
            if reader.reads is stage:
                self._ask(course, reader)

    def _ask(self, course: Course, stage: Stage) -> None:
        """Asks for all sets of a stage."""
        asked = course.asked
        member_KxS = stage.sets(self._writer.step, asked.cursor)
        course.member[stage.name] = member_KxS
        search = self._writer.search(self._search, asked)
        candidates = course.of_stage(stage.reads).as_population(search).first(stage.candidates)
        requests, cleaned = self._writer.aggregation(stage, asked, candidates, member_KxS)
        self._ready.extend(requests.take([u]) for u in range(len(requests)))
        self._open += len(requests)
        self.cleaned.update({f"{stage.label}_{name}": n for name, n in cleaned.items()})
