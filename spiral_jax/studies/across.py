"""Several studies with the same arms -> which arm is best over all of their tasks.

Read are the reports' JSON files, so that anyone can work it out again without the runs. A score is
one run's value of its study's first measure, a share from 0 to 1. Measures and intervals are those
of Agarwal et al. 2021 (arXiv 2108.13264), for few runs of several tasks:

interquartile mean   the mean of the middle half of an arm's scores on all tasks
improvement          the chance that a run of one arm scores more than a run of another on the same
                     task, ties by half, averaged over tasks
profile              the share of an arm's scores that lie above a threshold

Where every report has a second reading, at equal operations (`operations.py`), its scores are
compared too. Tasks count the same, also where an arm has more runs of one of them. 95 % intervals
are by bootstrap over runs, within each task.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from spiral_jax.core.config import ConfigError
from spiral_jax.evaluation.tables import percent
from spiral_jax.reporting.axes import new_figure, plot_curve, save, set_note, set_title, tidy
from spiral_jax.studies.cells import estimate
from spiral_jax.studies.design import BASE
from spiral_jax.studies.figures import look_of
from spiral_jax.studies.markdown import table

DRAWS = 2000  # resamples
THRESHOLDS = np.linspace(0, 1, 101)

Scores = list[np.ndarray]  # of one arm: [Z] of its runs, for each task


class Task(NamedTuple):
    """One study's report.

    Attributes:
      scores: arm -> [Z], its runs' values of the measure.
      readings: the same at equal operations; empty: the study has none.
    """

    title: str
    measure: str
    scores: dict[str, np.ndarray]
    readings: dict[str, np.ndarray]


def write_comparison(files: Sequence[pathlib.Path], best: str, out: pathlib.Path) -> str:
    """Writes OUT.md, OUT.json and OUT_profile.png of `compare_across`; returns the first.

    Raises:
      ConfigError: see `compare_across`.
    """
    compared = compare_across(files, best)
    out.parent.mkdir(parents=True, exist_ok=True)
    picture = out.with_name(f"{out.name}_profile.png")
    save(_plot_profiles(compared), picture)
    numbers = out.with_name(f"{out.name}.json")
    numbers.write_text(json.dumps(compared, indent=1, allow_nan=False) + "\n")
    text = markdown(compared, picture.name)
    out.with_name(f"{out.name}.md").write_text(text)
    return text


def read_task(file: pathlib.Path) -> Task:
    """The scores in a report's JSON file.

    Raises:
      ConfigError: it is no such file, or no run in it was evaluated.
    """
    try:
        report = json.loads(file.read_text())
        measure, runs = report["measures"][0], report["runs"]
        title = report["title"]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ConfigError(
            f"--across: {file} is no report of a study ({type(error).__name__}: {error}). Name the "
            "JSON files that `python -m spiral_jax.study --config=... --report` has written."
        ) from None
    scores = _scores(runs, measure)
    if not scores:
        raise ConfigError(f"--across: no run of {file} has been evaluated.")
    read = (report.get("operations") or {"runs": []})["runs"]
    readings = _scores(read, measure)
    if readings and BASE in scores:
        readings = {BASE: scores[BASE]} | readings  # it has spent nothing
    return Task(title, measure, scores, readings)


def _scores(runs: Sequence[Mapping[str, Any]], measure: str) -> dict[str, np.ndarray]:
    """By arm: [Z] of the runs that have a value."""
    values: dict[str, list[float]] = {}
    for run in runs:
        value = run.get("measures", {}).get(measure)
        if value is not None:
            values.setdefault(run["arm"], []).append(value)
    return {arm: np.array(of_arm) for arm, of_arm in values.items()}


def compare_across(files: Sequence[pathlib.Path], best: str) -> dict[str, Any]:
    """Every arm over all tasks, and `best` against each other arm.

    Returns:
      tasks: title, measure and file of each, and runs by arm; missing: arms that not every task
      has; arms: by arm, its `interquartile mean` and its `profile`; improvement: of `best` over
      each other arm; operations: missing, arms and improvement at equal operations, None where
      some task has no such reading of `best`. Estimates are those of `cells.estimate`, over all
      runs of all tasks.

    Raises:
      ConfigError: a file cannot be read, or `best` is not an arm of every task.
    """
    tasks = [read_task(file) for file in files]
    common = [arm for arm in tasks[0].scores if all(arm in task.scores for task in tasks)]
    if best not in common:
        raise ConfigError(
            f"--best={best}: must be an arm that every study has: {', '.join(common) or 'none'}."
        )
    has_readings = all(best in task.readings for task in tasks)
    return {
        "tasks": [
            {"title": task.title, "measure": task.measure, "file": str(file)}
            | {"runs": {arm: len(task.scores[arm]) for arm in common}}
            for task, file in zip(tasks, files, strict=True)
        ],
        "best": best,
        **_compare([task.scores for task in tasks], best),
        "operations": _compare([task.readings for task in tasks], best) if has_readings else None,
    }


def _compare(of_tasks: Sequence[Mapping[str, np.ndarray]], best: str) -> dict[str, Any]:
    """missing, arms and improvement of `compare_across`, from each task's scores by arm."""
    named = dict.fromkeys(arm for task in of_tasks for arm in task)
    common = [arm for arm in named if all(arm in task for task in of_tasks)]
    scores = {arm: [task[arm] for task in of_tasks] for arm in common}
    drawn = {arm: resampled(scores[arm], seed) for seed, arm in enumerate(common)}
    others = [arm for arm in common if arm not in (best, BASE)]
    return {
        "missing": [arm for arm in named if arm not in common],
        "arms": {
            arm: {
                "interquartile mean": _estimate(interquartile_mean(drawn[arm]), scores[arm]),
                "profile": _profile(drawn[arm]),
            }
            for arm in common
        },
        "improvement": {
            arm: _estimate(improvement(drawn[best], drawn[arm]), scores[arm]) for arm in others
        },
    }


