"""The reason of an advantage, in words and numbers, from how many traces are right: no floats.

A second way to the numbers of `of_sets` and `of_own_answers`, in exact fractions: what a page says
can be checked against what was trained on. Each function says why one trace has its advantage
before the length gate. No numpy, no jax: reports are read where neither is at hand.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction

_NOT_VERIFIED = "It could not be verified, which is our failure: it is in no mean, 0."


@dataclasses.dataclass(frozen=True)
class Reason:
    """An advantage before the length gate and why it is what it is; None: not known here."""

    value: float | None
    words: str


@dataclasses.dataclass(frozen=True)
class Score:
    """What the `verified` ones of some traces have earned.

    Attributes:
      total: the sum of their rewards: where those are 0 and 1, how many are right.
      squares: the sum of the squares; None: that of zeros and ones, which is `total`.
    """

    total: int | Fraction
    verified: int
    squares: int | Fraction | None = None

    @classmethod
    def of(cls, rewards: Sequence[float]) -> Score:
        exact = [Fraction(reward) for reward in rewards]
        return cls(sum(exact), len(exact), sum(reward * reward for reward in exact))

    @property
    def share(self) -> Fraction | None:
        """None where nothing was verified."""
        return Fraction(self.total) / self.verified if self.verified else None

    @property
    def variance(self) -> Fraction:
        """Over the population."""
        return Fraction(self._squares) / self.verified - self.share**2

    @property
    def counts_right(self) -> bool:
        """Whether every reward is 0 or 1."""
        return self._squares == self.total

    @property
    def _squares(self) -> int | Fraction:
        return self.total if self.squares is None else self.squares

    def in_words(self, traces: str) -> str:
        """Of `traces`, such as "traces"."""
        if self.counts_right:
            return f"{self.total} of {self.verified} {traces} are right"
        return f"{self.verified} {traces} have earned {float(self.total):.4g} together"

    def __str__(self) -> str:
        return f"{float(self.total):.4g}/{self.verified}"


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What is known of one trace that is read.

    Attributes:
      trace: its number among the candidates of the round that reads it.
      reward: its own, in [0, 1]; None: our failure.
      own: what all candidates have earned by themselves.
      set_size: S.
      member_KxS: which candidates each set of that round holds.
      scores: the aggregations of each set.
      names: what the page calls each set.
      own_N: the own rewards of all candidates; None: our failure.
      c: what the estimator has fitted on earlier steps; None: not known.
    """

    trace: int
    reward: float | None
    own: Score
    set_size: int
    member_KxS: Sequence[Sequence[int]] = ()
    scores: Sequence[Score] = ()
    names: Sequence[str] = ()
    own_N: Sequence[float | None] = ()
    c: float | None = None

    @property
    def own_words(self) -> str:
        return self.own.in_words("traces")

    def scored_sets(self) -> list[int]:
        return [k for k, score in enumerate(self.scores) if score.verified]

    def sets_with_it(self) -> list[int]:
        return [k for k in self.scored_sets() if self.trace in self.member_KxS[k]]

    def mean_score(self, sets: Sequence[int]) -> Fraction:
        return sum((self.scores[k].share for k in sets), Fraction(0)) / len(sets)

    def list_scores(self, sets: Sequence[int]) -> str:
        return ", ".join(f"{self.names[k]} {self.scores[k]}" for k in sets)


# --- being read, by the score of sets -------------------------------------------------------------


def no_words(evidence: Evidence) -> Reason:
    """Of estimators that need more than the counts of right traces."""
    del evidence
    return Reason(None, "This estimator is not explained here; the number is the logged one.")


def not_trained(evidence: Evidence) -> Reason:
    """Of estimators under which traces earn nothing for being read."""
    del evidence
    return Reason(0.0, "This estimator trains no traces for being read: 0.")


def stale(evidence: Evidence) -> Reason:
    """Of traces of earlier steps, under every estimator."""
    del evidence
    return Reason(0.0, "It was sampled in an earlier step: it is read, and not trained on, 0.")


def against_all_sets(evidence: Evidence) -> Reason:
    """`of_sets.marginal_mean`."""
    return _against(evidence, evidence.scored_sets(), "all sets")


def against_sets_without(evidence: Evidence) -> Reason:
    """`of_sets.with_without`."""
    with_it = evidence.sets_with_it()
    without = [k for k in evidence.scored_sets() if k not in with_it]
    if with_it and not without:
        words = "It is in every set that was scored: there is nothing to compare them with, 0."
        return Reason(0.0, words)
    return _against(evidence, without, "sets without it")


