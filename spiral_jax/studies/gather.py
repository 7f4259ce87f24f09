"""The directory of a study -> one dictionary of everything that its report says: the content of
OUT.json.

arms      by arm: `plan.arm_row`, and estimates of every measure over its runs
runs      every run, failed ones too: state, steps, tokens, seconds, what it said when it failed, its own measures
unnamed   runs in the directory that the configuration does not name any more
gaps      by arm and measure: the arm - the baseline
optimum   the best possible aggregated accuracy where the number of strategies is known, and what it is made of
cross     for each two arms of `cross`: what the one's aggregator makes of the other's search
efficiency by arm: samples that the baseline needs for each one of the arm's at equal coverage
claims    each claim with its gap and a verdict: holds, fails, or open (the interval holds both)
curves    pass@k and self-aggregation by arm; training by run, thinned

Intervals are 95 % percentiles of a bootstrap over seeds and over problems: each resample draws the
seeds, and one set of problems for all of them, since all runs are evaluated on the same. Gaps are
paired over both: they use the seeds that both arms have. With one seed an interval says nothing
about seeds; with few it is too narrow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spiral_jax.evaluation.comparison import check_comparable, scaling_efficiency
from spiral_jax.evaluation.measures import columns
from spiral_jax.evaluation.results import ResultsError, read_results
from spiral_jax.evaluation.statistics import bootstrap_weights
from spiral_jax.run.workdir import WorkdirError
from spiral_jax.studies.cells import Cells, column_of, estimate, gap, value_of
from spiral_jax.studies.claims import judged
from spiral_jax.studies.design import BASE, Study, arm_row
from spiral_jax.studies.directory import StudyDirectory, pair_name
from spiral_jax.studies.history import check_evaluation, run_row
from spiral_jax.studies.optimum import optimum

VERSION = 1
DRAWS = 2000  # resamples


def gather(study: Study, directory: StudyDirectory) -> dict[str, Any]:
    """Everything that the report says, from whatever is finished.

    Raises:
      ResultsError: evaluations that cannot be compared. WorkdirError: none is finished.
    """
    runs = [run_row(study, directory, arm, seed) for arm, seed in study.runs]
    first, done = _evaluated(
        study, directory, [*study.runs, *((pair_name(*pair), seed) for pair, seed in study.pairs)]
    )
    if first is None:
        said = [f"{run['arm']} seed {run['seed']}: {run['error'] or 'not run'}" for run in runs]
        raise WorkdirError(
            f"{directory.path}: no run has been evaluated yet.\n  " + "\n  ".join(said)
        )
    for run in runs:
        cells = done.get(run["arm"])
        if cells and run["seed"] in cells.seeds:
            place = cells.seeds.index(run["seed"])
            run["measures"] = {m: value_of(cells.columns[place], m) for m in study.s.measures}
    weight_RxB = bootstrap_weights(0, len(first["records"]), DRAWS)
    pairs = {pair_name(*pair) for pair, _ in study.pairs}
    arms = {arm: cells for arm, cells in done.items() if arm not in pairs}
    journal = directory.journal.read()
    efficiency = _efficiency(study, arms, weight_RxB)
    return {
        "version": VERSION,
        "title": study.s.title,
        "machines": sorted({_machine(row["environment"]) for row in journal}),
        "seconds": sum(row["seconds"] for row in journal),
        "at_once": max(row["at_once"] for row in journal),
        "commits": sorted({_commit(row["environment"]) for row in journal}),
        "problems": first["problems"],
        "settings": first["settings"],
        "measures": list(study.s.measures),
        "baseline": study.s.baseline,
        "optimum": optimum(study, arms, weight_RxB),
        "arms": {arm: _arm(study, arm, arms.get(arm), weight_RxB) for arm in study.arms},
        "cross": _cross(study, directory, done, weight_RxB),
        "gaps": _gaps(study, arms, weight_RxB),
        "efficiency": efficiency,
        "claims": [
            judged(study, arms, runs, efficiency, claim, weight_RxB) for claim in study.s.claims
        ],
        "curves": {arm: _curves(cells, weight_RxB) for arm, cells in arms.items()},
        "runs": runs,
        "unnamed": _unnamed(study, directory),
    }


def _evaluated(
    study: Study, directory: StudyDirectory, asked: Sequence[tuple[str, int]]
) -> tuple[dict[str, Any] | None, dict[str, Cells]]:
    """Content of the first finished evaluation, and all that are, by name of an arm or a pair.

    Raises:
      ResultsError: they cannot be compared, sampled something else than is asked, or have no such
      measure.
    """
    first, done = None, {}
    for name, seed in asked:
        files = directory.evaluations(name, seed)
        if not files:
            continue
        results = read_results(files[-1])
        first = first or results
        check_comparable(first, results)
        check_evaluation(study, files[-1], results)
        found = columns(results["records"])
        needed = [*study.s.measures, *(("right_if_mixed",) if study.s.strategies else ())]
        if missing := [m for m in needed if column_of(m)[0] not in found]:
            raise ResultsError(
                f"{files[-1]}: has no {', '.join(missing)}: its task names no strategies."
            )
        cells = done.setdefault(name, Cells([], []))
        cells.seeds.append(seed)
        cells.columns.append(found)
    return first, done


def _cross(
    study: Study, directory: StudyDirectory, done: dict[str, Cells], weight_RxB: np.ndarray
) -> list[dict[str, Any]]:
    """For each two arms of `cross`: measures of the one's search read by the other, over the seeds
    that are there.
    """
    rows = []
    for searcher in study.s.cross:
        for reader in study.s.cross:
            name = searcher if searcher == reader else pair_name(searcher, reader)
            row = {"searcher": searcher, "reader": reader, "measures": {}}
            if name in done:
                of, seeds = done[name], done[name].seeds
                row["measures"] = {
                    m: estimate(of.measure(m, seeds, weight_RxB), len(seeds))
                    for m in study.s.measures
                }
            if searcher != reader:
                asked = [seed for pair, seed in study.pairs if pair == (searcher, reader)]
                row["errors"] = [error for seed in asked if (error := directory.error(name, seed))]
            rows.append(row)
    return rows


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
    """Runs in the directory that the configuration does not name any more: nothing that was run
    goes unsaid.
    """
    named = {directory.run(arm, seed) for arm, seed in study.runs}
    found = sorted(path for path in (directory.path / "runs").glob("*/seed_*") if path not in named)
    return [str(path.relative_to(directory.path / "runs")) for path in found]


def _arm(study: Study, arm: str, cells: Cells | None, weight_RxB: np.ndarray) -> dict[str, Any]:
    row = {"seeds": study.arms[arm]} | (arm_row(study.experiments[arm]) if arm != BASE else {})
    of = lambda m: estimate(cells.measure(m, cells.seeds, weight_RxB), len(cells.seeds))  # noqa: E731
    return row | {"measures": {m: of(m) for m in study.s.measures} if cells else {}}


def _gaps(study: Study, done: dict[str, Cells], weight_RxB: np.ndarray) -> dict[str, Any]:
    baseline = study.s.baseline
    return {
        arm: {m: gap(done, arm, baseline, m, weight_RxB) for m in study.s.measures}
        for arm in done
        if arm != baseline
    }


def _efficiency(study: Study, done: dict[str, Cells], weight_RxB: np.ndarray) -> dict[str, Any]:
    """`comparison.scaling_efficiency` at the highest coverage that both reach, resampled over seeds
    too.
    """
    found, baseline = {}, done.get(study.s.baseline)
    for arm, cells in done.items():
        seeds = [seed for seed in cells.seeds if baseline and seed in baseline.seeds]
        if seeds and cells is not baseline:
            curves = [side.curve("pass_at_k", seeds, weight_RxB) for side in (baseline, cells)]
            found[arm] = scaling_efficiency(*curves)[-1] | {"seeds": len(seeds)}
    return found


def _curves(cells: Cells, weight_RxB: np.ndarray) -> dict[str, list[dict]]:
    """By k: pass@k; by round: self-aggregation."""

    def rows(name: str, key: str, first: int) -> list[dict]:
        curve = cells.curve(name, cells.seeds, weight_RxB)
        return [
            {key: q + first} | estimate(curve[:, q], len(cells.seeds))
            for q in range(curve.shape[1])
        ]

    return {"pass_at_k": rows("pass_at_k", "k", 1), "rsa": rows("rsa/single", "round", 0)}
