"""The directory of a study -> one dictionary of everything that its report says: the content of OUT.json.

arms      by arm: `plan.arm_row`, and estimates of every measure over its runs
runs      every run, failed ones too: state, steps, tokens, seconds, what it said when it failed, its own measures
unnamed   runs in the directory that the configuration does not name any more
gaps      by arm and measure: the arm - the baseline
efficiency by arm: samples that the baseline needs for each one of the arm's at equal coverage
claims    each claim with its gap and a verdict: holds, fails, or open (the interval holds both)
curves    pass@k and self-aggregation by arm; training by run, thinned

Intervals are 95 % percentiles of a bootstrap over seeds and over problems: each resample draws the seeds, and one set
of problems for all of them, since all runs are evaluated on the same. Gaps are paired over both: they use the seeds
that both arms have. With one seed an interval says nothing about seeds; with few it is too narrow.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spiral_jax.comparison import check_comparable, scaling_efficiency
from spiral_jax.config import difference, from_plain, to_plain, uses_aggregation
from spiral_jax.estimators import bootstrap_weights
from spiral_jax.measures import Column, columns
from spiral_jax.results import ResultsError, read_results
from spiral_jax.studies.plan import BASE, EFFICIENCY, OPTIMUM, Study, arm_row
from spiral_jax.workdir import StepLog, WorkdirError, read_config

VERSION = 1
DRAWS = 2000  # resamples
_CURVE_POINTS = 50  # of a run's training that are kept
_LAST = 0.1  # share of a run's steps that "at the end" means
_COLUMNS = {
    "single": ("single", 0), "aggregated": ("aggregated", 0),
    "pass": ("pass_at_k", -1), "maj": ("majority_at_k", -1), "rsa": ("rsa/single", 0),
}  # fmt: skip
_TRAINING = {  # curve: the metric that is drawn, over sampled tokens
    "aggregated": "reward/aggregated", "own": "reward/search", "entropy": "entropy/search",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class StudyDirectory:
    """Where a study keeps what."""

    path: pathlib.Path

    @property
    def journal(self) -> StepLog:
        """A row for each command that has ended: arm, seed, stage, returncode, seconds, environment, error."""
        return StepLog(self.path / "journal.jsonl")

    def run(self, arm: str, seed: int) -> pathlib.Path:
        return self.path / "runs" / arm / f"seed_{seed}"

    def evaluation(self, arm: str, seed: int, step: int) -> pathlib.Path:
        return self.path / "evaluations" / arm / f"seed_{seed}" / f"step_{step:06d}"

    def evaluations(self, arm: str, seed: int) -> list[pathlib.Path]:
        """The finished evaluations of a run, by step."""
        return sorted((self.path / "evaluations" / arm / f"seed_{seed}").glob("step_*/results.json"))

    def log(self, arm: str, seed: int, stage: str) -> pathlib.Path:
        return self.path / "logs" / f"{arm}_seed_{seed}_{stage}.log"

    def error(self, arm: str, seed: int) -> str:
        """What a stage of the run said if it failed when it was tried last; "" if none did."""
        last = {row["stage"]: row for row in self.journal.read() if (row["arm"], row["seed"]) == (arm, seed)}
        return next((f"{stage}: {row['error']}" for stage, row in last.items() if row["returncode"]), "")


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The steps of a run that may still be writing them; none if it has not begun."""
    file = workdir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []


@dataclasses.dataclass(frozen=True)
class Cells:
    """Evaluations of one arm on the same B problems: its seeds, and the `Column`s of each."""

    seeds: list[int]
    columns: list[dict[str, Column]]

    def curve(self, name: str, seeds: Sequence[int], weight_RxB: np.ndarray) -> np.ndarray:
        """[1 + R, Q]: the measure over those seeds, of all problems and then of every resample."""
        chosen = [self.columns[self.seeds.index(seed)][name] for seed in seeds]
        total_ZxBxQ, count_ZxBxQ = (np.stack([column[part] for column in chosen]) for part in (0, 1))
        Z, B = total_ZxBxQ.shape[:2]
        seed_RxZ = np.concatenate([np.ones((1, Z)), bootstrap_weights(1, Z, len(weight_RxB))])
        problem_RxB = np.concatenate([np.ones((1, B)), weight_RxB])
        sums = [np.einsum("rz,rb,zbq->rq", seed_RxZ, problem_RxB, part, optimize=True) for part in
                (total_ZxBxQ, count_ZxBxQ)]  # fmt: skip
        with np.errstate(invalid="ignore", divide="ignore"):
            return sums[0] / sums[1]

    def measure(self, name: str, seeds: Sequence[int], weight_RxB: np.ndarray) -> np.ndarray:
        """[1 + R] of a measure as `plan.defaults` names it."""
        column, q = column_of(name)
        return self.curve(column, seeds, weight_RxB)[:, q]


