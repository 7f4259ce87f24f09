"""One or two evaluations -> the paper's four figures (arXiv 2606.23595, Fig. 3, 4, 6) as PNGs.

One evaluation: a colour for each way to spend compute. Two: a colour for each evaluation, a line
style for each way.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from spiral_jax.evaluation.results import describe_temperatures
from spiral_jax.reporting.axes import (
    count_axis,
    new_figure,
    plot_curve,
    round_axis,
    save_both,
    set_note,
    set_title,
    tidy,
)
from spiral_jax.reporting.style import BLACK, BLUE, GREEN, ORANGE, VERMILION

_SIDES = {ORANGE: -1, BLUE: 1}  # A, B: colour, and on which side of a place they stand
_APART = 1.03  # how far, as a factor
_INTERVALS = "bands and bars: 95 % bootstrap interval over problems"
_WIDTH, _HEIGHT = 7.6, 5.0  # inches


@dataclasses.dataclass(frozen=True)
class _Look:
    """How one way to spend compute looks; `color` is for an evaluation that is alone."""

    color: str
    linestyle: str
    marker: str


_LOOKS = {
    "pass@k": _Look(GREEN, "-", "None"),
    "majority vote": _Look(GREEN, "--", "None"),
    "RSA": _Look(BLUE, "-", "o"),
    "aggregated once": _Look(VERMILION, "None", "D"),
    "single trace by limit": _Look(ORANGE, ":", "s"),
    "maj@N": _Look(GREEN, "--", "^"),
    "pass@N": _Look(ORANGE, ":", "s"),
}


@dataclasses.dataclass(frozen=True)
class _Side:
    """One evaluation of a figure.

    Attributes:
      measures, settings: of its results.json.
      color: of all its curves; None: each way has its own.
      prefix: of its labels.
      aside: -1, 0 or 1: where its lone points stand, so that no bar hides another's.
    """

    measures: dict[str, Any]
    settings: dict[str, Any]
    color: str | None
    prefix: str
    aside: int

    def plot(
        self,
        axes: Axes,
        way: str,
        x: Sequence[float],
        rows: Sequence[Mapping[str, Any]],
        *,
        label: str | None = None,
        **options: Any,
    ) -> None:
        """The curve of a way to spend compute, a key of `_LOOKS`; see `axes.plot_curve`."""
        look = _LOOKS[way]
        plot_curve(
            axes,
            x,
            rows,
            label=self.prefix + (label or way),
            color=self.color or look.color,
            linestyle=look.linestyle,
            marker=look.marker,
            **options,
        )

    def plot_once(self, axes: Axes, x: float) -> None:
        """The point of one aggregation; the x axis is logarithmic."""
        x *= _APART**self.aside
        label = f"aggregated once, of {self.settings['subset_size']} traces"
        self.plot(axes, "aggregated once", [x], [self.measures["aggregated"]], label=label)


def _sides(results: Mapping[str, dict]) -> Iterator[_Side]:
    if len(results) == 1:
        (evaluation,) = results.values()
        yield _Side(evaluation["measures"], evaluation["settings"], None, "", 0)
        return
    for (color, aside), (name, evaluation) in zip(_SIDES.items(), results.items(), strict=True):
        yield _Side(evaluation["measures"], evaluation["settings"], color, f"{name}: ", aside)


def plot_evaluation(
    results: Mapping[str, dict],
    directory: pathlib.Path,
    efficiency: Mapping[str, Any] | None = None,
) -> list[pathlib.Path]:
    """Writes pass_at_k, rsa, tokens and voting into `directory`, each as PNG and as SVG.

    Args:
      results: name for the legend -> content of results.json; one, or A and B.
      efficiency: the last row of `comparison.scaling_efficiency`, marked between the two pass@k
        curves.

    Returns:
      The paths of the PNGs.
    """
    figures = {
        "pass_at_k": _pass_at_k(results, efficiency),
        "rsa": _rsa(results),
        "tokens": _tokens(results),
        "voting": _voting(results),
    }
    paths = []
    for name, figure in figures.items():
        paths.append(directory / f"{name}.png")
        save_both(figure, paths[-1])
    return paths


def _pass_at_k(results: Mapping[str, dict], efficiency: Mapping[str, Any] | None) -> Figure:
    title = "Coverage: is any of k independent traces right?"
    figure, axes = _figure(title, "pass@k (% of problems)")
    for side in _sides(results):
        rows = side.measures["pass_at_k"]
        side.plot(axes, "pass@k", [row["k"] for row in rows], rows)
    if efficiency:
        _mark_efficiency(axes, list(results), efficiency)
    most = max(evaluation["settings"]["n"] for evaluation in results.values())
    count_axis(axes, "k, traces sampled for a problem", most)
    return _finish(figure, axes, results)


def _mark_efficiency(axes: Axes, names: Sequence[str], row: Mapping[str, Any]) -> None:
    """An arrow between the curves at the highest coverage that both reach, and what it means."""
    level = 100 * row["coverage"]
    axes.annotate(
        "",
        xy=(row["samples_b"], level),
        xytext=(row["samples_a"], level),
        arrowprops={"arrowstyle": "<->", "color": BLACK, "linewidth": 1.2},
    )
    bound = f"{row['bound']} " if row["bound"] else ""
    ratio = f"{bound}{row['ratio']:.2f}x [{row['low']:.2f}, {row['high']:.2f}]"
    title = f"For {level:.1f} % coverage {names[0]} needs {ratio} the samples of {names[1]}"
    set_title(axes, title)


def _rsa(results: Mapping[str, dict]) -> Figure:
    figure = new_figure(11.5, _HEIGHT)
    accuracy, entropy = figure.subplots(1, 2, width_ratios=(1.5, 1))
    _label(accuracy, "Recursive self-aggregation, by round", "right answers (%)")
    _label(entropy, "Do its answers still differ?", "entropy of the answers (nats)")
    for side in _sides(results):
        rows = side.measures["rsa"]
        rounds = [row["round"] for row in rows]
        if len(rows) == 1:  # points with bars, not curves with bands
            rounds = [rounds[0] + (_APART - 1) * side.aside]
        side.plot(accuracy, "RSA", rounds, [row["single"] for row in rows], label="mean")
        side.plot(accuracy, "pass@N", rounds, [row["pass_at_n"] for row in rows], band=False)
        side.plot(accuracy, "maj@N", rounds, [row["majority"] for row in rows], band=False)
        entropies = [row["entropy"] for row in rows]
        side.plot(entropy, "RSA", rounds, entropies, label="mean over problems", scale=1)
    round_axis(accuracy)
    round_axis(entropy)
    entropy.set_ylim(bottom=0)
    settings = [evaluation["settings"] for evaluation in results.values()]
    shapes = dict.fromkeys(f"population N={s['population']}, set {s['set_size']}" for s in settings)
    return _finish(figure, accuracy, results, "; ".join(shapes))


def _tokens(results: Mapping[str, dict]) -> Figure:
    figure, axes = _figure("Accuracy by compute", "right answers (%)")
    for side in _sides(results):
        rsa, votes = side.measures["rsa"], side.measures["majority_at_k"]
        limits = side.measures["limits"]
        side.plot(axes, "RSA", _tokens_of(rsa), [row["single"] for row in rsa])
        side.plot(axes, "majority vote", _tokens_of(votes), votes)
        side.plot_once(axes, side.measures["aggregated"]["tokens"])
        singles = [row["single"] for row in limits]
        side.plot(axes, "single trace by limit", _tokens_of(limits), singles)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("tokens sampled for a problem (mean; all stages so far, prompts not counted)")
    return _finish(figure, axes, results)


def _tokens_of(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return [row["tokens"] for row in rows]


def _voting(results: Mapping[str, dict]) -> Figure:
    figure, axes = _figure("Voting against aggregation", "right answers (%)")
    most = 1
    for side in _sides(results):
        votes, rsa = side.measures["majority_at_k"], side.measures["rsa"]
        traces = [side.settings["population"] * (row["round"] + 1) for row in rsa]
        most = max(most, traces[-1], side.settings["n"])
        side.plot(axes, "majority vote", [row["k"] for row in votes], votes)
        side.plot(axes, "RSA", traces, [row["single"] for row in rsa])
        side.plot_once(axes, side.settings["subset_size"] + 1)
    count_axis(axes, "traces sampled for a problem (RSA: all rounds so far)", most)
    return _finish(figure, axes, results)


def _figure(title: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = new_figure(_WIDTH, _HEIGHT)
    axes = figure.subplots()
    _label(axes, title, ylabel)
    return figure, axes


def _label(axes: Axes, title: str, ylabel: str) -> None:
    set_title(axes, title)
    axes.set_ylabel(ylabel)
    tidy(axes)


def _finish(figure: Figure, axes: Axes, results: Mapping[str, dict], shape: str = "") -> Figure:
    """Adds the legend, and one line below that says what the picture is of."""
    axes.legend(loc="best", fontsize="small", framealpha=0.9)
    axes.set_ylim(bottom=max(0, axes.get_ylim()[0]))
    first = next(iter(results.values()))
    counts = dict.fromkeys(str(evaluation["problems"]["count"]) for evaluation in results.values())
    problems = f"{', '.join(counts)} problems of {first['problems']['task']}"
    parts = [problems, shape, describe_temperatures(first["settings"]), _INTERVALS]
    set_note(figure, "; ".join(part for part in parts if part))
    return figure
