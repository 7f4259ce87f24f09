"""What the traces of some problems have earned: the input of every estimator. Host-side numpy."""

from __future__ import annotations

import dataclasses
import functools
from fractions import Fraction

import numpy as np

from spiral_jax.objective import of_own_answers, of_sets
from spiral_jax.objective.control_variate import set_control_variate
from spiral_jax.objective.subsets import incidence


@dataclasses.dataclass(frozen=True)
class Rewards:
    """What the traces of B problems have earned in one round; NaN = our own failure.

    In the first round the candidates, which the sets are made of, are the N search traces; in a
    later one they are the traces of the round before.

    Attributes:
      own_BxN: float64, the candidates' own rewards.
      aggregated_BxKxM: float64, of the aggregation traces; None without that stage.
      member_BxKxS: int, which candidates each set holds; None without that stage.
      strategy_BxN: int, equal numbers are the same strategy, -1 = none; None unless the estimator
        rewards strategies.
      c: weight of own correctness as a control variate, fitted on earlier steps; 0 unless the
        estimator has a `fit`.
      stale: whether the candidates were sampled in earlier steps, by other weights.

    Raises:
      ValueError: arrays whose shapes do not fit together.
    """

    own_BxN: np.ndarray
    aggregated_BxKxM: np.ndarray | None = None
    member_BxKxS: np.ndarray | None = None
    strategy_BxN: np.ndarray | None = None
    c: float = 0.0
    stale: bool = False

    def __post_init__(self):
        for name in ("own_BxN", "aggregated_BxKxM"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, np.asarray(value, np.float64))
        if not self._shapes_fit():
            shapes = [np.shape(a) for a in (self.own_BxN, self.aggregated_BxKxM, self.member_BxKxS)]
            raise ValueError(
                "rewards are own [B, N], and with an aggregation stage aggregated [B, K, M] and "
                f"member [B, K, S], got {', '.join(map(str, shapes))}"
            )

    def _shapes_fit(self) -> bool:
        if self.own_BxN.ndim != 2:
            return False
        if self.aggregated_BxKxM is None or self.member_BxKxS is None:
            return self.aggregated_BxKxM is None and self.member_BxKxS is None
        aggregated, member = self.aggregated_BxKxM.shape, self.member_BxKxS.shape
        same_problems = len(self.own_BxN) == aggregated[0] == member[0]
        return len(aggregated) == len(member) == 3 and same_problems and aggregated[1] == member[1]

    @functools.cached_property
    def score_BxK(self) -> np.ndarray:
        """f_k; see `of_sets.set_score`."""
        return of_sets.set_score(self.aggregated_BxKxM)

    @functools.cached_property
    def incidence_BxKxN(self) -> np.ndarray:
        """bool: which candidates are in which drawn set."""
        return incidence(self.member_BxKxS, self.own_BxN.shape[1])

    @property
    def subset_size(self) -> int:
        """S."""
        return self.member_BxKxS.shape[2]

    @property
    def traces_B(self) -> np.ndarray:
        """Candidates with a valid own reward."""
        return (~np.isnan(self.own_BxN)).sum(axis=-1)

    @property
    def sets_B(self) -> np.ndarray:
        """Sets with a valid aggregation."""
        return (~np.isnan(self.aggregated_BxKxM)).any(axis=-1).sum(axis=-1)

    @functools.cached_property
    def controlled_BxN(self) -> list[list[Fraction]]:
        """Exact advantages; see `control_variate.set_control_variate`."""
        return set_control_variate(self.own_BxN, self.aggregated_BxKxM, self.member_BxKxS, self.c)

    @functools.cached_property
    def polychromic_BxT(self) -> np.ndarray:
        """S^2 f_poly of all T = C(N, S) sets; see `of_sets.polychromic_score`."""
        of_own_answers.check_bits(self.own_BxN)  # so that sums stay exact
        return of_sets.polychromic_score(self.own_BxN, self.strategy_BxN, self._every_TxS)

    @property
    def every_BxTxN(self) -> np.ndarray:
        """bool: which candidates are in which of all T sets."""
        every_TxN = incidence(self._every_TxS, self.own_BxN.shape[1])
        return np.broadcast_to(every_TxN, (len(self.own_BxN), *every_TxN.shape))

    @property
    def _every_TxS(self) -> np.ndarray:
        return of_sets.every_subset(self.own_BxN.shape[1], self.subset_size)
