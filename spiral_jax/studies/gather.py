"""The directory of a study -> one dictionary of everything that its report says: OUT.json.

arms      by arm: `Experiment.budget`, and estimates of every measure over its runs
runs      every run, failed ones too: state, steps, tokens, seconds, what it said when it failed,
          its own measures
largest_k at which curves over k end: of every run, nearly all problems have as many traces that are
          no errors of ours; measures above it are None
unnamed   runs in the directory that the configuration does not name any more
unrecorded commands that outlived a study that was killed: `seconds` lacks theirs
gaps      by arm and measure: the arm - the baseline
optimum   the best possible aggregated accuracy where the number of strategies is known, and what it
          is made of
cross     for each two arms of `cross`: what the one's aggregator makes of the other's search
efficiency by arm: samples that the baseline needs for each one of the arm's at equal coverage
operations the second reading, at equal operations, if the study has one (`operations.py`): its
          budget, measures and gaps by arm, where each run was read, and what is missing
claims    each claim with its gap and a verdict: holds, fails, or open (the interval holds both)
curves    pass@k and self-aggregation by arm; training by run, thinned
sweep     `sweep.outcome`, where there was one

Intervals are 95 % percentiles of a bootstrap over seeds and over problems: each resample draws the
seeds, and one set of problems for all of them, since all runs are evaluated on the same. Gaps are
paired over both: they use the seeds that both arms have. With one seed an interval says nothing
about seeds; with few it is too narrow.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from spiral_jax.evaluation.comparison import check_comparable, scaling_efficiency
from spiral_jax.evaluation.measures import cut_curves, largest_k
from spiral_jax.evaluation.results import ResultsError, read_results
from spiral_jax.evaluation.statistics import bootstrap_weights
from spiral_jax.run.workdir import WorkdirError
from spiral_jax.studies.cells import Cells, columns_with, estimate, gap, place_of, value_of
from spiral_jax.studies.claims import Evidence, judge_claim
from spiral_jax.studies.design import BASE, Study
from spiral_jax.studies.directory import StudyDirectory, pair_name, reading_name
from spiral_jax.studies.history import check_evaluation, run_row, unrecorded
from spiral_jax.studies.operations import Reading, Readings, find_readings
from spiral_jax.studies.optimum import optimum
from spiral_jax.studies.rungs import GIVEN_UP

VERSION = 1
DRAWS = 2000  # resamples


def gather(
    study: Study, directory: StudyDirectory, sweep: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Everything that the report says, from whatever is finished.

    Args:
      sweep: `sweep.outcome` of the directory, if there was one.

    Raises:
      ResultsError: evaluations that cannot be compared.
      WorkdirError: none is finished.
    """
    runs = [run_row(study, directory, arm, seed) for arm, seed in study.runs]
    readings = find_readings(study, directory) if study.equal_operations else None
    evaluated = _read_evaluations(study, directory, readings.rows if readings else ())
    if evaluated is None:
        said = [f"{run['arm']} seed {run['seed']}: {run['error'] or 'not run'}" for run in runs]
        raise WorkdirError(
            f"{directory.path}: no run has been evaluated yet.\n  " + "\n  ".join(said)
        )
    first, arms = evaluated.first, evaluated.arms
    for run in runs:
        is_swept = sweep and run["arm"] in study.proposed  # and not listed since
        if is_swept and sweep["arms"].get(run["arm"], {}).get("state") == GIVEN_UP:
            run["state"] = GIVEN_UP
        run |= _own_measures(study, arms, run["arm"], run["seed"])
    weight_RxB = bootstrap_weights(0, len(first["records"]), DRAWS)
    journal = directory.journal.read()
    environments = [row["environment"] for row in journal]
    for arm, seed in study.runs:
        environments += directory.starts(arm, seed)
    efficiency = _efficiency(study, arms, weight_RxB)
    evidence = Evidence(study, arms, runs, efficiency, weight_RxB)
    return {
        "version": VERSION,
        "title": study.title,
        "machines": sorted({_machine(environment) for environment in environments}),
        "seconds": sum(row["seconds"] for row in journal),
        "at_once": max((row["at_once"] for row in journal), default=None),
        "commits": sorted({_commit(environment) for environment in environments}),
        "problems": first["problems"],
        "settings": first["settings"],
        "largest_k": evaluated.largest_k,
        "measures": list(study.measures),
        "baseline": study.baseline,
        "optimum": optimum(study, arms, weight_RxB),
        "arms": {arm: _arm(study, arm, arms.get(arm), weight_RxB) for arm in study.arms},
        "cross": _cross(study, directory, evaluated, weight_RxB),
        "gaps": _gaps(study, arms, weight_RxB),
        "efficiency": efficiency,
        "operations": _operations(study, directory, readings, evaluated, weight_RxB),
        "claims": [judge_claim(evidence, claim) for claim in study.claims],
        "curves": {arm: _curves(cells, weight_RxB) for arm, cells in arms.items()},
        "runs": runs,
        "unnamed": _unnamed(study, directory),
        "unrecorded": unrecorded(study, directory),
    } | ({"sweep": dict(sweep)} if sweep else {})


