"""One stream of the engine under way: groups enter free slots, decode together, narrow, and leave.

feed -> admit (prefill, enter) -> [ decode a chunk -> collect tokens -> leave or move -> admit ] ->
feed

Search and aggregation groups run side by side, and nothing waits for the longest trace of anything
but its own group. Time is counted in chunks and every choice depends on token counts alone, so a
replayed step does the same again, and so do all processes of a run: each of them sees every token
and follows every group.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import jax
import numpy as np

from spiral_jax.core import faults
from spiral_jax.core import mesh as meshes
from spiral_jax.core.metrics import Mean
from spiral_jax.sampling.counts import Counts
from spiral_jax.sampling.entrance import Entrance
from spiral_jax.sampling.programs import CompiledProgram, Name
from spiral_jax.sampling.protocol import Feed
from spiral_jax.sampling.seating import Job, Piece, Place, Seats, cut
from spiral_jax.sampling.settings import DecodeSettings, Schedule
from spiral_jax.sampling.slots import Move
from spiral_jax.sampling.weights import DecodeWeights


class Decoding:
    """A `Sampling` of the engine: device states, who sits where, and what is counted."""

    def __init__(
        self,
        settings: DecodeSettings,
        schedule: Schedule,
        programs: dict[Name, CompiledProgram],
        weights: DecodeWeights,
        feed: Feed,
    ):
        classes = schedule.classes
        self._settings, self._schedule, self._programs = settings, schedule, programs
        self._weights, self._feed = weights, feed
        self._shards = meshes.group_count_multiple(settings.mesh)
        self._entries = schedule.entries()
        self._now = 0

        self._states = [programs["clear", i].run() for i in range(len(classes))]
        self._seats = Seats(classes, self._shards)
        self._seated: list[Piece] = []
        self._waiting: list[Piece] = []
        self._counts = Counts()
        self._entrances = {
            i: Entrance(i, settings, schedule, programs, self._counts) for i in self._entries
        }
        # where the rows of each class begin among those of a shard
        rows = [slots.rows // self._shards for slots in classes]
        self._first_row = list(itertools.accumulate(rows, initial=0))

    def __iter__(self) -> Iterator[int]:
        """Yields `now` once a chunk; see `protocol.Sampling`.

        Raises:
          ValueError: a request that no class can hold; the message names the field.
        """
        while True:
            yield self._now
            if self._feed.finished():
                return

            while self._admit():
                self._settle()
            if self._seated:
                self._decode()
                self._settle()
            self._now += 1

    def metrics(self) -> dict[str, Mean | float]:
        """What the log says about the sampling so far."""
        abandoned = _jobs(self._seated) | _jobs(self._waiting)
        return self._counts.metrics(len(self._programs), len(abandoned))

    def _admit(self) -> bool:
        """Seats waiting pieces, then new requests, as long as there is room; prefills and enters.

        Returns:
          whether anybody took a seat.
        """
        new = self._seat_waiting() + self._seat_requests()
        self._seated += new

        start = time.monotonic()
        for i, entrance in self._entrances.items():
            pieces = [piece for piece in new if piece.place.slot_class == i]
            self._states[i] = entrance.enter(
                self._weights, self._states[i], pieces, self._waiting_for(i)
            )
        self._counts.prefill_seconds += time.monotonic() - start
        return bool(new)

    def _seat_waiting(self) -> list[Piece]:
        """Seats the pieces for which there is a slot now, in the order in which they wait."""
        seated = [piece for piece in self._waiting if self._seat(piece)]
        self._waiting = [piece for piece in self._waiting if piece.place is None]
        return seated

    def _seat_requests(self) -> list[Piece]:
        """Asks for requests while an entry class has a free slot; pieces without one wait.

        A wide group may fill all slots with some of its pieces. No more groups wait than the entry
        classes have slots.
        """
        seated = []
        room = sum(self._schedule.classes[i].slots for i in self._entries)
        while self._has_free_entry() and len(_jobs(self._waiting)) < room:
            request = self._feed.next(self._now)
            if request is None:
                break
            entries = self._schedule.entries_for(request)
            width = self._schedule.classes[entries[0]].C
            for piece in cut(Job(request, self._settings.stop_ids), width, entries):
                group = seated if self._seat(piece) else self._waiting
                group.append(piece)
        return seated

    def _has_free_entry(self) -> bool:
        return any(self._seats.has_free(i) for i in self._entries)

    def _seat(self, piece: Piece) -> bool:
        """Gives a piece the first free slot that is wide enough, if there is one."""
        for i in piece.entries:
            width = self._schedule.classes[i].C
            if len(piece.traces) <= width and (place := self._seats.take(i)):
                piece.sit(place, list(range(len(piece.traces))), width)
                return True
        return False

    def _waiting_for(self, i: int) -> set[Job]:
        """Jobs with waiting pieces that may be seated in class i."""
        width = self._schedule.classes[i].C
        return {
            piece.job
            for piece in self._waiting
            if i in piece.entries and len(piece.traces) <= width
        }

    def _decode(self) -> None:
        """One chunk, with the program that computes the fewest rows."""
        start = time.monotonic()
        rows = self._fewest_rows()
        chunk = self._programs["decode", rows].run(self._weights, tuple(self._states))
        self._states = list(chunk.states)
        token_NxZxR, logprob_NxZxR, steps = jax.device_get(chunk[1:])
        faults.chunk_decoded()
        self._counts.decode_seconds += time.monotonic() - start

        steps = int(steps)
        for piece in self._seated:
            first = self._first_row[piece.place.slot_class] + piece.place.slot * len(piece.traces)
            at = slice(steps), piece.place.shard, slice(first, first + len(piece.traces))
            piece.append(token_NxZxR[at], logprob_NxZxR[at])
        self._counts.chunks += 1
        self._counts.queue += len(self._waiting)
        self._counts.rows_computed += steps * self._shards * rows
        self._counts.rows_live += int((token_NxZxR[:steps] >= 0).sum())

    def _fewest_rows(self) -> int:
        """Rows of the smallest decode program that holds all running ones of each shard."""
        running = [0] * self._shards
        for piece in self._seated:
            has_room = piece.step < self._schedule.classes[piece.place.slot_class].G
            if has_room:  # else it waits for a longer slot
                running[piece.place.shard] += len(piece.running)
        return next(n for n in self._schedule.decode_rows(self._shards) if n >= max(running))

    def _settle(self) -> None:
        """Lets ended groups go, and moves the others to where they waste fewer rows."""
        self._leave()
        for piece in self._seated:  # oldest first
            place = piece.place
            better = self._seats.better_class(piece, self._schedule.targets(place.slot_class))
            if better is not None:
                self._move(piece, self._seats.take(better, place.shard))

    def _leave(self) -> None:
        """Hands groups back whose last trace has ended."""
        still = []
        for piece in self._seated:
            if piece.running:
                still.append(piece)
                continue
            self._seats.give_back(piece.place)
            piece.job.pieces -= 1
            if piece.job.pieces == 0:
                self._feed.done(piece.job.group(), self._now)
        self._seated = still

    def _move(self, piece: Piece, to: Place) -> None:
        """Moves the traces of a piece that still run, on the device and here."""
        origin, rows = piece.place, piece.running
        i, j, width = origin.slot_class, to.slot_class, self._schedule.classes[to.slot_class].C
        move = Move(
            from_Z=np.full(self._shards, -1, np.int32),
            to_Z=np.full(self._shards, -1, np.int32),
            row_ZxC=np.full((self._shards, width), -1, np.int32),
        )
        move.from_Z[to.shard] = origin.slot
        move.to_Z[to.shard] = to.slot
        move.row_ZxC[to.shard, : len(rows)] = rows

        placed = meshes.place(move, meshes.group_sharding(self._settings.mesh))
        self._states[i], self._states[j] = self._programs["move", i, j].run(
            self._states[i], self._states[j], placed
        )
        self._seats.give_back(origin)
        piece.sit(to, rows, width)
        self._counts.moves += 1


def _jobs(pieces: list[Piece]) -> set[Job]:
    return {piece.job for piece in pieces}
