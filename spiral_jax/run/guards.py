"""Bad numbers: steps skipped because they were not finite, and values far from the last ones."""

from __future__ import annotations

import math
import pathlib
import statistics
from collections.abc import Iterable
from typing import Any

import numpy as np

from spiral_jax.core import distributed
from spiral_jax.core.errors import UserError
from spiral_jax.rollout.collect import Batch
from spiral_jax.verifier.rewards import Verdict

SKIPPED = "skipped_update"  # metric of the train step: 1 where loss or gradient was not finite
WATCHED = ("grad_norm", "loss/search", "loss/aggregation")
# Where traces are equally long, an on-policy loss is zero but for rounding: this close to the
# median, nothing is a spike.
_NOISE = 1e-5
_WINDOW, _LEAST = 32, 8  # steps that make the median, and how many there must be


class BadSteps(UserError):
    """Too many steps in a row without a finite loss or gradient; names the last batch's file."""


class Mismatch(UserError):
    """Sampler and trainer give different log-probs for the same policy."""


def watched_metrics(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `NumericsGuard` needs of the rows of metrics.jsonl."""
    return [{name: row.get(name) for name in (*WATCHED, SKIPPED)} for row in rows]


class NumericsGuard:
    """Counts bad steps in a row, and flags spikes.

    All it knows are the rows of metrics.jsonl, so a resume changes nothing.

    Args:
      max_bad_steps: config.train.max_bad_steps.
      spike: config.train.spike; 0 = off.
      rows: `watched_metrics` of the steps that are done.
    """

    def __init__(self, max_bad_steps: int, spike: float, rows: Iterable[dict[str, Any]]):
        self._max_bad_steps, self._spike = max_bad_steps, spike
        self._values: dict[str, list[float]] = {name: [] for name in WATCHED}
        self.bad_in_a_row = 0
        for row in rows:
            self._take(row)

    def check(self, step: int, metrics: dict[str, Any]) -> dict[str, float]:
        """Takes in a step and prints a line for each thing that is wrong with it.

        Returns:
          its flags `spike/NAME`, 0 or 1.
        """
        flags = {}
        for name, values in self._values.items():
            if name not in metrics:
                continue
            is_spike = self._is_spike(name, metrics[name])
            flags[f"spike/{name}"] = float(is_spike)
            if is_spike:
                print(
                    f"warning: step {step}: {name} = {metrics[name]:.4g}, the median is "
                    f"{statistics.median(values):.4g}.",
                    flush=True,
                )
        self._take(metrics)
        if self.bad_in_a_row:
            print(
                f"warning: step {step}: loss or gradient is not finite. The update was skipped "
                f"({self.bad_in_a_row} in a row; config.train.max_bad_steps = "
                f"{self._max_bad_steps} end the run).",
                flush=True,
            )
        return flags

    def check_bad_steps(self, workdir: pathlib.Path, step: int, batch: Batch) -> None:
        """Ends the run after `max_bad_steps` bad steps in a row.

        The batch of the last one is written to `workdir` first.

        Raises:
          BadSteps: with the file's path.
        """
        if self.bad_in_a_row < self._max_bad_steps:
            return
        path = workdir / f"bad_step_{step:06d}.npz"
        if distributed.is_first():
            np.savez_compressed(path, **_batch_arrays(batch))
        raise BadSteps(
            f"{self.bad_in_a_row} steps in a row without a finite loss or gradient, the last one "
            f"step {step}; no update was made of them. Its batch is in {path} (names as in "
            "core/groups.py). If a log-prob in it is not finite, the sampler is at fault; else try "
            "a smaller optimizer.lr, optimizer.clip_norm, or float32 (model.compute_dtype), and "
            "resume with --config.resume.allow naming what you change."
        )

    def _take(self, row: dict[str, Any]) -> None:
        self.bad_in_a_row = self.bad_in_a_row + 1 if row.get(SKIPPED) else 0
        for name, values in self._values.items():
            if _is_finite(row.get(name)):
                values.append(row[name])
                del values[:-_WINDOW]

    def _is_spike(self, name: str, value: float | None) -> bool:
        """Whether it is further from the median than `spike` median absolute deviations.

        A gradient norm only upwards.
        """
        values = self._values[name]
        if not self._spike or len(values) < _LEAST or not _is_finite(value):
            return False
        median = statistics.median(values)
        deviation = statistics.median([abs(x - median) for x in values])
        distance = value - median if name == "grad_norm" else abs(value - median)
        return distance > self._spike * deviation > 0 and distance > _NOISE


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def check_mismatch(step: int, metrics: dict[str, Any], limit: float) -> None:
    """At the first step sampler and trainer run the same policy: more than rounding is a bug.

    Args:
      limit: config.train.mismatch_limit; 0 = off.

    Raises:
      Mismatch: their log-probs differ by more.
    """
    worst = metrics["mismatch/max_abs_log_ratio"]
    if limit and step == 0 and not worst <= limit:  # NaN is no agreement
        raise Mismatch(
            f"sampler and trainer disagree at the first step: |log ratio| up to {worst:.2e} a "
            f"token, config.train.mismatch_limit = {limit:g}. Check model.compute_dtype (bfloat16 "
            "needs a wider limit)."
        )


def _batch_arrays(batch: Batch) -> dict[str, np.ndarray]:
    """A batch as plain arrays, none of which needs pickle.

    They are `ROLE/FIELD`, weights, and the problems' ids and cursors; a verdict is its status.
    """
    arrays = {
        "problem_B": np.array([problem.id for problem in batch.rollouts.problems]),
        "cursor_B": batch.rollouts.cursor_B,
    }
    for role, (groups, weight_UxC) in batch.roles.items():
        fields = vars(groups.requests) | vars(groups) | {"weight_UxC": weight_UxC}
        for name, value in fields.items():
            if name == "verdict_UxC" and value is not None:
                value = np.vectorize(_status, otypes=[str])(value)
            if isinstance(value, np.ndarray):
                arrays[f"{role.label}/{name}"] = value
    return arrays


def _status(verdict: Verdict) -> str:
    return verdict.status.value
