"""A run at a glance: metrics.jsonl and evaluation results -> one PNG of curves, one Markdown table."""

from __future__ import annotations

import json
import math

import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from spiral_jax.evaluation.tables import defined_estimate, is_number

# Colours of Okabe and Ito (2008), distinct for colour-blind readers; one colour per meaning in all
# panels.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#555555"
MEASURES = {  # evaluation key: label, colour and marker of its points
    "single": ("held-out, single trace", ORANGE, "s"),
    "majority": ("held-out, majority vote", GREEN, "^"),
    "aggregated": ("held-out, aggregated", BLUE, "o"),
}


def draw_curves(
    metrics_path: epath.PathLike, evaluations: list[dict], png_path: epath.PathLike
) -> None:
    """Draws reward, trace length, parse rate, gradient norm and sampler-trainer mismatch over
    optimizer steps.

    A panel or curve whose metrics are missing, null or NaN throughout is left out; single such
    steps are gaps.

    Args:
      metrics_path: metrics.jsonl, one object a step with `step`.
      evaluations: held-out results, each with `step` and some of `single`, `majority`, `aggregated`
        (the fields of `estimators.Estimate` as a dict).
      png_path: file that is written, 1,680 x 840 pixels.

    Raises:
      ValueError: a line of the metrics is no JSON object with `step`, or there is nothing to draw.
    """
    records = _read_metrics(metrics_path)
    evaluations = sorted(evaluations, key=lambda evaluation: evaluation["step"])
    panels = [
        draw
        for draw, keys in (
            (_draw_lengths, ("length/search", "length/aggregation")),
            (_draw_parse_rates, ("verifier/parse_rate_search", "verifier/parse_rate_aggregation")),
            (_draw_gradient_norm, ("grad_norm",)),
            (_draw_mismatch, ("mismatch/kl",)),
        )
        if any(_has_values(records, key) for key in keys)
    ]
    has_reward = any(_has_values(records, key) for key in ("reward/aggregated", "reward/search"))
    has_reward |= any(
        defined_estimate(evaluation, name) for evaluation in evaluations for name in MEASURES
    )
    if not panels and not has_reward:
        raise ValueError(
            f"{metrics_path}: none of its metrics can be drawn, and there is no evaluation."
        )

    figure = Figure(figsize=(14, 7), dpi=120, layout="constrained")
    places = (
        figure.subfigures(1, 2, width_ratios=(1, 1.15))
        if panels and has_reward
        else [figure, figure]
    )
    if has_reward:
        _draw_reward(places[0].subplots(), records, evaluations)
    if panels:
        for draw, axes in zip(panels, _grid(places[1], len(panels)), strict=True):
            draw(axes, records)
    for axes in figure.axes:
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    with epath.Path(png_path).open("wb") as file:
        figure.savefig(file, format="png")


