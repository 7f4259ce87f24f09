"""The stages of an evaluation: search, plain aggregation, and rounds of self-aggregation (RSA)."""

from __future__ import annotations

import functools

import numpy as np

from spiral_jax.core.groups import Purpose
from spiral_jax.evaluation.settings import EvaluationSettings
from spiral_jax.objective.subsets import Key, disjoint_subsets, independent_subsets
from spiral_jax.rollout.stages import Stage


def evaluation_stages(s: EvaluationSettings) -> list[Stage]:
    """Search alone where nothing is aggregated; else plain aggregation and RSA both read it."""
    search = Stage("search", 0, s.n, s.search_max_tokens)
    if not s.aggregates:
        return [search]
    aggregation = Stage(
        name="aggregation",
        round=1,
        traces=s.traces,
        max_tokens=s.aggregation_max_tokens,
        reads=search,
        candidates=s.n,
        set_size=s.subset_size,
        sets=functools.partial(_disjoint, s),
    )
    stages, reads = [search, aggregation], search
    for round in range(1, s.rounds + 1):
        reads = Stage(
            name=f"rsa/{round}",
            round=round + 1,
            traces=1,
            max_tokens=s.aggregation_max_tokens,
            reads=reads,
            candidates=s.population,
            set_size=s.set_size,
            sets=functools.partial(_population, s, round),
        )
        stages.append(reads)
    return stages


def _disjoint(s: EvaluationSettings, step: int, index: int) -> np.ndarray:
    """Which search traces are aggregated together."""
    key = Key(s.seed, int(Purpose.EVALUATION), step, index, 0)
    return disjoint_subsets(key, s.n, s.subset_size, s.subsets)


def _population(s: EvaluationSettings, round: int, step: int, index: int) -> np.ndarray:
    """What each member of the next population reads (arXiv 2509.26626)."""
    key = Key(s.seed, int(Purpose.EVALUATION), step, index, round)
    return independent_subsets(key, s.population, s.set_size, s.population)
