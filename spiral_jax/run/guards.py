"""Bad numbers: steps that were skipped because they were not finite, and values far from those of
the last steps.
"""

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

SKIPPED = "skipped_update"  # metric of the train step: 1 where loss or gradient was not finite
WATCHED = ("grad_norm", "loss/search", "loss/aggregation")
# an on-policy loss is a sum that is zero but for rounding: nothing this close to the median is a
# spike
_NOISE = 1e-5
_WINDOW, _LEAST = 32, 8  # steps whose median is compared with, and how many there must be


class BadSteps(UserError):
    """Too many steps in a row without a finite loss or gradient; names the file of the last batch."""


class Mismatch(UserError):
    """Sampler and trainer give different log-probs for the same policy."""


def watched(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `NumericsGuard` needs of the rows of metrics.jsonl."""
    return [{name: row.get(name) for name in (*WATCHED, SKIPPED)} for row in rows]


class NumericsGuard:
    """Counts bad steps in a row, and flags spikes. All it knows are the rows of metrics.jsonl, so a
    resume changes nothing.

    Args:
      max_bad_steps: config.train.max_bad_steps.
      spike: config.train.spike; 0 = off.
      rows: `watched` metrics of the steps that are done.
    """

    def __init__(self, max_bad_steps: int, spike: float, rows: Iterable[dict[str, Any]]):
        self._max_bad_steps, self._spike = max_bad_steps, spike
        self._values: dict[str, list[float]] = {name: [] for name in WATCHED}
        self.bad_in_a_row = 0
        for row in rows:
            self._take(row)

    def check(self, step: int, metrics: dict[str, Any]) -> dict[str, float]:
        """Takes in a step; returns its flags `spike/NAME`, 0 or 1, and prints a line for what is
        wrong with it.
        """
        flags = {}
        for name in [name for name in WATCHED if name in metrics]:
            flags[f"spike/{name}"] = float(self._is_spike(name, metrics))
            if flags[f"spike/{name}"]:
                middle = statistics.median(self._values[name])
                print(
                    f"warning: step {step}: {name} = {metrics[name]:.4g}, the median is {middle:.4g}.",
                    flush=True,
                )
        self._take(metrics)
        if self.bad_in_a_row:
            print(
                f"warning: step {step}: loss or gradient is not finite. The update was skipped ({self.bad_in_a_row} in "
                f"a row; config.train.max_bad_steps = {self._max_bad_steps} end the run).", flush=True,
            )  # fmt: skip
        return flags

    def check_bad_steps(self, workdir: pathlib.Path, step: int, batch: Batch) -> None:
        """Ends the run after `max_bad_steps` bad steps in a row; the batch of the last is written
        to `workdir` first.

        Raises:
          BadSteps: with the file's path.
        """
        if self.bad_in_a_row < self._max_bad_steps:
            return
        path = workdir / f"bad_step_{step:06d}.npz"
        if distributed.is_first():
            np.savez_compressed(path, **batch_arrays(batch))
        raise BadSteps(
            f"{self.bad_in_a_row} steps in a row without a finite loss or gradient, the last one step {step}; no "
            f"update was made of them. Its batch is in {path} (names as in groups.py). If a log-prob in it is "
            "not finite, the sampler is at fault; else try a smaller optimizer.lr, optimizer.clip_norm, or float32 "
            "(model.compute_dtype), and resume with --config.resume.allow naming what you change."
        )

    def _take(self, row: dict[str, Any]) -> None:
        self.bad_in_a_row = self.bad_in_a_row + 1 if row.get(SKIPPED) else 0
        for name, values in self._values.items():
            value = row.get(name)
            if value is not None and math.isfinite(value):
                values.append(value)
                del values[:-_WINDOW]

    def _is_spike(self, name: str, metrics: dict[str, Any]) -> bool:
        """Further from the median than `spike` median absolute deviations; a gradient norm only
        upwards.
        """
        values, value = self._values[name], metrics[name]
        if not self._spike or len(values) < _LEAST or value is None or not math.isfinite(value):
            return False
        middle = statistics.median(values)
        deviation = statistics.median([abs(x - middle) for x in values])
        distance = value - middle if name == "grad_norm" else abs(value - middle)
        return distance > self._spike * deviation > 0 and distance > _NOISE


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


def batch_arrays(batch: Batch) -> dict[str, np.ndarray]:
    """A batch as plain arrays, none of which needs pickle.

    They are `ROLE/FIELD`, weights, and the problems' ids and cursors.
    """
    arrays = {
        "problem_B": np.array([problem.id for problem in batch.rollouts.problems]),
        "cursor_B": batch.rollouts.cursor_B,
    }
    for role, (groups, weight_UxC) in batch.roles.items():
        fields = {name: getattr(groups, name) for name in vars(groups) if name != "requests"}
        for name in ("prompt_UxP", "prompt_len_U", "id_Ux6"):
            fields[name] = getattr(groups.requests, name)
        fields["weight_UxC"] = weight_UxC
        for name, value in fields.items():
            if value is not None:
                arrays[f"{role.label}/{name}"] = np.asarray(value)
    return arrays
