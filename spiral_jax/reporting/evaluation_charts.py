"""One evaluation, and the one that it is compared with -> plotly figures and a table of its
measures.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from spiral_jax.evaluation.answers import CORRECT, ERROR
from spiral_jax.evaluation.measures import populations
from spiral_jax.evaluation.tables import percent, powers_of_two
from spiral_jax.reporting.charts import BLUE, GREEN, GREY, ORANGE, SKY, VERMILION, chart

_BANDS = {
    "right": GREEN,
    "most frequent wrong answer": VERMILION,
    "second wrong answer": ORANGE,
    "other wrong answers": "#F0E442",
    "no answer": GREY,
    "not verified": "#CC79A7",
}
_SIDES = (
    (BLUE, "solid", "circle"),
    (ORANGE, "dash", "square"),
)  # the evaluation, what it is compared with


def evaluation_charts(results: Mapping[str, dict]) -> list[dict]:
    """(title, note, figure) of the charts: `results` is the evaluation, then what it is compared
    with, by name.
    """
    if not results:
        return []
    first = next(iter(results.values()))
    size, rounds = first["settings"]["population"], first["settings"]["rounds"]
    found = []
    if rounds:
        found.append((
            "Recursive self-aggregation: what the population answers",
            f"Mean over problems of a population of {size}; round 0 are independent search traces. Wrong answers are "
            "ranked within each problem and round.",
            chart(_answer_bands(first["records"]), "% of the population", "round of aggregation", yaxis_range=[0, 100],
                  xaxis_dtick=1),
        ))  # fmt: skip
        found.append((
            "Recursive self-aggregation: right answers",
            "Bars: 95 % bootstrap interval over problems.",
            chart([line for i, (name, r) in enumerate(results.items()) for line in _rsa(name, r, i)],
                  "% right", "round of aggregation", xaxis_dtick=1),
        ))  # fmt: skip
    found.append((
        "pass@k", "Is any of k independent traces right? Band: 95 % bootstrap interval over problems.",
        chart([line for i, (name, r) in enumerate(results.items()) for line in _pass_at_k(name, r, i)],
              "% of problems", "k, traces sampled for a problem", xaxis_type="log", xaxis_dtick=0.30103),
    ))  # fmt: skip
    found.append((
        "Accuracy by tokens", "Sampled for a problem, mean of all stages so far; prompts are not counted.",
        chart([line for i, (name, r) in enumerate(results.items()) for line in _by_tokens(name, r, i)],
              "% right", "tokens sampled for a problem", xaxis_type="log"),
    ))  # fmt: skip
    return [
        {"title": title, "note": note, "figure": figure} for title, note, figure in found if figure
    ]


def _answer_bands(records: Sequence[dict]) -> list[go.Scatter]:
    """By round, stacked: shares of the population by answer, in percent, mean over problems."""
    stages = [populations(record) for record in records]
    rounds = list(range(len(stages[0])))
    shares = [[_shares(stage[t]["answer"]) for stage in stages] for t in rounds]
    bands = []
    for name, colour in _BANDS.items():
        values = [
            100 * sum(share.get(name, 0) for share in of_round) / len(of_round)
            for of_round in shares
        ]
        if any(values):
            bands.append(go.Scatter(x=rounds, y=values, name=name, stackgroup="answers", mode="lines+markers",
                                    line={"color": colour, "width": 1}, fillcolor=colour))  # fmt: skip
    return bands


def _shares(answers: Sequence[int | None]) -> dict[str, float]:
    """Shares of a population by the names of `_BANDS`."""
    wrong = collections.Counter(
        answer for answer in answers if answer not in (CORRECT, ERROR, None)
    )
    ranked = [count for _, count in wrong.most_common()] + [0, 0]
    counts = {
        "right": answers.count(CORRECT), "most frequent wrong answer": ranked[0], "second wrong answer": ranked[1],
        "other wrong answers": sum(ranked[2:]), "no answer": answers.count(None), "not verified": answers.count(ERROR),
    }  # fmt: skip
    return {name: count / len(answers) for name, count in counts.items()}


def _points(
    x: Sequence[float], rows: Sequence[Mapping[str, Any]], name: str, side: int, **look: Any
) -> go.Scatter:
    """Estimates in percent with error bars."""
    colour, dash, symbol = _SIDES[side]
    rows = [row for row in rows if row["mean"] is not None]
    bars = {end: [abs(100 * ((row["mean"] if row[end] is None else row[end]) - row["mean"])) for row in rows]
            for end in ("high", "low")}  # fmt: skip
    style = {
        "mode": "lines+markers",
        "line": {"color": colour, "dash": dash, "width": 2},
        "marker": {"symbol": symbol},
    }
    return go.Scatter(
        x=list(x), y=[100 * row["mean"] for row in rows], name=name,
        error_y={"type": "data", "symmetric": False, "array": bars["high"], "arrayminus": bars["low"], "width": 3},
        **(style | look),
    )  # fmt: skip


def _rsa(name: str, found: dict, side: int) -> list[go.Scatter]:
    rows = found["measures"]["rsa"]
    rounds = [row["round"] for row in rows]
    return [
        _points(rounds, [row["single"] for row in rows], f"{name}: mean", side),
        _points(rounds, [row["pass_at_n"] for row in rows], f"{name}: any right", side,
                line={"color": SKY if side == 0 else VERMILION, "dash": "dot"}),
    ]  # fmt: skip


def _pass_at_k(name: str, found: dict, side: int) -> list[go.Scatter]:
    colour, dash, _ = _SIDES[side]
    rows = found["measures"]["pass_at_k"]
    k, low, high = ([row[key] for row in rows] for key in ("k", "low", "high"))
    lines = []
    if None not in low and None not in high:
        outline = [*high, *low[::-1]]
        lines.append(go.Scatter(x=[*k, *k[::-1]], y=[100 * value for value in outline], fill="toself", mode="lines",
                                line={"width": 0, "color": colour}, opacity=0.25, hoverinfo="skip", showlegend=False,
                                name=f"{name}: interval"))  # fmt: skip
    line = go.Scatter(x=k, y=[100 * row["mean"] for row in rows], name=f"{name}: pass@k", mode="lines",
                      line={"color": colour, "dash": dash, "width": 2.5})  # fmt: skip
    votes = found["measures"]["majority_at_k"]
    look = {"color": colour, "dash": "dot", "width": 1.5}
    majority = go.Scatter(x=[row["k"] for row in votes], y=[100 * row["mean"] for row in votes], mode="lines",
                          name=f"{name}: vote of k", line=look, opacity=0.8)  # fmt: skip
    size, once = found["settings"]["subset_size"], found["measures"]["aggregated"]
    point = _points([size], [once], f"{name}: aggregated, {size} traces", side, mode="markers",
                    marker={"symbol": "diamond", "size": 11})  # fmt: skip
    return [*lines, line, majority, point]


def _by_tokens(name: str, found: dict, side: int) -> list[go.Scatter]:
    measures = found["measures"]
    votes, rsa, once = measures["majority_at_k"], measures["rsa"], measures["aggregated"]
    look = {"color": _SIDES[side][0], "dash": "dot", "width": 1.5}
    lines = [go.Scatter(x=[row["tokens"] for row in votes], y=[100 * row["mean"] for row in votes], mode="lines",
                        name=f"{name}: majority vote", line=look)]  # fmt: skip
    if len(rsa) > 1:
        lines.append(
            _points(
                [row["tokens"] for row in rsa], [row["single"] for row in rsa], f"{name}: RSA", side
            )
        )
    lines.append(_points([once["tokens"]], [once], f"{name}: aggregated once", side, mode="markers",
                         marker={"symbol": "diamond", "size": 11}))  # fmt: skip
    return lines


def measure_table(results: Mapping[str, dict]) -> list[tuple[str, list[str]]]:
    """(measure, percent with 95 % interval in each of `results`); a dash where one does not have
    it.
    """
    columns = [dict(_measures(found)) for found in results.values()]
    names = dict.fromkeys(name for column in columns for name in column)
    return [(name, [column.get(name, "–") for column in columns]) for name in names]


def _measures(found: dict) -> list[tuple[str, str]]:
    measures, n = found["measures"], found["settings"]["n"]
    rows = [(f"pass@{k}", percent(measures["pass_at_k"][k - 1])) for k in powers_of_two(n)]
    rows += [
        (f"maj@{k}", percent(measures["majority_at_k"][k - 1])) for k in powers_of_two(n) if k > 2
    ]
    rows.append(
        (
            f"aggregated pass@1, sets of {found['settings']['subset_size']}",
            percent(measures["aggregated"]),
        )
    )
    rows.append(("vote of the same sets", percent(measures["aggregated_majority"])))
    rows.append(("rescue: right when the vote is not", percent(measures["rescue_vote_wrong"])))
    rows.append(("spoil: wrong when the vote is right", percent(measures["spoil_vote_right"])))
    rows += [(f"RSA round {row['round']}", percent(row["single"])) for row in measures["rsa"][1:]]
    return rows


def training_table(evaluations: Sequence[dict]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Heads and rows of the first and the last row of evaluations.jsonl: percent with 95 %
    interval.
    """
    ends = [evaluations[0], evaluations[-1]] if len(evaluations) > 1 else list(evaluations)
    names = {"aggregated": "aggregated", "majority": "vote of the same sets", "single": "single trace",
             "pass_at_n": "some trace is right (pass@N)"}  # fmt: skip
    rows = [
        (label, [percent(row[name]) if name in row else "–" for row in ends])
        for name, label in names.items()
    ]
    return [f"step {row['step']}" for row in ends], [row for row in rows if set(row[1]) - {"–"}]
