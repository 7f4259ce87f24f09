"""Two results on the same problems and scaffold -> scaling efficiency and gaps.

A is the baseline. Intervals are paired: both sides are resampled with the same problems, so that
what is hard for both cancels out.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from spiral_jax.core.config import defaults, difference, to_plain
from spiral_jax.evaluation.measures import (
    BOOTSTRAP_DRAWS,
    Column,
    columns,
    cut_curves,
    largest_k,
)
from spiral_jax.evaluation.results import ResultsError
from spiral_jax.evaluation.statistics import bootstrap_weights, ratios_and_intervals
from spiral_jax.evaluation.tables import powers_of_two

VERSION = 1
_BUDGETS = 4  # token budgets at which accuracies are compared, each half of the one above
# what `Needed.bound` of B, or its opposite of A, makes of a ratio k_A / k_B
_BOUNDS = {-1: "at least", 0: None, 1: "at most"}


class Needed(NamedTuple):
    """How many samples each of R curves needs.

    Attributes:
      samples_R: float64 in [1, N].
      bound_R: -1 where the level is below that of one sample, so that fewer would do; 1 where it is
        above that of all N, so that more are needed; else 0.
    """

    samples_R: np.ndarray
    bound_R: np.ndarray


class Measure(NamedTuple):
    """A line of the table of gaps: measure q of a column."""

    label: str
    column: str
    q: int


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """The content of comparison.json.

    Returns:
      a, b: model and settings of each side, and the `largest_k` at which its curves end.
      efficiency: see `scaling_efficiency`.
      gaps: B - A in paired means over problems.
      equal_tokens: the same at equal sampled tokens, of votes and of RSA.
      left_out: what could not be compared, and why.

    Raises:
      ResultsError: other problems, scaffold or reward.
    """
    check_comparable(a, b)
    columns_a, columns_b = columns(a["records"]), columns(b["records"])
    k_a, k_b = largest_k(columns_a), largest_k(columns_b)
    columns_a, columns_b = cut_curves(columns_a, k_a), cut_curves(columns_b, k_b)
    weight_RxB = bootstrap_weights(0, len(a["records"]), BOOTSTRAP_DRAWS)

    curve_a_RxN = _resample(columns_a["pass_at_k"], weight_RxB)
    curve_b_RxN = _resample(columns_b["pass_at_k"], weight_RxB)

    measures, left_out = _common_measures(a["settings"], b["settings"], min(k_a, k_b))
    left_out += _cut_off("A", a["settings"]["n"], k_a) + _cut_off("B", b["settings"]["n"], k_b)
    gaps = [_gap(measure, columns_a, columns_b, weight_RxB) for measure in measures]

    votes = _gaps_at_equal_tokens(
        _budget_curve(columns_a, "majority_at_k", "tokens_at_k", weight_RxB),
        _budget_curve(columns_b, "majority_at_k", "tokens_at_k", weight_RxB),
    )
    rsa = _gaps_at_equal_tokens(
        _budget_curve(columns_a, "rsa/single", "rsa/tokens", weight_RxB),
        _budget_curve(columns_b, "rsa/single", "rsa/tokens", weight_RxB),
    )
    return {
        "version": VERSION,
        "a": {"model": a["model"], "settings": a["settings"], "largest_k": k_a},
        "b": {"model": b["model"], "settings": b["settings"], "largest_k": k_b},
        "problems": a["problems"],
        "efficiency": scaling_efficiency(curve_a_RxN, curve_b_RxN),
        "gaps": gaps,
        "equal_tokens": [
            *({"method": "majority vote"} | row for row in votes),
            *({"method": "RSA"} | row for row in rsa),
        ],
        "left_out": left_out,
    }


def write_comparison(path: pathlib.Path, comparison: Mapping[str, Any]) -> None:
    """Writes comparison.json."""
    path.write_text(json.dumps(comparison, indent=1, allow_nan=False) + "\n")


# Whether the two can be compared


def check_comparable(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """Raises `ResultsError` that names what differs: problems, scaffold or reward."""
    # stands for fields that did not exist when a file was written
    usual = to_plain(defaults().prompt)
    reasons = difference(usual | a["scaffold"], usual | b["scaffold"], "prompt.")
    reward_a, reward_b = ({"reward": side["problems"]["reward"]} for side in (a, b))
    reasons += difference(reward_a, reward_b, "task.")
    if a["problems"]["fingerprint"] != b["problems"]["fingerprint"]:
        reasons += _differing_problems(a, b)
    if reasons:
        raise ResultsError(
            "--compare: the two results are not of the same problems and scaffold (A -> B):\n  "
            + "\n  ".join(reasons)
            + "\nEvaluate both with the same config.task, eval.problems and config.prompt."
        )


def _differing_problems(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What differs between the problems of two results."""
    ids_a, ids_b = ([record["id"] for record in side["records"]] for side in (a, b))
    reasons = [
        f"problems: {len(ids_a)} of {a['problems']['task']}"
        f" -> {len(ids_b)} of {b['problems']['task']}"
    ]
    only_a, only_b = sorted(set(ids_a) - set(ids_b)), sorted(set(ids_b) - set(ids_a))
    for side, only in (("A", only_a), ("B", only_b)):
        if only:
            reasons.append(f"problems only in {side}: {len(only)}, first {only[0]}")
    if not only_a and not only_b:
        reasons.append("problems: the same ids, other texts, answers or order")
    return reasons