def _against(evidence: Evidence, others: list[int], others_name: str) -> Reason:
    with_it = evidence.sets_with_it()
    if not with_it:
        return Reason(0.0, "It is in no set that was scored: nothing says what it is worth, 0.")
    score, reference = evidence.mean_score(with_it), evidence.mean_score(others)
    words = (
        f"Mean score of sets with it {_decimal(score)} ({evidence.list_scores(with_it)}), of "
        f"{others_name} {_decimal(reference)} ({evidence.list_scores(others)}): "
        f"{_signed(score - reference)}."
    )
    return Reason(float(score - reference), words)


def with_control_variate(evidence: Evidence) -> Reason:
    """`control_variate.set_control_variate`."""
    if evidence.c is None:
        return Reason(None, "The step's c was not logged, so the number is not explained here.")
    c, sets = Fraction(evidence.c), evidence.scored_sets()
    if len(sets) < 2:
        return Reason(0.0, "Fewer than two sets were scored: there is nothing to compare, 0.")
    own_N = [Fraction(reward or 0) for reward in evidence.own_N]
    best_K = [max(own_N[i] for i in members) for members in evidence.member_KxS]
    with_it = evidence.sets_with_it()
    without = [k for k in sets if k not in with_it]
    of_scores, of_best = Fraction(0), Fraction(0)
    words = "It is in all sets that were scored or in none: they say nothing of it."
    if with_it and without:
        of_scores = evidence.mean_score(with_it) - evidence.mean_score(without)
        of_best = sum(best_K[k] for k in with_it) / len(with_it)
        of_best -= sum(best_K[k] for k in without) / len(without)
        words = (
            f"Mean score of sets with it ({evidence.list_scores(with_it)}) minus that of sets "
            f"without it ({evidence.list_scores(without)}): {_signed(of_scores)}; the same of "
            f"their candidates' best own reward: {_signed(of_best)}."
        )
    of_every = _best_of_every_set(own_N, evidence.trace, evidence.set_size)
    q = _chance_of_comparison(len(own_N), evidence.set_size, len(sets))
    value = (of_scores - c * of_best) / q + c * of_every
    words += (
        f" Over all possible sets of {evidence.set_size} the best own reward differs by "
        f"{_signed(of_every)}. With c = {float(c):.3f}, the slope of scores on best own rewards in "
        f"earlier steps, and the chance {_decimal(q)} of a comparison: ({_signed(of_scores)} - c * "
        f"{_signed(of_best)}) / {_decimal(q)} + c * {_signed(of_every)} = {_signed(value)}."
    )
    return Reason(float(value), words)


def _best_of_every_set(own_N: Sequence[Fraction], trace: int, size: int) -> Fraction:
    """Mean best own reward of all sets with the trace minus that of all sets without it.

    By rank: of m others in ascending order, C(j, size - 1) sets of them have the j-th as the best.
    """
    others = sorted(reward for i, reward in enumerate(own_N) if i != trace)
    with_it = [max(reward, own_N[trace]) for reward in others]

    def mean(best: Sequence[Fraction], drawn: int) -> Fraction:
        counted = sum(best[j] * math.comb(j, drawn - 1) for j in range(len(best)))
        return counted / math.comb(len(best), drawn)

    return (mean(with_it, size - 1) if size > 1 else own_N[trace]) - mean(others, size)


def _chance_of_comparison(n: int, size: int, sets: int) -> Fraction:
    """That a trace is in some of the drawn sets, but not in all of them."""
    with_it, draws = math.comb(n - 1, size - 1), math.comb(math.comb(n, size), sets)
    in_none, in_all = math.comb(math.comb(n - 1, size), sets), math.comb(with_it, sets)
    return 1 - Fraction(in_none + in_all, draws)


# --- being read, by own correctness ---------------------------------------------------------------


def against_mean(evidence: Evidence) -> Reason:
    """`of_own_answers.centred`."""
    return _without_signal(evidence) or _minus(evidence, evidence.own.share, evidence.own_words)


def against_others(evidence: Evidence) -> Reason:
    """`of_own_answers.leave_one_out`."""
    if reason := _without_signal(evidence):
        return reason
    own = evidence.own
    others = (Fraction(own.total) - Fraction(evidence.reward)) / (own.verified - 1)
    return _minus(evidence, others, f"{evidence.own_words}, of the others")


def against_mean_by_std(evidence: Evidence) -> Reason:
    """`of_own_answers.grpo`."""
    if reason := _without_signal(evidence):
        return reason
    mean, reward = evidence.own.share, evidence.reward
    std = math.sqrt(evidence.own.variance)
    value = float(Fraction(reward) - mean) / (std + 1e-6)
    words = (
        f"{evidence.own_words}: mean {_decimal(mean)}, standard deviation {std:.3f}. Its reward "
        f"{reward:g}: ({reward:g} - {_decimal(mean)}) / {std:.3f} = {_signed(value)}."
    )
    return Reason(value, words)


