"""One stream of the engine under way: groups are admitted, decode together, and leave.

feed -> admit (prompts into pages) -> [ pages for the next tokens -> decode a chunk -> collect ] ->
feed

Search and aggregation groups run side by side, and nothing waits for the longest trace of anything
but its own group. Time is counted in chunks and every choice depends on token counts alone, so a
replayed step does the same again, and so do all processes of a run: each of them sees every token
and follows every group.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import jax
import numpy as np

from spiral_jax.core import faults
from spiral_jax.core import mesh as meshes
from spiral_jax.core.metrics import Mean
from spiral_jax.sampling.counts import Counts
from spiral_jax.sampling.decode import Exit, Rows
from spiral_jax.sampling.jobs import Job
from spiral_jax.sampling.prefill import Prompts
from spiral_jax.sampling.programs import CompiledProgram, Name, shardings
from spiral_jax.sampling.protocol import Feed
from spiral_jax.sampling.settings import DecodeSettings, Schedule
from spiral_jax.sampling.shapes import exit_shapes, prompt_shapes, row_shapes
from spiral_jax.sampling.shard import Running, Shard
from spiral_jax.sampling.weights import DecodeWeights

EXIT_SHARE = 4  # a chunk ends early when one in so many of its rows has ended


class Decoding:
    """A `Sampling` of the engine: the pages, the rows of each shard, and what is counted."""

    def __init__(
        self,
        settings: DecodeSettings,
        schedule: Schedule,
        programs: dict[Name, CompiledProgram],
        weights: DecodeWeights,
        feed: Feed,
    ):
        self._settings, self._schedule, self._programs = settings, schedule, programs
        self._weights, self._feed = weights, feed
        self._now = 0
        self._pool = programs[("pool",)].run()
        self._shards = [
            Shard(schedule, settings.stop_ids)
            for _ in range(meshes.group_count_multiple(settings.mesh))
        ]
        self._waiting: Job | None = None  # asked for, and without room
        self._admitted = 0  # groups that have not ended
        self._counts = Counts()

    def __iter__(self) -> Iterator[int]:
        """Yields `now` once a chunk; see `protocol.Sampling`.

        Raises:
          ValueError: a request that does not fit the sampler's limits; the message says which.
        """
        while True:
            yield self._now
            if self._feed.finished():
                return

            for shard in self._shards:
                shard.grow()
                shard.begin()
            self._prefill(self._admit())
            running = [shard.running() for shard in self._shards]
            if any(len(rows.seat_N) for rows in running):
                self._decode(running)
            self._now += 1

    def metrics(self) -> dict[str, Mean | float]:
        """What the log says about the sampling so far."""
        pages = len(self._shards) * (self._schedule.pages - 1)
        abandoned = self._admitted + (self._waiting is not None)
        return self._counts.metrics(len(self._programs), pages, abandoned)

    def _admit(self) -> list[list[Job]]:
        """Admits groups in the order of the feed while there is room; those of each shard."""
        admitted: list[list[Job]] = [[] for _ in self._shards]
        while job := self._next():
            able = [z for z, shard in enumerate(self._shards) if shard.has_room(job)]
            if not able:
                break
            z = max(able, key=lambda z: (self._shards[z].free_pages, -z))
            self._shards[z].admit(job)
            self._shards[z].begin()
            admitted[z].append(job)
            self._waiting = None
            self._admitted += 1
            self._counts.prompt_tokens += job.request.traces * len(job.prompt)
        return admitted

    def _next(self) -> Job | None:
        """The group that is to be admitted next."""
        if self._waiting is None:
            request = self._feed.next(self._now)
            if request is not None:
                self._schedule.check_request(request)
                self._waiting = Job(request)
        return self._waiting

    def _prefill(self, admitted: list[list[Job]]) -> None:
        """Computes the prompts of admitted groups, those of like length together."""
        start = time.monotonic()
        shorter = 0
        for tokens in self._schedule.prompts:
            jobs = [
                sorted((job for job in of_shard if shorter < job.prefix <= tokens), key=_prefix)
                for of_shard in admitted
            ]
            W = self._schedule.prompts_of_a_call(tokens)
            for first in range(0, max(map(len, jobs)), W):
                self._prefill_call(tokens, [of_shard[first : first + W] for of_shard in jobs])
            shorter = tokens
        self._counts.prefill_seconds += time.monotonic() - start

    def _prefill_call(self, tokens: int, jobs: list[list[Job]]) -> None:
        shapes = prompt_shapes(self._settings, self._schedule, tokens)
        new = _zeros(shapes)
        for z, of_shard in enumerate(jobs):
            for w, job in enumerate(of_shard):
                new.token_ZxWxP[z, w, : job.prefix] = job.prompt[:-1]
                new.length_ZxW[z, w] = job.prefix
                new.table_ZxWxT[z, w, : len(job.pages)] = job.pages
        placed = meshes.place(new, shardings(shapes))
        self._pool = self._programs["prefill", tokens].run(self._weights, self._pool, placed)

        chunk = self._settings.chunk_of(tokens)
        chunks = -(-int(new.length_ZxW.max()) // chunk)
        self._counts.prefill_computed += new.length_ZxW.size * chunks * chunk
        self._counts.prefilled += int(new.length_ZxW.sum())

    def _decode(self, running: list[Running]) -> None:
        """One chunk, with the program that computes the fewest rows."""
        start = time.monotonic()
        rows = self._fewest_rows(running)
        shapes = row_shapes(self._settings, self._schedule, rows)
        placed = meshes.place(self._rows(_zeros(shapes), running), shardings(shapes))
        exit_at = meshes.place(self._exit(rows, running), shardings(exit_shapes(self._settings)))
        chunk = self._programs["decode", rows].run(self._weights, self._pool, placed, exit_at)
        self._pool = chunk.pool
        token_TxZxN, logprob_TxZxN, steps = jax.device_get(chunk[1:])
        faults.chunk_decoded()
        self._counts.decode_seconds += time.monotonic() - start

        steps = int(steps)
        self._count(running, rows, token_TxZxN[:steps])
        for z, (shard, of_shard) in enumerate(zip(self._shards, running, strict=True)):
            at = slice(steps), z, slice(len(of_shard.seat_N))
            for job in shard.collect(of_shard.seat_N, token_TxZxN[at], logprob_TxZxN[at]):
                self._admitted -= 1
                self._feed.done(job.group(), self._now)

    def _fewest_rows(self, running: list[Running]) -> int:
        """Rows of the smallest decode program that holds those that run on each shard."""
        most_rows = max(len(of_shard.seat_N) for of_shard in running)
        most_bundles = max(of_shard.bundles for of_shard in running)
        return next(
            rows
            for rows in self._schedule.rows
            if rows >= most_rows and self._schedule.bundles(rows) >= most_bundles
        )

    def _rows(self, new: Rows, running: list[Running]) -> Rows:
        """Fills host arrays of zeros with what runs."""
        new.member_ZxUxW[...] = -1
        for z, (shard, of_shard) in enumerate(zip(self._shards, running, strict=True)):
            seats, n = of_shard.seat_N, len(of_shard.seat_N)
            new.token_ZxN[z, :n] = shard.token_R[seats]
            new.drawn_ZxN[z, :n] = shard.drawn_R[seats]
            new.limit_ZxN[z, :n] = shard.may_have(seats)
            new.id_ZxNx6[z, :n] = shard.id_Rx6[seats]
            new.trace_ZxN[z, :n] = shard.trace_R[seats]
            new.own_table_ZxNxT[z, :n] = shard.own_table_RxT[seats]
            new.prefix_ZxN[z, :n] = shard.prefix_R[seats]

            at = of_shard.bundle_N, of_shard.place_N
            new.member_ZxUxW[z][at] = np.arange(n)
            new.place_ZxN[z, :n] = of_shard.bundle_N * self._schedule.width + of_shard.place_N
            for u, seat in zip(
                of_shard.bundle_N[of_shard.place_N == 0],
                seats[of_shard.place_N == 0],
                strict=True,
            ):
                job = shard.job[seat]
                new.prompt_ZxU[z, u] = job.prefix
                new.prompt_table_ZxUxT[z, u, : len(job.pages)] = job.pages
        return new

    def _exit(self, rows: int, running: list[Running]) -> Exit:
        """A chunk ends early when the host has something better to do.

        That is to admit groups, when a good part of the rows have ended, since each call has its
        price; or, if none waits, to go on with a program of fewer rows.
        """
        worth_it = max(self._schedule.together, rows // EXIT_SHARE)
        if self._waiting is not None or any(shard.waits for shard in self._shards):
            return Exit(np.int32(0), np.int32(worth_it))
        fewer = max((n for n in self._schedule.rows if n < rows), default=0)
        most_running = max(len(of_shard.seat_N) for of_shard in running)
        return Exit(np.int32(fewer if most_running > fewer else 0), np.int32(worth_it))

    def _count(self, running: list[Running], rows: int, token_TxZxN: np.ndarray) -> None:
        counts, steps = self._counts, len(token_TxZxN)
        counts.chunks += 1
        counts.waiting += self._waiting is not None
        counts.rows_computed += steps * len(self._shards) * rows
        counts.rows_live += int((token_TxZxN >= 0).sum())
        for shard, of_shard in zip(self._shards, running, strict=True):
            counts.paused += of_shard.paused
            counts.pages += self._schedule.pages - 1 - shard.free_pages
            heads = of_shard.seat_N[of_shard.place_N == 0]
            prompts = int(shard.prefix_R[heads].sum())
            own = int(shard.drawn_R[of_shard.seat_N].sum()) + len(of_shard.seat_N) * (steps // 2)
            counts.tokens_read += steps * (prompts + own)


def _prefix(job: Job) -> int:
    return job.prefix


def _zeros(shapes: Prompts | Rows) -> Prompts | Rows:
    """Host arrays of zeros in these shapes."""
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
