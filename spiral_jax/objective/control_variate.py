"""Scores of sets, with the sets' own correctness as a control variate. Exact fractions, host-side.

    WW(h)_i = mean of h over sets with trace i - mean over sets without; 0 if one side is empty
    g(I)    = the highest own reward in set I: of zeros and ones, whether some trace is right
    A(i)    = WW_drawn(f - c g)_i / q + c WW_all(g)_i

f_k, the score of set k, is known for the K drawn sets alone, and g for all C(N, S), at no cost. q
is the chance that a trace is in some drawn set, but not in all. Over the draw of sets the mean of
WW_drawn(g)/q is WW_all(g), whatever the traces and their rewards are, and so it is with f. Hence
E[A | traces] is WW_all(f), what scoring every set would give, for every c that does not depend on
the draw, and the expected gradient is that of J with the factor N/S. Only the variance depends on
c. It is least near the slope of f on g within problems, which leaves in f what g does not explain.
Where a right candidate is all that the reader needs, c is near 1 and A near ParaGator's signal;
where own correctness says nothing of a set, c is near 0 and A is `with_without`.

c is fitted on earlier steps, and carried by the run (`Slopes`), rather than on the other problems
of the batch. Both are unbiased. But a problem is kept or not as soon as its own rewards are there,
by whether its advantages are zero: so c must be known before, or the rule is not exact. An earlier
c is one number a step, which is logged and explains the step's advantages. It is fitted on more
sets, which small batches need. And the policy changes little in the few steps that are averaged.

A failed own reward (NaN) counts as 0 in g: this is one more function of the set, so adds no bias.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from spiral_jax.objective.of_own_answers import mean_best
from spiral_jax.objective.subsets import chances

if TYPE_CHECKING:  # it imports this module
    from spiral_jax.objective.rewards import Rewards

# Of the sums of earlier steps this is left after each step: the newest has a weight of 0.3, and
# together they count as 3.3 steps. Longer lags behind the policy, shorter is noisier.
_KEPT = 0.7
# Added to the sum of squares: as much as a drawn set adds at most, on average over its problem's
# sets. So c stays near 0 as long as next to nothing has been seen of how f depends on g.
_PRIOR = 0.25
_METRIC = "advantage/control_c"


@dataclasses.dataclass(frozen=True)
class Slopes:
    """What c of each round of aggregation is fitted on; a run carries it and saves it.

    Attributes:
      product_R: sum over drawn sets of (f - mean f) (g - mean g), means over the problem's sets.
      square_R: of (g - mean g)^2.
    """

    product_R: tuple[float, ...]
    square_R: tuple[float, ...]

    @classmethod
    def unknown(cls, rounds: int) -> Slopes:
        """Before the first step."""
        return cls((0.0,) * rounds, (0.0,) * rounds)

    @property
    def c_R(self) -> tuple[float, ...]:
        """c of each round; 0 where nothing is known."""
        pairs = zip(self.product_R, self.square_R, strict=True)
        return tuple(product / (square + _PRIOR) for product, square in pairs)

    def after(self, rewards: Sequence[Rewards]) -> Slopes:
        """With one step more: `rewards` of each round, of all its problems in cursor order."""
        product_R, square_R = list(self.product_R), list(self.square_R)
        for r, of_round in enumerate(rewards):
            product, square = _sums(of_round)
            product_R[r] = _KEPT * product_R[r] + product
            square_R[r] = _KEPT * square_R[r] + square
        return Slopes(tuple(product_R), tuple(square_R))


def c_metrics(c_R: Sequence[float]) -> dict[str, float]:
    """c of the last round, and of those before it by their number; nothing where none is fitted."""
    names = [f"{_METRIC}_round_{r}" for r in range(1, len(c_R))] + [_METRIC]
    return dict(zip(names, c_R, strict=True)) if c_R else {}


def logged_c(metrics: Mapping[str, float | None]) -> tuple[float, ...]:
    """The c of each round that `c_metrics` has put among a step's metrics; () if it has not."""
    if _METRIC not in metrics:
        return ()
    earlier = itertools.takewhile(
        metrics.__contains__, (f"{_METRIC}_round_{r}" for r in itertools.count(1))
    )
    return (*(metrics[name] for name in earlier), metrics[_METRIC])


