"""The pictures of a study: OUT_arms.png, OUT_mixed.png (where strategies are named),
OUT_pass_at_k.png, OUT_rsa.png, OUT_training.png.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from spiral_jax.evaluation.tables import powers_of_two
from spiral_jax.studies.design import BASE

# Okabe and Ito (2008), distinct for colour-blind readers; arms beyond them repeat the colours with
# another dash.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", ":")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X")  # filled, then hollow
_GREY = "#555555"
_SMOOTH = 7  # points of a training curve that are averaged
_MOST_BANDS = (
    4  # arms whose intervals are drawn; more would hide each other, and the tables have them
)


def draw(found: Mapping[str, Any], out: pathlib.Path) -> list[pathlib.Path]:
    """Writes the pictures beside `out`; returns their paths."""
    pictures = {
        "arms": _arms(found),
        "mixed": _mixed(found),
        "pass_at_k": _curves(
            found, "pass_at_k", "k", "Coverage: is any of k independent traces right?"
        ),
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
    return {
        "color": _COLORS[place % len(_COLORS)],
        "linestyle": _DASHES[place // len(_COLORS) % len(_DASHES)],
    }


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
        seeds = [
            100 * run["measures"][measure]
            for run in found["runs"]
            if run["arm"] == arm and "measures" in run
        ]
        axes.plot(seeds, [y + 0.22] * len(seeds), "o", color=color, markersize=3, alpha=0.6)
    if found["optimum"] and measure == "aggregated":
        best = 100 * found["optimum"]["aggregated"]["mean"]
        axes.axvline(best, color=_GREY, linestyle="--", linewidth=1)
        axes.annotate("best possible", (best, -0.55), ha="right", fontsize="small", color=_GREY,
                      xytext=(-3, 0), textcoords="offset points")  # fmt: skip
    axes.set_yticks(range(len(arms)), arms)
    axes.set_ylim(-0.8, len(arms) - 0.4)
    axes.set_xlabel(f"{measure} (% of held-out problems)")
    figure.supxlabel(
        "dots: seeds; bars: 95 % bootstrap interval over seeds and problems",
        fontsize=8,
        color=_GREY,
    )
    return _finish(figure, axes, "After training")


def _mixed(found: Mapping[str, Any]) -> Figure | None:
    """Of every run, how many sets are mixed and how often the aggregated answer is right; the line: the base's reading
    of mixed and other sets, so what is above or below it is due to reading, and what is along it to search."""
    if not found["optimum"] or not {"mixed", "aggregated"} <= set(found["measures"]):
        return None
    best = found["optimum"]
    figure = Figure(figsize=(7.6, 5.0), dpi=150, layout="constrained")
    axes = figure.subplots()
    ends = [100 * best[name]["mean"] for name in ("right_if_alike", "right_if_mixed")]
    axes.plot([0, 100], ends, color=_GREY, linewidth=1)
    axes.axvline(100 * best["mixed"], color=_GREY, linestyle="--", linewidth=1)
    axes.annotate("most that independent traces allow", (100 * best["mixed"], ends[0]), rotation=90, ha="right",
                  fontsize="small", color=_GREY, xytext=(-3, 0), textcoords="offset points")  # fmt: skip
    for arm in found["arms"]:
        of_arm = [
            run["measures"] for run in found["runs"] if run["arm"] == arm and "measures" in run
        ]
        if of_arm:
            x, y = ([100 * measures[m] for measures in of_arm] for m in ("mixed", "aggregated"))
            place = list(found["arms"]).index(arm)
            axes.plot(x, y, _MARKERS[place % len(_MARKERS)], color=_style(found, arm)["color"], markersize=6, alpha=0.8,
                      label=arm, fillstyle="full" if place < len(_MARKERS) else "none")  # fmt: skip
    axes.set_xlabel("sets of two strategies or more (%)")
    axes.set_ylabel("aggregated (% right)")
    axes.set_xlim(0, 100)
    axes.legend(fontsize="small", framealpha=0.9, loc="upper left")
    return _finish(
        figure,
        axes,
        "What search offers and what aggregation makes of it; the line is the base's reading",
    )


def _curves(found: Mapping[str, Any], name: str, key: str, title: str) -> Figure:
    figure = Figure(figsize=(9.0, 5.0), dpi=150, layout="constrained")
    axes = figure.subplots()
    for arm, curves in found["curves"].items():
        rows, style = curves[name], _style(found, arm)
        at = [row[key] for row in rows]
        mean, low, high = (
            100 * np.array([row[end] for row in rows], float) for end in ("mean", "low", "high")
        )
        axes.plot(at, mean, linewidth=1.8, label=arm, **style)
        if len(found["curves"]) <= _MOST_BANDS:
            axes.fill_between(at, low, high, color=style["color"], alpha=0.12, linewidth=0)
    axes.set_ylabel("right answers (%)" if key == "round" else "pass@k (% of problems)")
    if key == "k":
        ticks = powers_of_two(
            max(row["k"] for curves in found["curves"].values() for row in curves[name])
        )
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("k, traces sampled for a problem")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("round of aggregation (0: independent search traces)")
    figure.legend(loc="outside right upper", fontsize="small")
    return _finish(figure, axes, title)


def _training(found: Mapping[str, Any]) -> Figure | None:
    """Reward of what is trained for, and entropy of search traces, over sampled tokens: an arm's
    mean over its runs.
    """
    runs = {arm: [run["training"] for run in found["runs"] if run["arm"] == arm and "training" in run] for arm in
            found["arms"]}  # fmt: skip
    if not any(runs.values()):
        return None
    figure = Figure(figsize=(13.5, 4.6), dpi=150, layout="constrained")
    panels = {
        "aggregated": ("Reward of aggregation traces", "right (%)", 100),
        "own": ("Own correctness of search traces", "right (%)", 100),
        "entropy": ("Entropy of search traces", "nat a token", 1),
    }
    lines = {}
    for axes, (curve, (title, label, scale)) in zip(
        figure.subplots(1, 3), panels.items(), strict=True
    ):
        for arm, of_arm in runs.items():
            curves = [run for run in of_arm if curve in run]
            if curves:
                tokens, value = _mean_curve(curves, curve)
                (lines[arm],) = axes.plot(
                    tokens, scale * value, linewidth=1.5, label=arm, **_style(found, arm)
                )
        axes.set_xlabel("sampled tokens")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:,.0f}k"))
        axes.set_ylabel(label)
        _finish(figure, axes, title)
    figure.legend(lines.values(), lines, loc="outside right upper", fontsize="small")
    figure.supxlabel(
        "mean over an arm's runs, smoothed; up to where the shortest of them ends",
        fontsize=8,
        color=_GREY,
    )
    return figure


def _mean_curve(runs: Sequence[Mapping[str, Sequence]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, mean of a curve there) over the runs of one arm, up to the end of the shortest."""
    start = max(run["sampled_tokens"][0] for run in runs)
    end = min(run["sampled_tokens"][-1] for run in runs)
    grid = np.linspace(start, end, len(runs[0]["sampled_tokens"]))
    curves = [
        _smooth(np.array([np.nan if v is None else v for v in run[name]], float)) for run in runs
    ]
    values = [
        np.interp(grid, run["sampled_tokens"], curve)
        for run, curve in zip(runs, curves, strict=True)
    ]
    return grid, np.mean(values, axis=0)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Running mean, shorter at both ends."""
    half = _SMOOTH // 2
    return np.array(
        [np.nanmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    )


def _finish(figure: Figure, axes: Axes, title: str) -> Figure:
    axes.set_title(title, fontsize="medium", loc="left", fontweight="bold")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