# Samples for equal coverage


def scaling_efficiency(curve_a_RxN: np.ndarray, curve_b_RxN: np.ndarray) -> list[dict[str, Any]]:
    """How many times fewer samples B needs for the same coverage.

    For a coverage y that A reaches with k samples: k_A(y) / k_B(y), where k(y) is the smallest k at
    which pass@k is y, linear in log k between whole k. Above 1: B is the more efficient. (arXiv
    2606.23595, section 4, which has no formula.)

    Args:
      curve_a_RxN, curve_b_RxN: pass@k for k = 1..N (each side its own N); row 0 of all problems,
        the others of bootstrap resamples, the same problems in the same row.

    Returns:
      rows with coverage, samples_a, samples_b, ratio, its 95 % interval low, high, and bound: None,
      or "at least" where fewer samples of B than one would do, "at most" where fewer of A than one
      would, or where B does not reach it with all of its samples. The resamples are bounded in the
      same way. One row for each power of two of A's samples; the last, "both", is for the highest
      coverage that both reach.
    """
    rising_a_RxN, rising_b_RxN = (
        np.maximum.accumulate(curve_RxN, axis=1) for curve_RxN in (curve_a_RxN, curve_b_RxN)
    )
    levels = {f"A at k={k}": rising_a_RxN[:, k - 1] for k in powers_of_two(curve_a_RxN.shape[1])}
    levels["both"] = np.minimum(rising_a_RxN[:, -1], rising_b_RxN[:, -1])
    rows = []
    for name, level_R in levels.items():
        needed_a, needed_b = (
            samples_needed(rising_RxN, level_R) for rising_RxN in (rising_a_RxN, rising_b_RxN)
        )
        ratio_R = needed_a.samples_R / needed_b.samples_R
        low, high = np.percentile(ratio_R[1:], (2.5, 97.5))
        rows.append(
            {
                "at": name,
                "coverage": float(level_R[0]),
                "samples_a": float(needed_a.samples_R[0]),
                "samples_b": float(needed_b.samples_R[0]),
                "ratio": float(ratio_R[0]),
                "low": float(low),
                "high": float(high),
                "bound": _BOUNDS[int(needed_b.bound_R[0] - needed_a.bound_R[0])],
            }
        )
    return rows


def samples_needed(curve_RxN: np.ndarray, level_R: np.ndarray) -> Needed:
    """The smallest k at which each curve reaches its level, linear in log k.

    Args:
      curve_RxN: pass@k for k = 1..N; where it falls, by rounding or because problems have fewer
        samples, it is taken to stay.
    """
    rising_RxN = np.maximum.accumulate(curve_RxN, axis=1)
    reached_RxN = rising_RxN >= level_R[:, None] - 1e-12
    last = rising_RxN.shape[1] - 1
    at_R = np.where(reached_RxN.any(axis=1), reached_RxN.argmax(axis=1), last)  # index of k
    before_R = np.maximum(at_R - 1, 0)

    rows = np.arange(len(rising_RxN))
    below_R, above_R = rising_RxN[rows, before_R], rising_RxN[rows, at_R]
    is_step_R = above_R > below_R
    step_R = np.where(is_step_R, above_R - below_R, 1.0)
    share_R = np.clip(np.where(is_step_R, (level_R - below_R) / step_R, 1.0), 0.0, 1.0)
    log_k = np.log(np.arange(1, last + 2))
    samples_R = np.exp(log_k[before_R] + share_R * (log_k[at_R] - log_k[before_R]))

    is_below_all_R = rising_RxN[:, 0] > level_R + 1e-12
    bound_R = np.where(~reached_RxN[:, -1], 1, np.where(is_below_all_R, -1, 0))
    return Needed(samples_R, bound_R)


def _resample(column: Column, weight_RxB: np.ndarray) -> np.ndarray:
    """[1 + R, Q]: the measure of all problems, then of every resample."""
    weights = np.concatenate([np.ones((1, weight_RxB.shape[1])), weight_RxB])
    return (weights @ column.total_BxQ) / np.maximum(weights @ column.count_BxQ, 1e-300)


# Gaps


