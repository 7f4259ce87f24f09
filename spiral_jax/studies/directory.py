"""Where a study keeps what, and what its processes have said there."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

from spiral_jax.run.workdir import StepLog


def pair_name(searcher: str, reader: str) -> str:
    """Of the evaluation in which `reader` aggregates the search traces of `searcher`; no arm has a
    "+".
    """
    return f"{searcher}+{reader}"


@dataclasses.dataclass(frozen=True)
class StudyDirectory:
    """Where a study keeps what."""

    path: pathlib.Path

    @property
    def journal(self) -> StepLog:
        """A row for each command that has ended: arm, seed, stage, returncode, seconds,
        environment, error.
        """
        return StepLog(self.path / "journal.jsonl")

    @property
    def sweep(self) -> pathlib.Path:
        """What a sweep has proposed; see `studies/sweep.py`."""
        return self.path / "sweep.db"

    def run(self, arm: str, seed: int) -> pathlib.Path:
        return self.path / "runs" / arm / f"seed_{seed}"

    def evaluation(self, arm: str, seed: int, step: int) -> pathlib.Path:
        return self.path / "evaluations" / arm / f"seed_{seed}" / f"step_{step:06d}"

    def evaluations(self, arm: str, seed: int) -> list[pathlib.Path]:
        """The finished evaluations of a run, by step."""
        return sorted(
            (self.path / "evaluations" / arm / f"seed_{seed}").glob("step_*/results.json")
        )

    def log(self, arm: str, seed: int, stage: str) -> pathlib.Path:
        return self.path / "logs" / f"{arm}_seed_{seed}_{stage}.log"

    def error(self, arm: str, seed: int) -> str:
        """What a stage of the run said if it failed when it was tried last; "" if none did."""
        last = {
            row["stage"]: row
            for row in self.journal.read()
            if (row["arm"], row["seed"]) == (arm, seed)
        }
        return next(
            (f"{stage}: {row['error']}" for stage, row in last.items() if row["returncode"]), ""
        )


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The steps of a run that may still be writing them; none if it has not begun."""
    file = workdir / "metrics.jsonl"
    return (
        [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
        if file.exists()
        else []
    )
