"""Where a study keeps what, and what its processes have said there."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from etils import epath

from spiral_jax.run.workdir import StepLog, read_log


def pair_name(searcher: str, reader: str) -> str:
    """Name of the evaluation in which `reader` aggregates what `searcher` has searched.

    No arm has a "+".
    """
    return f"{searcher}+{reader}"


def reading_name(arm: str) -> str:
    """Name of an arm's evaluations at equal operations, before its end; no arm has an "@"."""
    return f"{arm}@equal_operations"


@dataclasses.dataclass(frozen=True)
class StudyDirectory:
    """Where a study keeps what."""

    path: pathlib.Path

    @property
    def journal(self) -> StepLog:
        """A row for each command that has ended.

        arm, seed, stage, returncode, seconds, at_once, environment; error where it failed.
        """
        return StepLog(self.path / "journal.jsonl")

    @property
    def sweep(self) -> pathlib.Path:
        """What a sweep has proposed; see `studies/sweep.py`."""
        return self.path / "sweep.db"

    def run(self, arm: str, seed: int) -> pathlib.Path:
        return self.path / "runs" / arm / f"seed_{seed}"

    def metrics(self, arm: str, seed: int) -> list[dict[str, Any]]:
        """The steps of a run that may still be writing them; none if it has not begun."""
        return read_log(epath.Path(self.run(arm, seed) / "metrics.jsonl"))

    def starts(self, arm: str, seed: int) -> list[dict[str, Any]]:
        """What a run was started on, each time; see `run/provenance.py`."""
        return read_log(epath.Path(self.run(arm, seed) / "starts.jsonl"))

    def evaluation(self, arm: str, seed: int, step: int) -> pathlib.Path:
        return self.path / "evaluations" / arm / f"seed_{seed}" / f"step_{step:06d}"

    def evaluations(self, arm: str, seed: int) -> list[pathlib.Path]:
        """The results.json of a run's finished evaluations, by step."""
        folder = self.path / "evaluations" / arm / f"seed_{seed}"
        return sorted(folder.glob("step_*/results.json"))

    def evaluated_steps(self, arm: str, seed: int) -> set[int]:
        """Of a run's finished evaluations."""
        files = self.evaluations(arm, seed)
        return {int(file.parent.name.removeprefix("step_")) for file in files}

    def set_aside(self, evaluation: pathlib.Path) -> pathlib.Path:
        """Moves an evaluation of other weights to where it is not read; returns where to."""
        number = 1
        while (kept := evaluation.with_name(f"other_weights_{number}_{evaluation.name}")).exists():
            number += 1
        return evaluation.rename(kept)

    def reading(self, arm: str, seed: int, step: int) -> pathlib.Path:
        """The results.json of a run at that step, finished or not.

        Where the run has been evaluated there anyway, it is that evaluation.
        """
        at_end = self.evaluation(arm, seed, step) / "results.json"
        if at_end.exists():
            return at_end
        return self.evaluation(reading_name(arm), seed, step) / "results.json"

    def log(self, arm: str, seed: int, stage: str) -> pathlib.Path:
        return self.path / "logs" / f"{arm}_seed_{seed}_{stage}.log"

    def error(self, arm: str, seed: int) -> str:
        """What a stage of the run said if it failed when it was tried last; "" if none did."""
        lines = [f"{stage}: {said}" for stage, said in self.errors(arm, seed).items()]
        return lines[0] if lines else ""

    def errors(self, arm: str, seed: int) -> dict[str, str]:
        """What each stage of the run that failed when it was tried last said."""
        last = {}
        for row in self.journal.read():
            if row["arm"] == arm and row["seed"] == seed:
                last[row["stage"]] = row
        return {stage: row["error"] for stage, row in last.items() if row["returncode"]}