def _read_metrics(path: epath.PathLike) -> list[dict]:
    """The records of metrics.jsonl in order of their step."""
    records = []
    for number, line in enumerate(epath.Path(path).read_text().splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not (isinstance(record, dict) and isinstance(record.get("step"), int | float)):
            raise ValueError(
                f"{path}, line {number}: {line[:80]!r} is not a JSON object with a number `step`."
            )
        records.append(record)
    return sorted(records, key=lambda record: record["step"])


def _has_values(records: list[dict], key: str) -> bool:
    return any(is_number(record.get(key)) for record in records)


def _series(records: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(step [n], value [n]) of a metric, float64; NaN where it is missing."""
    steps = np.array([record["step"] for record in records], np.float64)
    values = [record[key] if is_number(record.get(key)) else np.nan for record in records]
    return steps, np.array(values, np.float64)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of each value and those up to `window - 1` before it, NaN left out; NaN where there
    is none.
    """
    known = ~np.isnan(values)
    sums = np.cumsum(np.where(known, values, 0.0))
    counts = np.cumsum(known)
    sums[window:], counts[window:] = (
        sums[window:] - sums[:-window],
        counts[window:] - counts[:-window],
    )
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _grid(figure: Figure | SubFigure, panels: int) -> list[Axes]:
    """Axes for `panels` panels, at most two rows, filled row by row."""
    columns = math.ceil(panels / 2)
    axes = list(np.ravel(figure.subplots(math.ceil(panels / columns), columns)))
    for unused in axes[panels:]:
        unused.remove()
    return axes[:panels]


def _draw_reward(axes: Axes, records: list[dict], evaluations: list[dict]) -> None:
    key = "reward/aggregated" if _has_values(records, "reward/aggregated") else "reward/search"
    if _has_values(records, key):
        label = f"training, {'aggregated' if key == 'reward/aggregated' else 'search'}"
        _draw_smoothed(
            axes, *_series(records, key), BLUE if key == "reward/aggregated" else ORANGE, label
        )
    span = max(
        [record["step"] for record in records] + [evaluation["step"] for evaluation in evaluations]
    )
    for place, (name, (label, color, marker)) in enumerate(MEASURES.items()):
        found = [
            (evaluation["step"], defined_estimate(evaluation, name)) for evaluation in evaluations
        ]
        found = [(step, estimate) for step, estimate in found if estimate]
        if not found:
            continue
        # side by side, so that bars at the same step do not hide each other
        steps = [step + (place - 1) * 0.008 * span for step, _ in found]
        means = [estimate["mean"] for _, estimate in found]
        errors = [1.96 * (estimate["standard_error"] or 0.0) for _, estimate in found]
        axes.errorbar(steps, means, yerr=errors, color=color, marker=marker, markersize=7, linestyle=":", linewidth=1,
                      elinewidth=1.5, capsize=3, markeredgecolor="white", label=label, zorder=3)  # fmt: skip
    axes.set_title(
        "reward (share of correct answers; bars: 95 % interval over problems)", fontsize="medium"
    )
    axes.set_ylabel("reward")
    axes.legend(loc="best", fontsize="small")


def _draw_smoothed(
    axes: Axes, steps: np.ndarray, values: np.ndarray, color: str, label: str
) -> None:
    """A thin curve of every step and, where there are enough steps, a bold one of the running mean."""
    window = len(values) // 20
    point = (
        "." if len(values) < 30 else ""
    )  # a lone point between gaps would be invisible as a line
    if window < 2:
        axes.plot(steps, values, color=color, linewidth=1.5, marker=point, label=label)
        return
    axes.plot(steps, values, color=color, linewidth=0.7, alpha=0.4)
    mean = _running_mean(values, window)
    axes.plot(steps, mean, color=color, linewidth=2, label=f"{label} (mean of {window} steps)")


def _draw_roles(axes: Axes, records: list[dict], prefix: str, scale: float) -> None:
    for role, color in (("search", ORANGE), ("aggregation", BLUE)):
        if _has_values(records, f"{prefix}{role}"):
            steps, values = _series(records, f"{prefix}{role}")
            _draw_smoothed(axes, steps, scale * values, color, role)
    axes.legend(loc="best", fontsize="small")


def _draw_lengths(axes: Axes, records: list[dict]) -> None:
    _draw_roles(axes, records, "length/", 1)
    axes.set_ylim(bottom=0)
    axes.set_title("mean trace length", fontsize="medium")
    axes.set_ylabel("tokens")


def _draw_parse_rates(axes: Axes, records: list[dict]) -> None:
    _draw_roles(axes, records, "verifier/parse_rate_", 100)
    axes.set_title("answers that could be parsed", fontsize="medium")
    axes.set_ylabel("% of traces")


def _draw_gradient_norm(axes: Axes, records: list[dict]) -> None:
    _draw_diagnostic(axes, records, "grad_norm")
    axes.set_title("gradient norm", fontsize="medium")
    axes.set_ylabel("L2 norm")


def _draw_mismatch(axes: Axes, records: list[dict]) -> None:
    _draw_diagnostic(axes, records, "mismatch/kl")
    axes.set_title("sampler-trainer mismatch", fontsize="medium")
    axes.set_ylabel("KL (nats per token)")


def _draw_diagnostic(axes: Axes, records: list[dict], key: str) -> None:
    """One metric, on a logarithmic scale where it spans more than a factor of 30, so that a spike
    hides nothing.
    """
    steps, values = _series(records, key)
    _draw_smoothed(axes, steps, values, GREY, key)
    if np.nanmin(values) > 0 and np.nanmax(values) > 30 * np.nanmin(values):
        axes.set_yscale("log")
