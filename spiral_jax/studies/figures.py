"""The pictures of a study: OUT_arms, OUT_mixed, OUT_pass_at_k, OUT_rsa and OUT_training, all .png.

OUT_arms is only there where some arm has a value of the first measure, OUT_mixed where strategies
are named, OUT_training where some run was trained.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from spiral_jax.reporting.axes import (
    count_axis,
    new_figure,
    plot_curve,
    round_axis,
    save,
    set_note,
    set_title,
    tidy,
)
from spiral_jax.reporting.series import running_mean, series
from spiral_jax.reporting.style import DISTINCT, GREY
from spiral_jax.studies.design import BASE

# Arms beyond the colours repeat them with another dash, and beyond the markers with hollow ones.
_DASHES = ("-", "--", ":")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X")

_SMOOTHED = 3  # points before and after each one of a training curve that its mean takes in
_MOST_BANDS = 4  # arms whose intervals are shown: more would hide each other; the tables have them


def plot_study(gathered: Mapping[str, Any], out: pathlib.Path) -> list[pathlib.Path]:
    """Writes the pictures of what `gather` returns beside `out`; returns their paths."""
    figures = {
        "arms": _arms(gathered),
        "mixed": _mixed(gathered),
        "pass_at_k": _pass_at_k(gathered),
        "rsa": _rsa(gathered),
        "training": _training(gathered),
    }
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            paths.append(out.with_name(f"{out.name}_{name}.png"))
            save(figure, paths[-1])
    return paths


def look_of(gathered: Mapping[str, Any], arm: str) -> dict[str, Any]:
    """One colour and dash for each arm in all pictures; the base is grey."""
    if arm == BASE:
        return {"color": GREY, "linestyle": "-."}
    place = [name for name in gathered["arms"] if name != BASE].index(arm)
    dash = place // len(DISTINCT) % len(_DASHES)
    return {"color": DISTINCT[place % len(DISTINCT)], "linestyle": _DASHES[dash]}


def _measures_measured(gathered: Mapping[str, Any], arm: str) -> list[dict[str, float | None]]:
    """What each evaluated run of an arm has measured."""
    runs = [run for run in gathered["runs"] if run["arm"] == arm]
    return [run["measures"] for run in runs if "measures" in run]


def _arms(gathered: Mapping[str, Any]) -> Figure | None:
    """The first measure of every arm that has a value: mean and interval, a dot for each seed."""
    measure = gathered["measures"][0]
    measured = {
        arm: row["measures"][measure] for arm, row in gathered["arms"].items() if row["measures"]
    }
    values = {arm: value for arm, value in measured.items() if value["mean"] is not None}
    if not values:
        return None
    arms = sorted(values, key=lambda arm: values[arm]["mean"])
    figure = new_figure(7.6, 1.4 + 0.42 * len(arms))
    axes = figure.subplots()
    for y, arm in enumerate(arms):
        value, color = values[arm], look_of(gathered, arm)["color"]
        axes.hlines(y, 100 * value["low"], 100 * value["high"], color=color, linewidth=2)
        axes.plot(100 * value["mean"], y, "D", color=color, markersize=6, zorder=3)
        of_runs = [measures[measure] for measures in _measures_measured(gathered, arm)]
        seeds = [100 * value for value in of_runs if value is not None]
        axes.plot(seeds, [y + 0.22] * len(seeds), "o", color=color, markersize=3, alpha=0.6)
    best = gathered["optimum"]["aggregated"]["mean"] if gathered["optimum"] else None
    if best is not None and measure == "aggregated":
        best *= 100
        axes.axvline(best, color=GREY, linestyle="--", linewidth=1)
        _annotate_line(axes, "best possible", best, -0.55)
    axes.set_yticks(range(len(arms)), arms)
    axes.set_ylim(-0.8, len(arms) - 0.4)
    axes.set_xlabel(f"{measure} (% of held-out problems)")
    set_note(figure, "dots: seeds; bars: 95 % bootstrap interval over seeds and problems")
    set_title(axes, "After training")
    tidy(axes)
    return figure


def _annotate_line(axes: Axes, text: str, x: float, y: float, rotation: int = 0) -> None:
    """A small grey word to the left of a vertical line."""
    axes.annotate(
        text,
        (x, y),
        xytext=(-3, 0),
        textcoords="offset points",
        rotation=rotation,
        ha="right",
        fontsize="small",
        color=GREY,
    )


def _mixed(gathered: Mapping[str, Any]) -> Figure | None:
    """Of every run, how many sets are mixed and how often the aggregated answer is right.

    The line is how the base reads mixed and other sets, if it has both: what is above or below it
    is due to reading, and what is along it to search.
    """
    best = gathered["optimum"]
    if not best or not {"mixed", "aggregated"} <= set(gathered["measures"]):
        return None
    figure = new_figure(7.6, 5.0)
    axes = figure.subplots()
    ends = [best[name]["mean"] for name in ("right_if_alike", "right_if_mixed")]
    if None not in ends:
        axes.plot([0, 100], [100 * end for end in ends], color=GREY, linewidth=1)
    axes.axvline(100 * best["mixed"], color=GREY, linestyle="--", linewidth=1)
    most = "most that independent traces allow"
    _annotate_line(axes, most, 100 * best["mixed"], 100 * (ends[0] or 0), rotation=90)
    for place, arm in enumerate(gathered["arms"]):
        measured = _measures_measured(gathered, arm)
        if not measured:
            continue
        axes.plot(
            [100 * measures["mixed"] for measures in measured],
            [100 * measures["aggregated"] for measures in measured],
            _MARKERS[place % len(_MARKERS)],
            fillstyle="full" if place < len(_MARKERS) else "none",
            color=look_of(gathered, arm)["color"],
            markersize=6,
            alpha=0.8,
            label=arm,
        )
    axes.set_xlabel("sets of two strategies or more (%)")
    axes.set_ylabel("aggregated (% right)")
    axes.set_xlim(0, 100)
    axes.legend(fontsize="small", framealpha=0.9, loc="upper left")
    title = "What search offers and what aggregation makes of it; the line is the base's reading"
    set_title(axes, title)
    tidy(axes)
    return figure


def _pass_at_k(gathered: Mapping[str, Any]) -> Figure:
    title = "Coverage: is any of k independent traces right?"
    figure, axes = _curves(gathered, "pass_at_k", "k", title)
    most = max(row["k"] for curves in gathered["curves"].values() for row in curves["pass_at_k"])
    count_axis(axes, "k, traces sampled for a problem", most)
    axes.set_ylabel("pass@k (% of problems)")
    return figure


def _rsa(gathered: Mapping[str, Any]) -> Figure:
    figure, axes = _curves(gathered, "rsa", "round", "Recursive self-aggregation, by round")
    round_axis(axes)
    axes.set_ylabel("right answers (%)")
    return figure


def _curves(gathered: Mapping[str, Any], name: str, x: str, title: str) -> tuple[Figure, Axes]:
    """A curve of each arm; `x` is the field of its rows that the figure goes along."""
    figure = new_figure(9.0, 5.0)
    axes = figure.subplots()
    band = len(gathered["curves"]) <= _MOST_BANDS
    for arm, curves in gathered["curves"].items():
        at = [row[x] for row in curves[name]]
        plot_curve(axes, at, curves[name], label=arm, band=band, **look_of(gathered, arm))
    figure.legend(loc="outside right upper", fontsize="small")
    set_title(axes, title)
    tidy(axes)
    return figure, axes


def _training(gathered: Mapping[str, Any]) -> Figure | None:
    """Rewards, and entropy of search traces, over sampled tokens: an arm's mean over its runs."""
    runs = {
        arm: [
            run["training"] for run in gathered["runs"] if run["arm"] == arm and "training" in run
        ]
        for arm in gathered["arms"]
    }
    if not any(runs.values()):
        return None
    figure = new_figure(13.5, 4.6)
    reward, own, entropy = figure.subplots(1, 3)
    lines: dict[str, Any] = {}

    def plot_panel(axes: Axes, curve: str, title: str, ylabel: str, scale: float) -> None:
        for arm, arm_runs in runs.items():
            with_curve = [run for run in arm_runs if curve in run]
            if with_curve:
                tokens, value = mean_over_runs(with_curve, curve)
                look = look_of(gathered, arm)
                (lines[arm],) = axes.plot(tokens, scale * value, linewidth=1.5, label=arm, **look)
        axes.set_xlabel("sampled tokens")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens / 1000:,.0f}k"))
        axes.set_ylabel(ylabel)
        set_title(axes, title)
        tidy(axes)

    plot_panel(reward, "aggregated", "Reward of aggregation traces", "right (%)", 100)
    plot_panel(own, "own", "Own correctness of search traces", "right (%)", 100)
    plot_panel(entropy, "entropy", "Entropy of search traces", "nat a token", 1)
    figure.legend(lines.values(), lines, loc="outside right upper", fontsize="small")
    set_note(figure, "mean over an arm's runs, smoothed; up to where the shortest of them ends")
    return figure


def mean_over_runs(
    runs: Sequence[Mapping[str, Sequence]], name: str
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, smoothed mean of a curve there) over the runs of one arm, while all of them run."""
    start = max(run["sampled_tokens"][0] for run in runs)
    end = min(run["sampled_tokens"][-1] for run in runs)
    grid = np.linspace(start, end, len(runs[0]["sampled_tokens"]))
    values = []
    for run in runs:
        curve = series([{name: value} for value in run[name]], name)
        smooth = running_mean(curve, before=_SMOOTHED, after=_SMOOTHED)
        values.append(np.interp(grid, run["sampled_tokens"], smooth))
    return grid, np.mean(values, axis=0)
