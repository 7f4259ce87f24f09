"""Where each run of a study had spent the same operations: its second reading.

The arms of a study spend the same sampled tokens. Their operations differ: aggregation prompts are
read but not sampled, and arms train on more or fewer of their traces. So each run is read a second
time, at its newest checkpoint that had spent no more than one budget, common to all runs.
Operations are those that a step's metrics count, `tflop/sampling`, prefill included, and
`tflop/update`.

The budget is the least that a run of the study's first seed has spent in all, of those that ended
where their experiment does: one that failed early, as for want of a signal, does not set it. Of the
first seed alone, so that it is known as soon as every arm has been run with that seed, and later
seeds change neither it nor what was read before. A run that ended below the budget is read at its
end.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from spiral_jax.studies.design import BASE, Study
from spiral_jax.studies.directory import StudyDirectory


class State(enum.Enum):
    """What has become of a training: it is not over, ended where its experiment does, or failed."""

    OPEN = enum.auto()
    ENDED = enum.auto()
    FAILED = enum.auto()


class Spending(NamedTuple):
    """What a run has spent.

    Attributes:
      tflop_S: [1 + steps] float64, 10^12 operations up to each step; None: they were not counted.
      kept: steps that can be read.
    """

    arm: str
    seed: int
    state: State
    tflop_S: np.ndarray | None
    kept: frozenset[int]


class Budget(NamedTuple):
    """10^12 operations, and the run that has set them."""

    tflop: float
    arm: str
    seed: int


class Reading(NamedTuple):
    """Where a run that is over is read.

    Attributes:
      step: None: nowhere.
      tflop: 10^12 operations up to there.
      why_not: of step = None.
    """

    arm: str
    seed: int
    step: int | None
    tflop: float | None
    why_not: str = ""


class Readings(NamedTuple):
    """Where all runs are read.

    Attributes:
      budget: None: not known yet.
      waits_for: what it would take to know it.
    """

    budget: Budget | None
    waits_for: list[str]
    rows: list[Reading]


def find_readings(study: Study, directory: StudyDirectory) -> Readings:
    """Budget and readings, from what the runs' metrics say by now."""
    trained = [(arm, seed) for arm, seed in study.runs if arm != BASE]
    spendings = [_spending(study, directory, arm, seed) for arm, seed in trained]
    listed = {arm: seeds for arm, seeds in study.listed if arm != BASE}  # none of a sweep
    first_seed = min((min(seeds) for seeds in listed.values()), default=0)
    first = [run for run in spendings if run.seed == first_seed and run.arm in listed]
    budget, waits_for = find_budget(first)
    rows = []
    if budget is not None:
        rows = [read_within(run, budget) for run in spendings if run.state is not State.OPEN]
    return Readings(budget, waits_for, rows)


def find_budget(first: Sequence[Spending]) -> tuple[Budget | None, list[str]]:
    """The budget, of the runs of the first seed; or None, and what it would take to know it."""
    ended = [run for run in first if run.state is State.ENDED]
    waits_for = [
        *(f"{run.arm} seed {run.seed} is not over" for run in first if run.state is State.OPEN),
        *(
            f"{run.arm} seed {run.seed} has not counted its operations"
            for run in ended
            if run.tflop_S is None
        ),
    ]
    if not ended and not waits_for:
        waits_for = ["no run of the first seed has ended where its experiment does"]
    if waits_for:
        return None, waits_for
    least = min(ended, key=lambda run: run.tflop_S[-1])
    return Budget(float(least.tflop_S[-1]), least.arm, least.seed), []


def read_within(run: Spending, budget: Budget) -> Reading:
    """The newest step of a run that can be read and had spent no more than the budget."""
    if run.tflop_S is None:
        return Reading(run.arm, run.seed, None, None, "it has not counted its operations")
    spent = {step: float(run.tflop_S[step]) for step in run.kept if step < len(run.tflop_S)}
    within = [step for step in spent if spent[step] <= budget.tflop]
    if not within:
        return Reading(run.arm, run.seed, None, None, "no checkpoint of it is within the budget")
    return Reading(run.arm, run.seed, max(within), spent[max(within)])


def spent_by_step(steps: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
    """[1 + steps] float64: 10^12 operations of a run up to each step, from 0 on.

    None of runs that have not counted them, or not from their first step on.
    """
    if any("tflop/update" not in step for step in steps):
        return None
    return np.cumsum([0.0, *(step["tflop/sampling"] + step["tflop/update"] for step in steps)])


def kept_steps(checkpoint: Mapping[str, int], steps: int) -> set[int]:
    """Steps up to `steps` whose checkpoints stay for good, by config.checkpoint."""
    every, keep_every = checkpoint["every"], checkpoint["keep_every"]
    if not every or not keep_every:
        return set()
    return {step for step in range(every, steps + 1, every) if step % keep_every == 0}


def _spending(study: Study, directory: StudyDirectory, arm: str, seed: int) -> Spending:
    steps, experiment = directory.metrics(arm, seed), study.experiments[arm]
    kept = kept_steps(experiment.plain["checkpoint"], len(steps))
    kept |= directory.evaluated_steps(arm, seed)
    state = State.OPEN
    if experiment.has_ended(steps):
        state, kept = State.ENDED, kept | {len(steps)}
    elif "train" in directory.errors(arm, seed):
        state = State.FAILED
    return Spending(arm, seed, state, spent_by_step(steps), frozenset(kept))
