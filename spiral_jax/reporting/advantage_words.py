"""Why a logged trace has its advantage, in words: its reasons, the length gate, what was logged."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from spiral_jax.core.groups import Stop
from spiral_jax.objective import explain
from spiral_jax.objective.advantages import length_gate
from spiral_jax.objective.estimators import ESTIMATORS
from spiral_jax.objective.explain import Evidence, Reason
from spiral_jax.reporting.logged_problem import LoggedProblem, Stage, Trace, TraceSet

_ROUNDING = 1e-5  # logged advantages are float32, ours exact


@dataclasses.dataclass(frozen=True)
class AdvantageSettings:
    """What of a run's configuration its advantages follow from.

    Attributes:
      length_gate: of `config.loss`: 0, a share of the limit, or tokens.
      max_tokens: limit of a trace, by role.
      c_R: of each round, what the estimator had fitted before the step; (): nothing is known of it.
    """

    estimator: str
    subset_size: int
    length_gate: float
    max_tokens: dict[str, int]
    c_R: tuple[float, ...] = ()

    @classmethod
    def from_plain(cls, config: dict[str, Any]) -> AdvantageSettings:
        """Of a run's plain configuration."""
        return cls(
            estimator=config["loss"]["estimator"],
            subset_size=config["aggregation"]["subset_size"],
            length_gate=config["loss"]["length_gate"],
            max_tokens={role: config[role]["max_tokens"] for role in ("search", "aggregation")},
        )


def explain_advantage(
    problem: LoggedProblem,
    stage: Stage,
    of_set: TraceSet,
    trace: Trace,
    settings: AdvantageSettings,
) -> str:
    """The reasons of a trace's advantage; and if they do not add up to what was logged, that."""
    reasons = _reasons(problem, stage, of_set, trace, settings)
    words = " ".join(reason.words for reason in reasons)
    if not trace.row["kept"]:
        return f"Dynamic sampling discarded the problem: nothing was learned from it. {words}"
    if any(reason.value is None for reason in reasons):
        return words

    sentences, total = [], 0.0
    for reason in reasons:
        sentences.append(reason.words)
        if _is_gated(trace, reason.value, settings):
            too_long = _too_long(trace, settings)
            sentences.append(f"The length gate takes it: positive, and {too_long}, so 0.")
        else:
            total += reason.value
    if len(reasons) > 1:
        sentences.append(f"Together {total:+.3f}.")
    logged = trace.row["advantage"]
    if abs(total - logged) > _ROUNDING * max(1, abs(logged)):
        sentences.append(
            f"But {logged:+.4f} was logged: the run's objective is not the one explained here."
        )
    return " ".join(sentences)


def _reasons(
    problem: LoggedProblem,
    stage: Stage,
    of_set: TraceSet,
    trace: Trace,
    settings: AdvantageSettings,
) -> list[Reason]:
    """Why a trace has its advantage: by its own set, and by the sets that it is read in."""
    stale = problem.replay and not stage.reads
    words = explain.stale if stale else ESTIMATORS[settings.estimator].explain
    reasons = []
    if stage.reads:
        reasons.append(explain.aggregation(trace.row["reward"], of_set.score))
    reader = problem.reader_of(stage)
    if reader is not None or not stage.reads:  # search may be read by sets that nobody drew
        sets = reader.sets if reader else []
        evidence = Evidence(
            trace=trace.place,
            reward=trace.row["reward"],
            own=of_set.score,
            set_size=settings.subset_size,
            member_KxS=[other.members for other in sets],
            scores=[other.score for other in sets],
            names=[other.name for other in sets],
            own_N=[other.row["reward"] for other in stage.traces],
            c=settings.c_R[problem.stages.index(stage)] if settings.c_R else None,
        )
        reasons.append(words(evidence))
    return reasons


def _is_gated(trace: Trace, advantage: float, settings: AdvantageSettings) -> bool:
    """Whether the length gate makes this advantage 0."""
    if advantage <= 0:
        return False
    stop, limit = Stop[trace.row["stop"].upper()], settings.max_tokens[trace.row["role"]]
    gated = length_gate(
        np.array(advantage),
        np.array(trace.row["length"]),
        np.array(stop),
        limit,
        settings.length_gate,
    )
    return bool(gated == 0)


def _too_long(trace: Trace, settings: AdvantageSettings) -> str:
    gate = settings.length_gate
    if gate == 0:
        return "cut off at its limit"
    limit = gate if gate > 1 else gate * settings.max_tokens[trace.row["role"]]
    return f"longer than {limit:g} tokens"
