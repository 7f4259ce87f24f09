"""What became of each run of a study, and whether it is the run that the configuration asks for."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from spiral_jax.core.config import difference, from_plain, to_plain
from spiral_jax.evaluation.results import (
    ResultsError,
    describe_sampling,
    with_both_temperatures,
)
from spiral_jax.reporting.series import series
from spiral_jax.run.checkpoint import CheckpointError
from spiral_jax.run.start import trained_digest
from spiral_jax.run.workdir import WorkdirError, read_config, read_log
from spiral_jax.studies.design import BASE, Study
from spiral_jax.studies.directory import StudyDirectory, pair_name, reading_name
from spiral_jax.studies.operations import spent_by_step

_CURVE_POINTS = 50  # of a run's training that are kept
_LAST = 0.1  # share of a run's steps that "at the end" means
_CURVES = {  # curve: the metric that it shows, over sampled tokens
    "aggregated": "reward/aggregated",
    "own": "reward/search",
    "entropy": "entropy/search",
}
_FIELDS = {  # that settings of results have another name for
    "temperature": "eval.search_temperature",
    "search_max_tokens": "search.max_tokens",
    "aggregation_max_tokens": "aggregation.max_tokens",
}


def _check_run(study: Study, directory: StudyDirectory, arm: str, seed: int) -> None:
    """Raises WorkdirError: a run is there that was made with another experiment than the arm's."""
    workdir = directory.run(arm, seed)
    if not (workdir / "config.json").exists():
        return
    asked = study.experiments[arm].plain | {"seed": seed}
    held = to_plain(from_plain(read_config(workdir)[0]))  # fields may have been added since
    lines = difference(held, asked)
    if lines:
        raise WorkdirError(
            f"{workdir}: was run with another config (there -> here):\n  "
            + "\n  ".join(lines)
            + "\nGive the changed arm another name, or restore what it was."
        )


def check_evaluation(study: Study, file: pathlib.Path, results: Mapping[str, Any]) -> None:
    """Raises ResultsError: an evaluation is there that sampled something else than is asked."""
    held = _by_field(with_both_temperatures(results["settings"]))
    lines = difference(held, _by_field(describe_sampling(study.evaluation)))
    if lines:
        raise ResultsError(
            f"{file}: sampled with another config (there -> here):\n  "
            + "\n  ".join(lines)
            + "\nMove its directory away to evaluate again, or restore what it was."
        )


def is_of_other_weights(evaluation: pathlib.Path, init_from: str, searcher: str = "") -> bool:
    """Whether an evaluation, finished or not, is of other weights than are there now.

    One of an earlier version, which does not say of which, is taken as it is, and so is one whose
    checkpoint is gone.

    Args:
      init_from, searcher: WORKDIR@step, as the evaluation's configuration names them; or "".
    """
    waves = read_log(epath.Path(evaluation / "waves.jsonl"))
    stamp = waves[0] if waves else {}
    try:
        return any(
            run and field in stamp and stamp[field] != trained_digest(run)
            for field, run in (("init_from", init_from), ("searcher", searcher))
        )
    except (WorkdirError, CheckpointError):
        return False


def _by_field(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of results by the fields that ask for them, without the seed, the run's own."""
    names = sampling.keys() - {"seed"}
    return {_FIELDS.get(name, f"eval.{name}"): sampling[name] for name in names}


def run_row(study: Study, directory: StudyDirectory, arm: str, seed: int) -> dict[str, Any]:
    """State of a run and what its training has cost."""
    if arm != BASE:
        _check_run(study, directory, arm, seed)
    error = "" if _has_ended(study, directory, arm, seed) else directory.error(arm, seed)
    is_evaluated = bool(directory.evaluations(arm, seed))
    finished = "done" if is_evaluated else "not finished"
    state = "failed" if error else finished
    run = {"arm": arm, "seed": seed, "state": state, "error": error}
    steps = directory.metrics(arm, seed)
    if not steps:
        return run
    experiment = study.experiments[arm]
    row = run | _costs(steps, experiment.aggregates) | {"training": _training_curves(steps)}
    if not is_evaluated and not experiment.has_ended(steps):
        row["entropy_end"] = None  # of a run that has not come to its end
    return row


def _has_ended(study: Study, directory: StudyDirectory, arm: str, seed: int) -> bool:
    """Whether the run was evaluated where its experiment ends.

    Then it is done, whatever the journal says: a study that was killed leaves its commands to
    themselves, and nobody journals how they end.
    """
    evaluated = directory.evaluated_steps(arm, seed)
    if not evaluated or arm == BASE:
        return bool(evaluated)
    return study.experiments[arm].has_ended(directory.metrics(arm, seed)[: max(evaluated)])


def unrecorded(study: Study, directory: StudyDirectory) -> list[str]:
    """Commands that have left what they make and stand in no line of the journal.

    They outlived a study that was killed: how long they took is not known.
    """
    recorded = {
        (row["arm"], row["seed"], row["stage"])
        for row in directory.journal.read()
        if not row["returncode"]
    }
    names = [*study.runs, *((pair_name(p.searcher, p.reader), p.seed) for p in study.pairs)]
    names += [(reading_name(arm), seed) for arm, seed in study.runs]
    missing = []
    for name, seed in names:
        made = {
            "train": _is_trained(study, directory, name, seed),
            "evaluate": bool(directory.evaluations(name, seed)),
        }
        for stage, is_made in made.items():
            if is_made and (name, seed, stage) not in recorded:
                missing.append(f"{name} seed {seed}: {stage}")
    return missing


def _is_trained(study: Study, directory: StudyDirectory, name: str, seed: int) -> bool:
    return name in study.experiments and _has_ended(study, directory, name, seed)


def _costs(steps: Sequence[Mapping[str, Any]], aggregates: bool) -> dict[str, Any]:
    """What a training has cost, and its diagnostics."""
    ends = max(1, round(_LAST * len(steps)))
    row = {
        "steps": len(steps),
        "sampled_tokens": round(sum(step["sampling/generated_tokens"] for step in steps)),
        "prefilled_tokens": round(sum(step["sampling/prefilled_tokens"] for step in steps)),
        "tflop": _tflop(steps),
        "seconds": round(sum(step["time/step"] for step in steps), 1),
        "entropy_start": _mean(steps[:ends], "entropy/search"),
        "entropy_end": _mean(steps[-ends:], "entropy/search"),
    }
    for role in ("search", "aggregation") if aggregates else ("search",):
        parse_rates = [step[f"verifier/parse_rate_{role}"] for step in steps]
        row[f"grad_norm_{role}"] = _mean(steps, f"grad_norm/{role}")
        row[f"lowest_parse_rate_{role}"] = min(parse_rates)
    return row


def _tflop(steps: Sequence[Mapping[str, Any]]) -> float | None:
    """10^12 operations of sampling and updates; None of runs that have not counted them."""
    tflop_S = spent_by_step(steps)
    return None if tflop_S is None else round(float(tflop_S[-1]), 3)


def _mean(steps: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """The mean of a metric where it is there; None if it never is."""
    values = series(steps, key)
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else None


def _training_curves(steps: Sequence[Mapping[str, Any]]) -> dict[str, list]:
    """A training's curves over sampled tokens, at evenly spread steps."""
    kept = np.unique(np.linspace(0, len(steps) - 1, _CURVE_POINTS).round().astype(int))
    tokens = np.cumsum([step["sampling/generated_tokens"] for step in steps])
    curves = {"sampled_tokens": tokens[kept].tolist()}
    for curve, key in _CURVES.items():
        if key in steps[0]:
            curves[curve] = [steps[i].get(key) for i in kept]
    return curves
