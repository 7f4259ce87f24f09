"""The trace log: every trace of chosen steps, for a person to read and for the report.

WORKDIR/traces/step_000123.jsonl.gz    one JSON object a trace
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from spiral_jax.core.distributed import is_first
from spiral_jax.core.groups import Groups, Role, Stop
from spiral_jax.prompts.prompts import listed_order
from spiral_jax.rollout.collect import Batch
from spiral_jax.rollout.traces import Replayed, Rollouts, Round
from spiral_jax.run.workdir import WorkdirError, json_line, replacing, writing
from spiral_jax.tasks.problem import Problem

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PreTrainedTokenizerBase

_NO_SET = dict.fromkeys(("round", "set", "subset", "order"))  # of traces that read no others
_FILE = re.compile(r"step_(\d+)\.jsonl\.gz")


class TraceLog:
    """One gzip file of JSON lines for each step that is logged; the same rows give the same bytes.

    Args:
      directory: is created with the first file.
      keep_steps: newest files that are kept.
    """

    def __init__(self, directory: str | os.PathLike, keep_steps: int):
        self.directory = Path(directory)
        self.keep_steps = keep_steps

    def write(self, step: int, rows: Iterable[dict]) -> Path:
        """Writes the file of `step`, then deletes the oldest files beyond the limit.

        It appears only when it is complete.

        Args:
          rows: as `StepLog.append` takes them, but for the step.
        """
        path = self.directory / f"step_{step:06d}.jsonl.gz"
        if not is_first():
            return path
        with writing(self.directory):
            self.directory.mkdir(exist_ok=True)
        # Level 1: ids and log-probs hardly compress; on them 6 was 6 times slower and 13 % smaller.
        with (
            writing(path),
            replacing(path) as file,
            gzip.GzipFile(filename="", mode="wb", compresslevel=1, fileobj=file, mtime=0) as packed,
        ):
            for row in rows:
                packed.write(json_line(row))
        for old in list(trace_files(self.directory).values())[: -self.keep_steps]:
            old.unlink()
        return path

    def cut_back(self, step: int) -> int:
        """Deletes the files of `step` and later; returns how many."""
        if not is_first():
            return 0
        late = [path for at, path in trace_files(self.directory).items() if at >= step]
        for path in late:
            path.unlink()
        return len(late)


def trace_files(directory: epath.Path) -> dict[int, epath.Path]:
    """The trace files of a run by step, ascending."""
    paths = directory.iterdir() if directory.exists() else ()
    by_step = {int(match[1]): path for path in paths if (match := _FILE.fullmatch(path.name))}
    return dict(sorted(by_step.items()))


def read_traces(path: epath.Path) -> Iterator[dict]:
    """The rows of a trace file.

    Raises:
      WorkdirError: damaged.
      FileNotFoundError: gone.
    """
    with path.open("rb") as packed, gzip.open(packed) as file:
        try:
            yield from map(json.loads, file)
        except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise WorkdirError(
                f"{path}: damaged ({error}). Delete it, or put it back from a copy."
            ) from error


@dataclasses.dataclass(frozen=True)
class TraceRows:
    """Makes the rows of the trace log.

        problem, cursor, kept, problem_text, reference_answer    the same in all rows of a problem
        role, round, set, subset, order, trace    `set` k of a round reads the traces `subset`,
                                      listed in its prompt by `order`: search traces, or those of
                                      the round before, numbered k * M + trace
        text, ids, logprobs, length, stop   as sampled; `stop` is "stop" or "length"
        verdict, verdict_detail, reward     a verifier's `Status`, what an error was; null for it
        answer                              what a reward function says that it is, or null
        advantage                           as trained on, behind the length gate

    A problem whose stored population was read has, in place of search, the traces of that: they are
    aggregations of an earlier step, and have no round, no log-probs and no advantage. All its rows
    have one field more:

        replay    {"step", "round", "uses"}: when and in which round what is read was sampled, and
                  how many steps have read it before

    Attributes:
      fraction: of the problems that are written, the first ones; at least one.
      order, seed: config.aggregation.order and config.seed: how prompts list candidates.
      drops_truncated: whether prompts leave truncated candidates out.
    """

    tokenizer: PreTrainedTokenizerBase
    fraction: float
    order: str
    seed: int
    drops_truncated: bool

    def make(self, batch: Batch) -> Iterator[dict[str, Any]]:
        """One JSON object a trace: of kept problems, of discarded ones, then of replayed ones."""
        kept, discarded = len(batch.rollouts), len(batch.discarded)
        for b in range(min(kept, max(1, round(self.fraction * kept)))):
            yield from self._problem_rows(batch.rollouts, b, kept=True)
        for b in range(round(self.fraction * discarded)):
            yield from self._problem_rows(batch.discarded, b, kept=False)
        if batch.replay:
            kept_B = batch.replay.advantages.keep_B
            for b in range(round(self.fraction * len(kept_B))):
                yield from self._replayed_rows(batch.replay.replayed, b, bool(kept_B[b]))

    def make_failed(self, rollouts: Rollouts) -> Iterator[dict[str, Any]]:
        """The same of the problems of a step that made no batch, all of them."""
        for b in range(len(rollouts)):
            yield from self._problem_rows(rollouts, b, kept=False)

    def _problem_rows(self, rollouts: Rollouts, b: int, kept: bool) -> Iterator[dict[str, Any]]:
        shared = _shared(rollouts.problems[b], rollouts.cursor_B[b], kept)
        search = shared | {"role": Role.SEARCH.label} | _NO_SET
        yield from self._group_rows(search, rollouts.search, b)
        for r, round in enumerate(rollouts.rounds, start=1):
            stop_BxN = rollouts.stages[r - 1].stop_UxC.reshape(len(rollouts), -1)
            yield from self._round_rows(shared, r, round, b, stop_BxN[b])

    def _replayed_rows(self, replayed: Replayed, b: int, kept: bool) -> Iterator[dict[str, Any]]:
        read = replayed.populations[b]
        shared = _shared(replayed.problems[b], read.cursor, kept)
        shared["replay"] = {"step": read.step, "round": read.round, "uses": read.uses}
        stored = shared | {"role": Role.AGGREGATION.label} | _NO_SET
        for row in self._group_rows(stored, replayed.candidates, b):
            yield row | {"logprobs": None}
        stop_BxN = replayed.candidates.stop_UxC
        for r, round in enumerate(replayed.rounds, start=1):
            yield from self._round_rows(shared, read.round + r, round, b, stop_BxN[b])
            stop_BxN = round.groups.stop_UxC.reshape(len(replayed), -1)

    def _round_rows(
        self, shared: dict[str, Any], number: int, round: Round, b: int, stop_N: np.ndarray
    ) -> Iterator[dict[str, Any]]:
        """Of a problem's sets in a round; `stop_N` says why each candidate ended."""
        K = round.member_BxKxS.shape[1]
        for k in range(K):
            place = {"role": Role.AGGREGATION.label, "round": number, "set": k}
            place |= self._candidates(round, b, k, stop_N)
            yield from self._group_rows(shared | place, round.groups, b * K + k)

    def _candidates(self, round: Round, b: int, k: int, stop_N: np.ndarray) -> dict[str, Any]:
        """`subset` and `order` of a set; `stop_N` says why each candidate ended."""
        member_S = round.member_BxKxS[b, k]
        id_6 = round.groups.requests.id_Ux6[b * round.member_BxKxS.shape[1] + k]
        order_S = listed_order(self.order, self.seed, id_6, len(member_S))
        listed = member_S[order_S].tolist()
        if self.drops_truncated:
            listed = [n for n in listed if stop_N[n] != Stop.LENGTH]
        return {"subset": member_S.tolist(), "order": listed}

    def _group_rows(
        self, shared: dict[str, Any], groups: Groups, u: int
    ) -> Iterator[dict[str, Any]]:
        for i in range(groups.trace_len_UxC.shape[1]):
            ids, length = groups.trace_ids(u, i), int(groups.trace_len_UxC[u, i])
            reward, verdict = float(groups.reward_UxC[u, i]), groups.verdict_UxC[u, i]
            yield shared | {
                "trace": i,
                "text": self.tokenizer.decode(ids),
                "ids": ids.tolist(),
                "logprobs": [round(float(x), 6) for x in groups.logprob_UxCxG[u, i, :length]],
                "length": length,
                "stop": Stop(groups.stop_UxC[u, i]).name.lower(),
                "verdict": verdict.status.value,
                "verdict_detail": verdict.detail,
                "reward": None if np.isnan(reward) else reward,
                "answer": verdict.answer,
                "advantage": float(groups.advantage_UxC[u, i]),
            }


def _shared(problem: Problem, cursor: int, kept: bool) -> dict[str, Any]:
    """What all rows of a problem have."""
    return {
        "problem": problem.id,
        "cursor": int(cursor),
        "kept": kept,
        "problem_text": problem.text,
        "reference_answer": problem.answer,
    }
