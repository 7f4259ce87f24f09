"""What a person reads of a rollout: the trace log, and the examples that the first step prints.

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
from spiral_jax.rollout.traces import Rollouts, Round
from spiral_jax.run.workdir import WorkdirError, json_line, replacing, written

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PreTrainedTokenizerBase

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
        """Writes the file of `step`, which appears only when it is complete.

        Then deletes the oldest files beyond the limit. Values of `rows` are those that
        `StepLog.append` takes.
        """
        path = self.directory / f"step_{step:06d}.jsonl.gz"
        if not is_first():
            return path
        with written(self.directory):
            self.directory.mkdir(exist_ok=True)
        # Level 1: ids and log-probs hardly compress; on them 6 was 6 times slower and 13 % smaller.
        with (
            written(path),
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
        verdict, verdict_detail, reward     a verifier's `Status`, what an error was; 0, 1 or null
        advantage                           as trained on, behind the length gate

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

    def of(self, batch: Batch) -> Iterator[dict[str, Any]]:
        """One JSON object a trace: of kept problems, then of those that were discarded."""
        yield from self._of_rollouts(batch.rollouts, kept=True)
        yield from self._of_rollouts(batch.discarded, kept=False)

    def _of_rollouts(self, rollouts: Rollouts, kept: bool) -> Iterator[dict[str, Any]]:
        least = 1 if kept else 0
        for b in range(max(least, round(self.fraction * len(rollouts)))):
            problem = rollouts.problems[b]
            shared = {
                "problem": problem.id,
                "cursor": int(rollouts.cursor_B[b]),
                "kept": kept,
                "problem_text": problem.text,
                "reference_answer": problem.answer,
            }
            nothing = dict.fromkeys(("round", "set", "subset", "order"))
            place = {"role": Role.SEARCH.label} | nothing
            yield from self._of_group(shared | place, rollouts.search, b)
            for r, of_round in enumerate(rollouts.rounds, start=1):
                candidates = rollouts.stages[r - 1].stop_UxC.reshape(len(rollouts), -1)
                for place in self._places(of_round, r, b, candidates[b]):
                    u = b * of_round.member_BxKxS.shape[1] + place["set"]
                    yield from self._of_group(shared | place, of_round.groups, u)

    def _places(
        self, of_round: Round, number: int, b: int, stop_N: np.ndarray
    ) -> Iterator[dict[str, Any]]:
        """Where each set of a problem stands; `stop_N`: why each candidate ended."""
        K = of_round.member_BxKxS.shape[1]
        for k, member_S in enumerate(of_round.member_BxKxS[b]):
            id_6 = of_round.groups.requests.id_Ux6[b * K + k]
            order_S = listed_order(self.order, self.seed, id_6, len(member_S))
            listed = [int(n) for n in member_S[order_S]]
            if self.drops_truncated:
                listed = [n for n in listed if stop_N[n] != Stop.LENGTH]
            yield {
                "role": Role.AGGREGATION.label,
                "round": number,
                "set": k,
                "subset": member_S.tolist(),
                "order": listed,
            }

    def _of_group(self, shared: dict[str, Any], groups: Groups, u: int) -> Iterator[dict[str, Any]]:
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
                "advantage": float(groups.advantage_UxC[u, i]),
            }


def render_examples(rollouts: Rollouts, tokenizer: PreTrainedTokenizerBase) -> str:
    """A prompt (text and ids) and a trace of search and of each round, as they really were."""
    lines = []
    for r, groups in enumerate(rollouts.stages):
        name = ("search", "aggregation")[r] if r < 2 else f"aggregation, round {r},"
        prompt = groups.requests.prompt_UxP[0, : groups.requests.prompt_len_U[0]]
        lines += [
            f"--- {name} prompt, {len(prompt)} tokens",
            tokenizer.decode(prompt),
            f"ids: {prompt.tolist()}",
            f"--- {name} trace, reward {groups.reward_UxC[0, 0]:g}",
            tokenizer.decode(groups.trace_ids(0, 0)),
        ]
    return "\n".join([*lines, "---"])