class _Evaluated(NamedTuple):
    """The finished evaluations.

    `first` is the content of one of them, `largest_k` where the curves of all end.
    """

    first: dict[str, Any]
    arms: dict[str, Cells]
    pairs: dict[str, Cells]  # by `pair_name`
    readings: dict[str, Cells]  # of arms at equal operations
    largest_k: int


def _read_evaluations(
    study: Study, directory: StudyDirectory, readings: Sequence[Reading]
) -> _Evaluated | None:
    """The finished evaluations of all runs, pairs and readings; None: no run has one.

    Raises:
      ResultsError: they cannot be compared, sampled something else than is asked, or have no such
        measure.
    """
    first: dict[str, Any] = {}
    arms: dict[str, Cells] = {}
    pairs: dict[str, Cells] = {}
    of_readings: dict[str, Cells] = {}

    def read(into: dict[str, Cells], name: str, seed: int, file: pathlib.Path) -> None:
        results = read_results(file)
        if not first:
            first.update(results)
        check_comparable(first, results)
        check_evaluation(study, file, results)
        cells = into.setdefault(name, Cells([], []))
        cells.seeds.append(seed)
        cells.columns.append(_columns(study, results, str(file)))

    for arm, seed in study.runs:
        for file in directory.evaluations(arm, seed)[-1:]:
            read(arms, arm, seed, file)
    for pair in study.pairs:
        name = pair_name(pair.searcher, pair.reader)
        for file in directory.evaluations(name, pair.seed)[-1:]:
            read(pairs, name, pair.seed, file)
    if BASE in arms:
        of_readings[BASE] = arms[BASE]  # has spent nothing
    for row in readings:
        if row.step is not None:
            file = directory.reading(row.arm, row.seed, row.step)
            if file.exists():
                read(of_readings, row.arm, row.seed, file)
    if not arms:
        return None
    k = _cut_alike([*arms.values(), *pairs.values(), *of_readings.values()])
    return _Evaluated(first, arms, pairs, of_readings, k)


def _cut_alike(cells: Sequence[Cells]) -> int:
    """Cuts the curves of all evaluations at the `largest_k` that all of them have; returns it."""
    evaluations = [evaluation for of_arm in cells for evaluation in of_arm.columns]
    k = min(map(largest_k, evaluations))
    for evaluation in evaluations:
        evaluation.update(cut_curves(evaluation, k))
    return k


def _columns(study: Study, results: Mapping[str, Any], file: str) -> dict[str, Any]:
    """`measures.columns` of an evaluation. Raises ResultsError: it lacks one of the study's."""
    by_name = columns_with(results["records"], study.measures)
    needed = [*study.measures, *(["right_if_mixed"] if study.strategies else [])]
    missing = [measure for measure in needed if place_of(measure).column not in by_name]
    if missing:
        raise ResultsError(
            f"{file}: has no {', '.join(missing)}: its task names no strategies. Set "
            "task.strategy and evaluate again, or leave them out of the study's measures."
        )
    return by_name


def _cross(
    study: Study, directory: StudyDirectory, evaluated: _Evaluated, weight_RxB: np.ndarray
) -> list[dict[str, Any]]:
    """For each two arms of `cross`: measures of the one's search read by the other."""
    rows = []
    for searcher in study.cross:
        for reader in study.cross:
            row = {"searcher": searcher, "reader": reader, "measures": {}}
            name = pair_name(searcher, reader)
            if searcher == reader:
                cells = evaluated.arms.get(searcher)
            else:
                cells = evaluated.pairs.get(name)
                row["errors"] = []
            if cells:
                row["measures"] = _estimates(study, cells, weight_RxB)
            for pair in study.pairs:
                if (pair.searcher, pair.reader) == (searcher, reader):
                    error = directory.error(name, pair.seed)
                    row["errors"] += [error] if error else []
            rows.append(row)
    return rows


