"""What a training run writes beside its checkpoints: metrics, evaluations, traces and starts.

All of it is cut back to the checkpoint that a run goes on from, so a run that was killed ends with
the same files. Of several processes the first alone writes.
"""

from __future__ import annotations

import pathlib
import re
import shutil
import time
from collections.abc import Iterable, Sequence
from typing import Any

from spiral_jax import STARTED
from spiral_jax.core import distributed
from spiral_jax.evaluation.results import write_results
from spiral_jax.run import provenance
from spiral_jax.run.metric_writers import MetricWriters
from spiral_jax.run.trace_log import TraceLog
from spiral_jax.run.workdir import StepLog


class RunLog:
    """The logs of the run in `path`; a context manager, entered after `cut_back`.

    Args:
      keep_trace_files: config.trace_log.keep_steps.
      keep_best: config.checkpoint.keep_best, the measure that checkpoints are kept by; "" = none.
    """

    def __init__(self, path: pathlib.Path, keep_trace_files: int, keep_best: str):
        self.path, self._keep_best = path, keep_best
        self._metrics = StepLog(path / "metrics.jsonl")
        self._evaluations = StepLog(path / "evaluations.jsonl")
        self._traces = TraceLog(path / "traces", keep_trace_files)
        self._writers = MetricWriters((), path, "", {}, 0)
        self._start_up: dict[str, float] = {}  # for the first row of this process

    def __enter__(self) -> RunLog:
        self._writers.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._writers.__exit__(*error)

    def cut_back(self, step: int) -> None:
        """Cuts all logs back to what the checkpoint of `step` has seen."""
        self._metrics.cut_back(step)
        self._traces.cut_back(step)
        self._evaluations.cut_back(step + 1)
        if not distributed.is_first():
            return
        for folder in (self.path / "evaluations").glob("step_*"):
            if int(folder.name.removeprefix("step_")) > step:
                shutil.rmtree(folder)

    def note_start(
        self, step: int, writers: Sequence[str], config_plain: dict, reward_source: str = ""
    ) -> None:
        """Notes what the run runs on from `step`, and opens config.metrics.writers.

        Args:
          reward_source: fingerprint of a reward function of the user's. Where the run has had
            another one until now, a line says so.
        """
        if not distributed.is_first():
            return
        starts = StepLog(self.path / "starts.jsonl")
        starts.cut_back(step + 1)
        before = [row["reward_source"] for row in starts.read() if row.get("reward_source")]
        if before and reward_source and before[-1] != reward_source:
            print(
                f"warning: the source of the reward function has changed since the last start "
                f"({before[-1][:12]} -> {reward_source[:12]}): from step {step} on answers are "
                "judged by the new one. For one reward all along, put the old source back or "
                "start in another --workdir.",
                flush=True,
            )
        starts.append({"step": step} | provenance.describe() | {"reward_source": reward_source})
        first = re.sub(r"\W", "", starts.read()[0]["time"].removesuffix("+00:00"))
        name = f"{self.path.name}-{first}"
        self._writers = MetricWriters(writers, self.path, name, config_plain, step)

    def note_start_up_time(self) -> None:
        """Prints how long this process took until it could work; the next row has it too."""
        self._start_up = {"time/start_up": time.monotonic() - STARTED}
        print(f"start-up took {self._start_up['time/start_up']:.1f} s", flush=True)

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl; of several processes the first alone can count on them."""
        return self._metrics.read()

    def starts(self) -> list[dict[str, Any]]:
        """The rows of starts.jsonl."""
        return StepLog(self.path / "starts.jsonl").read()

    def add_step(
        self, step: int, metrics: dict[str, float | None], traces: Iterable[dict] | None
    ) -> None:
        """Adds a finished step.

        Args:
          traces: rows of the trace log; None where this step has none.
        """
        if traces is not None:
            self._traces.write(step, traces)
        row = {"step": step} | metrics | self._start_up
        self._start_up = {}
        self._metrics.append(row)
        self._writers.write(row)

    def add_failed(self, step: int, traces: Iterable[dict]) -> pathlib.Path:
        """Writes the traces of a step that gave no batch; returns their file."""
        return self._traces.write(step, traces)

    def is_evaluated(self, step: int) -> bool:
        """Whether the policy after `step` steps was evaluated before; the same on all processes."""

        def read() -> list[int]:
            return [row["step"] for row in self._evaluations.read()]

        return step in distributed.from_first(read)

    def add_evaluation(
        self, step: int, row: dict[str, Any], results: dict[str, Any] | None
    ) -> None:
        """Adds an evaluation; `results`: content of its results.json, None where it has none."""
        # The row says that the evaluation is done, so it comes after the file of results.
        if results is not None and distributed.is_first():
            write_results(self.path / "evaluations" / f"step_{step:06d}" / "results.json", results)
        self._evaluations.append(row)
        self._writers.write(row, "evaluation/")

    def evaluations(self) -> list[dict[str, Any]]:
        """The rows of evaluations.jsonl."""
        return self._evaluations.read()

    def scores(self) -> dict[int, float]:
        """What checkpoints are kept by: the measure's mean by step, the same on all processes."""
        if not self._keep_best:
            return {}

        def read() -> list[tuple[int, float]]:
            rows = [row for row in self._evaluations.read() if self._keep_best in row]
            return [(row["step"], row[self._keep_best]["mean"]) for row in rows]

        return {step: score for step, score in distributed.from_first(read)}
