"""The rollout engine: groups enter free slots, decode together, narrow as their traces end, and
leave.

feed -> admit (prefill, enter) -> [ decode a chunk -> collect tokens -> leave or move -> admit ] ->
feed

Search and aggregation groups run side by side, and nothing waits for the longest trace of anything
but its own group. Time is counted in chunks and every choice depends on token counts alone, so a
replayed step does the same again, and
so do all processes of a run: each of them sees every token and follows every group.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from spiral_jax.core import faults
from spiral_jax.core import mesh as meshes
from spiral_jax.core.config import ConfigError
from spiral_jax.core.groups import GroupRequests
from spiral_jax.core.metrics import Mean
from spiral_jax.sampling.prefill import Prefilled, Prompts
from spiral_jax.sampling.programs import (
    Program,
    Schedule,
    admission_shapes,
    check_room,
    compile_programs,
    describe,
    device_bytes,
    prompt_shapes,
)
from spiral_jax.sampling.protocol import Feed
from spiral_jax.sampling.seating import Job, Piece, Seats, cut, plan_prefills
from spiral_jax.sampling.slots import Admission, DecodeSettings
from spiral_jax.sampling.weights import DecodeWeights, lay_out


class Engine:
    """A `Sampler` with continuous admission.

    Args:
      settings: model, draws, mesh.
      schedule: classes of slots and how long they are decoded at a time.

    Raises:
      ConfigError: slots that the mesh does not divide, a stop id outside the vocabulary; and when
        the programs are compiled, devices without room for weights and slots.
    """

    def __init__(self, settings: DecodeSettings, schedule: Schedule):
        self.settings = settings
        self.schedule = schedule
        self.shards = meshes.group_count_multiple(settings.mesh)
        self.entries = schedule.entries()
        self.targets = {
            i: [j for a, j in schedule.moves() if a == i] for i in range(len(schedule.classes))
        }
        self._programs: dict[tuple[Any, ...], Program] = {}
        for i, slots in enumerate(schedule.classes):
            if slots.slots % self.shards:
                raise ConfigError(
                    f"config.sampling.classes[{i}]: its {slots.slots} slots must be a multiple of the mesh's "
                    f"data * fsdp = {self.shards}."
                )
        V = settings.config.arch.V
        if outside := [stop for stop in settings.stop_ids if not 0 <= stop < V]:
            raise ConfigError(
                f"stop ids {outside} are outside the vocabulary of {V} ids: mend generation_config.json."
            )

    @property
    def programs(self) -> dict[tuple[Any, ...], Program]:
        """All compiled programs; compiles them at the first use."""
        if not self._programs:
            check_room(self.settings, self.schedule, device_bytes(self.settings.mesh))
            self._programs = compile_programs(self.settings, self.schedule)
        return self._programs

    def start_report(self) -> str:
        """Compiles what is not compiled yet, and says what there is: programs, compile times,
        memory.
        """
        return describe(self.programs, self.settings, self.schedule)

    def prepare(self, variables: dict[str, Any]) -> DecodeWeights:
        """Separate per-layer weights, replicated over groups and cut along `tensor` only."""
        with jax.set_mesh(self.settings.mesh):
            return lay_out(variables, self.settings.config, self.settings.mesh)

    def stream(self, weights: DecodeWeights, feed: Feed) -> Decoding:
        """Samples what `feed` gives until it is finished; see `protocol.Sampler`."""
        return Decoding(self, weights, feed)

    def entry_of(self, request: GroupRequests) -> list[int]:
        """Entry classes that can hold a request (U = 1), the shortest prompts first. Raises
        `ValueError` if none.
        """
        classes, P, G = self.schedule.classes, int(request.prompt_len_U[0]), request.max_tokens
        if P < 1 or request.traces < 1:
            raise ValueError(
                f"a request with a prompt of {P} tokens and {request.traces} traces: both must be >= 1."
            )
        longest = {slots.P: max(c.G for c in classes if c.P == slots.P) for slots in classes}
        fit = [i for i in self.entries if classes[i].P >= P and longest[classes[i].P] >= G]
        if not fit:
            raise ValueError(
                f"a prompt of {P} tokens with traces of up to {G} fits into none of config.sampling.classes = "
                f"{[tuple(vars(slots).values()) for slots in classes]} (slots, C, P, G): add a longer one."
            )
        return fit


@dataclasses.dataclass(frozen=True)
class _Ready:
    """Prefilled prompts, and whose they are: the jobs in the rows of each shard."""

    rows: list[list[Job]]
    prompts: Prefilled

    @property
    def jobs(self) -> set[Job]:
        return {job for of_shard in self.rows for job in of_shard}


class Decoding:
    """A `Sampling` of the engine: device states, who sits where, and what is counted."""

    def __init__(self, engine: Engine, weights: DecodeWeights, feed: Feed):
        self.engine, self.weights, self.feed, self.now = engine, weights, feed, 0
        self.schedule, self.settings, self.shards = engine.schedule, engine.settings, engine.shards
        self.programs = engine.programs
        self.seats = Seats(self.schedule.classes, self.shards)
        self.seated: list[Piece] = []
        self.waiting: deque[tuple[Piece, list[int]]] = deque()
        self.kept: dict[int, _Ready] = {}  # by class: prompts that waiting pieces will enter from
        self.states = [self.programs["clear", i].run() for i in range(len(self.schedule.classes))]
        self.counts: Counter[str] = Counter()
        rows = [slots.rows // self.shards for slots in self.schedule.classes]
        self.first_rows = [
            sum(rows[:i]) for i in range(len(rows))
        ]  # of each class, among those of a shard

    def __iter__(self) -> Iterator[int]:
        """Yields `now` once a chunk; see `protocol.Sampling`.

        Raises:
          ValueError: a request that no class can hold; the message names the field.
        """
        while True:
            yield self.now
            if self.feed.finished():
                return

            while self.admit():
                self.settle()
            if self.seated:
                self.decode()
                self.settle()
            self.now += 1

    def admit(self) -> bool:
        """Seats waiting pieces, then new requests, as long as an entry class has a free slot;
        prefills them.

        Returns:
          whether anybody took a seat.
        """
        entered: dict[int, list[Piece]] = {}
        for _ in range(len(self.waiting)):
            self._seat(*self.waiting.popleft(), entered)
        room = sum(
            self.schedule.classes[i].slots for i in self.engine.entries
        )  # groups, however wide
        while (
            any(self.seats.has_free(i) for i in self.engine.entries)
            and len({piece.job for piece, _ in self.waiting}) < room
        ):
            request = self.feed.next(self.now)
            if request is None:
                break
            entries = self.engine.entry_of(request)
            for piece in cut(
                Job(request, self.settings.stop_ids), self.schedule.classes[entries[0]].C
            ):
                self._seat(piece, entries, entered)
        start = time.monotonic()
        for i, pieces in entered.items():
            self._enter(i, pieces)
        # the last that waited may have found a seat in another class
        self.kept = {
            i: ready for i, ready in self.kept.items() if ready.jobs & self._waiting_for(i)
        }
        self.counts["prefill_seconds"] += time.monotonic() - start
        return bool(entered)

    def _seat(self, piece: Piece, entries: list[int], entered: dict[int, list[Piece]]) -> None:
        classes = self.schedule.classes
        for i in entries:
            if len(piece.traces) <= classes[i].C and (place := self.seats.take(i)):
                piece.place = place
                piece.traces += [-1] * (classes[i].C - len(piece.traces))
                self.seated.append(piece)
                entered.setdefault(i, []).append(piece)
                return
        self.waiting.append((piece, entries))

    def _waiting_for(self, i: int) -> set[Job]:
        """Jobs with waiting pieces that may be seated in class i."""
        width = self.schedule.classes[i].C
        return {
            piece.job
            for piece, entries in self.waiting
            if i in entries and len(piece.traces) <= width
        }

    def _enter(self, i: int, pieces: list[Piece]) -> None:
        """Puts pieces into their slots of class i, from prompts that are kept or are prefilled now.

        At most one call's prompts are kept for a class: pieces are seated in the order in which
        they wait, so only the last job that enters a class can have more of them.
        """
        waiting, ready = self._waiting_for(i), self.kept.pop(i, None)
        if ready:
            pieces = self._enter_from(i, ready, pieces, waiting)
        W = prompt_shapes(self.settings, self.schedule, i).prompt_len_ZxW.shape[1]
        for rows in plan_prefills(pieces, waiting, self.shards, W):
            ready = None  # its memory is free before the next prompts take theirs
            ready = self._prefill(i, rows)
            pieces = self._enter_from(i, ready, pieces, waiting)

    def _prefill(self, i: int, rows: list[list[Job]]) -> _Ready:
        """One call; a prompt that is computed on several shards counts once, and its other rows are
        padding.
        """
        shapes = prompt_shapes(self.settings, self.schedule, i)
        new = _prompts(shapes, rows)
        chunk = self.settings.chunk_of(self.schedule.classes[i].P)
        chunks = -(-int(new.prompt_len_ZxW.max()) // chunk)
        ready = _Ready(rows, self.programs["prefill", i].run(self.weights, _place(new, shapes)))
        self.counts["prefill_computed"] += new.prompt_len_ZxW.size * chunks * chunk
        self.counts["prefilled"] += sum(job.prompt_len for job in ready.jobs)
        return ready

    def _enter_from(
        self, i: int, ready: _Ready, pieces: list[Piece], waiting: set[Job]
    ) -> list[Piece]:
        """Enters those whose prompts are ready, keeps these if others wait for them, and returns
        the other pieces.
        """
        jobs = ready.jobs
        by_shard = [
            [p for p in pieces if p.job in jobs and p.place[1] == z] for z in range(self.shards)
        ]
        shapes = admission_shapes(self.settings, self.schedule, i)
        W = shapes.slot_ZxW.shape[1]
        for start in range(0, max(map(len, by_shard)), W):
            batch = {
                (z, w): piece
                for z, of in enumerate(by_shard)
                for w, piece in enumerate(of[start : start + W])
            }
            new = _place(_admission(shapes, ready.rows, batch), shapes)
            self.states[i], tokens, logprobs = self.programs["enter", i].run(
                self.states[i], ready.prompts, new
            )
            token_ZxWxC, logprob_ZxWxC = jax.device_get((tokens, logprobs))
            for (z, w), piece in batch.items():
                self._collect(piece, token_ZxWxC[z, w][None], logprob_ZxWxC[z, w][None])
                drawn = int((token_ZxWxC[z, w] >= 0).sum())
                self.counts["generated"] += drawn
                self.counts["prompt_tokens"] += drawn * piece.job.prompt_len
        if jobs & waiting:
            self.kept[i] = ready
        return [piece for piece in pieces if piece.job not in jobs]

    def decode(self) -> None:
        """One chunk of the program with the fewest rows that hold all running ones of each shard."""
        start = time.monotonic()
        running = [0] * self.shards
        for piece in self.seated:
            if (
                piece.step < self.schedule.classes[piece.place[0]].G
            ):  # else it waits for a longer slot
                running[piece.place[1]] += len(piece.running)
        rows = next(rows for rows in self.schedule.decode_rows(self.shards) if rows >= max(running))
        states, tokens, logprobs, steps = self.programs["decode", rows].run(
            self.weights, tuple(self.states)
        )
        self.states = list(states)
        token_NxZxR, logprob_NxZxR, steps = jax.device_get((tokens, logprobs, steps))
        faults.chunk_decoded()
        self.counts["decode_seconds"] += time.monotonic() - start
        for piece in self.seated:
            i, z, slot = piece.place
            first = self.first_rows[i] + slot * len(piece.traces)
            at = (slice(int(steps)), z, slice(first, first + len(piece.traces)))
            self._collect(piece, token_NxZxR[at], logprob_NxZxR[at])
        self.counts["chunks"] += 1
        self.counts["queue_depth"] += len(self.waiting)
        self.counts["rows_computed"] += int(steps) * self.shards * rows
        self.counts["rows_live"] += int((token_NxZxR[:steps] >= 0).sum())

    def _collect(self, piece: Piece, token_NxC: np.ndarray, logprob_NxC: np.ndarray) -> None:
        drawn_C = (token_NxC >= 0).sum(axis=0)
        for row, trace in enumerate(piece.traces):
            if trace >= 0 and drawn_C[row]:
                n = drawn_C[row]
                piece.job.append(trace, token_NxC[:n, row], logprob_NxC[:n, row])

    def settle(self) -> None:
        """Lets ended groups go, and moves the others to where they waste fewer rows, oldest first."""
        self._leave()
        for piece in self.seated:
            i, shard, _ = piece.place
            j = self.seats.better_class(piece, self.engine.targets[i])
            if j is not None:
                place = self.seats.take(j, shard)
                rows = piece.running + [-1] * (self.schedule.classes[j].C - len(piece.running))
                self._move(piece, place, rows)

    def _move(self, piece: Piece, place: tuple[int, int, int], rows: list[int]) -> None:
        (i, shard, slot), (j, _, to) = piece.place, place
        from_Z, to_Z = np.full((2, self.shards), -1, np.int32)
        row_ZxC = np.full((self.shards, len(rows)), -1, np.int32)
        from_Z[shard], to_Z[shard], row_ZxC[shard] = slot, to, rows
        along = meshes.group_sharding(self.settings.mesh)
        self.states[i], self.states[j] = self.programs["move", i, j].run(
            self.states[i], self.states[j], *meshes.place((from_Z, to_Z, row_ZxC), along)
        )
        self.seats.give_back(piece.place)
        piece.place, piece.traces = place, [piece.traces[row] if row >= 0 else -1 for row in rows]
        self.counts["moves"] += 1

    def _leave(self) -> None:
        still = []
        for piece in self.seated:
            if piece.running:
                still.append(piece)
                continue
            self.seats.give_back(piece.place)
            piece.job.pieces -= 1
            if piece.job.pieces == 0:
                self.feed.done(piece.job.group(), self.now)
        self.seated = still

    def metrics(self) -> dict[str, Mean | float]:
        """What the log says about the sampling, as (sum, count) pairs and counts."""
        n = self.counts
        padding = Mean(float(n["prefill_computed"] - n["prefilled"]), float(n["prefill_computed"]))
        abandoned = {
            id(piece.job) for piece in [*self.seated, *(piece for piece, _ in self.waiting)]
        }
        return {
            "sampling/generated_tokens": float(n["generated"] + n["rows_live"]),
            "sampling/row_occupancy": Mean(float(n["rows_live"]), float(n["rows_computed"])),
            "sampling/prefill_padding": padding,
            "tokens_per_s/decode": Mean(float(n["rows_live"]), n["decode_seconds"]),
            "tokens_per_s/prefill": Mean(float(n["prefilled"]), n["prefill_seconds"]),
            "sampling/queue_depth": Mean(float(n["queue_depth"]), float(n["chunks"])),
            "sampling/shared_prompt_tokens": float(n["prompt_tokens"] - n["prefilled"]),
            "sampling/prefilled_tokens": float(n["prefilled"]),
            "sampling/moves": float(n["moves"]),
            "sampling/chunks": float(n["chunks"]),
            "sampling/programs": float(len(self.programs)),
            "sampling/abandoned_groups": float(len(abandoned)),
            "time/decode": n["decode_seconds"],
            "time/prefill": n["prefill_seconds"],
        }


def _prompts(shapes: Prompts, rows: list[list[Job]]) -> Prompts:
    """Host arrays of a prefill of these jobs' prompts; `rows`: of each shard."""
    new = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)
    new.prompt_len_ZxW[...] = 1
    for z, of_shard in enumerate(rows):
        for w, job in enumerate(of_shard):
            new.prompt_ZxWxP[z, w, : job.prompt_len] = job.request.prompt_UxP[0, : job.prompt_len]
            new.prompt_len_ZxW[z, w] = job.prompt_len
    return new


def _admission(
    shapes: Admission, rows: list[list[Job]], batch: dict[tuple[int, int], Piece]
) -> Admission:
    """Host arrays of an admission; (shard, w) -> piece. `rows`: whose prompts are prefilled on each
    shard.
    """
    new = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)
    new.slot_ZxW[...] = -1
    for at, piece in batch.items():
        new.row_ZxW[at] = rows[at[0]].index(piece.job)
        new.id_ZxWx6[at] = piece.job.request.id_Ux6[0]
        new.first_trace_ZxW[at] = piece.traces[0]
        new.slot_ZxW[at] = piece.place[2]
        for row, trace in enumerate(piece.traces):
            new.limit_ZxWxC[at][row] = piece.job.limit_C[trace] if trace >= 0 else 0
    return new


def _place(new: Prompts | Admission, shapes: Prompts | Admission) -> Prompts | Admission:
    """Host arrays on the devices, with the shardings of `shapes`."""
    return meshes.place(new, jax.tree.map(lambda a: a.sharding, shapes))
