"""Two results on the same problems and scaffold -> scaling efficiency and gaps, with paired
intervals over problems.

A is the baseline. Both sides are resampled with the same problems, so that what is hard for both
cancels out.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from spiral_jax.core.config import defaults, difference, to_plain
from spiral_jax.evaluation.measures import BOOTSTRAP_DRAWS, Column, columns
from spiral_jax.evaluation.results import ResultsError
from spiral_jax.evaluation.statistics import bootstrap_weights, ratios_and_intervals
from spiral_jax.evaluation.tables import powers_of_two

VERSION = 1
_BUDGETS = 4  # token budgets at which accuracies are compared, each half of the one above


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """The content of comparison.json.

    Returns:
      a, b: model and settings of each side. efficiency: `scaling_efficiency` at powers of two of
      A's samples and, last,
      at the highest coverage that both reach. gaps: B - A in paired means over problems.
      equal_tokens: the same at
      equal sampled tokens, of votes and of RSA. left_out: what could not be compared, and why.

    Raises:
      ResultsError: other problems, scaffold or reward.
    """
    check_comparable(a, b)
    of_a, of_b = columns(a["records"]), columns(b["records"])
    weight_RxB = bootstrap_weights(0, len(a["records"]), BOOTSTRAP_DRAWS)
    gaps, left_out = _gaps(a["settings"], b["settings"], of_a, of_b, weight_RxB)
    curves = [_resampled(of["pass_at_k"], weight_RxB) for of in (of_a, of_b)]
    return {
        "version": VERSION,
        **{
            side: {name: results[name] for name in ("model", "settings")}
            for side, results in (("a", a), ("b", b))
        },
        "problems": a["problems"],
        "efficiency": scaling_efficiency(*curves),
        "gaps": gaps,
        "equal_tokens": [
            {"method": method} | row
            for method, accuracy, tokens in (
                ("majority vote", "majority_at_k", "tokens_at_k"),
                ("RSA", "rsa/single", "rsa/tokens"),
            )
            for row in _gaps_at_equal_tokens(
                [
                    [_resampled(of[name], weight_RxB) for name in (accuracy, tokens)]
                    for of in (of_a, of_b)
                ]
            )
        ],
        "left_out": left_out,
    }


def check_comparable(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """Raises `ResultsError` that names what differs: problems, scaffold or reward."""
    usual = to_plain(
        defaults().prompt
    )  # stands for fields that did not exist when a file was written
    reasons = difference(usual | a["scaffold"], usual | b["scaffold"], "prompt.")
    reasons += difference(
        {"reward": a["problems"]["reward"]}, {"reward": b["problems"]["reward"]}, "task."
    )
    if a["problems"]["fingerprint"] != b["problems"]["fingerprint"]:
        ids = [[record["id"] for record in results["records"]] for results in (a, b)]
        only = [sorted(set(mine) - set(others)) for mine, others in (ids, ids[::-1])]
        sizes = [
            f"{len(mine)} of {results['problems']['task']}"
            for mine, results in zip(ids, (a, b), strict=True)
        ]
        reasons.append(f"problems: {sizes[0]} -> {sizes[1]}")
        for side, names in zip("AB", only, strict=True):
            if names:
                reasons.append(f"problems only in {side}: {len(names)}, first {names[0]}")
        if not any(only):
            reasons.append("problems: the same ids, other texts, answers or order")
    if reasons:
        raise ResultsError(
            "--compare: the two results are not of the same problems and scaffold (A -> B):\n  "
            + "\n  ".join(reasons)
            + "\nEvaluate both with the same config.task, eval.problems and config.prompt."
        )


def scaling_efficiency(curve_a_RxN: np.ndarray, curve_b_RxN: np.ndarray) -> list[dict[str, Any]]:
    """How many times fewer samples B needs for the same coverage (arXiv 2606.23595, section 4,
    which has no formula).

    Of a coverage y that A reaches with k samples: k_A(y) / k_B(y), where k(y) is the smallest k at
    which pass@k is y,
    linear in log k between whole k. Above 1: B is the more efficient.

    Args:
      curve_a_RxN, curve_b_RxN: pass@k for k = 1..N (each side its own N); row 0 of all problems,
        the others of bootstrap resamples, the same problems in the same row.

    Returns:
      rows with coverage, samples_a, samples_b, ratio, its 95 % interval low, high, and bound: None,
      or "at least" where B has this coverage with one sample already, "at most" where B does not
      reach it with all of its samples. The resamples are bounded in the same way. One row for each
      power of two of A's samples; the last is for the highest coverage that both reach, `both`.
    """
    ends = np.minimum(curve_a_RxN[:, -1], curve_b_RxN[:, -1])
    asked = [(f"A at k={k}", curve_a_RxN[:, k - 1]) for k in powers_of_two(curve_a_RxN.shape[1])]
    rows = []
    for name, level_R in [*asked, ("both", ends)]:
        (k_a, _), (k_b, bound) = (
            samples_needed(curve_a_RxN, level_R),
            samples_needed(curve_b_RxN, level_R),
        )
        ratio_R = k_a / k_b
        low, high = np.percentile(ratio_R[1:], (2.5, 97.5))
        rows.append({
            "at": name, "coverage": float(level_R[0]), "samples_a": float(k_a[0]), "samples_b": float(k_b[0]),
            "ratio": float(ratio_R[0]), "low": float(low), "high": float(high),
            "bound": {-1: "at least", 0: None, 1: "at most"}[int(bound[0])],
        })  # fmt: skip
    return rows


def samples_needed(curve_RxN: np.ndarray, level_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The smallest k at which each curve reaches its level, linear in log k, and whether that is a
    bound.

    Args:
      curve_RxN: pass@k for k = 1..N; what falls by rounding, or because problems have fewer
      samples, is levelled.

    Returns:
      float64 [R] in [1, N], and [R]: -1 where k = 1 is above the level already, 1 where k = N is
      below it, else 0.
    """
    rising = np.maximum.accumulate(curve_RxN, axis=1)
    level = level_R[:, None]
    reached = rising >= level - 1e-12
    at = np.where(reached.any(axis=1), reached.argmax(axis=1), rising.shape[1] - 1)
    rows = np.arange(len(rising))
    below, above = rising[rows, np.maximum(at - 1, 0)], rising[rows, at]
    step = np.where(above > below, above - below, 1.0)
    share = np.clip(np.where(above > below, (level_R - below) / step, 1.0), 0.0, 1.0)
    log_k = np.log(np.arange(1, rising.shape[1] + 1))
    needed = np.exp(
        log_k[np.maximum(at - 1, 0)] + share * (log_k[at] - log_k[np.maximum(at - 1, 0)])
    )
    bound = np.where(~reached[:, -1], 1, np.where(rising[:, 0] > level_R + 1e-12, -1, 0))
    return needed, bound


