"""Whether a study's claim, stated before the runs, holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spiral_jax.evaluation.statistics import bootstrap_weights
from spiral_jax.studies.cells import Cells, estimate, gap, with_all
from spiral_jax.studies.design import EFFICIENCY, ENTROPY, OPTIMUM, Claim, Study
from spiral_jax.studies.optimum import optimum_R


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What a study has measured so far.

    Attributes:
      cells: evaluations by arm.
      runs: rows of `history.run_row`.
      efficiency: by arm, against the baseline.
      weight_RxB: how often each resample of the problems has each.
    """

    study: Study
    cells: Mapping[str, Cells]
    runs: Sequence[Mapping[str, Any]]
    efficiency: Mapping[str, Any]
    weight_RxB: np.ndarray


def judge_claim(evidence: Evidence, claim: Claim) -> dict[str, Any]:
    """The claim in words, its gap and unit, and the verdict.

    holds: the whole interval is above what is asked; fails: below; open: neither, or not measured,
    or measured as a bound that leaves it open.
    """
    measured, verdict = _measure_gap(evidence, claim), "open"
    if measured is None or measured["mean"] is None:
        measured = None
    elif measured["low"] > claim.difference and measured.get("bound") != "at most":
        verdict = "holds"
    elif measured["high"] <= claim.difference and measured.get("bound") != "at least":
        verdict = "fails"
    return _state(claim) | {"gap": measured, "verdict": verdict}


def _state(claim: Claim) -> dict[str, str]:
    """The claim in words, and the unit of its gap."""
    measure, arm, other, least = claim
    if measure == EFFICIENCY:
        words = f"{arm} needs less than 1/{least:g} of the samples of {other}"
        return {"claim": words, "unit": "times"}
    if measure == ENTROPY:
        by = f" by more than {least:g}" if least else ""
        words = f"entropy of search at the end of training: {arm} > {other}{by}"
        return {"claim": words, "unit": "nat"}
    if not other:
        return {"claim": f"{measure}: {arm} > {100 * least:g} %", "unit": "percent"}
    by = ""
    if least > 0:
        by = f" by more than {100 * least:g} points"
    elif least < 0:
        by = f" - {-100 * least:g} points"
    return {"claim": f"{measure}: {arm} > {other}{by}", "unit": "points"}


def _measure_gap(evidence: Evidence, claim: Claim) -> dict[str, Any] | None:
    """What the claim is about, with its interval; None: not measured."""
    cells, weight_RxB = evidence.cells, evidence.weight_RxB
    if claim.measure == EFFICIENCY:
        row = evidence.efficiency.get(claim.arm)
        if row is None:
            return None
        return {
            "mean": row["ratio"],
            "low": row["low"],
            "high": row["high"],
            "seeds": row["seeds"],
            "bound": row["bound"],
        }
    if claim.measure == ENTROPY:
        return _entropy_gap(evidence, claim)
    if not claim.other:
        arm = cells.get(claim.arm)
        return arm.estimate(claim.measure, weight_RxB) if arm else None
    if OPTIMUM in (claim.arm, claim.other):
        return _optimum_gap(evidence, claim)
    return gap(cells, claim.arm, claim.other, claim.measure, weight_RxB)


def _optimum_gap(evidence: Evidence, claim: Claim) -> dict[str, Any] | None:
    """arm - optimum, or optimum - other; None where one of them is not known."""
    best_R = optimum_R(evidence.study, evidence.cells, evidence.weight_RxB)
    side = evidence.cells.get(claim.other if claim.arm == OPTIMUM else claim.arm)
    if side is None or best_R is None:
        return None
    above_R = side.measure(claim.measure, side.seeds, evidence.weight_RxB) - best_R
    return estimate(-above_R if claim.arm == OPTIMUM else above_R, len(side.seeds))


def _entropy_gap(evidence: Evidence, claim: Claim) -> dict[str, Any] | None:
    """arm - other, paired and resampled over the seeds that both have; None if there are none."""
    arm, other = (_entropies(evidence.runs, side) for side in (claim.arm, claim.other))
    gap_Z = np.array([arm[seed] - other[seed] for seed in arm if seed in other])
    if not len(gap_Z):
        return None
    weight_RxZ = with_all(bootstrap_weights(1, len(gap_Z), len(evidence.weight_RxB)))
    return estimate(weight_RxZ @ gap_Z / len(gap_Z), len(gap_Z))


def _entropies(runs: Sequence[Mapping[str, Any]], arm: str) -> dict[int, float]:
    """Entropy at the end of an arm's runs, by seed."""
    ends = {run["seed"]: run.get("entropy_end") for run in runs if run["arm"] == arm}
    return {seed: end for seed, end in ends.items() if end is not None}
