"""Evaluations of one arm over seeds -> estimates whose intervals are over seeds and problems.

Letters: Z seeds, B problems, R resamples, Q entries of a measure's curve.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from spiral_jax.evaluation.measures import REWARD, STRATEGIES, Column, columns
from spiral_jax.evaluation.statistics import bootstrap_weights


class Place(NamedTuple):
    """Where a measure stands: a column of `measures.columns`, and the entry in its curve."""

    column: str
    q: int


# kind of measure: its column, and the entry of number 0, that is of "pass@0" or "rsa@0"
_PLACES = {
    "single": Place("single", 0),
    "aggregated": Place("aggregated", 0),
    "pass": Place("pass_at_k", -1),
    "maj": Place("majority_at_k", -1),
    "rsa": Place("rsa/single", 0),
    "reward": Place(REWARD, 0),
    "reward_single": Place("reward/single", 0),
    "reward_rsa": Place("reward/rsa", 0),
    **{name: Place(name, 0) for name in STRATEGIES},
}


def place_of(measure: str) -> Place:
    """Where a measure stands, such as "aggregated" or "pass@32"."""
    kind, _, number = measure.partition("@")
    column, first = _PLACES[kind]
    return Place(column, first + int(number or 0))


@dataclasses.dataclass(frozen=True)
class Cells:
    """Evaluations of one arm on the same B problems: its seeds, and the `Column`s of each."""

    seeds: list[int]
    columns: list[dict[str, Column]]

    def curve(self, column: str, seeds: Sequence[int], weight_RxB: np.ndarray) -> np.ndarray:
        """[1 + R, Q]: a column over those seeds, of all problems and then of every resample."""
        chosen = [self.columns[self.seeds.index(seed)][column] for seed in seeds]
        seed_RxZ = with_all(bootstrap_weights(1, len(seeds), len(weight_RxB)))
        problem_RxB = with_all(weight_RxB)
        total_RxQ = _weighted_sum(seed_RxZ, problem_RxB, [of.total_BxQ for of in chosen])
        count_RxQ = _weighted_sum(seed_RxZ, problem_RxB, [of.count_BxQ for of in chosen])
        with np.errstate(invalid="ignore", divide="ignore"):
            return total_RxQ / count_RxQ

    def measure(self, name: str, seeds: Sequence[int], weight_RxB: np.ndarray) -> np.ndarray:
        """[1 + R] of a measure as `design.defaults` names it; NaN above the end of its curve."""
        column, q = place_of(name)
        value_RxQ = self.curve(column, seeds, weight_RxB)
        return value_RxQ[:, q] if q < value_RxQ.shape[1] else np.full(len(value_RxQ), np.nan)

    def estimate(self, name: str, weight_RxB: np.ndarray) -> dict[str, Any]:
        """A measure over all seeds that are there."""
        return estimate(self.measure(name, self.seeds, weight_RxB), len(self.seeds))


def with_all(weight_RxB: np.ndarray) -> np.ndarray:
    """[1 + R, B]: the resamples' weights behind those of everything once."""
    return np.concatenate([np.ones((1, weight_RxB.shape[1])), weight_RxB])


def _weighted_sum(
    seed_RxZ: np.ndarray, problem_RxB: np.ndarray, part_of_seeds: Sequence[np.ndarray]
) -> np.ndarray:
    """[R, Q]: the sum over seeds and problems, each weighted; `part_of_seeds`: [B, Q] of each."""
    part_ZxBxQ = np.stack(part_of_seeds)
    return np.einsum("rz,rb,zbq->rq", seed_RxZ, problem_RxB, part_ZxBxQ, optimize=True)


def columns_with(records: Sequence[dict], measures: Sequence[str]) -> dict[str, Column]:
    """All columns of an evaluation, with mean rewards if one of these measures is one."""
    asked = {place_of(measure).column for measure in measures}
    return columns(records, with_rewards=any(name.startswith("reward/") for name in asked))


def value_of(measured: Mapping[str, Column], measure: str) -> float | None:
    """A measure of one evaluation; None if no set or trace is of its kind."""
    column, q = place_of(measure)
    total_BxQ, count_BxQ = measured[column]
    if q >= count_BxQ.shape[1] or not count_BxQ[:, q].any():
        return None
    return float(total_BxQ[:, q].sum() / count_BxQ[:, q].sum())


def estimate(value_R: np.ndarray, seeds: int) -> dict[str, Any]:
    """Mean, 95 % interval, and how many seeds it is over."""
    if np.isnan(value_R[0]):  # no problem has a value
        return {"mean": None, "low": None, "high": None, "seeds": seeds}
    low, high = np.nanpercentile(value_R[1:], (2.5, 97.5))
    return {"mean": float(value_R[0]), "low": float(low), "high": float(high), "seeds": seeds}


def gap(
    cells: Mapping[str, Cells], arm: str, other: str, measure: str, weight_RxB: np.ndarray
) -> dict[str, Any] | None:
    """arm - other over the seeds that both have; None if there are none."""
    if arm not in cells or other not in cells:
        return None
    seeds = [seed for seed in cells[arm].seeds if seed in cells[other].seeds]
    if not seeds:
        return None
    arm_R = cells[arm].measure(measure, seeds, weight_RxB)
    other_R = cells[other].measure(measure, seeds, weight_RxB)
    return estimate(arm_R - other_R, len(seeds))