def column_of(measure: str) -> tuple[str, int]:
    """(name of a column of `measures.columns`, index in it) of a measure such as "pass@32"."""
    kind, _, number = measure.partition("@")
    name, offset = _COLUMNS[kind]
    return name, int(number or 0) + offset if number else offset


def estimate(value_R: np.ndarray, seeds: int) -> dict[str, Any]:
    """Mean, 95 % interval, and how many seeds it is over."""
    if np.isnan(value_R[0]):  # no problem has a value
        return {"mean": None, "low": None, "high": None, "seeds": seeds}
    low, high = np.nanpercentile(value_R[1:], (2.5, 97.5))
    return {"mean": float(value_R[0]), "low": float(low), "high": float(high), "seeds": seeds}


def gather(study: Study, directory: StudyDirectory) -> dict[str, Any]:
    """Everything that the report says, from whatever is finished.

    Raises:
      ResultsError: evaluations that cannot be compared. WorkdirError: none is finished.
    """
    evaluated, runs, first = {arm: Cells([], []) for arm in study.arms}, [], None
    for arm, seed in study.runs:
        run, files = _run(study, directory, arm, seed), directory.evaluations(arm, seed)
        if files:
            results = read_results(files[-1])
            first = first or results
            check_comparable(first, results)
            _check_evaluation(study, files[-1], results)
            evaluated[arm].seeds.append(seed)
            evaluated[arm].columns.append(columns(results["records"]))
            run["measures"] = {m: _own_estimate(evaluated[arm], seed, m) for m in study.s.measures}
        runs.append(run)
    if first is None:
        said = [f"{run['arm']} seed {run['seed']}: {run['error'] or 'not run'}" for run in runs]
        raise WorkdirError(f"{directory.path}: no run has been evaluated yet.\n  " + "\n  ".join(said))
    weight_RxB = bootstrap_weights(0, len(first["records"]), DRAWS)
    done = {arm: cells for arm, cells in evaluated.items() if cells.seeds}
    journal = directory.journal.read()
    efficiency = _efficiency(study, done, weight_RxB)
    return {
        "version": VERSION,
        "title": study.s.title,
        "machines": sorted({_machine(row["environment"]) for row in journal}),
        "commits": sorted({_commit(row["environment"]) for row in journal}),
        "problems": first["problems"],
        "settings": first["settings"],
        "measures": list(study.s.measures),
        "baseline": study.s.baseline,
        "optimum": study.s.optimum,
        "arms": {arm: _arm(study, arm, done.get(arm), weight_RxB) for arm in study.arms},
        "gaps": _gaps(study, done, weight_RxB),
        "efficiency": efficiency,
        "claims": [_claim(study, done, efficiency, claim, weight_RxB) for claim in study.s.claims],
        "curves": {arm: _curves(cells, weight_RxB) for arm, cells in done.items()},
        "runs": runs,
        "unnamed": _unnamed(study, directory),
    }


def _machine(environment: Mapping[str, Any]) -> str:
    versions = environment["versions"]
    parts = [environment["hardware"], environment["devices"], f"Python {versions['python']}", f"jax {versions['jax']}"]
    return ", ".join(parts)


def _commit(environment: Mapping[str, Any]) -> str:
    """12 digits, with "+" if tracked files differed."""
    return (environment["commit"] or "unknown")[:12] + ("+" if environment["modified"] else "")


def _unnamed(study: Study, directory: StudyDirectory) -> list[str]:
    """Runs in the directory that the configuration does not name any more: nothing that was run goes unsaid."""
    named = {directory.run(arm, seed) for arm, seed in study.runs}
    found = sorted(path for path in (directory.path / "runs").glob("*/seed_*") if path not in named)
    return [str(path.relative_to(directory.path / "runs")) for path in found]


def _own_estimate(cells: Cells, seed: int, measure: str) -> float:
    column, q = column_of(measure)
    total, count = cells.columns[cells.seeds.index(seed)][column]
    return float(total[:, q].sum() / max(count[:, q].sum(), 1e-300))


def _arm(study: Study, arm: str, cells: Cells | None, weight_RxB: np.ndarray) -> dict[str, Any]:
    row = {"seeds": study.arms[arm]} | (arm_row(study.experiments[arm]) if arm != BASE else {})
    of = lambda m: estimate(cells.measure(m, cells.seeds, weight_RxB), len(cells.seeds))  # noqa: E731
    return row | {"measures": {m: of(m) for m in study.s.measures} if cells else {}}


def _gap(done: dict[str, Cells], arm: str, other: str, measure: str, weight_RxB: np.ndarray) -> dict | None:
    """arm - other over the seeds that both have; None if there are none."""
    if arm not in done or other not in done:
        return None
    seeds = [seed for seed in done[arm].seeds if seed in done[other].seeds]
    if not seeds:
        return None
    a, b = (done[side].measure(measure, seeds, weight_RxB) for side in (arm, other))
    return estimate(a - b, len(seeds))


