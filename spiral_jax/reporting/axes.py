"""What all PNG figures share: layout, axes, and curves with their intervals (matplotlib)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from spiral_jax.reporting.style import GREY


def new_figure(width: float, height: float, dpi: int = 150) -> Figure:
    """An empty figure of that size in inches whose parts make room for each other."""
    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def tidy(axes: Axes) -> None:
    """A faint grid, and no frame on the sides without numbers."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def set_title(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize="medium", loc="left", fontweight="bold")


def set_note(figure: Figure, note: str) -> None:
    """One line below the figure that says what it is of."""
    figure.supxlabel(note, fontsize=8, color=GREY)


def count_axis(axes: Axes, label: str, most: int) -> None:
    """The x axis of numbers of traces: logarithmic, a tick at each power of two up to `most`."""
    ticks = [1 << i for i in range(most.bit_length())]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)


def round_axis(axes: Axes) -> None:
    """The x axis of self-aggregation's rounds."""
    axes.set_xlabel("round of aggregation (0: independent search traces)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def plot_curve(
    axes: Axes,
    x: Sequence[float],
    rows: Sequence[Mapping[str, Any]],
    *,
    label: str,
    color: str,
    linestyle: str = "-",
    marker: str = "None",
    scale: float = 100,
    band: bool = True,
) -> None:
    """One curve with its interval; estimates that are not defined are left out.

    Args:
      rows: an estimate for each of `x`, with `mean`, `low` and `high`.
      scale: what the estimates are multiplied by; 100 gives percent.
      band: whether the intervals are shown: as a band, or as a bar where there is one point alone.
    """
    known = [(at, row) for at, row in zip(x, rows, strict=True) if row["mean"] is not None]
    if not known:
        return
    axes.plot(
        [at for at, _ in known],
        scale * np.array([row["mean"] for _, row in known]),
        color=color,
        linestyle=linestyle,
        linewidth=1.8,
        marker=marker,
        markersize=5,
        markeredgecolor="white",
        label=label,
        zorder=3,
    )
    bounded = [(at, row) for at, row in known if row["low"] is not None]
    if not band or not bounded:
        return
    at = [place for place, _ in bounded]
    low = scale * np.array([row["low"] for _, row in bounded])
    high = scale * np.array([row["high"] for _, row in bounded])
    if len(at) == 1:
        axes.vlines(at, low, high, color=color, linewidth=1.5, zorder=2)
    else:
        axes.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)


def save(figure: Figure, path: str | os.PathLike) -> None:
    """Writes the figure as a PNG; `path` may be an address that etils' epath knows."""
    with epath.Path(path).open("wb") as file:
        figure.savefig(file, format="png")


def save_both(figure: Figure, path: str | os.PathLike) -> None:
    """Writes the figure as the PNG `path`, and as an SVG beside it, for papers."""
    save(figure, path)
    same_bytes = {"svg.hashsalt": "spiral_jax"}  # for the same figure
    with epath.Path(path).with_suffix(".svg").open("wb") as file, rc_context(same_bytes):
        figure.savefig(file, format="svg", metadata={"Date": None})
