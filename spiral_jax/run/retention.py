"""Which checkpoints of a run stay."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import orbax.checkpoint as ocp

from spiral_jax.core import faults


@dataclasses.dataclass(frozen=True)
class Retention:
    """Which checkpoints stay when a new one is complete; the others are deleted.

    Attributes:
      keep: so many newest ones, >= 1.
      every: and those whose step is a multiple of it; 0 = none.
      scores: and of the checkpoints that there are, the one with the highest score. Asked at each
        save: score by step.
    """

    keep: int
    every: int = 0
    scores: Callable[[], dict[int, float]] = dict

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """As orbax's `PreservationPolicy` asks."""
        steps = sorted(checkpoint.step for checkpoint in checkpoints)
        stay = set(steps[-self.keep :])
        stay |= {step for step in steps if self.every and step % self.every == 0}
        scores = {step: score for step, score in self.scores().items() if step in steps}
        stay |= {max(scores, key=lambda step: (scores[step], step))} if scores else set()
        return [checkpoint.step in stay for checkpoint in checkpoints]


def manager_options(keep: int | Retention | None) -> ocp.CheckpointManagerOptions:
    """Orbax's options: for writing, or with None for reading only; a number as `Retention.keep`."""
    if keep is None:
        return ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0)
    return ocp.CheckpointManagerOptions(
        preservation_policy=keep if isinstance(keep, Retention) else Retention(keep),
        cleanup_tmp_directories=True,
        async_options=ocp.AsyncOptions(
            post_finalization_callback=lambda: faults.passed("checkpoint")
        ),
    )
