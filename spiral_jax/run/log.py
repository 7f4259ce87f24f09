"""What a training run writes beside its checkpoints: metrics, evaluations, traces, starts, and a
summary at its end.

All of it is cut back to the checkpoint that a run goes on from, so a run that was killed ends with
the same files. Of several processes the first alone writes.
"""

from __future__ import annotations

import pathlib
import re
import shutil
import time
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from spiral_jax import STARTED
from spiral_jax.core import config, distributed
from spiral_jax.evaluation.results import write_results
from spiral_jax.evaluation.tables import evaluation_table
from spiral_jax.run import environment
from spiral_jax.run.metric_writers import MetricWriters
from spiral_jax.run.workdir import StepLog, TraceLog


class RunLog:
    """The logs of the run in `path`; a context manager, entered after `go_on`."""

    def __init__(self, path: pathlib.Path, c: ConfigDict):
        self.path, self._c = path, c
        self._metrics, self._evaluations = (
            StepLog(path / "metrics.jsonl"),
            StepLog(path / "evaluations.jsonl"),
        )
        self._traces = TraceLog(path / "traces", c.trace_log.keep_steps)
        self._writers = MetricWriters((), path, "", {}, 0)
        self._start_up: dict[str, float] = {}  # for the first row of this process

    def __enter__(self) -> RunLog:
        self._writers.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._writers.__exit__(*error)

    def go_on(self, step: int, finished: bool) -> None:
        """Cuts all logs back to what the checkpoint of `step` has seen; a run that is not finished
        notes its start.
        """
        self._metrics.cut_back(step)
        self._traces.cut_back(step)
        self._evaluations.cut_back(step + 1)
        if not distributed.is_first():
            return
        for folder in (self.path / "evaluations").glob("step_*"):
            if int(folder.name.removeprefix("step_")) > step:
                shutil.rmtree(folder)
        if finished:
            return
        starts = StepLog(self.path / "starts.jsonl")
        starts.cut_back(step + 1)
        starts.append({"step": step} | environment.describe())
        first = re.sub(r"\W", "", starts.read()[0]["time"].removesuffix("+00:00"))
        name, plain = f"{self.path.name}-{first}", config.to_plain(self._c)
        self._writers = MetricWriters(self._c.metrics.writers, self.path, name, plain, step)

    def started(self) -> None:
        """Says, and notes in the next row of the metrics, how long this process took until it could
        work.
        """
        self._start_up = {"time/start_up": time.monotonic() - STARTED}
        print(f"start-up took {self._start_up['time/start_up']:.1f} s", flush=True)

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl; where several processes run, only the first one's are
        complete.
        """
        return self._metrics.read()

    def step(
        self, step: int, metrics: dict[str, float | None], traces: Iterable[dict] | None
    ) -> None:
        """Adds a finished step; `traces`: rows of the trace log, None where this step's are not
        kept.
        """
        if traces is not None:
            self._traces.write(step, traces)
        row = {"step": step} | metrics | self._start_up
        self._start_up = {}
        self._metrics.append(row)
        self._writers.write(row)

    def is_evaluated(self, step: int) -> bool:
        """Whether the policy after `step` steps has been evaluated before; the same on all
        processes.
        """
        return step in distributed.from_first(
            lambda: [row["step"] for row in self._evaluations.read()]
        )

    def evaluation(self, step: int, row: dict[str, Any], results: dict[str, Any] | None) -> None:
        """Adds an evaluation. Its row says that it is done, so it comes after the file of results."""
        if results is not None and distributed.is_first():
            write_results(self.path / "evaluations" / f"step_{step:06d}" / "results.json", results)
        self._evaluations.append(row)
        self._writers.write(row, "evaluation/")

    def scores(self) -> dict[int, float]:
        """What config.checkpoint.keep_best goes by: the measure's mean by step, the same on all
        processes.
        """
        measure = self._c.checkpoint.keep_best
        if not measure:
            return {}
        rows = lambda: [
            (row["step"], row[measure]["mean"])
            for row in self._evaluations.read()
            if measure in row
        ]  # noqa: E731
        return {step: score for step, score in distributed.from_first(rows)}

    def summarise(self, steps: int, sampled_tokens: int) -> None:
        """Draws the curves, writes and prints the table."""
        from spiral_jax.reporting import training_figures

        if not distributed.is_first():
            return
        done, picture = self._evaluations.read(), self.path / "curves.png"
        training_figures.plot_training(self._metrics.read(), done, picture)
        print(f"\n{steps} steps, {sampled_tokens:,} sampled tokens; curves: {picture}", flush=True)
        if done:
            table = evaluation_table(done)
            (self.path / "results.md").write_text(table)
            print(table, flush=True)