def _gaps(study: Study, done: dict[str, Cells], weight_RxB: np.ndarray) -> dict[str, Any]:
    baseline = study.s.baseline
    return {
        arm: {m: _gap(done, arm, baseline, m, weight_RxB) for m in study.s.measures} for arm in done if arm != baseline
    }


def _efficiency(study: Study, done: dict[str, Cells], weight_RxB: np.ndarray) -> dict[str, Any]:
    """`comparison.scaling_efficiency` at the highest coverage that both reach, resampled over seeds too."""
    found, baseline = {}, done.get(study.s.baseline)
    for arm, cells in done.items():
        seeds = [seed for seed in cells.seeds if baseline and seed in baseline.seeds]
        if seeds and cells is not baseline:
            curves = [side.curve("pass_at_k", seeds, weight_RxB) for side in (baseline, cells)]
            found[arm] = scaling_efficiency(*curves)[-1] | {"seeds": len(seeds)}
    return found


def _claim(
    study: Study, done: dict[str, Cells], efficiency: dict[str, Any], claim: Sequence, weight_RxB: np.ndarray
) -> dict[str, Any]:
    """holds: the whole interval is above what is asked; fails: below; open: neither, or not measured."""
    measure, arm, other, points = claim
    by = f" by more than {100 * points:g} points" if points > 0 else f" - {-100 * points:g} points" if points else ""
    row = {"claim": f"{measure}: {arm} > {other}{by}", "unit": "points"}
    if measure == EFFICIENCY:
        row = {"claim": f"{arm} needs less than 1/{points:g} of the samples of {other}", "unit": "times"}
        of = efficiency.get(arm)
        gap = of and {"mean": of["ratio"], "low": of["low"], "high": of["high"], "seeds": of["seeds"]}
    elif OPTIMUM in (arm, other):
        side = other if arm == OPTIMUM else arm
        gap = None
        if side in done:
            value_R = done[side].measure(measure, done[side].seeds, weight_RxB) - study.s.optimum
            gap = estimate(value_R if side == arm else -value_R, len(done[side].seeds))
    else:
        gap = _gap(done, arm, other, measure, weight_RxB)
    if gap is None or gap["mean"] is None:
        return row | {"gap": None, "verdict": "open"}
    verdict = "holds" if gap["low"] > points else "fails" if gap["high"] <= points else "open"
    return row | {"gap": gap, "verdict": verdict}


def _curves(cells: Cells, weight_RxB: np.ndarray) -> dict[str, list[dict]]:
    """By k: pass@k; by round: self-aggregation."""

    def rows(name: str, key: str, first: int) -> list[dict]:
        curve = cells.curve(name, cells.seeds, weight_RxB)
        return [{key: q + first} | estimate(curve[:, q], len(cells.seeds)) for q in range(curve.shape[1])]

    return {"pass_at_k": rows("pass_at_k", "k", 1), "rsa": rows("rsa/single", "round", 0)}


def _check_run(study: Study, directory: StudyDirectory, arm: str, seed: int) -> None:
    """A run that is there was made with the experiment that its arm has now. Raises WorkdirError: it was not."""
    workdir = directory.run(arm, seed)
    if not (workdir / "config.json").exists():
        return
    asked = to_plain(study.experiments[arm]) | {"seed": seed}
    lines = difference(to_plain(from_plain(read_config(workdir)[0])), asked)  # fields may have been added since
    if lines:
        raise WorkdirError(
            f"{workdir}: was run with another config (there -> here):\n  "
            + "\n  ".join(lines)
            + "\nGive the changed arm another name, or restore what it was."
        )


def _check_evaluation(study: Study, file: pathlib.Path, results: Mapping[str, Any]) -> None:
    """An evaluation that is there sampled what the study asks for now. Raises ResultsError: it did not."""
    asked, held = to_plain(study.evaluation.eval), results["settings"]
    names = (held.keys() & asked.keys()) - {"subset_size"}  # 0 stands for that of training
    lines = difference({name: held[name] for name in names}, {name: asked[name] for name in names}, "eval.")
    if lines:
        raise ResultsError(
            f"{file}: sampled with another config (there -> here):\n  "
            + "\n  ".join(lines)
            + "\nMove its directory away to evaluate again, or restore what it was."
        )


def _run(study: Study, directory: StudyDirectory, arm: str, seed: int) -> dict[str, Any]:
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

    roles = ("search", *(("aggregation",) if uses_aggregation(study.experiments[arm]) else ()))
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
        curve: [steps[i].get(name) for i in kept] for curve, name in _TRAINING.items() if name in steps[0]
    }
    return run
