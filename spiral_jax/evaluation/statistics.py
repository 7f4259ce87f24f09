"""Counts, votes and values by problem -> exact scores with intervals. NumPy, float64."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Hashable, Sequence

import numpy as np

MOST_TRACES = 1000  # of a problem: with more, binomials leave float64
# keeps these draws apart from others that are made from the same seed
_BOOTSTRAP_STREAM = 0x626F6F74


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over problems with its 95 % interval. None: not defined with this many problems.

    Attributes:
      mean: None if count is 0.
      low: lower end of the bootstrap interval. None if count < 2.
      high: upper end.
      standard_error: over problems. None if count < 2.
      count: problems that have a value.
    """

    mean: float | None
    low: float | None
    high: float | None
    standard_error: float | None
    count: int


def pass_at_k(correct: np.ndarray, n: np.ndarray | int, k: int) -> np.ndarray:
    """The chance that k of n samples, drawn without replacement, hold a correct one.

    1 - C(n - c, k) / C(n, k), unbiased for pass@k at any n >= k (Chen et al. 2021, arXiv
    2107.03374); computed as a product, so that nothing overflows.

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
        advice = "must be whole numbers; drop failed samples from both."
        raise ValueError(f"correct = {correct!r}, n = {n!r}: {advice}")
    if np.any(c < 0) or np.any(c > n):
        raise ValueError(f"correct = {correct!r}: must be between 0 and n = {n!r}.")
    if k < 1 or np.any(n < k):
        fewest = n.min(initial=np.inf)
        raise ValueError(
            f"k = {k!r}: must be between 1 and the fewest samples of a problem, {fewest:g}."
        )
    i = np.arange(k)
    missed = np.maximum((n - c)[..., None] - i, 0) / (n[..., None] - i)
    return 1 - missed.prod(axis=-1)


def majority_correct(classes: Sequence[Hashable | None], gold_class: Hashable) -> float:
    """The chance that a plurality vote over `classes` picks `gold_class`, ties broken uniformly.

    Args:
      classes: the verifier's equivalence class of each candidate's answer; None where none could be
        parsed. None has no vote: one parsed answer beats any number of them.
      gold_class: the class of the reference answer.

    Returns:
      1 / (number of tied winners) if `gold_class` is one of them, else 0; 0 if nothing could be
      parsed.

    Raises:
      ValueError: there are no candidates.
    """
    if not classes:
        raise ValueError(
            "classes = []: a vote needs at least one candidate; "
            "leave such problems out and count them."
        )
    votes = collections.Counter(answer for answer in classes if answer is not None)
    most = max(votes.values(), default=0)
    winners = [answer for answer, count in votes.items() if count == most]
    return 1 / len(winners) if gold_class in winners else 0.0


def majority_at_k(correct: int, wrong: Sequence[int], unparsed: int) -> np.ndarray:
    """The chance that a plurality vote among k of n samples is right, for k = 1..n.

    The k samples are drawn without replacement, ties are split evenly. Exact: where j correct
    samples are drawn, the vote can be won if every wrong class has at most j of the others, and
    with t classes at exactly j it is won with chance 1 / (t + 1), so

        maj@k = sum_j C(c, j) sum_t W_j(k - j, t) / (t + 1) / C(n, k)

    where W_j(s, t) counts the ways to draw s other samples with at most j of a class and exactly t
    classes at j. It is the coefficient of x^s y^t in

        (1 + x)^f  prod_i ( sum_{m < j} C(w_i, m) x^m + C(w_i, j) x^j y )

    over the classes of w_i >= j samples. The f other samples (smaller classes, which cannot reach
    j, and unparsed ones, which have no vote but take a place) are one factor together, so at most
    n / j classes are multiplied out.

    Args:
      correct: c, samples in the correct class.
      wrong: sizes of the wrong classes, each >= 1.
      unparsed: samples without an answer.

    Returns:
      float64 [n], n = correct + sum(wrong) + unparsed; entry k - 1 belongs to k. Relative error
      about n * 1e-16.

    Raises:
      ValueError: n is 0 or above `MOST_TRACES`, or a count is out of range.
    """
    n = correct + sum(wrong) + unparsed
    if not 1 <= n <= MOST_TRACES or min(correct, unparsed, 0) < 0 or min(wrong, default=1) < 1:
        raise ValueError(
            f"correct = {correct}, wrong = {list(wrong)}, unparsed = {unparsed}: counts must be "
            f">= 0 (classes >= 1) and add up to between 1 and {MOST_TRACES}."
        )
    won = np.zeros(n + 1)  # how many k-subsets win, by k; ties count by their chance
    for j in range(1, correct + 1):
        large = [count for count in wrong if count >= j]
        ways = _ways_below(j, large, free=n - correct - sum(large), n=n)
        won_by_others = (ways / np.arange(1, len(large) + 2)[:, None]).sum(axis=0)
        won[j:] += _binomials(correct)[j] * won_by_others[: n + 1 - j]
    return (won / _binomials(n))[1:]


def _ways_below(j: int, large: Sequence[int], free: int, n: int) -> np.ndarray:
    """W_j of `majority_at_k`: float64 [t, s], for t = 0..len(large) and s = 0..n."""
    ways = np.zeros((len(large) + 1, n + 1))
    ways[0, : free + 1] = _binomials(free)
    for count in large:
        choices = _binomials(count)
        longer = np.zeros_like(ways)
        for m in range(j):  # m of this class: fewer than j
            longer[:, m:] += choices[m] * ways[:, : n + 1 - m]
        longer[1:, j:] += choices[j] * ways[:-1, : n + 1 - j]  # j of it: one more class at j
        ways = longer
    return ways


def longest_of_k(lengths: Sequence[float] | np.ndarray) -> np.ndarray:
    """The mean of the longest among k of n samples, drawn without replacement, for k = 1..n.

    The critical path of k traces that run side by side: sum_i C(i-1, k-1) / C(n, k) l_(i) over the
    ascending order.

    Returns:
      float64 [n].

    Raises:
      ValueError: not one-dimensional, or not between 1 and `MOST_TRACES` of them.
    """
    ordered = np.sort(np.asarray(lengths, np.float64))
    if ordered.ndim != 1 or not 1 <= len(ordered) <= MOST_TRACES:
        shape = np.shape(lengths)
        raise ValueError(f"lengths has shape {shape}: must be [n] with n from 1 to {MOST_TRACES}.")
    return _longest_weights(len(ordered)) @ ordered


@functools.lru_cache(maxsize=8)
def _longest_weights(n: int) -> np.ndarray:
    """[k - 1, i - 1]: the chance that the i-th smallest is the longest of k."""
    weights = np.zeros((n, n))
    for i in range(1, n + 1):
        weights[:i, i - 1] = _binomials(i - 1)
    return weights / _binomials(n)[1:, None]


@functools.lru_cache(maxsize=4096)
def _binomials(n: int) -> np.ndarray:
    """C(n, 0..n) as float64 [n + 1]."""
    return np.array([math.comb(n, k) for k in range(n + 1)], np.float64)


def answer_entropy(classes: Sequence[Hashable | None]) -> float:
    """Entropy in nats of the shares of answer classes among parsed answers (not None).

    0: all agree; log(number of answers): all differ; NaN: none was parsed. The plug-in estimate,
    biased downwards.
    """
    counts = collections.Counter(answer for answer in classes if answer is not None)
    if not counts:
        return math.nan
    shares = np.array(list(counts.values()), float) / counts.total()
    return float(-(shares * np.log(shares)).sum()) + 0.0  # no -0.0


def bootstrap_weights(seed: int, problems: int, draws: int) -> np.ndarray:
    """How often each problem is drawn in each of `draws` resamples of as many problems.

    One array for all measures, and for both sides of a comparison, makes their resamples the same:
    paired. From PCG64's raw words, whose stream NumPy keeps fixed between versions.

    Returns:
      float64 [R, B].
    """
    stream = np.random.PCG64(np.random.SeedSequence((seed, _BOOTSTRAP_STREAM)))
    words = stream.random_raw(draws * problems)
    drawn_RxB = (words % np.uint64(problems)).astype(np.int64).reshape(draws, problems)
    cells_RxB = drawn_RxB + problems * np.arange(draws)[:, None]
    counts = np.bincount(cells_RxB.ravel(), minlength=draws * problems)
    return counts.reshape(draws, problems).astype(np.float64)


def ratios_and_intervals(
    total_BxQ: np.ndarray, count_BxQ: np.ndarray, weight_RxB: np.ndarray
) -> list[Estimate]:
    """Sum of totals / sum of counts over problems, for each of Q measures, with its 95 % interval.

    With counts of 1 (0 where a problem has no value) this is the mean over problems and its
    ordinary standard error sd / sqrt(count). Other counts make it a ratio of sums, such as a rate
    among sets of a certain kind; its standard error is that of the linearised ratio.

    Args:
      total_BxQ: finite; 0 where the count is 0.
      count_BxQ: >= 0.
      weight_RxB: of `bootstrap_weights`; the interval is from the 2.5th to the 97.5th percentile of
        its resamples, those without any count left out.
    """
    sums_Q, counts_Q = total_BxQ.sum(axis=0), count_BxQ.sum(axis=0)
    problems_Q = (count_BxQ > 0).sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_Q = sums_Q / counts_Q
        spread_Q = ((total_BxQ - mean_Q * count_BxQ) ** 2).sum(axis=0)
        error_Q = np.sqrt(spread_Q * problems_Q / (problems_Q - 1)) / counts_Q
        resampled_RxQ = (weight_RxB @ total_BxQ) / (weight_RxB @ count_BxQ)
    estimates = []
    for q, problems in enumerate(problems_Q.tolist()):
        mean = float(mean_Q[q]) if problems else None
        if problems < 2:
            estimates.append(Estimate(mean, None, None, None, problems))
            continue
        low, high = np.nanpercentile(resampled_RxQ[:, q], (2.5, 97.5))
        estimates.append(Estimate(mean, float(low), float(high), float(error_Q[q]), problems))
    return estimates


def mean_and_interval(values_B: Sequence[float] | np.ndarray, weight_RxB: np.ndarray) -> Estimate:
    """Mean over problems and its 95 % interval, as `ratios_and_intervals` of one measure.

    Args:
      values_B: one number a problem; NaN = our own failure, left out (`count` says how many
        remain).

    Raises:
      ValueError: not one-dimensional.
    """
    values_B = np.asarray(values_B, np.float64)
    if values_B.ndim != 1:
        advice = "must be one number a problem; average samples first."
        raise ValueError(f"values_B has shape {values_B.shape}: {advice}")
    known_B = ~np.isnan(values_B)
    total_Bx1, count_Bx1 = np.where(known_B, values_B, 0.0)[:, None], known_B[:, None].astype(float)
    (estimate,) = ratios_and_intervals(total_Bx1, count_Bx1, weight_RxB)
    return estimate