def _sums(rewards: Rewards) -> tuple[float, float]:
    """What the drawn sets of B problems add to `Slopes`; those without a valid sample add 0."""
    valid_BxK = ~np.isnan(rewards.score_BxK)
    count_Bx1 = np.maximum(valid_BxK.sum(axis=-1, keepdims=True), 1)

    def centred(value_BxK: np.ndarray) -> np.ndarray:
        value_BxK = np.where(valid_BxK, value_BxK, 0.0)
        mean_Bx1 = value_BxK.sum(axis=-1, keepdims=True) / count_Bx1
        return np.where(valid_BxK, value_BxK - mean_Bx1, 0.0)

    own_BxN = np.nan_to_num(rewards.own_BxN, nan=0.0)
    best_BxK = np.where(rewards.incidence_BxKxN, own_BxN[:, None, :], 0.0).max(axis=-1, initial=0.0)
    f_BxK, g_BxK = centred(rewards.score_BxK), centred(best_BxK)
    return float((f_BxK * g_BxK).sum()), float((g_BxK * g_BxK).sum())


def set_control_variate(
    own_BxN: np.ndarray, aggregated_BxKxM: np.ndarray, member_BxKxS: np.ndarray, c: float
) -> list[list[Fraction]]:
    """A of the module's page: B x N exact fractions, as the keep rule needs them.

    0 at every trace of a problem with fewer than two valid sets.

    Args:
      own_BxN, aggregated_BxKxM, member_BxKxS: see `Rewards`.
      c: fitted on other problems than these.
    """
    own_BxN, S = np.nan_to_num(own_BxN, nan=0.0), member_BxKxS.shape[2]
    exact = []
    for own, aggregated_KxM, member_KxS in zip(
        own_BxN.tolist(), aggregated_BxKxM.tolist(), member_BxKxS.tolist(), strict=True
    ):
        own_N = [Fraction(reward) for reward in own]
        drawn = _controlled_sets(own_N, aggregated_KxM, member_KxS, Fraction(c))
        exact.append(_of_problem(own_N, drawn, S, Fraction(c)))
    return exact


@dataclasses.dataclass(frozen=True)
class _ControlledSet:
    """A drawn set with a valid sample; `score` is its f - c g."""

    members: frozenset[int]
    score: Fraction


def _controlled_sets(
    own_N: list[Fraction],
    aggregated_KxM: list[list[float]],
    member_KxS: list[list[int]],
    c: Fraction,
) -> list[_ControlledSet]:
    drawn = []
    for member_S, reward_M in zip(member_KxS, aggregated_KxM, strict=True):
        valid = [Fraction(reward) for reward in reward_M if not math.isnan(reward)]
        if valid:
            best = max(own_N[i] for i in member_S)
            score = sum(valid) / len(valid) - c * best
            drawn.append(_ControlledSet(frozenset(member_S), score))
    return drawn


def _of_problem(
    own_N: list[Fraction], drawn: list[_ControlledSet], S: int, c: Fraction
) -> list[Fraction]:
    N = len(own_N)
    if len(drawn) < 2:
        return [Fraction(0)] * N
    in_some, in_all = chances(N, S, len(drawn))
    of_all = {reward: c * _against_sets_without(own_N, S, reward) for reward in set(own_N)}
    return [
        _with_without(drawn, i) / (in_some - in_all) + of_all[reward]
        for i, reward in enumerate(own_N)
    ]


def _with_without(drawn: list[_ControlledSet], i: int) -> Fraction:
    with_it = [each.score for each in drawn if i in each.members]
    without = [each.score for each in drawn if i not in each.members]
    if not with_it or not without:
        return Fraction(0)
    return sum(with_it) / len(with_it) - sum(without) / len(without)


def _against_sets_without(own_N: list[Fraction], S: int, reward: Fraction) -> Fraction:
    """WW_all(g) of a trace with this own reward."""
    others = list(own_N)
    others.remove(reward)
    return mean_best(others, S - 1, at_least=reward) - mean_best(others, S)
