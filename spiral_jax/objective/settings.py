"""config.loss, as far as it says what traces earn, at the door of this room."""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from spiral_jax.core.config import require
from spiral_jax.objective.estimators import ESTIMATORS, Estimator


@dataclasses.dataclass(frozen=True)
class ObjectiveSettings:
    """What traces earn and how much they weigh; the fields of config.loss, with their comments."""

    estimator: str
    normalizer: str
    search_weight: float
    aggregation_weight: float
    length_gate: float

    @property
    def row(self) -> Estimator:
        """The estimator's row of the table."""
        return ESTIMATORS[self.estimator]


def objective_settings(loss: ConfigDict) -> ObjectiveSettings:
    """Checks config.loss.

    Raises:
      ConfigError: a value that is not allowed.
    """
    names, normalizers = ", ".join(ESTIMATORS), ("unbiased", "sum")
    require(loss.estimator in ESTIMATORS, "loss.estimator", loss.estimator, f"one of {names}")
    require(
        loss.normalizer in normalizers,
        "loss.normalizer",
        loss.normalizer,
        f"one of {', '.join(normalizers)}",
    )
    require(loss.length_gate >= 0, "loss.length_gate", loss.length_gate, ">= 0")
    return ObjectiveSettings(
        estimator=loss.estimator,
        normalizer=loss.normalizer,
        search_weight=loss.search_weight,
        aggregation_weight=loss.aggregation_weight,
        length_gate=loss.length_gate,
    )