def _common_measures(
    a: Mapping[str, Any], b: Mapping[str, Any], k: int
) -> tuple[list[Measure], list[str]]:
    """The measures for which the settings of both sides are alike, and why others are left out.

    Args:
      k: at which the shorter of their curves ends.
    """
    measures = [
        Measure("single trace", "single", 0),
        Measure(f"pass@{k}", "pass_at_k", k - 1),
        Measure(f"maj@{k}", "majority_at_k", k - 1),
    ]
    left_out = []

    if other := _changes(a, b, ["subset_size"]):
        left_out.append(f"aggregated pass@1 ({other})")
    else:
        measures.append(Measure(f"aggregated pass@1, S={a['subset_size']}", "aggregated", 0))

    if other := _changes(a, b, ["population", "set_size"]):
        left_out.append(f"RSA by round ({other})")
    else:
        rounds = range(1, min(a["rounds"], b["rounds"]) + 1)
        measures += [Measure(f"RSA round {t}", "rsa/single", t) for t in rounds]
    return measures, left_out


def _cut_off(side: str, n: int, k: int) -> list[str]:
    """What is left out of a side's curves that end at k of n traces; nothing if k = n."""
    if k == n:
        return []
    return [
        f"pass@k and maj@k above k = {k} of {side} (of its {n} traces a problem some are errors "
        "of ours; fewer than 90 % of the problems have more than that)"
    ]


def _changes(a: Mapping[str, Any], b: Mapping[str, Any], names: Sequence[str]) -> str:
    """The settings among `names` in which the sides differ, "" if there are none."""
    return ", ".join(f"{name}: {a[name]} -> {b[name]}" for name in names if a[name] != b[name])


def _gap(
    measure: Measure,
    columns_a: Mapping[str, Column],
    columns_b: Mapping[str, Column],
    weight_RxB: np.ndarray,
) -> dict[str, Any]:
    """B - A of a measure, over the problems for which both have a value."""
    a, b = columns_a[measure.column], columns_b[measure.column]
    total_a_Bx1, total_b_Bx1 = a.total_BxQ[:, [measure.q]], b.total_BxQ[:, [measure.q]]
    both_Bx1 = (a.count_BxQ[:, [measure.q]] > 0) & (b.count_BxQ[:, [measure.q]] > 0)
    difference_Bx1 = np.where(both_Bx1, total_b_Bx1 - total_a_Bx1, 0.0)
    (gap,) = ratios_and_intervals(difference_Bx1, both_Bx1.astype(float), weight_RxB)
    return {
        "measure": measure.label,
        "a": float(total_a_Bx1[both_Bx1].mean()) if both_Bx1.any() else None,
        "b": float(total_b_Bx1[both_Bx1].mean()) if both_Bx1.any() else None,
        "gap": dataclasses.asdict(gap),
    }


# Gaps at equal tokens


class BudgetCurve(NamedTuple):
    """What Q budgets cost and give: of all problems (row 0), and of every resample."""

    tokens_RxQ: np.ndarray
    accuracy_RxQ: np.ndarray

    def at(self, tokens: float) -> np.ndarray:
        """[R]: the accuracy at so many tokens a problem, linear in log tokens."""
        pairs = zip(self.tokens_RxQ, self.accuracy_RxQ, strict=True)
        log_tokens = np.log(tokens)
        return np.array([np.interp(log_tokens, np.log(t_Q), y_Q) for t_Q, y_Q in pairs])


def _budget_curve(
    measured: Mapping[str, Column], accuracy: str, tokens: str, weight_RxB: np.ndarray
) -> BudgetCurve:
    return BudgetCurve(
        tokens_RxQ=_resample(measured[tokens], weight_RxB),
        accuracy_RxQ=_resample(measured[accuracy], weight_RxB),
    )


def _gaps_at_equal_tokens(a: BudgetCurve, b: BudgetCurve) -> list[dict[str, Any]]:
    """B - A in accuracy at equal sampled tokens a problem, where both have been measured."""
    least = max(a.tokens_RxQ[0, 0], b.tokens_RxQ[0, 0])
    most = min(a.tokens_RxQ[0, -1], b.tokens_RxQ[0, -1])
    budgets = [most / 2**i for i in reversed(range(_BUDGETS))]
    rows = []
    for budget in budgets:
        if budget < least:
            continue
        accuracy_a_R, accuracy_b_R = a.at(budget), b.at(budget)
        gap_R = accuracy_b_R - accuracy_a_R
        low, high = np.percentile(gap_R[1:], (2.5, 97.5))
        gap = {
            "mean": float(gap_R[0]),
            "low": float(low),
            "high": float(high),
            "standard_error": float(gap_R[1:].std()),
        }
        rows.append(
            {
                "tokens": float(budget),
                "a": float(accuracy_a_R[0]),
                "b": float(accuracy_b_R[0]),
                "gap": gap,
            }
        )
    return rows
