"""Evaluations of one arm over seeds -> estimates whose intervals are over seeds and problems."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spiral_jax.evaluation.measures import STRATEGIES, Column
from spiral_jax.evaluation.statistics import bootstrap_weights

_COLUMNS = {
    "single": ("single", 0), "aggregated": ("aggregated", 0),
    "pass": ("pass_at_k", -1), "maj": ("majority_at_k", -1), "rsa": ("rsa/single", 0),
    **{name: (name, 0) for name in STRATEGIES},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cells:
    """Evaluations of one arm on the same B problems: its seeds, and the `Column`s of each."""

    seeds: list[int]
    columns: list[dict[str, Column]]

    def curve(self, name: str, seeds: Sequence[int], weight_RxB: np.ndarray) -> np.ndarray:
        """[1 + R, Q]: the measure over those seeds, of all problems and then of every resample."""
        chosen = [self.columns[self.seeds.index(seed)][name] for seed in seeds]
        total_ZxBxQ, count_ZxBxQ = (
            np.stack([column[part] for column in chosen]) for part in (0, 1)
        )
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


def value_of(columns: Mapping[str, Column], measure: str) -> float | None:
    """A measure of one evaluation; None if no set or trace is of its kind."""
    column, q = column_of(measure)
    total, count = columns[column]
    return float(total[:, q].sum() / count[:, q].sum()) if count[:, q].any() else None


def estimate(value_R: np.ndarray, seeds: int) -> dict[str, Any]:
    """Mean, 95 % interval, and how many seeds it is over."""
    if np.isnan(value_R[0]):  # no problem has a value
        return {"mean": None, "low": None, "high": None, "seeds": seeds}
    low, high = np.nanpercentile(value_R[1:], (2.5, 97.5))
    return {"mean": float(value_R[0]), "low": float(low), "high": float(high), "seeds": seeds}


def gap(
    done: Mapping[str, Cells], arm: str, other: str, measure: str, weight_RxB: np.ndarray
) -> dict[str, Any] | None:
    """arm - other over the seeds that both have; None if there are none."""
    if arm not in done or other not in done:
        return None
    seeds = [seed for seed in done[arm].seeds if seed in done[other].seeds]
    if not seeds:
        return None
    a, b = (done[side].measure(measure, seeds, weight_RxB) for side in (arm, other))
    return estimate(a - b, len(seeds))
