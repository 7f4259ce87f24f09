"""Metrics and results -> plotly figures as JSON: no colours of the page (those follow dark and
light), no scripts.

Colours are those of Okabe and Ito (2008), one for each meaning, legible on white and on near-black;
what differs by colour differs by dash or marker too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

BLUE, ORANGE, GREEN, VERMILION, SKY, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#56B4E9",
    "#8A8A8A",
)
SEARCH, AGGREGATION = ORANGE, BLUE


def chart(
    traces: Sequence[go.Scatter], y: str, x: str = "optimizer step", **layout: Any
) -> dict[str, Any] | None:
    """A figure for `Plotly.newPlot`; None where no trace has a point."""
    traces = [trace for trace in traces if any(value is not None for value in trace.y)]
    if not traces:
        return None
    figure = go.Figure(traces)
    figure.update_layout(template="none", xaxis_title=x, yaxis_title=y, **layout)
    return json.loads(figure.to_json())


def overview_charts(
    metrics: list[dict], evaluations: list[dict], checkpoints: Mapping[int, dict]
) -> list[dict]:
    """(title, note, figure) of every chart that has data, in reading order."""
    rows = sorted(metrics, key=lambda row: row["step"])
    held = sorted(evaluations, key=lambda row: row["step"])

    def roles(prefix: str, scale: float = 1) -> list[go.Scatter]:
        ends = (
            ("aggregation", AGGREGATION, "solid"),
            ("search", SEARCH, "dash"),
        )  # the dashed one on top
        return [
            line
            for end, colour, dash in ends
            for line in _metric(rows, prefix + end, end, colour, dash, scale)
        ]

    reward = [
        *_metric(rows, "reward/aggregated", "aggregated", AGGREGATION),
        *_metric(rows, "reward/search", "search traces", SEARCH, "dash"),
    ]
    found = [
        ("Reward", "Share of right answers among all traces tried, before dynamic sampling.",
         chart([*reward, *_held_out(held)], "share right")),
        ("pass@k", "Held-out problems; bars: 95 % interval over problems.",
         chart(_pass_at_k(held, checkpoints), "share of problems solved")),
        ("Entropy", "Of the policy, mean over trained tokens.", chart(roles("entropy/"), "nats a token")),
        ("Length", "Mean of a trace.", chart(roles("length/"), "tokens", yaxis_rangemode="tozero")),
        ("Truncation", "Traces that were cut off at their limit.",
         chart(roles("length/cut_off_", 100), "% of traces", yaxis_rangemode="tozero")),
        ("Answers that could be parsed", "", chart(roles("verifier/parse_rate_", 100), "% of traces")),
        ("Sampler-trainer mismatch", "KL of what was sampled from to what was trained on.",
         chart(_metric(rows, "mismatch/kl", "mismatch/kl", GREY), "nats a token")),
        ("Throughput", "Sampled tokens by the clock: whole steps, and decoding alone.",
         chart([*_metric(rows, "tokens_per_s", "whole step", BLUE),
                *_metric(rows, "tokens_per_s/decode", "decoding", SKY, "dash")], "tokens a second",
               yaxis_rangemode="tozero")),
        ("Gradient norm", "Before clipping.",
         chart([*roles("grad_norm/"), *_metric(rows, "grad_norm", "both", GREY, "dot")], "L2 norm")),
        ("Traces with an advantage", "Of all that were tried.",
         chart([*_scaled(rows, "advantage/search_nonzero", "search", SEARCH, "dash"),
                *_scaled(rows, "advantage/aggregation_nonzero", "aggregation", AGGREGATION)], "% of traces")),
        ("Dynamic sampling", "Problems tried for a batch, and kept.",
         chart([*_metric(rows, "sampling/tried", "tried", GREY, "dash"),
                *_metric(rows, "sampling/kept", "kept", GREEN)], "problems", yaxis_rangemode="tozero")),
        ("Verifier trouble", "Answers that took too long (reward 0) or that we failed to verify (left out).",
         chart([*_trouble(rows, "timeout", ORANGE, "dash"), *_trouble(rows, "error", VERMILION, "solid")], "answers",
               yaxis_rangemode="tozero")),
    ]  # fmt: skip
    return [
        {"title": title, "note": note, "figure": figure} for title, note, figure in found if figure
    ]


def _metric(
    rows: list[dict], key: str, name: str, colour: str, dash: str = "solid", scale: float = 1
) -> list[go.Scatter]:
    """A line of every step; with 40 steps or more a thin one, and a bold running mean."""
    values = [None if row.get(key) is None else scale * row[key] for row in rows]
    if all(value is None for value in values):
        return []
    steps, window = [row["step"] for row in rows], len(rows) // 20
    if window < 2:
        mode = "lines+markers" if len(rows) < 30 else "lines"
        line = {"color": colour, "dash": dash, "width": 2}
        return [go.Scatter(x=steps, y=values, name=name, mode=mode, line=line, marker={"size": 5})]
    thin = go.Scatter(x=steps, y=values, name=f"{name}, every step", mode="lines", showlegend=False, opacity=0.35,
                      line={"color": colour, "width": 1}, legendgroup=name)  # fmt: skip
    bold = go.Scatter(x=steps, y=running_mean(values, window), name=f"{name} (mean of {window} steps)", mode="lines",
                      line={"color": colour, "dash": dash, "width": 2.2}, legendgroup=name)  # fmt: skip
    return [thin, bold]


def _scaled(
    rows: list[dict], key: str, name: str, colour: str, dash: str = "solid"
) -> list[go.Scatter]:
    return _metric(rows, key, name, colour, dash, 100)


def _trouble(rows: list[dict], status: str, colour: str, dash: str) -> list[go.Scatter]:
    keys = [f"verifier/{status}_{role}" for role in ("search", "aggregation")]
    sums = [{"step": row["step"], status: sum(row.get(key) or 0 for key in keys)} for row in rows
            if any(row.get(key) is not None for key in keys)]  # fmt: skip
    return _metric(sums, status, status, colour, dash)


def running_mean(values: Sequence[float | None], window: int) -> list[float | None]:
    """The mean of each value and those up to `window - 1` before it, None left out; None where
    there is none.
    """
    means: list[float | None] = []
    for i in range(len(values)):
        known = [value for value in values[max(0, i + 1 - window) : i + 1] if value is not None]
        means.append(math.fsum(known) / len(known) if known else None)
    return means


def _estimates(
    x: Sequence[float],
    rows: Sequence[Mapping[str, Any] | None],
    name: str,
    colour: str,
    symbol: str,
) -> go.Scatter:
    """Points with their 95 % intervals where those exist."""
    mean = [row and row["mean"] for row in rows]

    def ends(end: str, sign: int) -> list[float]:
        known = [(row or {}).get(end) for row in rows]
        return [
            0.0 if e is None or m is None else sign * (e - m)
            for e, m in zip(known, mean, strict=True)
        ]

    bars = {
        "type": "data",
        "symmetric": False,
        "array": ends("high", 1),
        "arrayminus": ends("low", -1),
        "width": 3,
    }
    marker, line = {"symbol": symbol, "size": 8}, {"color": colour, "dash": "dot", "width": 1}
    return go.Scatter(
        x=list(x), y=mean, name=name, mode="lines+markers", error_y=bars, marker=marker, line=line
    )


def _held_out(rows: list[dict]) -> list[go.Scatter]:
    points = (("single", "held-out, single trace", ORANGE, "square"),
              ("majority", "held-out, majority vote", GREEN, "triangle-up"),
              ("aggregated", "held-out, aggregated", BLUE, "circle"))  # fmt: skip
    return [
        _estimates([row["step"] for row in rows], [row.get(key) for row in rows], *look)
        for key, *look in points
    ]


def _pass_at_k(rows: list[dict], checkpoints: Mapping[int, dict]) -> list[go.Scatter]:
    """By step: pass@1, 2, 4, ... where the evaluations have them, else what their short rows have."""
    looks = [
        (GREY, "x"),
        (SKY, "diamond"),
        (GREEN, "triangle-up"),
        (BLUE, "circle"),
        (VERMILION, "square"),
    ]
    if not checkpoints:
        steps, keys = [row["step"] for row in rows], (("single", "pass@1"), ("pass_at_n", "pass@N"))
        return [
            _estimates(steps, [row.get(key) for row in rows], name, *look)
            for (key, name), look in zip(keys, looks, strict=False)
        ]
    curves = {step: found["measures"]["pass_at_k"] for step, found in checkpoints.items()}
    most = min(len(curve) for curve in curves.values())
    wanted = sorted({1 << i for i in range(most.bit_length())} | {most})[-len(looks) :]
    return [_estimates(list(curves), [curve[k - 1] for curve in curves.values()], f"pass@{k}", *look)
            for k, look in zip(wanted, looks, strict=False)]  # fmt: skip
