"""The reason of an advantage, in words and numbers, from how many traces are right: exact
fractions, no floats.

A second way to the numbers of `objective.advantages`: what the page says can be checked against
what was trained on. A set's score is right / verified aggregations of it, None without a verified
one.
"""

from __future__ import annotations

import dataclasses
import math
import string
from collections.abc import Sequence
from fractions import Fraction


@dataclasses.dataclass(frozen=True)
class Reason:
    """An advantage before the length gate and why it is what it is; `value` is None where there are
    no words for it.
    """

    value: float | None
    words: str


@dataclasses.dataclass(frozen=True)
class Score:
    """One set's aggregations: `right` of `verified` are right."""

    right: int
    verified: int

    @property
    def share(self) -> Fraction | None:
        return Fraction(self.right, self.verified) if self.verified else None

    def __str__(self) -> str:
        return f"{self.right}/{self.verified}"


def set_name(k: int, round: int = 1) -> str:
    """A, B, ... Z, then A1, B1, ...: what pages call set k; A', B', ... those of the second round,
    and so on.
    """
    letter, again = string.ascii_uppercase[k % 26], k // 26
    return f"{letter}{again or ''}" + "'" * (round - 1)


def explain_search(
    estimator: str,
    trace: int,
    member_KxS: Sequence[Sequence[int]],
    scores: Sequence[Score],
    names: Sequence[str],
) -> Reason:
    """Why a trace has the advantage of being read, under an estimator over drawn sets; else see
    `explain_own`.

    Args:
      trace: which of the traces that the round reads.
      member_KxS, scores, names: of the sets of that round.
    """
    if estimator == "aggregator_only":
        return Reason(0.0, "aggregator_only trains no traces for being read: 0.")
    if estimator not in ("marginal_mean", "with_without", "disjoint_sets"):
        return _without_words(estimator)
    valid = [k for k, score in enumerate(scores) if score.verified]
    inside = [k for k in valid if trace in member_KxS[k]]
    if not inside:
        return Reason(0.0, "It is in no set that was scored: nothing says what it is worth, 0.")
    if estimator != "with_without":
        others, name = valid, "all sets"
    else:
        others, name = [k for k in valid if k not in inside], "sets without it"
        if not others:
            return Reason(
                0.0, "It is in every set that was scored: there is nothing to compare them with, 0."
            )
    with_it, reference = _mean(inside, scores), _mean(others, scores)
    words = (
        f"Mean score of sets with it {_decimal(with_it)} ({_listed(inside, scores, names)}), "
        f"of {name} {_decimal(reference)} ({_listed(others, scores, names)}): {_signed(with_it - reference)}."
    )
    return Reason(float(with_it - reference), words)


def explain_own(estimator: str, reward: float | None, score: Score, set_size: int) -> Reason:
    """Why a search trace has its advantage under an estimator of `OWN_CORRECTNESS`.

    Args:
      reward: its own correctness, 0 or 1; None: our failure.
      score: right and verified ones of its problem's N traces.
      set_size: S.
    """
    if reward is None:
        return Reason(0.0, _NOT_VERIFIED)
    if score.right in (0, score.verified):
        return Reason(0.0, f"All verified traces have reward {reward:g}: 0.")
    of_all = f"{score.right} of {score.verified} traces are right"
    if estimator == "paragator":
        return _explain_pass_at_k(reward, score, set_size, of_all)
    if estimator == "pkpo":
        return _explain_max_at_k(reward, score, set_size, of_all)
    mean = score.share
    if estimator == "grpo":
        std = math.sqrt(mean * (1 - mean))  # of zeros and ones, over the population
        value = float(Fraction(reward) - mean) / (std + 1e-6)
        words = (
            f"{of_all}: mean {_decimal(mean)}, standard deviation {std:.3f}. "
            f"Its reward {reward:g}: ({reward:g} - {_decimal(mean)}) / {std:.3f} = {_signed(value)}."
        )
        return Reason(value, words)
    if estimator == "rloo":
        mean, of_all = (
            Fraction(score.right - int(reward), score.verified - 1),
            f"{of_all}, of the others",
        )
    value = Fraction(reward) - mean
    return Reason(
        float(value),
        f"{of_all}: mean {_decimal(mean)}. Its reward {reward:g} - it = {_signed(value)}.",
    )


OWN_CORRECTNESS = ("grpo", "grpo_nostd", "rloo", "online_multitask", "paragator", "pkpo")


def _explain_pass_at_k(reward: float, score: Score, k: int, of_all: str) -> Reason:
    """`own_advantages.pass_at_k`."""
    n, wrong = score.verified, score.verified - score.right
    if n <= k:
        return Reason(
            0.0, f"There is one set of {k} at most, which has nothing to be compared with: 0."
        )
    missed = Fraction(math.comb(wrong, k), math.comb(n, k))
    own = Fraction(0) if reward else Fraction(math.comb(wrong - 1, k - 1), math.comb(n - 1, k - 1))
    words = (
        f"{of_all}: of all sets of {k} a share of {_decimal(missed)} has no right one, of those with this trace "
        f"{_decimal(own)}: {_signed(missed - own)}."
    )
    return Reason(float(missed - own), words)


def _explain_max_at_k(reward: float, score: Score, k: int, of_all: str) -> Reason:
    """`own_advantages.max_at_k`."""
    n, wrong = score.verified, score.verified - score.right
    if n < k or not reward:
        return Reason(0.0, f"{of_all}. No set of {k} is solved because of it: 0.")
    value = Fraction(math.comb(wrong, k - 1), math.comb(n, k))
    words = f"{of_all}: it is the only right one in a share of {_decimal(value)} of all sets of {k}: {_signed(value)}."
    return Reason(float(value), words)


def explain_aggregation(reward: float | None, score: Score) -> Reason:
    """Why an aggregation trace has its advantage, which is the same under all estimators; `score`
    is its set's.
    """
    if reward is None:
        return Reason(0.0, _NOT_VERIFIED)
    value = Fraction(reward) - score.share
    words = (
        f"{score.right} of the set's {score.verified} aggregations are right. "
        f"Its reward {reward:g} - their mean {_decimal(score.share)} = {_signed(value)}."
    )
    return Reason(float(value), words)


_NOT_VERIFIED = "It could not be verified, which is our failure: it is in no mean, 0."


def _without_words(estimator: str) -> Reason:
    return Reason(
        None, f"loss.estimator = {estimator} is not explained here; the number is the logged one."
    )


def _mean(sets: Sequence[int], scores: Sequence[Score]) -> Fraction:
    return sum((scores[k].share for k in sets), Fraction(0)) / len(sets)


def _listed(sets: Sequence[int], scores: Sequence[Score], names: Sequence[str]) -> str:
    return ", ".join(f"{names[k]} {scores[k]}" for k in sets)


def _decimal(value: Fraction) -> str:
    return f"{float(value):.3f}"


def _signed(value: Fraction | float) -> str:
    return f"{float(value):+.3f}" if value else "0"
