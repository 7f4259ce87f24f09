"""What became of each run of a study, and whether it is the run that the configuration asks for."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from spiral_jax.core.config import difference, from_plain, to_plain
from spiral_jax.evaluation.results import ResultsError
from spiral_jax.objective.estimators import ESTIMATORS
from spiral_jax.run.workdir import WorkdirError, read_config
from spiral_jax.studies.design import BASE, Study
from spiral_jax.studies.directory import StudyDirectory, read_metrics

_CURVE_POINTS = 50  # of a run's training that are kept
_LAST = 0.1  # share of a run's steps that "at the end" means
_TRAINING = {  # curve: the metric that is drawn, over sampled tokens
    "aggregated": "reward/aggregated", "own": "reward/search", "entropy": "entropy/search",
}  # fmt: skip


def _check_run(study: Study, directory: StudyDirectory, arm: str, seed: int) -> None:
    """A run that is there was made with the experiment that its arm has now. Raises WorkdirError:
    it was not.
    """
    workdir = directory.run(arm, seed)
    if not (workdir / "config.json").exists():
        return
    asked = to_plain(study.experiments[arm]) | {"seed": seed}
    lines = difference(
        to_plain(from_plain(read_config(workdir)[0])), asked
    )  # fields may have been added since
    if lines:
        raise WorkdirError(
            f"{workdir}: was run with another config (there -> here):\n  "
            + "\n  ".join(lines)
            + "\nGive the changed arm another name, or restore what it was."
        )


def check_evaluation(study: Study, file: pathlib.Path, results: Mapping[str, Any]) -> None:
    """An evaluation that is there sampled what the study asks for now. Raises ResultsError: it did
    not.
    """
    asked, held = to_plain(study.evaluation.eval), results["settings"]
    names = (held.keys() & asked.keys()) - {"subset_size"}  # 0 stands for that of training
    lines = difference(
        {name: held[name] for name in names}, {name: asked[name] for name in names}, "eval."
    )
    if lines:
        raise ResultsError(
            f"{file}: sampled with another config (there -> here):\n  "
            + "\n  ".join(lines)
            + "\nMove its directory away to evaluate again, or restore what it was."
        )


def run_row(study: Study, directory: StudyDirectory, arm: str, seed: int) -> dict[str, Any]:
    """State of a run and what its training has cost."""
    if arm != BASE:
        _check_run(study, directory, arm, seed)
    error, trained = directory.error(arm, seed), bool(directory.evaluations(arm, seed))
    state = "done" if trained and not error else "failed" if error else "not finished"
    run = {"arm": arm, "seed": seed, "state": state, "error": error}
    steps = read_metrics(directory.run(arm, seed))
    if not steps:
        return run
    last = steps[-max(1, round(_LAST * len(steps))) :]

    def mean(rows: list[dict], name: str) -> float | None:
        values = [row[name] for row in rows if row.get(name) is not None]
        return float(np.mean(values)) if values else None

    roles = ["search"]
    if ESTIMATORS[study.experiments[arm].loss.estimator].aggregates:
        roles.append("aggregation")
    run |= {
        "steps": len(steps),
        "sampled_tokens": round(sum(row["sampling/generated_tokens"] for row in steps)),
        "prefilled_tokens": round(sum(row["sampling/prefilled_tokens"] for row in steps)),
        "seconds": round(sum(row["time/step"] for row in steps), 1),
        "entropy_start": mean(steps[: len(last)], "entropy/search"),
        "entropy_end": mean(last, "entropy/search"),
    }
    for role in roles:
        run[f"grad_norm_{role}"] = mean(steps, f"grad_norm/{role}")
        run[f"lowest_parse_rate_{role}"] = min(row[f"verifier/parse_rate_{role}"] for row in steps)
    kept = np.unique(np.linspace(0, len(steps) - 1, _CURVE_POINTS).round().astype(int))
    tokens = np.cumsum([row["sampling/generated_tokens"] for row in steps])
    run["training"] = {"sampled_tokens": tokens[kept].tolist()} | {
        curve: [steps[i].get(name) for i in kept]
        for curve, name in _TRAINING.items()
        if name in steps[0]
    }
    return run
