"""A run's metrics and evaluations -> plotly figures as JSON, without scripts.

They have no colours of the page, which follow dark and light; those of the curves fit both.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from spiral_jax.evaluation.tables import powers_of_two
from spiral_jax.reporting.series import running_mean, series, smoothing_window
from spiral_jax.reporting.style import (
    AGGREGATION,
    BLUE,
    GREEN,
    ORANGE,
    PAGE_GREY,
    SEARCH,
    SKY,
    VERMILION,
    VOTE,
)


@dataclasses.dataclass(frozen=True)
class Chart:
    """A figure for `Plotly.newPlot`, with its title and a note of what it shows."""

    title: str
    note: str
    figure: dict[str, Any]


def make_chart(
    title: str,
    note: str,
    curves: Sequence[go.Scatter],
    y: str,
    x: str = "optimizer step",
    **layout: Any,
) -> list[Chart]:
    """The chart of those curves that have a point; nothing where none has."""
    curves = [curve for curve in curves if any(value is not None for value in curve.y)]
    if not curves:
        return []
    figure = go.Figure(curves)
    figure.update_layout(template="none", xaxis_title=x, yaxis_title=y, **layout)
    return [Chart(title, note, json.loads(figure.to_json()))]


def overview_charts(
    metrics: Sequence[dict], evaluations: Sequence[dict], checkpoints: Mapping[int, dict]
) -> list[Chart]:
    """Every chart of a training run that has data, in reading order.

    Args:
      metrics, evaluations: rows of these logs.
      checkpoints: results.json by step, of the evaluations that have one.
    """
    metrics = sorted(metrics, key=lambda row: row["step"])
    evaluations = sorted(evaluations, key=lambda row: row["step"])
    return [
        *_learning_charts(metrics, evaluations, checkpoints),
        *_trace_charts(metrics),
        *_machine_charts(metrics),
    ]


def _learning_charts(
    metrics: Sequence[dict], evaluations: Sequence[dict], checkpoints: Mapping[int, dict]
) -> list[Chart]:
    return [
        *make_chart(
            "Reward",
            "Share of right answers among all traces tried, before dynamic sampling.",
            [
                *_line(metrics, "reward/aggregated", "aggregated", AGGREGATION),
                *_line(metrics, "reward/search", "search traces", SEARCH, "dash"),
                *_held_out(evaluations),
            ],
            "share right",
        ),
        *make_chart(
            "pass@k",
            "Held-out problems; bars: 95 % interval over problems.",
            _pass_at_k(evaluations, checkpoints),
            "share of problems solved",
        ),
        *make_chart(
            "Own correctness as a control variate",
            "c: the slope of sets' scores on their best own reward, fitted on earlier steps.",
            _line(metrics, "advantage/control_c", "last round", SEARCH),
            "c",
        ),
        *make_chart(
            "Entropy",
            "Of the policy, mean over trained tokens.",
            _by_role(metrics, "entropy/"),
            "nats a token",
        ),
    ]


def _trace_charts(metrics: Sequence[dict]) -> list[Chart]:
    return [
        *make_chart(
            "Length",
            "Mean of a trace.",
            _by_role(metrics, "length/"),
            "tokens",
            yaxis_rangemode="tozero",
        ),
        *make_chart(
            "Truncation",
            "Traces that were cut off at their limit.",
            _by_role(metrics, "length/cut_off_", 100),
            "% of traces",
            yaxis_rangemode="tozero",
        ),
        *make_chart(
            "Answers that could be parsed",
            "",
            _by_role(metrics, "verifier/parse_rate_", 100),
            "% of traces",
        ),
    ]


def _machine_charts(metrics: Sequence[dict]) -> list[Chart]:
    both = _line(metrics, "grad_norm", "both", PAGE_GREY, "dot")
    search, aggregation = "advantage/search_nonzero", "advantage/aggregation_nonzero"
    return [
        *make_chart(
            "Sampler-trainer mismatch",
            "KL of what was sampled from to what was trained on.",
            _line(metrics, "mismatch/kl", "mismatch/kl", PAGE_GREY),
            "nats a token",
        ),
        *make_chart(
            "Throughput",
            "Sampled tokens by the clock: whole steps, and decoding alone.",
            [
                *_line(metrics, "tokens_per_s", "whole step", BLUE),
                *_line(metrics, "tokens_per_s/decode", "decoding", SKY, "dash"),
            ],
            "tokens a second",
            yaxis_rangemode="tozero",
        ),
        *make_chart(
            "Gradient norm",
            "Before clipping.",
            [*_by_role(metrics, "grad_norm/"), *both],
            "L2 norm",
        ),
        *make_chart(
            "Traces with an advantage",
            "Of all that were tried.",
            [
                *_line(metrics, search, "search", SEARCH, "dash", scale=100),
                *_line(metrics, aggregation, "aggregation", AGGREGATION, scale=100),
            ],
            "% of traces",
        ),
        *make_chart(
            "Dynamic sampling",
            "Problems tried for a batch, and kept.",
            [
                *_line(metrics, "sampling/tried", "tried", PAGE_GREY, "dash"),
                *_line(metrics, "sampling/kept", "kept", GREEN),
            ],
            "problems",
            yaxis_rangemode="tozero",
        ),
        *make_chart(
            "Verifier trouble",
            "Answers that took too long (reward 0) or that we failed to verify (left out).",
            [
                *_trouble(metrics, "timeout", ORANGE, "dash"),
                *_trouble(metrics, "error", VERMILION, "solid"),
            ],
            "answers",
            yaxis_rangemode="tozero",
        ),
    ]


def _line(
    rows: Sequence[dict], key: str, name: str, color: str, dash: str = "solid", scale: float = 1
) -> list[go.Scatter]:
    """A line of every step; with 40 steps or more a thin one, and a bold one of the means."""
    values = series(rows, key, scale)
    steps, window = [row["step"] for row in rows], smoothing_window(len(rows))
    look = {"color": color, "dash": dash, "width": 2}
    if window < 2:
        mode = "lines+markers" if len(rows) < 30 else "lines"
        y = _with_gaps(values)
        return [go.Scatter(x=steps, y=y, name=name, mode=mode, line=look, marker={"size": 5})]
    thin = go.Scatter(
        x=steps,
        y=_with_gaps(values),
        name=f"{name}, every step",
        mode="lines",
        showlegend=False,
        opacity=0.35,
        line={"color": color, "width": 1},
        legendgroup=name,
    )
    bold = go.Scatter(
        x=steps,
        y=_with_gaps(running_mean(values, before=window - 1)),
        name=f"{name} (mean of {window} steps)",
        mode="lines",
        line=look | {"width": 2.2},
        legendgroup=name,
    )
    return [thin, bold]


def _with_gaps(values: Sequence[float]) -> list[float | None]:
    """None for NaN, which JSON does not have."""
    return [None if math.isnan(value) else float(value) for value in values]


def _by_role(rows: Sequence[dict], prefix: str, scale: float = 1) -> list[go.Scatter]:
    """The lines of both roles; the dashed one is on top."""
    return [
        *_line(rows, f"{prefix}aggregation", "aggregation", AGGREGATION, "solid", scale),
        *_line(rows, f"{prefix}search", "search", SEARCH, "dash", scale),
    ]


def _trouble(rows: Sequence[dict], status: str, color: str, dash: str) -> list[go.Scatter]:
    """How many answers of both roles ended with that status."""
    keys = [f"verifier/{status}_{role}" for role in ("search", "aggregation")]
    counted = [row for row in rows if any(row.get(key) is not None for key in keys)]
    sums = [
        {"step": row["step"], status: sum(row.get(key) or 0 for key in keys)} for row in counted
    ]
    return _line(sums, status, status, color, dash)


def estimate_points(
    x: Sequence[float],
    rows: Sequence[Mapping[str, Any] | None],
    name: str,
    scale: float = 1,
    **look: Any,
) -> go.Scatter:
    """Points of estimates with bars of their intervals; gaps where there is none.

    Args:
      rows: an estimate for each of `x`, with `mean`, `low` and `high`.
      scale: what the estimates are multiplied by.
      look: `mode`, `marker` and `line` of the points.
    """
    means: list[float | None] = []
    above: list[float] = []
    below: list[float] = []
    for row in rows:
        mean = row["mean"] if row else None
        known = mean is not None
        means.append(scale * mean if known else None)
        above.append(scale * (row["high"] - mean) if known and row["high"] is not None else 0.0)
        below.append(scale * (mean - row["low"]) if known and row["low"] is not None else 0.0)
    bars = {
        "type": "data",
        "symmetric": False,
        "array": above,
        "arrayminus": below,
        "width": 3,
    }
    return go.Scatter(x=list(x), y=means, name=name, error_y=bars, **look)


def _held_out(rows: Sequence[dict]) -> list[go.Scatter]:
    return [
        _points_by_step(rows, "single", "held-out, single trace", SEARCH, "square"),
        _points_by_step(rows, "majority", "held-out, majority vote", VOTE, "triangle-up"),
        _points_by_step(rows, "aggregated", "held-out, aggregated", AGGREGATION, "circle"),
    ]


def _points_by_step(
    rows: Sequence[dict], key: str, name: str, color: str, symbol: str
) -> go.Scatter:
    steps, estimates = [row["step"] for row in rows], [row.get(key) for row in rows]
    return estimate_points(steps, estimates, name, **_dotted(color, symbol))


def _dotted(color: str, symbol: str) -> dict[str, Any]:
    line = {"color": color, "dash": "dot", "width": 1}
    return {"mode": "lines+markers", "marker": {"symbol": symbol, "size": 8}, "line": line}


_PASS_AT_K = (
    _dotted(PAGE_GREY, "x"),
    _dotted(SKY, "diamond"),
    _dotted(GREEN, "triangle-up"),
    _dotted(BLUE, "circle"),
    _dotted(VERMILION, "square"),
)


def _pass_at_k(rows: Sequence[dict], checkpoints: Mapping[int, dict]) -> list[go.Scatter]:
    """By step: pass@1, 2, 4, ... where evaluations have them, else what their short rows have."""
    if not checkpoints:
        return [
            _points_by_step(rows, "single", "pass@1", PAGE_GREY, "x"),
            _points_by_step(rows, "pass_at_n", "pass@N", SKY, "diamond"),
        ]
    curves = {step: evaluation["measures"]["pass_at_k"] for step, evaluation in checkpoints.items()}
    most = min(len(curve) for curve in curves.values())
    points = []
    for k, look in zip(powers_of_two(most)[-len(_PASS_AT_K) :], _PASS_AT_K, strict=False):
        estimates = [curve[k - 1] for curve in curves.values()]
        points.append(estimate_points(list(curves), estimates, f"pass@{k}", **look))
    return points
