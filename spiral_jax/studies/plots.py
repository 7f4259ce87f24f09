"""The pictures of a study: OUT_arms.png, OUT_pass_at_k.png, OUT_rsa.png, OUT_training.png."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from spiral_jax.results import powers_of_two
from spiral_jax.studies.plan import BASE

# Okabe and Ito (2008), distinct for colour-blind readers; arms beyond them repeat the colours with another dash.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", ":")
_GREY = "#555555"
_SMOOTH = 3  # points of a training curve that are averaged
_MOST_BANDS = 4  # arms whose intervals are drawn; more would hide each other, and the tables have them


def draw(found: Mapping[str, Any], out: pathlib.Path) -> list[pathlib.Path]:
    """Writes the pictures beside `out`; returns their paths."""
    pictures = {
        "arms": _arms(found),
        "pass_at_k": _curves(found, "pass_at_k", "k", "Coverage: is any of k independent traces right?"),
        "rsa": _curves(found, "rsa", "round", "Recursive self-aggregation, by round"),
        "training": _training(found),
    }
    paths = []
    for name, figure in pictures.items():
        if figure is not None:
            paths.append(out.with_name(f"{out.name}_{name}.png"))
            figure.savefig(paths[-1], format="png")
    return paths


def _style(found: Mapping[str, Any], arm: str) -> dict[str, Any]:
    """One colour and dash for each arm in all pictures; the base is grey."""
    if arm == BASE:
        return {"color": _GREY, "linestyle": "-."}
    place = [name for name in found["arms"] if name != BASE].index(arm)
    return {"color": _COLORS[place % len(_COLORS)], "linestyle": _DASHES[place // len(_COLORS) % len(_DASHES)]}


def _arms(found: Mapping[str, Any]) -> Figure:
    """The first measure of every arm: mean and interval, a dot for each seed."""
    measure = found["measures"][0]
    arms = [arm for arm, row in found["arms"].items() if row["measures"]]
    arms.sort(key=lambda arm: found["arms"][arm]["measures"][measure]["mean"])
    figure = Figure(figsize=(7.6, 1.4 + 0.42 * len(arms)), dpi=150, layout="constrained")
    axes = figure.subplots()
    for y, arm in enumerate(arms):
        value, color = found["arms"][arm]["measures"][measure], _style(found, arm)["color"]
        axes.hlines(y, 100 * value["low"], 100 * value["high"], color=color, linewidth=2)
        axes.plot(100 * value["mean"], y, "D", color=color, markersize=6, zorder=3)
        seeds = [100 * run["measures"][measure] for run in found["runs"] if run["arm"] == arm and "measures" in run]
        axes.plot(seeds, [y + 0.22] * len(seeds), "o", color=color, markersize=3, alpha=0.6)
    if found["optimum"] and measure == "aggregated":
        best = 100 * found["optimum"]["aggregated"]["mean"]
        axes.axvline(best, color=_GREY, linestyle="--", linewidth=1)
        axes.annotate("best possible", (best, -0.55), ha="right", fontsize="small", color=_GREY,
                      xytext=(-3, 0), textcoords="offset points")  # fmt: skip
    axes.set_yticks(range(len(arms)), arms)
    axes.set_ylim(-0.8, len(arms) - 0.4)
    axes.set_xlabel(f"{measure} (% of held-out problems)")
    figure.supxlabel("dots: seeds; bars: 95 % bootstrap interval over seeds and problems", fontsize=8, color=_GREY)
    return _finish(figure, axes, "After training")


def _curves(found: Mapping[str, Any], name: str, key: str, title: str) -> Figure:
    figure = Figure(figsize=(7.6, 5.0), dpi=150, layout="constrained")
    axes = figure.subplots()
    for arm, curves in found["curves"].items():
        rows, style = curves[name], _style(found, arm)
        at = [row[key] for row in rows]
        mean, low, high = (100 * np.array([row[end] for row in rows], float) for end in ("mean", "low", "high"))
        axes.plot(at, mean, linewidth=1.8, label=arm, **style)
        if len(found["curves"]) <= _MOST_BANDS:
            axes.fill_between(at, low, high, color=style["color"], alpha=0.12, linewidth=0)
    axes.set_ylabel("right answers (%)" if key == "round" else "pass@k (% of problems)")
    if key == "k":
        ticks = powers_of_two(max(row["k"] for curves in found["curves"].values() for row in curves[name]))
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("k, traces sampled for a problem")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("round of aggregation (0: independent search traces)")
    axes.legend(fontsize="small", framealpha=0.9)
    return _finish(figure, axes, title)


def _training(found: Mapping[str, Any]) -> Figure | None:
    """Reward of what is trained for, and entropy of search traces, over sampled tokens; a line for each run."""
    runs = [run for run in found["runs"] if "training" in run]
    if not runs:
        return None
    figure = Figure(figsize=(13.0, 4.6), dpi=150, layout="constrained")
    panels = {
        "aggregated": ("Reward of aggregation traces", "right (%)", 100),
        "own": ("Own correctness of search traces", "right (%)", 100),
        "entropy": ("Entropy of search traces", "nat a token", 1),
    }
    for axes, (curve, (title, label, scale)) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        named: set[str] = set()
        for run in runs:
            if curve not in run["training"]:
                continue
            values = scale * np.array([np.nan if v is None else v for v in run["training"][curve]], float)
            arm = run["arm"]
            axes.plot(run["training"]["sampled_tokens"], _smooth(values), linewidth=1.2, alpha=0.85,
                      label=None if arm in named else arm, **_style(found, arm))  # fmt: skip
            named.add(arm)
        axes.set_xlabel("sampled tokens")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:,.0f}k"))
        axes.set_ylabel(label)
        if named:
            axes.legend(fontsize="x-small", framealpha=0.9)
        _finish(figure, axes, title)
    return figure


def _smooth(values: np.ndarray) -> np.ndarray:
    """Running mean, shorter at both ends."""
    half = _SMOOTH // 2
    return np.array([np.nanmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def _finish(figure: Figure, axes: Axes, title: str) -> Figure:
    axes.set_title(title, fontsize="medium", loc="left", fontweight="bold")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
