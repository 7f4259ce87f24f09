"""The tables of what a study's runs may spend and have spent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spiral_jax.evaluation.tables import DASH
from spiral_jax.studies.markdown import escape, table

_BUDGET = {  # of an arm's row: key, head of its column
    "estimator": "estimator",
    "N": "N",
    "S": "S",
    "K": "K",
    "M": "M",
    "R": "R",
    "populations a step": "stored populations a step",
    "L search": "L, search",
    "L aggregation": "L, aggregation",
    "rollouts": "rollouts",
    "ceiling": "tokens a problem, at most",
    "problems a step": "problems a step",
    "steps": "steps, at most",
    "token budget": "sampled tokens, at most",
    "lr": "lr",
}


def arms_table(gathered: Mapping[str, Any]) -> str:
    """What each arm may spend."""
    trained = {arm: row for arm, row in gathered["arms"].items() if "estimator" in row}  # no base
    budget = dict(_BUDGET)
    if not any("populations a step" in row for row in trained.values()):
        del budget["populations a step"]
    rows = [
        [arm, *(count_cell(row.get(key)) for key in budget), len(row["seeds"])]
        for arm, row in trained.items()
    ]
    return table(["arm", *budget.values(), "seeds"], rows)


def training_table(gathered: Mapping[str, Any]) -> str:
    """What the runs of each arm have spent, and their diagnostics."""
    heads = [
        "arm",
        "steps",
        "sampled tokens",
        "prefilled tokens",
        "TFLOP",
        "seconds",
        "entropy of search, start",
        "end (nat)",
        "gradient norm, search",
        "aggregation",
        "lowest parse rate, search",
        "aggregation (%)",
    ]
    rows = []
    for arm in gathered["arms"]:
        runs = [run for run in gathered["runs"] if run["arm"] == arm and "steps" in run]
        if not runs:
            continue
        row = [
            arm,
            mean_cell(runs, "steps", 0),
            mean_cell(runs, "sampled_tokens", 0),
            mean_cell(runs, "prefilled_tokens", 0),
            mean_cell(runs, "tflop", 2),
            mean_cell(runs, "seconds", 0),
            mean_cell(runs, "entropy_start", 3),
            mean_cell(runs, "entropy_end", 3),
            mean_cell(runs, "grad_norm_search", 3),
            mean_cell(runs, "grad_norm_aggregation", 3),
            mean_cell(runs, "lowest_parse_rate_search", 1, 100),
            mean_cell(runs, "lowest_parse_rate_aggregation", 1, 100),
        ]
        rows.append(row)
    return table(heads, rows)


def mean_cell(runs: Sequence[Mapping[str, Any]], key: str, decimals: int, scale: float = 1) -> str:
    """The mean of what rows have under a key; a dash if none has it."""
    values = [run[key] for run in runs if run.get(key) is not None]
    return f"{scale * np.mean(values):,.{decimals}f}" if values else DASH


def runs_table(gathered: Mapping[str, Any]) -> str:
    """Every run, failed ones too."""
    rows = []
    for run in gathered["runs"]:
        row = [run["arm"], run["seed"], run["state"]]
        row += [count_cell(run.get(key)) for key in ("steps", "sampled_tokens", "seconds")]
        for measure in gathered["measures"]:
            value = run.get("measures", {}).get(measure)
            row.append(DASH if value is None else f"{100 * value:.1f}")
        rows.append([*row, escape(run["error"])])
    costs = ["steps", "sampled tokens", "seconds"]
    return table(["arm", "seed", "state", *costs, *gathered["measures"], "error"], rows)


def count_cell(value: Any) -> str:
    """A number or a name; a dash for nothing or 0."""
    if value is None or value == 0:
        return DASH
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
