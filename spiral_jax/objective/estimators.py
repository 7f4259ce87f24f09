"""The estimators: one row each, with all that the program knows of them by name. Host-side numpy.

An estimator says who is compared with whom: which sets a problem's traces are read in, and what
the traces that are read earn by it. Aggregation traces have the same advantage under all of them.
To add one, write its function in `of_sets` or `of_own_answers` and a row here; what normalises is
in `weights`. One that learns a number from step to step names in its row where that begins (`fit`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np

from spiral_jax.objective import explain, of_own_answers, of_sets
from spiral_jax.objective.control_variate import Slopes
from spiral_jax.objective.explain import Evidence, Reason
from spiral_jax.objective.rewards import Rewards

MOST_SCORED_SETS = 2000  # where all S-subsets of a problem's traces are scored: more take gigabytes


@dataclasses.dataclass(frozen=True)
class Needs:
    """Sizes below which an estimator gives no signal at all.

    Attributes:
      traces: N. sets: K. set_size: S.
      outsider: whether some trace must be outside each set (S < N), to compare it with.
      scores_every_set: whether all C(N, S) sets are scored, at most `MOST_SCORED_SETS`.
      strategies: whether something must name each trace's strategy (config.task.strategy).
      bits: whether own rewards must be 0 or 1: sets are scored by which of their traces are right.
    """

    traces: int = 1
    sets: int = 1
    set_size: int = 1
    outsider: bool = False
    scores_every_set: bool = False
    strategies: bool = False
    bits: bool = False


@dataclasses.dataclass(frozen=True)
class Estimator:
    """How the traces that are read are rewarded; each function takes the `Rewards` of B problems.

    Attributes:
      sets: how a problem's traces are aggregated: K distinct sets are "drawn", they are a
        "partition" into K disjoint ones, or there are "none": no aggregation stage.
      advantage: float32 [B, N], 0 where the trace's reward is our own failure.
      informative: bool [B], whether some advantage is not zero, decided without rounding. If
        rewards vary within a set it may be wrong for estimators over drawn sets: the aggregation
        traces have a signal then, which decides.
      starved: bool [B], problems that our own failures left without a signal, whatever the rewards.
      factor: float64 [B], c in E[sum_i A_i grad log pi(y_i)] = c grad J of the J that the search
        climbs, for problems that are not starved: failures are independent of rewards, so what is
        valid is a uniform draw too. None: the loss is GRPO's mean over tokens, which has no such J.
      explain: why a trace that is read has its advantage, for the report.
      needs: the sizes that it needs.
      rounds: whether it is defined for several rounds of aggregation.
      fit: rounds -> what `Rewards.c` is fitted on, before the first step: the run carries it from
        step to step, saves it and logs its c. None: nothing is fitted, and c is 0.
    """

    sets: Literal["drawn", "partition", "none"]
    advantage: Callable[[Rewards], np.ndarray]
    informative: Callable[[Rewards], np.ndarray]
    starved: Callable[[Rewards], np.ndarray]
    factor: Callable[[Rewards], np.ndarray] | None
    explain: Callable[[Evidence], Reason]
    needs: Needs
    rounds: bool = False
    fit: Callable[[int], Slopes] | None = None

    @property
    def aggregates(self) -> bool:
        """Whether the rollout has an aggregation stage, which GRPO and its relatives do without."""
        return self.sets != "none"


# --- what rows share ------------------------------------------------------------------------------


def _drawn_sets_differ(r: Rewards) -> np.ndarray:
    """Exact if no set's rewards vary: f_k is the one reward then, found here as the highest.

    A mean would round: 3 * 0.1 / 3 != 0.1.
    """
    scored_BxK = ~np.isnan(r.score_BxK)
    reward_BxKxM = np.where(np.isnan(r.aggregated_BxKxM), -np.inf, r.aggregated_BxKxM)
    highest_BxK = np.where(scored_BxK, reward_BxKxM.max(axis=-1), np.nan)
    return of_sets.sets_differ(highest_BxK, r.incidence_BxKxN)


def _no_set_with_two_samples(r: Rewards) -> np.ndarray:
    samples_BxK = (~np.isnan(r.aggregated_BxKxM)).sum(axis=-1)
    return (samples_BxK < 2).all(axis=-1)


def _controlled(r: Rewards) -> np.ndarray:
    exact = [[float(value) for value in of_problem] for of_problem in r.controlled_BxN]
    return np.array(exact, np.float32).reshape(r.own_BxN.shape)


def _of_draw(factor: Callable[[int, int, int], float]) -> Callable[[Rewards], np.ndarray]:
    """The factor of K distinct sets drawn uniformly, at each problem's number of valid sets."""

    def factor_B(r: Rewards) -> np.ndarray:
        N, S = r.own_BxN.shape[1], r.subset_size
        return np.array([factor(N, S, int(k)) for k in r.sets_B], np.float64)

    return factor_B


# --- the table ------------------------------------------------------------------------------------

_OVER_SETS = Needs(sets=2, outsider=True)

