"""Rows of a log -> series of numbers that a figure shows: NumPy, float64, NaN for a gap."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def series(rows: Sequence[Mapping[str, Any]], key: str, scale: float = 1) -> np.ndarray:
    """[n] values of a metric times `scale`; NaN where a row has none."""
    values = [math.nan if row.get(key) is None else row[key] for row in rows]
    values = np.array(values, np.float64)
    return scale * np.where(np.isfinite(values), values, np.nan)


def has_values(rows: Sequence[Mapping[str, Any]], key: str) -> bool:
    """Whether some row has a number under `key`."""
    return bool(np.isfinite(series(rows, key)).any())


def smoothing_window(steps: int) -> int:
    """How many steps a smoothed curve averages; below 2 there are too few to smooth."""
    return steps // 20


def running_mean(values: Sequence[float], before: int, after: int = 0) -> np.ndarray:
    """[n] means of each value with up to `before` values before it and `after` values after it.

    NaN is left out of the means; NaN where there is nothing else.
    """
    means = np.full(len(values), np.nan)
    for i in range(len(values)):
        near = values[max(0, i - before) : i + after + 1]
        known = [value for value in near if not math.isnan(value)]
        if known:
            means[i] = math.fsum(known) / len(known)
    return means