def resampled(scores: Scores, seed: int) -> Scores:
    """[1 + R, Z] for each task: its scores, and then R draws of as many with replacement."""
    rng = np.random.default_rng(seed)
    return [np.vstack([of, rng.choice(of, (DRAWS, len(of)))]) for of in scores]


def interquartile_mean(score_of_tasks: Scores) -> np.ndarray:
    """[1 + R]: the mean of the middle half, where tasks count the same whatever runs they have."""
    score_RxS = np.concatenate(score_of_tasks, axis=1)
    order_RxS = np.argsort(score_RxS, axis=1)
    end_RxS = np.cumsum(_weights(score_of_tasks)[order_RxS], axis=1)
    start_RxS = np.concatenate([np.zeros((len(end_RxS), 1)), end_RxS[:, :-1]], axis=1)
    middle_RxS = np.clip(end_RxS, 0.25, 0.75) - np.clip(start_RxS, 0.25, 0.75)
    return 2 * (np.take_along_axis(score_RxS, order_RxS, axis=1) * middle_RxS).sum(axis=1)


def _weights(score_of_tasks: Scores) -> np.ndarray:
    """[S] of all runs; those of each task add up to the same, all of them to 1."""
    runs = [score_RxZ.shape[1] for score_RxZ in score_of_tasks]
    return np.concatenate([np.full(Z, 1 / (Z * len(runs))) for Z in runs])


def improvement(score_of_tasks: Scores, other_of_tasks: Scores) -> np.ndarray:
    """[1 + R]: the chance that a run of the one scores more than one of the other."""
    chances = []
    for score_RxZ, other_RxZ in zip(score_of_tasks, other_of_tasks, strict=True):
        difference_RxZxZ = score_RxZ[:, :, None] - other_RxZ[:, None, :]
        chances.append((np.sign(difference_RxZxZ) / 2 + 0.5).mean(axis=(1, 2)))
    return np.mean(chances, axis=0)


def _profile(score_of_tasks: Scores) -> dict[str, list[float]]:
    """Share of the runs that score above each threshold, with its interval."""
    score_RxS = np.concatenate(score_of_tasks, axis=1)
    share_RxT = np.einsum("rst,s->rt", score_RxS[:, :, None] > THRESHOLDS, _weights(score_of_tasks))
    low_T, high_T = np.percentile(share_RxT[1:], (2.5, 97.5), axis=0)
    return {"mean": share_RxT[0].tolist(), "low": low_T.tolist(), "high": high_T.tolist()}


def _estimate(value_R: np.ndarray, scores: Scores) -> dict[str, Any]:
    return estimate(value_R, sum(map(len, scores)))


def markdown(compared: Mapping[str, Any], picture: str) -> str:
    """The report: one table, one picture; and the table at equal operations."""
    tasks = "; ".join(f"{task['title']} ({task['measure']})" for task in compared["tasks"])
    files = ",".join(task["file"] for task in compared["tasks"])
    best, operations = compared["best"], compared["operations"]
    parts = [
        "# Over all tasks",
        f"Runs of {tasks}.",
        _table(compared, best),
        f"![The share of each arm's runs that score above a threshold]({picture})",
        "Percent with 95 % intervals by bootstrap over runs within each task (arXiv 2108.13264): "
        "problems are not resampled, and with a few runs a task the intervals are narrower than "
        "the truth.",
        _missing(compared),
    ]
    if operations:
        parts += [
            "## At equal operations",
            "The same runs, each where it had spent its study's budget of operations: see the "
            "reports.",
            _table(operations, best),
            _missing(operations),
        ]
    parts.append(f"Written by `python -m spiral_jax.study --across={files} --best={best}`.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(compared: Mapping[str, Any], best: str) -> str:
    """What `_compare` returns, best arm first."""
    arms, rows = compared["arms"], []
    for arm in sorted(arms, key=lambda arm: -arms[arm]["interquartile mean"]["mean"]):
        middle, chance = arms[arm]["interquartile mean"], compared["improvement"].get(arm)
        rows.append([arm, middle["seeds"], percent(middle), percent(chance) if chance else ""])
    return table(["arm", "runs", "interquartile mean", f"chance that {best} is better"], rows)


def _missing(compared: Mapping[str, Any]) -> str:
    arms = ", ".join(compared["missing"])
    return f"Not every task has: {arms}." if arms else ""


def _plot_profiles(compared: Mapping[str, Any]) -> Figure:
    """Each arm's profile; the interval of the best alone, as more would hide each other."""
    figure = new_figure(8.0, 4.6)
    axes = figure.subplots()
    for arm, row in compared["arms"].items():
        profile = row["profile"]
        rows = [
            {"mean": mean, "low": low, "high": high}
            for mean, low, high in zip(*profile.values(), strict=True)
        ]
        band = arm == compared["best"]
        look = look_of(compared, arm)
        plot_curve(axes, 100 * THRESHOLDS, rows, label=arm, band=band, **look)
    axes.set_xlabel("score (%)")
    axes.set_ylabel("runs that score more (%)")
    axes.legend(fontsize="small", loc="lower left")
    set_title(axes, "Runs of all tasks that score above a threshold")
    set_note(figure, f"band: 95 % bootstrap interval of {compared['best']}")
    tidy(axes)
    return figure
