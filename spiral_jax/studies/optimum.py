"""The best possible aggregated accuracy of a study that knows its task's number of strategies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from spiral_jax.studies.cells import Cells, estimate
from spiral_jax.studies.design import BASE, Study


def optimum(
    study: Study, cells: Mapping[str, Cells], weight_RxB: np.ndarray
) -> dict[str, Any] | None:
    """What is possible, from how well the base reads before any training; None: not known (yet)."""
    value_R = optimum_R(study, cells, weight_RxB)
    if value_R is None:
        return None
    base = cells[BASE]
    return {
        "strategies": study.strategies,
        "subset_size": study.evaluation.subset_size,
        "mixed": _most_mixed(study),
        "aggregated": estimate(value_R, len(base.seeds)),
        "right_if_mixed": base.estimate("right_if_mixed", weight_RxB),
        "right_if_alike": base.estimate("right_if_alike", weight_RxB),
    }


def _most_mixed(study: Study) -> float:
    """The best possible share of sets that are not all of one strategy: all equally frequent."""
    V, S = study.strategies, study.evaluation.subset_size
    return 1 - V * float(V) ** -S


def optimum_R(
    study: Study, cells: Mapping[str, Cells], weight_RxB: np.ndarray
) -> np.ndarray | None:
    """[1 + R] of the best aggregated accuracy: the most mixed sets, read as the base reads."""
    if not study.strategies or BASE not in cells:
        return None
    base, mixed = cells[BASE], _most_mixed(study)
    if_mixed_R = base.measure("right_if_mixed", base.seeds, weight_RxB)
    if_alike_R = base.measure("right_if_alike", base.seeds, weight_RxB)
    return mixed * if_mixed_R + (1 - mixed) * if_alike_R
