"""Rewards of whole batches -> advantages and kept problems, for each of `config.ESTIMATORS`.
Host-side numpy.

An estimator is a rollout plan (there) plus a row of `RULES`: how search traces are rewarded.
Aggregation traces have the same advantage under all of them. The formulas are in `set_advantages`
and `own_advantages`; all that normalises is in `loss_weights`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from spiral_jax.core.groups import Stop
from spiral_jax.objective import of_own_answers as own
from spiral_jax.objective import of_sets as sets
from spiral_jax.objective.subsets import bias_factor, incidence


@dataclasses.dataclass(frozen=True)
class Rewards:
    """What the traces of B problems have earned; NaN = our own failure.

    Attributes:
      own_BxN: float64, of the search traces.
      aggregated_BxKxM: float64, of the aggregation traces; None without that stage.
      member_BxKxS: int, which search traces each set holds; None without that stage.
      strategy_BxN: int, equal numbers are the same strategy, -1 = none; None unless the estimator
      is polychromic.
    """

    own_BxN: np.ndarray
    aggregated_BxKxM: np.ndarray | None = None
    member_BxKxS: np.ndarray | None = None
    strategy_BxN: np.ndarray | None = None

    def __post_init__(self):
        for name in ("own_BxN", "aggregated_BxKxM"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else np.asarray(value, np.float64))
        shapes = [
            None if a is None else a.shape
            for a in (self.own_BxN, self.aggregated_BxKxM, self.member_BxKxS)
        ]
        search, aggregated, member = shapes
        without = aggregated is None and member is None
        with_sets = not without and None not in shapes and len(aggregated) == len(member) == 3
        fits = (
            with_sets and search[:1] == aggregated[:1] == member[:1] and aggregated[1] == member[1]
        )
        if len(search) != 2 or not (without or fits):
            raise ValueError(
                "rewards are own [B, N], and with an aggregation stage aggregated [B, K, M] and member [B, K, S], got "
                f"{search}, {aggregated}, {member}"
            )

    @functools.cached_property
    def score_BxK(self) -> np.ndarray:
        """f_k; see `set_advantages.set_score`."""
        return sets.set_score(self.aggregated_BxKxM)

    @functools.cached_property
    def incidence_BxKxN(self) -> np.ndarray:
        return incidence(self.member_BxKxS, self.own_BxN.shape[1])

    @property
    def subset_size(self) -> int:
        return self.member_BxKxS.shape[2]

    @property
    def traces_B(self) -> np.ndarray:
        """Search traces with a valid own reward."""
        return (~np.isnan(self.own_BxN)).sum(axis=-1)

    @property
    def sets_B(self) -> np.ndarray:
        """Sets with a valid sample."""
        return (~np.isnan(self.aggregated_BxKxM)).any(axis=-1).sum(axis=-1)

    @functools.cached_property
    def polychromic_BxT(self) -> np.ndarray:
        """S^2 f_poly of all T = C(N, S) sets."""
        own.counts(self.own_BxN)  # whole numbers only from 0/1 rewards
        return sets.polychromic_score(self.own_BxN, self.strategy_BxN, self.every_TxS)

    @property
    def every_TxS(self) -> np.ndarray:
        return sets.every_subset(self.own_BxN.shape[1], self.subset_size)

    @property
    def every_BxTxN(self) -> np.ndarray:
        """Incidence of all T sets."""
        every_TxN = incidence(self.every_TxS, self.own_BxN.shape[1])
        return np.broadcast_to(every_TxN, (len(self.own_BxN), *every_TxN.shape))


@dataclasses.dataclass(frozen=True)
class SearchRule:
    """How an estimator rewards search traces; functions of `Rewards`.

    Attributes:
      advantage: float32 [B, N], 0 where the trace's reward is our own failure.
      informative: bool [B], whether some of them is non-zero, decided without rounding. If rewards
        vary within a set it may be wrong for estimators over drawn sets: the aggregation traces
        have a signal then, which decides.
      starved: bool [B], problems that our own failures left without a signal, whatever the rewards.
      factor: float64 [B], c in E[sum_i A_i grad log pi(y_i)] = c grad J of the J that the search
        climbs, for problems that are not starved: failures are independent of rewards, so what is
        valid is a uniform draw too. None: the loss is GRPO's mean over tokens, which has no such J.
    """

    advantage: Callable[[Rewards], np.ndarray]
    informative: Callable[[Rewards], np.ndarray]
    starved: Callable[[Rewards], np.ndarray]
    factor: Callable[[Rewards], np.ndarray] | None


def _drawn_sets_differ(r: Rewards) -> np.ndarray:
    """Exact if no set's rewards vary, as f_k is the one reward then, here found without a mean: 3 *
    0.1 / 3 != 0.1.
    """
    any_BxK = ~np.isnan(r.score_BxK)
    highest_BxK = np.where(np.isnan(r.aggregated_BxKxM), -np.inf, r.aggregated_BxKxM).max(axis=-1)
    return sets.sets_differ(np.where(any_BxK, highest_BxK, np.nan), r.incidence_BxKxN)


def _factor_of_draw(estimator: str) -> Callable[[Rewards], np.ndarray]:
    """Of K distinct subsets drawn uniformly: `subsets.bias_factor` at the problem's number of valid
    sets.
    """
    return lambda r: np.array(
        [bias_factor(estimator, r.own_BxN.shape[1], r.subset_size, int(k)) for k in r.sets_B],
        np.float64,
    )


def _own_rule(advantage: Callable, informative: Callable, factor: Callable | None) -> SearchRule:
    """Of one trace's own correctness against that of the problem's others."""
    return SearchRule(
        advantage=lambda r: advantage(r.own_BxN),
        informative=lambda r: informative(r.own_BxN),
        starved=lambda r: r.traces_B < 2,
        factor=factor,
    )


RULES = {
    # the success of the model's own aggregator on the sets that a trace is in
    "marginal_mean": SearchRule(
        advantage=lambda r: sets.marginal_mean(r.score_BxK, r.incidence_BxKxN),
        informative=_drawn_sets_differ,
        starved=lambda r: r.sets_B < 2,
        factor=_factor_of_draw("marginal_mean"),
    ),
    "with_without": SearchRule(
        advantage=lambda r: sets.with_without(r.score_BxK, r.incidence_BxKxN),
        informative=_drawn_sets_differ,
        starved=lambda r: r.sets_B < 2,
        factor=_factor_of_draw("with_without"),
    ),
    # the same where the sets are disjoint, so independent: each is one sample of f, and all its
    # members share A
    "disjoint_sets": SearchRule(
        advantage=lambda r: sets.marginal_mean(r.score_BxK, r.incidence_BxKxN),
        informative=_drawn_sets_differ,
        starved=lambda r: r.sets_B < 2,
        factor=lambda r: r.sets_B - 1.0,
    ),
    # nothing: AggLM (arXiv 2509.06870), RSA's RL (arXiv 2509.26626)
    "aggregator_only": SearchRule(
        advantage=lambda r: np.zeros(r.own_BxN.shape, np.float32),
        informative=lambda r: np.zeros(len(r.own_BxN), bool),
        starved=lambda r: ((~np.isnan(r.aggregated_BxKxM)).sum(axis=-1) < 2).all(axis=-1),
        factor=lambda r: np.ones(len(r.own_BxN)),
    ),
    # a hand-made score of sets: own correctness times different strategies, over all S-sets (arXiv
    # 2604.17654)
    "polychromic": SearchRule(
        advantage=lambda r: sets.marginal_mean(r.polychromic_BxT / r.subset_size**2, r.every_BxTxN),
        informative=lambda r: sets.sets_differ(r.polychromic_BxT, r.every_BxTxN),
        starved=lambda r: r.traces_B <= r.subset_size,
        factor=lambda r: r.traces_B / r.subset_size - 1,
    ),
    # own correctness, beside aggregation: pass@1, then pass@S, for the sets that the aggregator
    # reads
    "online_multitask": _own_rule(own.centred, own.varies, lambda r: r.traces_B - 1.0),
    "paragator": SearchRule(
        advantage=lambda r: own.pass_at_k(r.own_BxN, r.subset_size),
        informative=lambda r: own.differs_at_k(r.own_BxN, r.subset_size),
        starved=lambda r: r.traces_B <= r.subset_size,
        factor=lambda r: r.traces_B / r.subset_size - 1,
    ),
    "pkpo": SearchRule(
        advantage=lambda r: own.max_at_k(r.own_BxN, r.subset_size),
        informative=lambda r: own.differs_at_k(r.own_BxN, r.subset_size - 1),
        starved=lambda r: r.traces_B < r.subset_size,
        factor=lambda r: np.ones(len(r.own_BxN)),
    ),
    # own correctness alone, no aggregation
    "grpo": _own_rule(own.grpo, own.varies, None),
    "grpo_nostd": _own_rule(own.centred, own.varies, None),
    "rloo": _own_rule(own.leave_one_out, own.varies, lambda r: r.traces_B.astype(np.float64)),
}


@dataclasses.dataclass(frozen=True)
class Advantages:
    """What an estimator makes of the rewards of B problems, before the length gate.

    Attributes:
      search_BxN: float32.
      aggregation_BxKxM: float32; None without an aggregation stage.
      keep_B: bool, the keep rule of dynamic sampling: not starved, and some advantage is non-zero,
      exactly.
      starved_B: bool, problems that our own failures left without a signal; never kept.
    """

    search_BxN: np.ndarray
    aggregation_BxKxM: np.ndarray | None
    keep_B: np.ndarray
    starved_B: np.ndarray

    def take(self, index: np.ndarray) -> Advantages:
        """Those of the problems at `index`."""
        aggregation = None if self.aggregation_BxKxM is None else self.aggregation_BxKxM[index]
        return Advantages(
            self.search_BxN[index], aggregation, self.keep_B[index], self.starved_B[index]
        )


def compute(estimator: str, rewards: Rewards) -> Advantages:
    """Advantages of B problems under one of `config.ESTIMATORS`.

    Raises:
      ValueError: another estimator, or own rewards other than 0, 1 and NaN where sets are scored by
      them.
    """
    if estimator not in RULES:
        raise ValueError(f"estimator {estimator!r}: must be one of {', '.join(RULES)}")
    rule = RULES[estimator]
    starved_B, informative_B = rule.starved(rewards), rule.informative(rewards)
    aggregation_BxKxM = None
    if rewards.aggregated_BxKxM is not None:
        aggregation_BxKxM = sets.aggregation_advantage(rewards.aggregated_BxKxM)
        informative_B = informative_B | own.varies(rewards.aggregated_BxKxM).any(axis=-1)
    return Advantages(
        rule.advantage(rewards), aggregation_BxKxM, informative_B & ~starved_B, starved_B
    )


def length_gate(
    advantage: np.ndarray, length: np.ndarray, stop: np.ndarray, limit_tokens: int, gate: float
) -> np.ndarray:
    """Positive advantages of too long traces become 0, negative ones stay (paper Eq. 8, whose limit
    is unpublished).

    Args:
      advantage, length, stop: arrays of one shape; tokens, values of `Stop`.
      limit_tokens: the role's limit on a trace.
      gate: > 1: tokens; 0 < gate <= 1: share of the limit; 0: traces that the limit cut off. A
        trace is too long if strictly longer, so gate = 1 changes nothing.

    Returns:
      float32 of the same shape.

    Raises:
      ValueError: gate is negative or NaN.
    """
    if not gate >= 0:
        raise ValueError(
            f"loss.length_gate = {gate}: must be >= 0 (0: cut-off traces; <= 1: share; else tokens)"
        )
    # A share is a quotient, since in floats 57 > 0.57 * 100.
    long = stop == Stop.LENGTH if gate == 0 else length / (1 if gate > 1 else limit_tokens) > gate
    return np.where((advantage > 0) & long, 0.0, advantage).astype(np.float32)
