"""A training run at a glance: its metrics and evaluations -> one PNG."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from spiral_jax.evaluation.tables import defined_estimate
from spiral_jax.reporting.axes import new_figure, save_both, tidy
from spiral_jax.reporting.series import has_values, running_mean, series, smoothing_window
from spiral_jax.reporting.style import AGGREGATION, GREY, SEARCH, VOTE


@dataclasses.dataclass(frozen=True)
class Panel:
    """One of the small figures: metrics over steps.

    Attributes:
      curves: label -> (key of the metric, colour).
      scale: what the metrics are multiplied by.
      legend: whether the labels are shown.
      from_zero: whether the y axis begins at 0.
      log_if_wide: whether the y axis is logarithmic where the metric spans more than a factor of
        30, so that a spike hides nothing.
    """

    title: str
    ylabel: str
    curves: dict[str, tuple[str, str]]
    scale: float = 1
    legend: bool = False
    from_zero: bool = False
    log_if_wide: bool = False


def _by_role(prefix: str) -> dict[str, tuple[str, str]]:
    return {
        "search": (f"{prefix}search", SEARCH),
        "aggregation": (f"{prefix}aggregation", AGGREGATION),
    }


_PANELS = (
    Panel("mean trace length", "tokens", _by_role("length/"), legend=True, from_zero=True),
    Panel(
        "traces cut off",
        "% cut off",
        _by_role("length/cut_off_"),
        scale=100,
        legend=True,
        from_zero=True,
    ),
    Panel(
        "answers parsed",
        "% of traces",
        _by_role("verifier/parse_rate_"),
        scale=100,
        legend=True,
    ),
    Panel("gradient norm", "L2 norm", {"both": ("grad_norm", GREY)}, log_if_wide=True),
    Panel(
        "sampler-trainer mismatch",
        "KL (nats per token)",
        {"KL": ("mismatch/kl", GREY)},
        log_if_wide=True,
    ),
)

# evaluation key: label, colour and marker of its points
_HELD_OUT = {
    "single": ("held-out, single trace", SEARCH, "s"),
    "majority": ("held-out, majority vote", VOTE, "^"),
    "aggregated": ("held-out, aggregated", AGGREGATION, "o"),
}


def plot_training(
    metrics: Sequence[dict], evaluations: Sequence[dict], png_path: epath.PathLike
) -> None:
    """Plots reward, trace length, truncation, parse rate, gradient norm and mismatch over steps.

    A panel or curve whose metrics are missing, null or NaN throughout is left out; single such
    steps are gaps.

    Args:
      metrics: rows of metrics.jsonl, one a step.
      evaluations: rows of evaluations.jsonl, each with `step` and some of `single`, `majority`,
        `aggregated` (the fields of `statistics.Estimate` as a dict).
      png_path: file that is written, 1,680 x 840 pixels; and an SVG beside it.

    Raises:
      ValueError: there is nothing to plot.
    """
    metrics = sorted(metrics, key=lambda row: row["step"])
    evaluations = sorted(evaluations, key=lambda row: row["step"])
    panels = [
        panel
        for panel in _PANELS
        if any(has_values(metrics, key) for key, _ in panel.curves.values())
    ]
    rewards = ("reward/aggregated", "reward/search")
    has_reward = any(has_values(metrics, key) for key in rewards) or any(
        defined_estimate(row, name) for row in evaluations for name in _HELD_OUT
    )
    if not panels and not has_reward:
        raise ValueError(f"{png_path}: no metric and no evaluation has anything to plot.")

    figure = new_figure(14, 7, dpi=120)
    left, right = figure, figure
    if panels and has_reward:
        left, right = figure.subfigures(1, 2, width_ratios=(1, 1.15))
    if has_reward:
        _plot_reward(left.subplots(), metrics, evaluations)
    if panels:
        for panel, axes in zip(panels, _grid(right, len(panels)), strict=True):
            _plot_panel(axes, panel, metrics)
    for axes in figure.axes:
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        tidy(axes)
    save_both(figure, png_path)


def _grid(figure: Figure | SubFigure, panels: int) -> list[Axes]:
    """Axes for `panels` panels, at most two rows, filled row by row."""
    columns = math.ceil(panels / 2)
    axes = list(np.ravel(figure.subplots(math.ceil(panels / columns), columns)))
    for unused in axes[panels:]:
        unused.remove()
    return axes[:panels]


def _plot_reward(axes: Axes, metrics: Sequence[dict], evaluations: Sequence[dict]) -> None:
    """The training reward as a curve, held-out shares as points with bars."""
    if has_values(metrics, "reward/aggregated"):
        _plot_smoothed(axes, metrics, "reward/aggregated", AGGREGATION, "training, aggregated")
    elif has_values(metrics, "reward/search"):
        _plot_smoothed(axes, metrics, "reward/search", SEARCH, "training, search")
    span = max(row["step"] for row in [*metrics, *evaluations])
    for place, (name, (label, color, marker)) in enumerate(_HELD_OUT.items()):
        held = [row for row in evaluations if defined_estimate(row, name)]
        if not held:
            continue
        # side by side, so that bars at the same step do not hide each other
        aside = (place - 1) * 0.008 * span
        axes.errorbar(
            [row["step"] + aside for row in held],
            [row[name]["mean"] for row in held],
            yerr=np.transpose([_bar(row[name]) for row in held]),
            color=color,
            marker=marker,
            markersize=7,
            markeredgecolor="white",
            linestyle=":",
            linewidth=1,
            elinewidth=1.5,
            capsize=3,
            label=label,
            zorder=3,
        )
    title = "reward (share of correct answers; bars: 95 % bootstrap interval over problems)"
    axes.set_title(title, fontsize="medium")
    axes.set_ylabel("reward")
    axes.legend(loc="best", fontsize="small")


def _bar(estimate: dict) -> tuple[float, float]:
    """How far the interval reaches below the mean and above it; 0 where there is none."""
    if estimate["low"] is None:
        return 0.0, 0.0
    below, above = estimate["mean"] - estimate["low"], estimate["high"] - estimate["mean"]
    return max(below, 0.0), max(above, 0.0)  # of equal values up to rounding


def _plot_panel(axes: Axes, panel: Panel, metrics: Sequence[dict]) -> None:
    for label, (key, color) in panel.curves.items():
        if not has_values(metrics, key):
            continue
        _plot_smoothed(axes, metrics, key, color, label, panel.scale, small=True)
        values = series(metrics, key)
        if panel.log_if_wide and 0 < np.nanmin(values) < np.nanmax(values) / 30:
            axes.set_yscale("log")
    if panel.legend:
        axes.legend(loc="best", fontsize="small")
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    axes.set_title(panel.title, fontsize="medium")
    axes.set_ylabel(panel.ylabel)


def _plot_smoothed(
    axes: Axes,
    metrics: Sequence[dict],
    key: str,
    color: str,
    label: str,
    scale: float = 1,
    small: bool = False,
) -> None:
    """A thin curve of every step and, where there are enough steps, a bold one of the means.

    Args:
      small: the axes have no room to say that, and leave it to the large ones.
    """
    steps, values = series(metrics, "step"), series(metrics, key, scale)
    window = smoothing_window(len(values))
    # a lone point between gaps would be invisible as a line
    marker = "." if len(values) < 30 else ""
    if window < 2:
        axes.plot(steps, values, color=color, linewidth=1.5, marker=marker, label=label)
        return
    axes.plot(steps, values, color=color, linewidth=0.7, alpha=0.4)
    mean = running_mean(values, before=window - 1)
    if not small:
        label = f"{label} (mean of {window} steps)"
    axes.plot(steps, mean, color=color, linewidth=2, label=label)