def _resampled(column: Column, weight_RxB: np.ndarray) -> np.ndarray:
    """[1 + R, Q]: the measure of all problems, then of every resample."""
    weights = np.concatenate([np.ones((1, weight_RxB.shape[1])), weight_RxB])
    return (weights @ column.total_BxQ) / np.maximum(weights @ column.count_BxQ, 1e-300)


def _gaps(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    of_a: dict[str, Column],
    of_b: dict[str, Column],
    weight_RxB: np.ndarray,
) -> tuple[list[dict[str, Any]], list[str]]:
    """B - A by measure, and what is left out since the two were not sampled alike."""
    n = min(a["n"], b["n"])
    wanted = [
        ("single trace", "single", 0),
        (f"pass@{n}", "pass_at_k", n - 1),
        (f"maj@{n}", "majority_at_k", n - 1),
    ]
    left_out = []
    lines = [f"{name}: {a[name]} -> {b[name]}" for name in ("subset_size",) if a[name] != b[name]]
    if lines:
        left_out.append(f"aggregated pass@1 ({', '.join(lines)})")
    else:
        wanted.append((f"aggregated pass@1, S={a['subset_size']}", "aggregated", 0))
    lines = [
        f"{name}: {a[name]} -> {b[name]}"
        for name in ("population", "set_size")
        if a[name] != b[name]
    ]
    if lines:
        left_out.append(f"RSA by round ({', '.join(lines)})")
    else:
        rounds = range(1, min(a["rounds"], b["rounds"]) + 1)
        wanted += [(f"RSA round {t}", "rsa/single", t) for t in rounds]
    gaps = []
    for name, key, q in wanted:
        (total_a, count_a), (total_b, count_b) = (
            [part[:, [q]] for part in of[key]] for of in (of_a, of_b)
        )
        both = (count_a > 0) & (count_b > 0)
        (gap,) = ratios_and_intervals(
            np.where(both, total_b - total_a, 0.0), both.astype(float), weight_RxB
        )
        means = [float(total[both].mean()) if both.any() else None for total in (total_a, total_b)]
        gaps.append({"measure": name, "a": means[0], "b": means[1], "gap": dataclasses.asdict(gap)})
    return gaps, left_out


def _gaps_at_equal_tokens(sides: list[list[np.ndarray]]) -> list[dict[str, Any]]:
    """B - A in accuracy at equal sampled tokens a problem, linear in log tokens between what was
    measured.

    Args:
      sides: (accuracy, tokens) of A and of B, each [1 + R, Q].
    """
    (accuracy_a, tokens_a), (accuracy_b, tokens_b) = sides
    least = max(tokens_a[0, 0], tokens_b[0, 0])
    most = min(tokens_a[0, -1], tokens_b[0, -1])
    budgets = [most / 2**i for i in reversed(range(_BUDGETS)) if most / 2**i >= least]
    rows = []
    for budget in budgets:
        a_R, b_R = (
            np.array(
                [
                    np.interp(np.log(budget), np.log(t), y)
                    for t, y in zip(tokens, accuracy, strict=True)
                ]
            )
            for accuracy, tokens in ((accuracy_a, tokens_a), (accuracy_b, tokens_b))
        )
        gap = b_R - a_R
        low, high = np.percentile(gap[1:], (2.5, 97.5))
        gap = {
            "mean": float(gap[0]),
            "low": float(low),
            "high": float(high),
            "standard_error": float(gap[1:].std()),
        }
        rows.append({"tokens": float(budget), "a": float(a_R[0]), "b": float(b_R[0]), "gap": gap})
    return rows


def write(path: pathlib.Path, found: dict[str, Any]) -> None:
    """Writes comparison.json."""
    path.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
