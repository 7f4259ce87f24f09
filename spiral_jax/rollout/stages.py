"""The stages of a rollout: which traces each one reads, in which sets, and what it draws.

Training is search -> aggregation 1 -> ... -> aggregation R, where each round reads the one before.
Evaluation is search -> plain aggregation, and beside it search -> RSA 1 -> RSA 2 -> ... A stage
knows only what it reads, so both are lists of stages for one and the same feed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from spiral_jax.core.groups import Role

Sets = Callable[[int, int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One kind of group that every problem has.

    Attributes:
      name: such as "search", "aggregation/2" or "rsa/3"; unique among the stages of a feed.
      round: names it in random keys; unique too, 0 is search.
      traces: C, of each of its groups.
      max_tokens: limit of a trace.
      reads: the stage whose traces are its candidates; None: the problem alone is read.
      candidates: how many of them, the first ones.
      set_size: S.
      sets: (step, cursor) -> int32 [K, S], which candidates each of its K groups reads; a pure
        function.
    """

    name: str
    round: int
    traces: int
    max_tokens: int
    reads: Stage | None = None
    candidates: int = 0
    set_size: int = 0
    sets: Sets | None = None

    @property
    def role(self) -> Role:
        return Role.SEARCH if self.reads is None else Role.AGGREGATION

    @property
    def label(self) -> str:
        """The name without its number: what counts of several rounds are added up under."""
        return self.name.partition("/")[0]