ESTIMATORS = {
    # Search is rewarded by the success of the model's own aggregator on the sets that a trace is in
    # (arXiv 2606.23595: the paper's), against all sets or against those without the trace.
    "marginal_mean": Estimator(
        sets="drawn",
        advantage=lambda r: of_sets.marginal_mean(r.score_BxK, r.incidence_BxKxN),
        informative=_drawn_sets_differ,
        starved=lambda r: r.sets_B < 2,
        factor=_of_draw(of_sets.marginal_mean_factor),
        explain=explain.against_all_sets,
        needs=_OVER_SETS,
        rounds=True,
    ),
    "with_without": Estimator(
        sets="drawn",
        advantage=lambda r: of_sets.with_without(r.score_BxK, r.incidence_BxKxN),
        informative=_drawn_sets_differ,
        starved=lambda r: r.sets_B < 2,
        factor=_of_draw(of_sets.with_without_factor),
        explain=explain.against_sets_without,
        needs=_OVER_SETS,
        rounds=True,
    ),
    # The same, with the sets' own correctness as a control variate: as unbiased, less variance.
    "set_control_variate": Estimator(
        sets="drawn",
        advantage=_controlled,
        informative=lambda r: _controlled(r).any(axis=-1),  # exact fractions, rounded once
        starved=lambda r: r.sets_B < 2,
        factor=lambda r: np.full(len(r.own_BxN), r.own_BxN.shape[1] / r.subset_size),
        explain=explain.with_control_variate,
        needs=_OVER_SETS,
        rounds=True,
        fit=Slopes.unknown,
    ),
    # `marginal_mean` where the sets are disjoint, so independent: each is one sample of f.
    "disjoint_sets": Estimator(
        sets="partition",
        advantage=lambda r: of_sets.marginal_mean(r.score_BxK, r.incidence_BxKxN),
        informative=_drawn_sets_differ,
        starved=lambda r: r.sets_B < 2,
        factor=lambda r: r.sets_B - 1.0,
        explain=explain.against_all_sets,
        needs=_OVER_SETS,
    ),
    # Search is not rewarded: AggLM (arXiv 2509.06870), RSA's RL (arXiv 2509.26626).
    "aggregator_only": Estimator(
        sets="drawn",
        advantage=lambda r: np.zeros(r.own_BxN.shape, np.float32),
        informative=lambda r: np.zeros(len(r.own_BxN), bool),
        starved=_no_set_with_two_samples,
        factor=lambda r: np.ones(len(r.own_BxN)),
        explain=explain.not_trained,
        needs=Needs(),
        rounds=True,
    ),
    # A hand-made score of sets: own correctness times different strategies (arXiv 2604.17654).
    "polychromic": Estimator(
        sets="drawn",
        advantage=lambda r: of_sets.marginal_mean(
            r.polychromic_BxT / r.subset_size**2, r.every_BxTxN
        ),
        informative=lambda r: of_sets.sets_differ(r.polychromic_BxT, r.every_BxTxN),
        starved=lambda r: r.traces_B <= r.subset_size,
        factor=lambda r: r.traces_B / r.subset_size - 1,
        explain=explain.no_words,
        needs=Needs(set_size=2, outsider=True, scores_every_set=True, strategies=True, bits=True),
    ),
    # Own correctness beside aggregation: pass@1, then pass@S of the sets that are read.
    "online_multitask": Estimator(
        sets="drawn",
        advantage=lambda r: of_own_answers.centred(r.own_BxN),
        informative=lambda r: of_own_answers.varies(r.own_BxN),
        starved=lambda r: r.traces_B < 2,
        factor=lambda r: r.traces_B - 1.0,
        explain=explain.against_mean,
        needs=Needs(traces=2),
    ),
    "paragator": Estimator(
        sets="drawn",
        advantage=lambda r: of_own_answers.pass_at_k(r.own_BxN, r.subset_size),
        informative=lambda r: of_own_answers.pass_at_k(r.own_BxN, r.subset_size).any(axis=-1),
        starved=lambda r: r.traces_B <= r.subset_size,
        factor=lambda r: r.traces_B / r.subset_size - 1,
        explain=explain.pass_at_k,
        needs=Needs(outsider=True),
    ),
    "pkpo": Estimator(
        sets="drawn",
        advantage=lambda r: of_own_answers.max_at_k(r.own_BxN, r.subset_size),
        informative=lambda r: of_own_answers.max_at_k(r.own_BxN, r.subset_size).any(axis=-1),
        starved=lambda r: r.traces_B < r.subset_size,
        factor=lambda r: np.ones(len(r.own_BxN)),
        explain=explain.max_at_k,
        needs=Needs(set_size=2),
    ),
    # Own correctness alone, no aggregation.
    "grpo": Estimator(
        sets="none",
        advantage=lambda r: of_own_answers.grpo(r.own_BxN),
        informative=lambda r: of_own_answers.varies(r.own_BxN),
        starved=lambda r: r.traces_B < 2,
        factor=None,
        explain=explain.against_mean_by_std,
        needs=Needs(traces=2),
    ),
    "grpo_nostd": Estimator(
        sets="none",
        advantage=lambda r: of_own_answers.centred(r.own_BxN),
        informative=lambda r: of_own_answers.varies(r.own_BxN),
        starved=lambda r: r.traces_B < 2,
        factor=None,
        explain=explain.against_mean,
        needs=Needs(traces=2),
    ),
    "rloo": Estimator(
        sets="none",
        advantage=lambda r: of_own_answers.leave_one_out(r.own_BxN),
        informative=lambda r: of_own_answers.varies(r.own_BxN),
        starved=lambda r: r.traces_B < 2,
        factor=lambda r: r.traces_B.astype(np.float64),
        explain=explain.against_others,
        needs=Needs(traces=2),
    ),
}


# What there is where candidates earn nothing for being read: those of earlier steps.
OF_AGGREGATIONS_ALONE = "aggregator_only"


def estimator_named(name: str) -> Estimator:
    """The row of `ESTIMATORS`. Raises `ValueError` for another name."""
    if name not in ESTIMATORS:
        raise ValueError(f"estimator {name!r}: must be one of {', '.join(ESTIMATORS)}")
    return ESTIMATORS[name]