def pass_at_k(evidence: Evidence) -> Reason:
    """`of_own_answers.pass_at_k`."""
    if reason := _without_signal(evidence):
        return reason
    n, k = evidence.own.verified, evidence.set_size
    if n <= k:
        words = f"There is one set of {k} at most, which has nothing to be compared with: 0."
        return Reason(0.0, words)
    if not evidence.own.counts_right:
        return _best_at_k(evidence)
    wrong = n - int(evidence.own.total)
    missed = Fraction(math.comb(wrong, k), math.comb(n, k))
    missed_with_it = Fraction(0)
    if not evidence.reward:
        missed_with_it = Fraction(math.comb(wrong - 1, k - 1), math.comb(n - 1, k - 1))
    words = (
        f"{evidence.own_words}: of all sets of {k} a share of {_decimal(missed)} has no right one, "
        f"of those with this trace {_decimal(missed_with_it)}: {_signed(missed - missed_with_it)}."
    )
    return Reason(float(missed - missed_with_it), words)


def _best_at_k(evidence: Evidence) -> Reason:
    """`pass_at_k` of rewards between 0 and 1."""
    n, k = evidence.own.verified, evidence.set_size
    verified = [None if reward is None else Fraction(reward) for reward in evidence.own_N]
    own_n = [reward for reward in verified if reward is not None]
    trace = sum(reward is not None for reward in verified[: evidence.trace])
    # with it - all sets = (1 - k / n) (with it - without it), as a share of k / n of all have it
    value = (1 - Fraction(k, n)) * _best_of_every_set(own_n, trace, k)
    words = (
        f"{evidence.own_words}. The mean best reward of all sets of {k} with this trace minus that "
        f"of all sets of {k}: {_signed(value)}."
    )
    return Reason(float(value), words)


def max_at_k(evidence: Evidence) -> Reason:
    """`of_own_answers.max_at_k`."""
    if reason := _without_signal(evidence):
        return reason
    n, k = evidence.own.verified, evidence.set_size
    if n < k or not evidence.reward:
        return Reason(0.0, f"{evidence.own_words}. No set of {k} is better because of it: 0.")
    # It adds what it is above the best of k - 1 others: by their rank, in ascending order.
    others = sorted(Fraction(reward) for reward in evidence.own_N if reward is not None)
    others.remove(Fraction(evidence.reward))
    value = sum(
        max(Fraction(evidence.reward) - best, 0) * math.comb(j, k - 2)
        for j, best in enumerate(others)
    ) / Fraction(math.comb(n, k))
    if not evidence.own.counts_right:
        words = (
            f"{evidence.own_words}. What it adds to the best of the others, over all sets of {k}: "
            f"{_signed(value)}."
        )
    else:
        words = (
            f"{evidence.own_words}: it is the only right one in a share of {_decimal(value)} of "
            f"all sets of {k}: {_signed(value)}."
        )
    return Reason(float(value), words)


def _without_signal(evidence: Evidence) -> Reason | None:
    if evidence.reward is None:
        return Reason(0.0, _NOT_VERIFIED)
    if evidence.own.variance == 0:
        return Reason(0.0, f"All verified traces have reward {evidence.reward:g}: 0.")
    return None


def _minus(evidence: Evidence, baseline: Fraction, words: str) -> Reason:
    reward = evidence.reward
    value = Fraction(reward) - baseline
    words = f"{words}: mean {_decimal(baseline)}. Its reward {reward:g} - it = {_signed(value)}."
    return Reason(float(value), words)


# --- aggregating ----------------------------------------------------------------------------------


def aggregation(reward: float | None, score: Score) -> Reason:
    """`of_sets.aggregation_advantage`, the same under all estimators; `score` is the set's."""
    if reward is None:
        return Reason(0.0, _NOT_VERIFIED)
    value = Fraction(reward) - score.share
    traces = "aggregations"
    if score.counts_right:
        earned = f"{score.total} of the set's {score.verified} {traces} are right"
    else:
        earned = f"The set's {score.in_words(traces)}"
    words = (
        f"{earned}. Its reward {reward:g} - their mean {_decimal(score.share)} = {_signed(value)}."
    )
    return Reason(float(value), words)


def _decimal(value: Fraction) -> str:
    return f"{float(value):.3f}"


def _signed(value: Fraction | float) -> str:
    return f"{float(value):+.3f}" if value else "0"
