"""Where a training run stands beside its weights: what a checkpoint's record says of it."""

from __future__ import annotations

import dataclasses
from typing import Any

from spiral_jax.objective.control_variate import Slopes, c_metrics
from spiral_jax.rollout.collect import Batch
from spiral_jax.rollout.populations import Populations
from spiral_jax.run.setup import Training


@dataclasses.dataclass
class Position:
    """Where a run stands beside its weights; saved with them, and a resumed run goes on from it.

    Attributes:
      slopes: what the estimator has fitted on the steps so far; None: it fits nothing.
      populations: what later steps can read of those so far; None: nothing is replayed.
    """

    step: int = 0
    cursor: int = 0
    sampled_tokens: int = 0
    slopes: Slopes | None = None
    populations: Populations | None = None

    def after(self, batch: Batch, sampled: int) -> Position:
        """Behind a step that has trained on `batch` and sampled so many tokens."""
        populations = self.populations
        if populations:
            replayed = batch.replay.replayed.answers() if batch.replay else ()
            populations = populations.after(self.step, batch.rollouts.answers(), replayed)
        return Position(
            step=self.step + 1,
            cursor=batch.next_cursor,
            sampled_tokens=self.sampled_tokens + sampled,
            slopes=self.slopes and self.slopes.after(batch.rewards()),
            populations=populations,
        )

    @property
    def c_R(self) -> tuple[float, ...]:
        """The estimator's c of each round; () where it fits none."""
        return self.slopes.c_R if self.slopes else ()

    def metrics(self) -> dict[str, float]:
        """What the log says of it beside what its step has done."""
        stored = {"replay/stored": float(len(self.populations.kept))} if self.populations else {}
        return c_metrics(self.c_R) | stored

    def to_plain(self) -> dict[str, Any]:
        """JSON types. Without what there is not, as earlier versions wrote it."""
        plain = {name: getattr(self, name) for name in ("step", "cursor", "sampled_tokens")}
        if self.slopes:
            plain["slopes"] = dataclasses.asdict(self.slopes)
        if self.populations:
            plain["populations"] = self.populations.to_plain()
        return plain

    @classmethod
    def first(cls, training: Training) -> Position:
        """Before the first step."""
        fit, replay = training.objective.row.fit, training.stages.replay
        return cls(
            slopes=fit(training.stages.rounds) if fit else None,
            populations=Populations(replay) if replay else None,
        )

    @classmethod
    def from_plain(cls, plain: dict[str, Any], start: Position) -> Position:
        """The position that was saved.

        Args:
          start: before the first step: what is not saved, or was fitted for another number of
            rounds, begins anew, and populations that its settings do not let be read are left out.
        """
        at = cls(plain["step"], plain["cursor"], plain["sampled_tokens"])
        at.slopes, saved = start.slopes, plain.get("slopes")
        if at.slopes and saved and len(saved["product_R"]) == len(at.slopes.product_R):
            at.slopes = Slopes(*map(tuple, (saved["product_R"], saved["square_R"])))
        if start.populations:
            at.populations = start.populations.restored(plain.get("populations", []), at.step)
        return at
