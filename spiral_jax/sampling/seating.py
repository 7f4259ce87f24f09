"""Who sits where: the host's picture of the slots. NumPy and integers only.

A `Job` is a requested group; it is cut into pieces as wide as its entry class, and each `Piece`
sits in one slot. All pieces of a job enter a class from one prefill of its prompt. Every choice is
a function of token counts.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from spiral_jax.core.groups import GroupRequests, Groups, Stop
from spiral_jax.sampling.settings import SlotClass


class Place(NamedTuple):
    """A slot: the index of its class, its shard, and its number within the shard."""

    slot_class: int
    shard: int
    slot: int


@dataclasses.dataclass(eq=False)
class Job:
    """A requested group (U = 1) and what has been drawn for it so far.

    Attributes:
      limit_C: int32 tokens of each trace.
      trace_CxG, length_C, logprob_CxG, stop_C: as in `Groups`.
      pieces: of it that have not ended.
    """

    request: GroupRequests
    stop_ids: tuple[int, ...]
    limit_C: np.ndarray = dataclasses.field(init=False)
    trace_CxG: np.ndarray = dataclasses.field(init=False)
    logprob_CxG: np.ndarray = dataclasses.field(init=False)
    length_C: np.ndarray = dataclasses.field(init=False)
    stop_C: np.ndarray = dataclasses.field(init=False)
    pieces: int = 0

    def __post_init__(self) -> None:
        C, G = self.request.traces, self.request.max_tokens
        limits = self.request.limit_UxC
        self.limit_C = np.full(C, G, np.int32) if limits is None else limits[0]
        self.trace_CxG = np.zeros((C, G), np.int32)
        self.logprob_CxG = np.zeros((C, G), np.float32)
        self.length_C = np.zeros(C, np.int32)
        self.stop_C = np.full(C, Stop.LENGTH, np.int32)

    @property
    def prompt_len(self) -> int:
        return int(self.request.prompt_len_U[0])

    def append(self, trace: int, token_n: np.ndarray, logprob_n: np.ndarray) -> None:
        """Adds drawn tokens to a trace."""
        start, end = self.length_C[trace], self.length_C[trace] + len(token_n)
        self.trace_CxG[trace, start:end] = token_n
        self.logprob_CxG[trace, start:end] = logprob_n
        self.length_C[trace] = end
        if len(token_n) and token_n[-1] in self.stop_ids:
            self.stop_C[trace] = Stop.STOP

    def runs(self, trace: int) -> bool:
        return self.stop_C[trace] == Stop.LENGTH and self.length_C[trace] < self.limit_C[trace]

    def group(self) -> Groups:
        """The completed group (U = 1)."""
        return Groups(
            self.request,
            trace_UxCxG=self.trace_CxG[None],
            trace_len_UxC=self.length_C[None],
            logprob_UxCxG=self.logprob_CxG[None],
            stop_UxC=self.stop_C[None],
        )


@dataclasses.dataclass(eq=False)
class Piece:
    """Some traces of a job, which sit in one slot.

    Attributes:
      traces: index of the job's trace in each row of the slot; -1 where a row holds none.
      entries: classes that it may enter, in the order in which they are tried.
      place: None while it waits.
    """

    job: Job
    traces: list[int]
    entries: list[int]
    place: Place | None = None

    @property
    def running(self) -> list[int]:
        """Rows whose trace has not ended."""
        return [row for row, trace in enumerate(self.traces) if trace >= 0 and self.job.runs(trace)]

    @property
    def step(self) -> int:
        """Tokens that the longest of its traces has."""
        return max(int(self.job.length_C[trace]) for trace in self.traces if trace >= 0)

    def sit(self, place: Place, rows: list[int], width: int) -> None:
        """Takes a place with C = `width`; the traces of `rows` become those of its first rows."""
        taken_along = [self.traces[row] for row in rows]
        self.place = place
        self.traces = taken_along + [-1] * (width - len(rows))

    def append(self, token_NxC: np.ndarray, logprob_NxC: np.ndarray) -> None:
        """Adds what its slot's rows have drawn in N steps: -1 from where on a row drew nothing."""
        drawn_C = (token_NxC >= 0).sum(axis=0)
        for row, trace in enumerate(self.traces):
            if trace >= 0 and drawn_C[row]:
                n = drawn_C[row]
                self.job.append(trace, token_NxC[:n, row], logprob_NxC[:n, row])


class Seats:
    """The free slots of all classes, by shard."""

    def __init__(self, classes: tuple[SlotClass, ...], shards: int):
        self._classes = classes
        self._free = [
            [list(range(slots.slots // shards)) for _ in range(shards)] for slots in classes
        ]

    def take(self, i: int, shard: int | None = None) -> Place | None:
        """The lowest free slot of class i; None if there is none.

        Args:
          shard: where; None: on the shard with the most free slots.
        """
        free = self._free[i]
        if shard is None:
            shard = max(range(len(free)), key=lambda z: (len(free[z]), -z))
        return Place(i, shard, free[shard].pop(0)) if free[shard] else None

    def give_back(self, place: Place) -> None:
        free = self._free[place.slot_class][place.shard]
        free.append(place.slot)
        free.sort()

    def has_free(self, i: int) -> bool:
        return any(self._free[i])

    def better_class(self, piece: Piece, targets: list[int]) -> int | None:
        """Where a piece should move: the narrowest class with room for its running traces.

        Of equally narrow ones the shortest. A piece whose slot is full may also move without
        becoming narrower, to a longer slot.

        Args:
          targets: classes that its own may move to.

        Returns:
          None if it does best where it is, or no such slot is free on its shard.
        """
        here, shard = self._classes[piece.place.slot_class], piece.place.shard
        running, step = len(piece.running), piece.step
        is_full = step >= here.G

        def helps(there: SlotClass) -> bool:
            return step < there.G if is_full else there.C < here.C

        def narrowest_then_shortest(j: int) -> tuple[int, int]:
            return self._classes[j].C, self._classes[j].G

        better = [
            j
            for j in targets
            if self._free[j][shard] and running <= self._classes[j].C and helps(self._classes[j])
        ]
        return min(better, key=narrowest_then_shortest, default=None)


def cut(job: Job, width: int, entries: list[int]) -> list[Piece]:
    """The job's traces as pieces of at most `width`, which may enter the classes `entries`."""
    traces = range(job.request.traces)
    pieces = [
        Piece(job, list(traces[start : start + width]), entries)
        for start in range(0, len(traces), width)
    ]
    job.pieces = len(pieces)
    return pieces


def plan_prefills(
    pieces: list[Piece], waiting: set[Job], shards: int, W: int
) -> list[list[list[Job]]]:
    """Which prompts are prefilled together, so that seated pieces of one class can enter.

    First fit, in the order of the pieces. A job's prompt is computed on each shard on which its
    pieces sit, and on every shard if some of its pieces still wait, since they may be seated
    anywhere: in one call, whose rows on other shards would mostly be padding.

    Args:
      waiting: jobs with pieces that will enter the class later.
      W: prompts of a call on each shard.

    Returns:
      calls; of each the jobs in the rows of each shard.
    """
    shards_of: dict[Job, set[int]] = {}
    for piece in pieces:
        needed = range(shards) if piece.job in waiting else [piece.place.shard]
        shards_of.setdefault(piece.job, set()).update(needed)

    calls: list[list[list[Job]]] = []
    for job, needed in shards_of.items():
        call = next((call for call in calls if all(len(call[z]) < W for z in needed)), None)
        if call is None:
            call = [[] for _ in range(shards)]
            calls.append(call)
        for z in needed:
            call[z].append(job)
    return calls