def _operations(
    study: Study,
    directory: StudyDirectory,
    readings: Readings | None,
    evaluated: _Evaluated,
    weight_RxB: np.ndarray,
) -> dict[str, Any] | None:
    """The second reading; None: the study has none.

    Returns:
      budget: tflop, and arm and seed of the run that has set it; None: not known yet.
      waits_for: what it would take to know it.
      arms, gaps: as those of the report, of the runs that were read.
      runs: arm, seed, step, tflop; measures, if it was read.
      missing: a line for each run that was not read.
    """
    if readings is None:
        return None
    budget, rows, missing = readings.budget, [], []
    for reading in readings.rows:
        arm, seed = reading.arm, reading.seed
        own = _own_measures(study, evaluated.readings, arm, seed)
        place = {"arm": arm, "seed": seed, "step": reading.step, "tflop": reading.tflop}
        rows.append(place | own)
        if not own:
            error = directory.error(reading_name(arm), seed)
            why_not = reading.why_not or error or f"not evaluated at step {reading.step}"
            missing.append(f"{arm} seed {seed}: {why_not}")
    cells = evaluated.readings if rows else {}
    return {
        "budget": budget._asdict() if budget else None,
        "waits_for": readings.waits_for,
        "arms": {arm: _estimates(study, cells[arm], weight_RxB) for arm in cells},
        "gaps": _gaps(study, cells, weight_RxB),
        "runs": rows,
        "missing": missing,
    }


def _own_measures(
    study: Study, arms: Mapping[str, Cells], arm: str, seed: int
) -> dict[str, dict[str, float | None]]:
    """What a run itself has reached, under "measures"; nothing if it was not evaluated."""
    cells = arms.get(arm)
    if cells is None or seed not in cells.seeds:
        return {}
    own = cells.columns[cells.seeds.index(seed)]
    return {"measures": {measure: value_of(own, measure) for measure in study.measures}}


def _estimates(study: Study, cells: Cells, weight_RxB: np.ndarray) -> dict[str, Any]:
    return {measure: cells.estimate(measure, weight_RxB) for measure in study.measures}


def _machine(environment: Mapping[str, Any]) -> str:
    versions = environment["versions"]
    parts = [
        environment["hardware"],
        environment["devices"],
        f"Python {versions['python']}",
        f"jax {versions['jax']}",
    ]
    return ", ".join(parts)


def _commit(environment: Mapping[str, Any]) -> str:
    """12 digits, with "+" if tracked files differed."""
    return (environment["commit"] or "unknown")[:12] + ("+" if environment["modified"] else "")


def _unnamed(study: Study, directory: StudyDirectory) -> list[str]:
    """Runs that the configuration does not name any more: nothing that was run goes unsaid."""
    runs = directory.path / "runs"
    named = {directory.run(arm, seed) for arm, seed in study.runs}
    paths = sorted(path for path in runs.glob("*/seed_*") if path not in named)
    return [str(path.relative_to(runs)) for path in paths]


def _arm(study: Study, arm: str, cells: Cells | None, weight_RxB: np.ndarray) -> dict[str, Any]:
    budget = study.experiments[arm].budget() if arm != BASE else {}
    measures = _estimates(study, cells, weight_RxB) if cells else {}
    return {"seeds": study.arms[arm]} | budget | {"measures": measures}


def _gaps(study: Study, arms: dict[str, Cells], weight_RxB: np.ndarray) -> dict[str, Any]:
    """By arm and measure: the arm - the baseline."""
    gaps = {}
    for arm in arms:
        if arm != study.baseline:
            gaps[arm] = {
                measure: gap(arms, arm, study.baseline, measure, weight_RxB)
                for measure in study.measures
            }
    return gaps


def _efficiency(study: Study, arms: dict[str, Cells], weight_RxB: np.ndarray) -> dict[str, Any]:
    """`comparison.scaling_efficiency` at the highest coverage that both arms reach.

    It is resampled over seeds too. An arm without any coverage, of partial credit alone, has none.
    """
    efficiency: dict[str, Any] = {}
    baseline = arms.get(study.baseline)
    if baseline is None:
        return efficiency
    for arm, cells in arms.items():
        seeds = [seed for seed in cells.seeds if seed in baseline.seeds]
        if not seeds or cells is baseline:
            continue
        baseline_curve = baseline.curve("pass_at_k", seeds, weight_RxB)
        curve = cells.curve("pass_at_k", seeds, weight_RxB)
        highest = scaling_efficiency(baseline_curve, curve)[-1]
        if highest["coverage"] > 0:
            efficiency[arm] = highest | {"seeds": len(seeds)}
    return efficiency


def _curves(cells: Cells, weight_RxB: np.ndarray) -> dict[str, list[dict]]:
    """By k: pass@k; by round: self-aggregation."""

    def rows(column: str, x: str, first: int) -> list[dict]:
        curve = cells.curve(column, cells.seeds, weight_RxB)
        seeds = len(cells.seeds)
        return [{x: first + q} | estimate(curve[:, q], seeds) for q in range(curve.shape[1])]

    return {"pass_at_k": rows("pass_at_k", "k", 1), "rsa": rows("rsa/single", "round", 0)}
