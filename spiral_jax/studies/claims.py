"""Whether a study's claim, stated before the runs, holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spiral_jax.evaluation.statistics import bootstrap_weights
from spiral_jax.studies.cells import Cells, estimate, gap
from spiral_jax.studies.design import EFFICIENCY, ENTROPY, OPTIMUM, Study
from spiral_jax.studies.optimum import optimum_R


def judged(
    study: Study,
    done: Mapping[str, Cells],
    runs: Sequence[Mapping[str, Any]],
    efficiency: Mapping[str, Any],
    claim: Sequence,
    weight_RxB: np.ndarray,
) -> dict[str, Any]:
    """The claim in words, its gap and unit, and the verdict.

    holds: the whole interval is above what is asked; fails: below; open: neither, or not measured.

    Args:
      done: evaluations by arm.
      runs: rows of `history.run_row`.
      efficiency: by arm, against the baseline.
      claim: see `plan.defaults`.
    """
    measure, arm, other, least = claim
    by = (
        f" by more than {100 * least:g} points"
        if least > 0
        else f" - {-100 * least:g} points"
        if least
        else ""
    )
    row = {"claim": f"{measure}: {arm} > {other}{by}", "unit": "points"}
    if measure == EFFICIENCY:
        row = {
            "claim": f"{arm} needs less than 1/{least:g} of the samples of {other}",
            "unit": "times",
        }
        of = efficiency.get(arm)
        found = of and {
            "mean": of["ratio"],
            "low": of["low"],
            "high": of["high"],
            "seeds": of["seeds"],
        }
    elif measure == ENTROPY:
        by = f" by more than {least:g}" if least else ""
        row = {
            "claim": f"entropy of search at the end of training: {arm} > {other}{by}",
            "unit": "nat",
        }
        found = _entropy_gap(runs, arm, other, len(weight_RxB))
    elif not other:
        row = {"claim": f"{measure}: {arm} > {100 * least:g} %", "unit": "percent"}
        found = (
            estimate(_alone_R(done[arm], measure, weight_RxB), len(done[arm].seeds))
            if arm in done
            else None
        )
    elif OPTIMUM in (arm, other):
        found = _optimum_gap(study, done, measure, arm, other, weight_RxB)
    else:
        found = gap(done, arm, other, measure, weight_RxB)
    if found is None or found["mean"] is None:
        return row | {"gap": None, "verdict": "open"}
    verdict = "holds" if found["low"] > least else "fails" if found["high"] <= least else "open"
    return row | {"gap": found, "verdict": verdict}


def _alone_R(cells: Cells, measure: str, weight_RxB: np.ndarray) -> np.ndarray:
    return cells.measure(measure, cells.seeds, weight_RxB)


def _optimum_gap(
    study: Study,
    done: Mapping[str, Cells],
    measure: str,
    arm: str,
    other: str,
    weight_RxB: np.ndarray,
) -> dict[str, Any] | None:
    side, best_R = other if arm == OPTIMUM else arm, optimum_R(study, done, weight_RxB)
    if side not in done or best_R is None:
        return None
    value_R = _alone_R(done[side], measure, weight_RxB) - best_R
    return estimate(value_R if side == arm else -value_R, len(done[side].seeds))


def _entropy_gap(
    runs: Sequence[Mapping[str, Any]], arm: str, other: str, draws: int
) -> dict[str, Any] | None:
    """arm - other, paired over the seeds of which both have a run, resampled over them; None if
    there are none.
    """
    end = {
        (run["arm"], run["seed"]): run["entropy_end"]
        for run in runs
        if run.get("entropy_end") is not None
    }
    gap_Z = np.array(
        [
            end[arm, seed] - end[other, seed]
            for of, seed in end
            if of == arm and (other, seed) in end
        ]
    )
    if not len(gap_Z):
        return None
    weight_RxZ = np.concatenate([np.ones((1, len(gap_Z))), bootstrap_weights(1, len(gap_Z), draws)])
    return estimate(weight_RxZ @ gap_Z / len(gap_Z), len(gap_Z))
