"""Evaluation estimators: counts, votes and per-problem values -> exact scores with intervals. NumPy, float64."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over problems with its 95 % normal interval. None: not defined with this many problems.

    Attributes:
      mean: None if count is 0.
      low: mean - 1.96 standard errors; not clipped to [0, 1]. None if count < 2.
      high: mean + 1.96 standard errors.
      standard_error: sd / sqrt(count), sd with ddof = 1. None if count < 2.
      count: problems that have a value.
    """

    mean: float | None
    low: float | None
    high: float | None
    standard_error: float | None
    count: int


def pass_at_k(correct: np.ndarray, n: np.ndarray | int, k: int) -> np.ndarray:
    """The chance that k of n samples, drawn without replacement, hold a correct one: 1 - C(n-c, k) / C(n, k).

    Unbiased for pass@k at any n >= k (Chen et al. 2021, arXiv 2107.03374); as a product, so that nothing overflows.

    Args:
      correct: c, correct samples of each problem, integers in any shape.
      n: samples of each problem; one integer or the shape of `correct`.
      k: samples of one attempt.

    Returns:
      float64 in [0, 1], in the shape of `correct`.

    Raises:
      ValueError: `correct` or `n` is not whole, or not 0 <= correct <= n, or not 1 <= k <= n.
    """
    c, n = np.broadcast_arrays(np.asarray(correct, np.float64), np.asarray(n, np.float64))
    if not (np.all(c == np.round(c)) and np.all(n == np.round(n))):  # NaN is not whole either
        raise ValueError(f"correct = {correct!r}, n = {n!r}: must be whole numbers; drop failed samples from both.")
    if np.any(c < 0) or np.any(c > n):
        raise ValueError(f"correct = {correct!r}: must be between 0 and n = {n!r}.")
    if k < 1 or np.any(n < k):
        raise ValueError(
            f"k = {k!r}: must be between 1 and the fewest samples of a problem, {n.min(initial=np.inf):g}."
        )
    i = np.arange(k)
    missed = np.maximum((n - c)[..., None] - i, 0) / (n[..., None] - i)
    return 1 - missed.prod(axis=-1)


def majority_correct(classes: list[str | None], gold_class: str) -> float:
    """The chance that a plurality vote over `classes` picks `gold_class`, ties broken uniformly.

    Args:
      classes: the verifier's equivalence class of each candidate's answer; None where none could be parsed. None has
        no vote: one parsed answer beats any number of them.
      gold_class: the class of the reference answer.

    Returns:
      1 / (number of tied winners) if `gold_class` is one of them, else 0; 0 if nothing could be parsed.

    Raises:
      ValueError: there are no candidates.
    """
    if not classes:
        raise ValueError("classes = []: a vote needs at least one candidate; leave such problems out and count them.")
    votes = collections.Counter(answer for answer in classes if answer is not None)
    most = max(votes.values(), default=0)
    winners = [answer for answer, count in votes.items() if count == most]
    return 1 / len(winners) if gold_class in winners else 0.0


def mean_and_interval(values_B: np.ndarray) -> Estimate:
    """Mean over problems and its 95 % interval, mean -+ 1.96 * sd / sqrt(count), sd with ddof = 1.

    The interval is for new problems: samples of one problem must be averaged before. It collapses when all values are
    equal, so it says little near 0 and 1.

    Args:
      values_B: one number a problem; NaN = our own failure, left out (`count` says how many remain).

    Raises:
      ValueError: not one-dimensional.
    """
    values_B = np.asarray(values_B, np.float64)
    if values_B.ndim != 1:
        raise ValueError(f"values_B has shape {values_B.shape}: must be one number a problem; average samples first.")
    values = values_B[~np.isnan(values_B)]
    if len(values) == 0:
        return Estimate(None, None, None, None, 0)
    mean = float(values.mean())
    if len(values) == 1:
        return Estimate(mean, None, None, None, 1)
    error = float(values.std(ddof=1) / np.sqrt(len(values)))
    return Estimate(mean, mean - 1.96 * error, mean + 1.96 * error, error, len(values))
