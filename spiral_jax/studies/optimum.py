"""The best possible aggregated accuracy of a study that knows its task's number of strategies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from spiral_jax.evaluation.settings import for_command
from spiral_jax.studies.cells import Cells, estimate
from spiral_jax.studies.design import BASE, Study


def optimum(
    study: Study, done: Mapping[str, Cells], weight_RxB: np.ndarray
) -> dict[str, Any] | None:
    """What is possible, from how well the base reads (measured before any training); None: not
    known (yet).
    """
    value_R = optimum_R(study, done, weight_RxB)
    if value_R is None:
        return None
    of = lambda m: estimate(
        done[BASE].measure(m, done[BASE].seeds, weight_RxB), len(done[BASE].seeds)
    )  # noqa: E731
    parts = {m: of(m) for m in ("right_if_mixed", "right_if_alike")}
    S = for_command(study.evaluation).subset_size
    bound = {"strategies": study.s.strategies, "subset_size": S, "mixed": _most_mixed(study)}
    return bound | {"aggregated": estimate(value_R, len(done[BASE].seeds))} | parts


def _most_mixed(study: Study) -> float:
    """The best possible share of sets that are not all of one strategy: that of equally frequent
    ones.
    """
    V, S = study.s.strategies, for_command(study.evaluation).subset_size
    return 1 - V * float(V) ** -S


def optimum_R(study: Study, done: Mapping[str, Cells], weight_RxB: np.ndarray) -> np.ndarray | None:
    """[1 + R] of the best possible aggregated accuracy, as `Cells.measure`: the most mixed sets,
    read by the base.
    """
    if not study.s.strategies or BASE not in done:
        return None
    mixed = _most_mixed(study)
    read_R, guessed_R = (
        done[BASE].measure(name, done[BASE].seeds, weight_RxB)
        for name in ("right_if_mixed", "right_if_alike")
    )
    return mixed * read_R + (1 - mixed) * guessed_R
