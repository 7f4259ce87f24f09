"""The way into a class of slots: prompts are prefilled, and pieces of groups enter from them."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from spiral_jax.core import mesh as meshes
from spiral_jax.sampling.counts import Counts
from spiral_jax.sampling.prefill import Prefilled, Prompts
from spiral_jax.sampling.programs import CompiledProgram, Name
from spiral_jax.sampling.seating import Job, Piece, plan_prefills
from spiral_jax.sampling.settings import DecodeSettings, Schedule
from spiral_jax.sampling.shapes import admission_shapes, prompt_shapes, shardings
from spiral_jax.sampling.slots import Admission, SlotState
from spiral_jax.sampling.weights import DecodeWeights


@dataclasses.dataclass(frozen=True)
class PrefilledJobs:
    """The prompts of one prefill, and whose they are: the jobs in the rows of each shard."""

    rows: list[list[Job]]
    prompts: Prefilled

    @property
    def jobs(self) -> set[Job]:
        return {job for jobs in self.rows for job in jobs}


class Entrance:
    """Prefills prompts for class i, and enters pieces from them.

    The prompts of the last prefill are kept as long as pieces wait that will enter from them, and
    no longer. Those of one call are enough: pieces are seated in the order in which they wait, so
    only the last job that enters a class can have more of them.
    """

    def __init__(
        self,
        i: int,
        settings: DecodeSettings,
        schedule: Schedule,
        programs: dict[Name, CompiledProgram],
        counts: Counts,
    ):
        self._counts = counts
        self._shards = meshes.group_count_multiple(settings.mesh)
        self._chunk = settings.chunk_of(schedule.classes[i].P)
        self._prompt_shapes = prompt_shapes(settings, schedule, i)
        self._admission_shapes = admission_shapes(settings, schedule, i)
        self._prefill_program = programs["prefill", i]
        self._enter_program = programs["enter", i]
        self._kept: PrefilledJobs | None = None

    def enter(
        self, weights: DecodeWeights, state: SlotState, pieces: list[Piece], waiting: set[Job]
    ) -> SlotState:
        """Puts pieces into the slots of the class that they have been seated in.

        Args:
          waiting: jobs with pieces that may enter the class later.
        """
        if self._kept:
            state = self._enter_from(self._kept, state, pieces)
            pieces = [piece for piece in pieces if piece.job not in self._kept.jobs]

        prompts_of_a_call = self._prompt_shapes.prompt_len_ZxW.shape[1]
        for rows in plan_prefills(pieces, waiting, self._shards, prompts_of_a_call):
            self._kept = None  # its memory is free before the next prompts take theirs
            self._kept = self._prefill(weights, rows)
            state = self._enter_from(self._kept, state, pieces)

        if self._kept and not self._kept.jobs & waiting:
            self._kept = None
        return state

    def _prefill(self, weights: DecodeWeights, rows: list[list[Job]]) -> PrefilledJobs:
        """Computes the prompts of the jobs in the rows of each shard.

        A prompt that is computed on several shards counts once, and its other rows are padding.
        """
        new = _make_prompts(self._prompt_shapes, rows)
        placed = meshes.place(new, shardings(self._prompt_shapes))
        ready = PrefilledJobs(rows, self._prefill_program.run(weights, placed))

        chunks = -(-int(new.prompt_len_ZxW.max()) // self._chunk)
        self._counts.prefill_computed += new.prompt_len_ZxW.size * chunks * self._chunk
        self._counts.prefilled += sum(job.prompt_len for job in ready.jobs)
        return ready

    def _enter_from(self, ready: PrefilledJobs, state: SlotState, pieces: list[Piece]) -> SlotState:
        """Enters those of the pieces whose prompts are ready."""
        jobs = ready.jobs
        by_shard: list[list[Piece]] = [[] for _ in range(self._shards)]
        for piece in pieces:
            if piece.job in jobs:
                by_shard[piece.place.shard].append(piece)

        W = self._admission_shapes.slot_ZxW.shape[1]
        for start in range(0, max(map(len, by_shard)), W):
            batch = [of_shard[start : start + W] for of_shard in by_shard]
            new = _make_admission(self._admission_shapes, ready.rows, batch)
            placed = meshes.place(new, shardings(self._admission_shapes))
            entered = self._enter_program.run(state, ready.prompts, placed)
            state = entered.state
            self._collect(batch, *jax.device_get((entered.token_ZxWxC, entered.logprob_ZxWxC)))
        return state

    def _collect(
        self, batch: list[list[Piece]], token_ZxWxC: np.ndarray, logprob_ZxWxC: np.ndarray
    ) -> None:
        """Gives the pieces their first tokens."""
        for z, of_shard in enumerate(batch):
            for w, piece in enumerate(of_shard):
                token_C, logprob_C = token_ZxWxC[z, w], logprob_ZxWxC[z, w]
                piece.append(token_C[None], logprob_C[None])
                drawn = int((token_C >= 0).sum())
                self._counts.first_tokens += drawn
                self._counts.prompt_tokens += drawn * piece.job.prompt_len


def _make_prompts(shapes: Prompts, rows: list[list[Job]]) -> Prompts:
    """Host arrays of a prefill of the jobs in the rows of each shard."""
    new = _zeros(shapes)
    new.prompt_len_ZxW[...] = 1
    for z, jobs in enumerate(rows):
        for w, job in enumerate(jobs):
            new.prompt_ZxWxP[z, w, : job.prompt_len] = job.request.prompt_UxP[0, : job.prompt_len]
            new.prompt_len_ZxW[z, w] = job.prompt_len
    return new


def _make_admission(
    shapes: Admission, rows: list[list[Job]], batch: list[list[Piece]]
) -> Admission:
    """Host arrays of an admission.

    Args:
      rows: whose prompts are in the rows of each shard.
      batch: the pieces that enter on each shard, at most W.
    """
    new = _zeros(shapes)
    new.slot_ZxW[...] = -1
    for z, pieces in enumerate(batch):
        for w, piece in enumerate(pieces):
            new.row_ZxW[z, w] = rows[z].index(piece.job)
            new.id_ZxWx6[z, w] = piece.job.request.id_Ux6[0]
            new.first_trace_ZxW[z, w] = piece.traces[0]
            new.slot_ZxW[z, w] = piece.place.slot
            for row, trace in enumerate(piece.traces):
                new.limit_ZxWxC[z, w, row] = piece.job.limit_C[trace] if trace >= 0 else 0
    return new


def _zeros(shapes: Prompts | Admission) -> Prompts | Admission:
    return jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)
