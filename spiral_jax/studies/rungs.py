"""How well a training is under way, for a sweep that gives up what does not get better."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from spiral_jax.studies.design import Experiment
from spiral_jax.studies.directory import StudyDirectory

RUNGS = 10  # parts of a training, by what it may spend
GIVEN_UP = "given up"  # state of an arm that was ended on the way

GivesUp = Callable[[int, float], bool]  # (rung, reward there) -> whether the training is ended


def rewards_of_rungs(
    experiment: Experiment, steps: Sequence[Mapping[str, Any]]
) -> list[float | None]:
    """The mean training reward of each rung that is done; None: no step has ended in it.

    It is that of aggregations, or of search where there are none.

    Args:
      steps: rows of the run's metrics, so far.
    """
    reward = "reward/aggregated" if experiment.aggregates else "reward/search"
    of_rung: list[list[float]] = [[] for _ in range(RUNGS)]
    for step, row in enumerate(steps, start=1):
        if reward in row:
            rung = int(RUNGS * experiment.share_done(steps[:step]))
            of_rung[min(rung, RUNGS - 1)].append(row[reward])
    done = of_rung[: int(RUNGS * experiment.share_done(steps))]
    return [float(np.mean(rewards)) if rewards else None for rewards in done]


class Watch:
    """Asked again and again, it says whether to end a run that is under way.

    Attributes:
      given_up: whether it has said so.
    """

    def __init__(
        self,
        directory: StudyDirectory,
        arm: str,
        seed: int,
        experiment: Experiment,
        gives_up: GivesUp,
    ):
        self._steps = lambda: directory.metrics(arm, seed)
        self._experiment, self._gives_up = experiment, gives_up
        self._told = 0  # rungs that `gives_up` knows
        self.given_up = False

    def __call__(self) -> bool:
        rewards = rewards_of_rungs(self._experiment, self._steps())
        for rung in range(self._told, len(rewards)):
            self._told = rung + 1
            if rewards[rung] is not None and self._gives_up(rung, rewards[rung]):
                self.given_up = True
                break
        return self.given_up
