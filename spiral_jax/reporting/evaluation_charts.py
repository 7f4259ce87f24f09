"""One evaluation, and the one that it is compared with -> plotly figures, tables of measures."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from spiral_jax.evaluation.answers import CORRECT, ERROR
from spiral_jax.evaluation.measures import populations
from spiral_jax.evaluation.tables import DASH, percent, powers_of_two
from spiral_jax.reporting.charts import Chart, estimate_points, make_chart
from spiral_jax.reporting.style import (
    BLUE,
    GREEN,
    ORANGE,
    PAGE_GREY,
    PURPLE,
    SKY,
    VERMILION,
    YELLOW,
)

_BANDS = {
    "right": GREEN,
    "most frequent wrong answer": VERMILION,
    "second wrong answer": ORANGE,
    "other wrong answers": YELLOW,
    "no answer": PAGE_GREY,
    "not verified": PURPLE,
}


@dataclasses.dataclass(frozen=True)
class _Look:
    """How the curves of one evaluation look; `any_right` is the colour of its pass@N."""

    color: str
    dash: str
    symbol: str
    any_right: str

    def line(self, **changes: Any) -> dict[str, Any]:
        return {"color": self.color, "dash": self.dash, "width": 2} | changes


_LOOKS = (
    _Look(BLUE, "solid", "circle", SKY),  # the evaluation
    _Look(ORANGE, "dash", "square", VERMILION),  # what it is compared with
)


def evaluation_charts(results: Mapping[str, dict]) -> list[Chart]:
    """The charts of an evaluation.

    Args:
      results: name -> content of results.json: the evaluation, then what it is compared with.
    """
    if not results:
        return []
    first = next(iter(results.values()))
    settings = first["settings"]
    rsa, pass_at_k, by_tokens = [], [], []
    for look, (name, evaluation) in zip(_LOOKS, results.items(), strict=False):
        rsa += _rsa(name, evaluation, look)
        pass_at_k += _pass_at_k(name, evaluation, look)
        by_tokens += _by_tokens(name, evaluation, look)
    charts = []
    if settings["rounds"]:
        charts += make_chart(
            "Recursive self-aggregation: what the population answers",
            f"Mean over problems of a population of {settings['population']}; round 0 are "
            "independent search traces. Wrong answers are ranked within each problem and round.",
            _answer_bands(first["records"]),
            "% of the population",
            "round of aggregation",
            yaxis_range=[0, 100],
            xaxis_dtick=1,
        )
        charts += make_chart(
            "Recursive self-aggregation: right answers",
            "Bars: 95 % bootstrap interval over problems.",
            rsa,
            "% right",
            "round of aggregation",
            xaxis_dtick=1,
        )
    charts += make_chart(
        "pass@k",
        "Is any of k independent traces right? Band: 95 % bootstrap interval over problems.",
        pass_at_k,
        "% of problems",
        "k, traces sampled for a problem",
        xaxis_type="log",
        xaxis_dtick=0.30103,  # log10 of 2
    )
    charts += make_chart(
        "Accuracy by tokens",
        "Sampled for a problem, mean of all stages so far; prompts are not counted.",
        by_tokens,
        "% right",
        "tokens sampled for a problem",
        xaxis_type="log",
    )
    return charts


def _answer_bands(records: Sequence[dict]) -> list[go.Scatter]:
    """By round, stacked: shares of the population by answer, in percent, mean over problems."""
    by_round = list(zip(*(populations(record) for record in records), strict=True))
    shares = [[_shares(stage["answer"]) for stage in of_round] for of_round in by_round]
    bands = []
    for name, color in _BANDS.items():
        values = [
            100 * sum(share[name] for share in of_round) / len(of_round) for of_round in shares
        ]
        if not any(values):
            continue
        band = go.Scatter(
            x=list(range(len(values))),
            y=values,
            name=name,
            stackgroup="answers",
            mode="lines+markers",
            line={"color": color, "width": 1},
            fillcolor=color,
        )
        bands.append(band)
    return bands


def _shares(answers: Sequence[int | None]) -> dict[str, float]:
    """Shares of a population by the names of `_BANDS`."""
    wrong = [answer for answer in answers if answer not in (CORRECT, ERROR, None)]
    ranked = [count for _, count in collections.Counter(wrong).most_common()] + [0, 0]
    counts = {
        "right": answers.count(CORRECT),
        "most frequent wrong answer": ranked[0],
        "second wrong answer": ranked[1],
        "other wrong answers": sum(ranked[2:]),
        "no answer": answers.count(None),
        "not verified": answers.count(ERROR),
    }
    return {name: count / len(answers) for name, count in counts.items()}


def _points(
    x: Sequence[float], rows: Sequence[Mapping[str, Any]], name: str, look: _Look, **changes: Any
) -> go.Scatter:
    """Estimates in percent with bars of their intervals."""
    style = {"mode": "lines+markers", "line": look.line(), "marker": {"symbol": look.symbol}}
    return estimate_points(x, rows, name, 100, **(style | changes))


def _diamond(x: float, row: Mapping[str, Any], name: str, look: _Look) -> go.Scatter:
    """The point of one aggregation."""
    marker = {"symbol": "diamond", "size": 11}
    return _points([x], [row], name, look, mode="markers", marker=marker)


def _line(
    x: Sequence[float], rows: Sequence[Mapping[str, Any]], name: str, **look: Any
) -> go.Scatter:
    """Means in percent, without their intervals; gaps where there is none."""
    means = [None if row["mean"] is None else 100 * row["mean"] for row in rows]
    return go.Scatter(x=list(x), y=means, mode="lines", name=name, **look)


def _rsa(name: str, evaluation: dict, look: _Look) -> list[go.Scatter]:
    rows = evaluation["measures"]["rsa"]
    rounds = [row["round"] for row in rows]
    any_right = {"color": look.any_right, "dash": "dot"}
    return [
        _points(rounds, [row["single"] for row in rows], f"{name}: mean", look),
        _points(
            rounds,
            [row["pass_at_n"] for row in rows],
            f"{name}: any right",
            look,
            line=any_right,
        ),
    ]


def _pass_at_k(name: str, evaluation: dict, look: _Look) -> list[go.Scatter]:
    measures, size = evaluation["measures"], evaluation["settings"]["subset_size"]
    rows, votes = measures["pass_at_k"], measures["majority_at_k"]
    k = [row["k"] for row in rows]
    return [
        *_band(name, rows, look),
        _line(k, rows, f"{name}: pass@k", line=look.line(width=2.5)),
        _line(
            [row["k"] for row in votes],
            votes,
            f"{name}: vote of k",
            line=look.line(dash="dot", width=1.5),
            opacity=0.8,
        ),
        _diamond(size, measures["aggregated"], f"{name}: aggregated, {size} traces", look),
    ]


def _band(name: str, rows: Sequence[Mapping[str, Any]], look: _Look) -> list[go.Scatter]:
    """The intervals of pass@k as one outline; nothing where one is not defined."""
    k, low, high = ([row[key] for row in rows] for key in ("k", "low", "high"))
    if None in low or None in high:
        return []
    outline = go.Scatter(
        x=[*k, *k[::-1]],
        y=[100 * value for value in [*high, *low[::-1]]],
        fill="toself",
        mode="lines",
        line={"width": 0, "color": look.color},
        opacity=0.25,
        hoverinfo="skip",
        showlegend=False,
        name=f"{name}: interval",
    )
    return [outline]


def _by_tokens(name: str, evaluation: dict, look: _Look) -> list[go.Scatter]:
    measures = evaluation["measures"]
    votes, rsa, once = measures["majority_at_k"], measures["rsa"], measures["aggregated"]
    curves = [
        _line(
            [row["tokens"] for row in votes],
            votes,
            f"{name}: majority vote",
            line=look.line(dash="dot", width=1.5),
        )
    ]
    if len(rsa) > 1:
        tokens, single = [row["tokens"] for row in rsa], [row["single"] for row in rsa]
        curves.append(_points(tokens, single, f"{name}: RSA", look))
    curves.append(_diamond(once["tokens"], once, f"{name}: aggregated once", look))
    return curves


def measure_table(results: Mapping[str, dict]) -> list[tuple[str, list[str]]]:
    """(measure, percent with 95 % interval in each of `results`); a dash where one has none."""
    columns = [_measures(evaluation) for evaluation in results.values()]
    names = dict.fromkeys(name for column in columns for name in column)
    return [(name, [column.get(name, DASH) for column in columns]) for name in names]


def _measures(evaluation: dict) -> dict[str, str]:
    """The text of every measure by its label, in reading order."""
    measures, settings = evaluation["measures"], evaluation["settings"]
    sizes = powers_of_two(settings["n"])
    once = f"aggregated pass@1, sets of {settings['subset_size']}"
    estimates = {f"pass@{k}": measures["pass_at_k"][k - 1] for k in sizes}
    estimates |= {f"maj@{k}": measures["majority_at_k"][k - 1] for k in sizes if k > 2}
    estimates |= {
        once: measures["aggregated"],
        "vote of the same sets": measures["aggregated_majority"],
        "rescue: right when the vote is not": measures["rescue_vote_wrong"],
        "spoil: wrong when the vote is right": measures["spoil_vote_right"],
    }
    estimates |= {f"RSA round {row['round']}": row["single"] for row in measures["rsa"][1:]}
    return {name: percent(estimate) for name, estimate in estimates.items()}


def training_table(evaluations: Sequence[dict]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Heads and rows of a table of the first and the last row of evaluations.jsonl, in percent."""
    ends = list(evaluations) if len(evaluations) < 2 else [evaluations[0], evaluations[-1]]
    labels = {
        "aggregated": "aggregated",
        "majority": "vote of the same sets",
        "single": "single trace",
        "pass_at_n": "some trace is right (pass@N)",
    }
    rows = []
    for name, label in labels.items():
        cells = [percent(row[name]) if name in row else DASH for row in ends]
        if set(cells) - {DASH}:
            rows.append((label, cells))
    return [f"step {row['step']}" for row in ends], rows
