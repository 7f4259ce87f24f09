"""The rows and pages of one shard, on the host: who has which, who goes on, who may begin.

Every choice is a function of token counts. NumPy and integers only.

    pages     free ones are taken as rows grow, before each chunk, and given back as traces end
    rows      begin in the order in which their groups were asked for, and are served in it
    pausing   a row without a page for its next token waits, and keeps what it has

The oldest rows never wait: as many pages stay free as they can still need. So they end, the next
become the oldest, and nothing is locked forever; no trace is ever begun again.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from spiral_jax.model.attention.pages import NOWHERE
from spiral_jax.sampling.jobs import Job
from spiral_jax.sampling.settings import Schedule


class Running(NamedTuple):
    """The rows of a shard that decode in the next chunk, and their bundles.

    Attributes:
      seat_N: int, their places in the shard's tables, groups together.
      bundle_N, place_N: int, the bundle of each row, and its place in that. Bundles of longer
        prompts come first, so that those of like length stand together.
      bundles: how many there are.
      paused: rows that wait for pages, or for a bundle.
    """

    seat_N: np.ndarray
    bundle_N: np.ndarray
    place_N: np.ndarray
    bundles: int
    paused: int


class Shard:
    """Tables of the rows of one shard, an entry a seat.

    Attributes:
      order: seats that are taken, by age.
      job: by seat; None where it is free.
      trace_R, drawn_R, limit_R, prefix_R: int32; see `decode.Rows`.
      token_R: int32, the newest token.
      held_R: int32 pages of its own.
      own_table_RxT: int32 their numbers.
      token_RxG, logprob_RxG: tokens drawn so far, and their log-probs.
      group_R: number of the row's group, by age.
    """

    def __init__(self, schedule: Schedule, stop_ids: tuple[int, ...]):
        if schedule.pages < schedule.least_pages:
            raise ValueError(f"{schedule.pages} pages: at least {schedule.least_pages} are needed")
        self._schedule, self._stop_ids = schedule, np.array(stop_ids, np.int32)
        R, G = schedule.rows[-1], schedule.trace
        self._free = list(range(schedule.pages - 1, NOWHERE, -1))
        self._seats = list(range(R - 1, -1, -1))  # free ones
        self.order: list[int] = []
        self.job: list[Job | None] = [None] * R
        self.trace_R, self.drawn_R, self.limit_R, self.prefix_R, self.token_R, self.held_R = (
            np.zeros(R, np.int32) for _ in range(6)
        )
        self.id_Rx6 = np.zeros((R, 6), np.int32)
        self.group_R = np.zeros(R, np.int64)
        self.own_table_RxT = np.full((R, schedule.own_pages), NOWHERE, np.int32)
        self.token_RxG = np.zeros((R, G), np.int32)
        self.logprob_RxG = np.zeros((R, G), np.float32)
        self._youngest: Job | None = None  # the only one of which traces may have not begun
        self._admitted = 0

    @property
    def free_pages(self) -> int:
        return len(self._free)

    @property
    def free_seats(self) -> int:
        return len(self._seats)

    @property
    def waits(self) -> bool:
        """Whether traces of an admitted group have not begun."""
        return self._youngest is not None and self._youngest.waits

    def has_room(self, job: Job) -> bool:
        """Whether a group may be admitted now: its prompt, and what is together of its traces."""
        rows = min(job.request.traces, self._schedule.together)
        prompt = self._schedule.pages_of(job.prefix)
        return not self.waits and self.free_seats >= rows and self._can_begin(job, rows, prompt)

    def admit(self, job: Job) -> None:
        """Gives a group pages for its prompt; its traces begin as there is room."""
        job.pages = self._take(self._schedule.pages_of(job.prefix))
        self._youngest = job
        self._admitted += 1

    def begin(self) -> None:
        """Lets traces of the youngest group begin, while there is room for them."""
        while self.waits and self._seats and self._can_begin(self._youngest, 1, 0):
            job, seat = self._youngest, self._seats.pop()
            trace = job.begun
            job.begun += 1
            self.job[seat] = job
            self.trace_R[seat], self.limit_R[seat] = trace, job.limit_C[trace]
            self.drawn_R[seat], self.held_R[seat] = 0, 0
            self.prefix_R[seat], self.token_R[seat] = job.prefix, job.prompt[-1]
            self.id_Rx6[seat], self.group_R[seat] = job.request.id_Ux6[0], self._admitted
            self._extend(seat, self._first_pages(job))
            self.order.append(seat)

    def grow(self) -> None:
        """Gives rows the pages of the next chunk, the oldest first, as far as there are some."""
        seats, schedule = np.array(self.order, np.int64), self._schedule
        aim_N = np.minimum(self.drawn_R[seats] + schedule.chunk, self.limit_R[seats])
        missing_N = np.maximum(-(-aim_N // schedule.page) - self.held_R[seats], 0)
        together = schedule.together
        for seat, missing in zip(seats[:together], missing_N[:together], strict=True):
            self._extend(seat, missing)

        spare = self.free_pages - self._reserved()
        served_N = np.cumsum(missing_N[together:]) <= spare
        growing_N = served_N & (missing_N[together:] > 0)
        for seat, missing in zip(
            seats[together:][growing_N], missing_N[together:][growing_N], strict=True
        ):
            self._extend(seat, missing)

    def running(self) -> Running:
        """Rows that have a page for their next token, as far as there are bundles for them."""
        seats, schedule = np.array(self.order, np.int64), self._schedule
        seats = seats[self.drawn_R[seats] < self.may_have(seats)]

        group_N = self.group_R[seats]
        is_first_N = np.diff(group_N, prepend=-1) != 0
        first_N = np.flatnonzero(is_first_N)[np.cumsum(is_first_N) - 1]  # of the same group
        place_N = (np.arange(len(seats)) - first_N) % schedule.width
        bundle_N = np.cumsum(place_N == 0) - 1

        fits_N = bundle_N < schedule.bundles(schedule.rows[-1])
        seats, bundle_N, place_N = seats[fits_N], bundle_N[fits_N], place_N[fits_N]
        paused = len(self.order) - len(seats)
        longest_first_U = np.argsort(-self.prefix_R[seats[place_N == 0]], kind="stable")
        rank_U = np.argsort(longest_first_U)  # the inverse permutation
        return Running(seats, rank_U[bundle_N], place_N, len(rank_U), paused)

    def may_have(self, seats: np.ndarray) -> np.ndarray:
        """int32 tokens that each row may have before it needs another page, or ends."""
        return np.minimum(self.limit_R[seats], self.held_R[seats] * self._schedule.page)

    def collect(
        self, seats: np.ndarray, token_TxN: np.ndarray, logprob_TxN: np.ndarray
    ) -> list[Job]:
        """Takes what rows have drawn in T steps, -1 from where on a row drew nothing.

        Returns:
          groups whose last trace has ended, oldest first; their pages are free again.
        """
        count_N = (token_TxN >= 0).sum(axis=0)
        t, n = np.nonzero(token_TxN >= 0)
        at = seats[n], self.drawn_R[seats[n]] + t
        self.token_RxG[at], self.logprob_RxG[at] = token_TxN[t, n], logprob_TxN[t, n]
        self.drawn_R[seats] += count_N.astype(np.int32)
        drew = seats[count_N > 0]
        self.token_R[drew] = self.token_RxG[drew, self.drawn_R[drew] - 1]

        stopped_N = np.isin(self.token_R[seats], self._stop_ids) & (self.drawn_R[seats] > 0)
        over_N = stopped_N | (self.drawn_R[seats] >= self.limit_R[seats])
        done = []
        for seat, stopped in zip(seats[over_N], stopped_N[over_N], strict=True):
            job = self._end(int(seat), bool(stopped))
            if job.ended == job.request.traces:
                self._give_back(job.pages)
                done.append(job)
        self.order = [seat for seat in self.order if self.job[seat] is not None]
        return done

    def _end(self, seat: int, stopped: bool) -> Job:
        job, n = self.job[seat], self.drawn_R[seat]
        job.end(self.trace_R[seat], self.token_RxG[seat, :n], self.logprob_RxG[seat, :n], stopped)
        self._give_back(self.own_table_RxT[seat, : self.held_R[seat]].tolist())
        self.own_table_RxT[seat] = NOWHERE
        self.job[seat] = None
        self._seats.append(seat)
        return job

    def _first_pages(self, job: Job) -> int:
        return self._schedule.pages_of(min(self._schedule.chunk, job.request.max_tokens))

    def _can_begin(self, job: Job, rows: int, prompt: int) -> bool:
        """Whether `rows` more may begin, beside `prompt` pages.

        The oldest rows keep what is reserved for them, and each other row a page to grow by.
        """
        first, together = self._first_pages(job), self._schedule.together
        before, after = len(self.order), len(self.order) + rows
        newly_oldest = min(together, after) - min(together, before)
        reserved = self._reserved() + newly_oldest * (self._schedule.own_pages - first)
        may_grow = int(np.sum(self.held_R[self.order[together:]] < self._schedule.own_pages))
        may_grow += (rows - newly_oldest) * (first < self._schedule.own_pages)
        return self.free_pages - prompt - rows * first >= reserved + may_grow

    def _reserved(self) -> int:
        """Pages that stay free: what the oldest rows still need if they are the longest."""
        oldest = self.order[: self._schedule.together]
        return len(oldest) * self._schedule.own_pages - int(self.held_R[oldest].sum())

    def _extend(self, seat: int, pages: int) -> None:
        held = self.held_R[seat]
        self.own_table_RxT[seat, held : held + pages] = self._take(int(pages))
        self.held_R[seat] += pages

    def _take(self, pages: int) -> list[int]:
        if pages > len(self._free):
            raise RuntimeError(f"{pages} pages wanted, {len(self._free)} free: none may be missing")
        return [self._free.pop() for _ in range(pages)]

    def _give_back(self, pages: list[int]) -> None:
        self._free.extend(reversed(pages))
