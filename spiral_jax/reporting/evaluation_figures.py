"""Results of one or two evaluations -> the paper's four figures (arXiv 2606.23595, Fig. 3, 4, 6) as
PNGs.

One evaluation: a colour for each way to spend compute. Two: a colour for each evaluation, a line
style for each way.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from spiral_jax.reporting.training_figures import BLUE, GREEN, ORANGE

VERMILION = "#D55E00"  # of the same colour-blind-safe palette (Okabe and Ito, 2008) as curves.py's
# way to spend compute: its colour when alone, line style, marker
_STYLES = {
    "pass@k": (GREEN, "-", "None"),
    "majority vote": (GREEN, "--", "None"),
    "RSA": (BLUE, "-", "o"),
    "aggregated once": (VERMILION, "None", "D"),
    "single trace by limit": (ORANGE, ":", "s"),
    "maj@N": (GREEN, "--", "^"),
    "pass@N": (ORANGE, ":", "s"),
}
_SIDES = (ORANGE, BLUE)  # A, B
_INTERVALS = "bands and bars: 95 % bootstrap interval over problems"
_SIZE = (7.6, 5.0)


def draw(
    results: Mapping[str, dict],
    directory: pathlib.Path,
    efficiency: Mapping[str, Any] | None = None,
) -> list[pathlib.Path]:
    """Writes pass_at_k.png, rsa.png, tokens.png and voting.png into `directory`; returns their
    paths.

    Args:
      results: name for the legend -> content of results.json; one, or A and B.
      efficiency: the last row of `comparison.scaling_efficiency`, drawn between the two pass@k
      curves.
    """
    paths = []
    for name, picture in (("rsa", _rsa), ("tokens", _tokens), ("voting", _voting)):
        paths.append(_save(picture(results), directory / f"{name}.png"))
    return [_save(_pass_at_k(results, efficiency), directory / "pass_at_k.png"), *paths]


def _pass_at_k(results: Mapping[str, dict], efficiency: Mapping[str, Any] | None) -> Figure:
    figure, axes = _figure(
        "Coverage: is any of k independent traces right?", "pass@k (% of problems)"
    )
    for name, found in results.items():
        rows = found["measures"]["pass_at_k"]
        _curve(axes, results, name, "pass@k", [row["k"] for row in rows], rows)
    if efficiency:
        _mark_efficiency(axes, list(results), efficiency)
    _log2_axis(axes, "k, traces sampled for a problem", _powers(results, "n"))
    return _finish(figure, axes, results)


def _mark_efficiency(axes: Axes, names: Sequence[str], row: Mapping[str, Any]) -> None:
    """An arrow between the two curves at the highest coverage that both reach, and what its length
    means.
    """
    level, ends = 100 * row["coverage"], (row["samples_b"], row["samples_a"])
    axes.annotate("", xy=(ends[0], level), xytext=(ends[1], level),
                  arrowprops={"arrowstyle": "<->", "color": "black", "linewidth": 1.2})  # fmt: skip
    bound = f"{row['bound']} " if row["bound"] else ""
    ratio = f"{bound}{row['ratio']:.2f}x [{row['low']:.2f}, {row['high']:.2f}]"
    axes.set_title(f"For {level:.1f} % coverage {names[0]} needs {ratio} the samples of {names[1]}",
                   fontsize="medium", loc="left", fontweight="bold")  # fmt: skip


def _rsa(results: Mapping[str, dict]) -> Figure:
    figure = Figure(figsize=(11.5, 5.0), dpi=150, layout="constrained")
    axes, entropy = figure.subplots(1, 2, width_ratios=(1.5, 1))
    _label(axes, "Recursive self-aggregation, by round", "right answers (%)")
    _label(entropy, "Do its answers still differ?", "entropy of the answers (nats)")
    for name, found in results.items():
        rows = found["measures"]["rsa"]
        rounds = [row["round"] for row in rows]
        _curve(axes, results, name, "RSA", rounds, [row["single"] for row in rows], "mean")
        for way, key in (("pass@N", "pass_at_n"), ("maj@N", "majority")):
            _curve(axes, results, name, way, rounds, [row[key] for row in rows], band=False)
        values = [row["entropy"] for row in rows]
        _curve(entropy, results, name, "RSA", rounds, values, "mean over problems", scale=1)
    for panel in (axes, entropy):
        panel.set_xlabel("round of aggregation (0: independent search traces)")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    entropy.set_ylim(bottom=0)
    settings = [found["settings"] for found in results.values()]
    shapes = dict.fromkeys(f"population N={s['population']}, set {s['set_size']}" for s in settings)
    return _finish(figure, axes, results, "; ".join(shapes))


def _tokens(results: Mapping[str, dict]) -> Figure:
    figure, axes = _figure("Accuracy by compute", "right answers (%)")
    for name, found in results.items():
        measures = found["measures"]
        rsa, votes = measures["rsa"], measures["majority_at_k"]
        _curve(
            axes,
            results,
            name,
            "RSA",
            [row["tokens"] for row in rsa],
            [row["single"] for row in rsa],
        )
        _curve(axes, results, name, "majority vote", [row["tokens"] for row in votes], votes)
        size, aggregated = found["settings"]["subset_size"], measures["aggregated"]
        _curve(
            axes,
            results,
            name,
            "aggregated once",
            [aggregated["tokens"]],
            [aggregated],
            _once(size),
        )
        limits = measures["limits"]
        if limits:
            values = [row["single"] for row in limits]
            _curve(
                axes,
                results,
                name,
                "single trace by limit",
                [row["tokens"] for row in limits],
                values,
            )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("tokens sampled for a problem (mean; all stages so far, prompts not counted)")
    return _finish(figure, axes, results)


def _voting(results: Mapping[str, dict]) -> Figure:
    figure, axes = _figure("Voting against aggregation", "right answers (%)")
    most = 1
    for name, found in results.items():
        measures, settings = found["measures"], found["settings"]
        votes, rsa = measures["majority_at_k"], measures["rsa"]
        traces = [settings["population"] * (row["round"] + 1) for row in rsa]
        most = max(most, traces[-1], settings["n"])
        _curve(axes, results, name, "majority vote", [row["k"] for row in votes], votes)
        _curve(axes, results, name, "RSA", traces, [row["single"] for row in rsa])
        size = settings["subset_size"]
        _curve(
            axes,
            results,
            name,
            "aggregated once",
            [size + 1],
            [measures["aggregated"]],
            _once(size),
        )
    _log2_axis(axes, "traces sampled for a problem (RSA: all rounds so far)", most)
    return _finish(figure, axes, results)


def _once(size: int) -> str:
    return f"aggregated once, of {size} traces"


def _figure(title: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, dpi=150, layout="constrained")
    axes = figure.subplots()
    _label(axes, title, y)
    return figure, axes


def _label(axes: Axes, title: str, y: str) -> None:
    axes.set_title(title, fontsize="medium", loc="left", fontweight="bold")
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _curve(
    axes: Axes, results: Mapping[str, dict], name: str, way: str, x: Sequence[float], rows: Sequence[dict],
    label: str | None = None, band: bool = True, scale: float = 100,
) -> None:  # fmt: skip
    """One curve with its interval; values that are not defined are left out."""
    own, line, marker = _STYLES[way]
    color = own if len(results) == 1 else _SIDES[list(results).index(name)]
    label = label or way
    known = [(at, row) for at, row in zip(x, rows, strict=True) if row["mean"] is not None]
    if not known:
        return
    at = [place for place, _ in known]
    mean = scale * np.array([row["mean"] for _, row in known])
    axes.plot(at, mean, color=color, linestyle=line, marker=marker, markersize=5, markeredgecolor="white",
              linewidth=1.8, label=label if len(results) == 1 else f"{name}: {label}", zorder=3)  # fmt: skip
    spread = [(place, row) for place, row in known if row["low"] is not None]
    if not band or not spread:
        return
    at = [place for place, _ in spread]
    low, high = (scale * np.array([row[end] for _, row in spread]) for end in ("low", "high"))
    if len(at) == 1:
        axes.vlines(at, low, high, color=color, linewidth=1.5, zorder=2)
    else:
        axes.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)


def _log2_axis(axes: Axes, label: str, most: int) -> None:
    ticks = [1 << i for i in range(most.bit_length())]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)


def _powers(results: Mapping[str, dict], setting: str) -> int:
    return max(found["settings"][setting] for found in results.values())


def _finish(figure: Figure, axes: Axes, results: Mapping[str, dict], note: str = "") -> Figure:
    """Legend, and one line below that says what the picture is of."""
    axes.legend(loc="best", fontsize="small", framealpha=0.9)
    axes.set_ylim(bottom=max(0, axes.get_ylim()[0]))
    first = next(iter(results.values()))
    counts = dict.fromkeys(found["problems"]["count"] for found in results.values())
    what = f"{', '.join(str(count) for count in counts)} problems of {first['problems']['task']}"
    parts = [what, note, f"T={first['settings']['temperature']:g}", _INTERVALS]
    figure.supxlabel("; ".join(part for part in parts if part), fontsize=8, color="#555555")
    return figure


def _save(figure: Figure, path: pathlib.Path) -> pathlib.Path:
    with path.open("wb") as file:
        figure.savefig(file, format="png")
    return path
