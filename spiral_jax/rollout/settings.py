"""What a training rollout draws, and how many problems: the config at the door of this room."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
from ml_collections import ConfigDict

from spiral_jax.core.config import require
from spiral_jax.core.groups import Purpose, Role
from spiral_jax.objective.estimators import ESTIMATORS, MOST_SCORED_SETS, Estimator
from spiral_jax.objective.subsets import Key, disjoint_subsets, draw_subsets
from spiral_jax.rollout.stages import Stage
from spiral_jax.verifier.settings import VerifierSettings


@dataclasses.dataclass(frozen=True)
class ReplaySettings:
    """Which stored populations are read; fields of config.replay, with their comments.

    Attributes:
      seed: config.seed.
      reads: rounds of aggregation that a step samples of a population, as of its own problems.
      answers, max_tokens: K * M answers of a population, and the limit of each.
    """

    seed: int
    problems: int
    max_age: int
    uses: int
    rounds: int
    reads: int
    answers: int
    max_tokens: int

    @property
    def capacity(self) -> int:
        """Populations that are kept at most: no more could be read before they are too old."""
        return self.problems * self.max_age


@dataclasses.dataclass(frozen=True)
class TrainingStages:
    """Sizes of a training rollout.

    Attributes:
      seed: config.seed.
      partition: whether a problem's sets are disjoint, rather than K distinct ones of all.
      rounds: R; 0 without an aggregation stage.
      search_traces, search_tokens: N, and the limit of each.
      subsets, subset_size: K, S.
      aggregation_traces, aggregation_tokens: M of each set, and the limit of each.
      replay: of stored populations; None: none are kept.
    """

    seed: int
    partition: bool
    rounds: int
    search_traces: int
    search_tokens: int
    subsets: int
    subset_size: int
    aggregation_traces: int
    aggregation_tokens: int
    replay: ReplaySettings | None = None

    def groups(self, problems: int) -> dict[Role, int]:
        """How many groups of each role a step of so many problems trains on, at most."""
        groups = {Role.SEARCH: problems}
        if self.rounds:
            populations = problems + (self.replay.problems if self.replay else 0)
            groups[Role.AGGREGATION] = populations * self.rounds * self.subsets
        return groups

    def stages(self) -> list[Stage]:
        """Search, then each round, which reads the stage before it."""
        stages = [Stage("search", 0, self.search_traces, self.search_tokens)]
        candidates = self.search_traces
        for round in range(1, self.rounds + 1):
            stages.append(
                Stage(
                    name=f"aggregation/{round}",
                    round=round,
                    traces=self.aggregation_traces,
                    max_tokens=self.aggregation_tokens,
                    reads=stages[-1],
                    candidates=candidates,
                    set_size=self.subset_size,
                    sets=functools.partial(self._draw, round - 1, candidates),
                )
            )
            candidates = self.subsets * self.aggregation_traces
        return stages

    def replay_stages(self) -> list[Stage]:
        """The rounds that read a stored population, as many as read search; []: none are kept."""
        if not self.replay:
            return []
        answers = self.subsets * self.aggregation_traces
        # of earlier steps: no trace of it is sampled, so its number is in no key
        reads = Stage("population", 2 * self.rounds + 1, answers, self.aggregation_tokens)
        stages = []
        for round in range(self.rounds + 1, 2 * self.rounds + 1):
            reads = Stage(
                name=f"aggregation/replay/{round - self.rounds}",
                round=round,
                traces=self.aggregation_traces,
                max_tokens=self.aggregation_tokens,
                reads=reads,
                candidates=answers,
                set_size=self.subset_size,
                sets=functools.partial(self._draw_of_answers, round - 1),
            )
            stages.append(reads)
        return stages

    def sampled(self) -> list[Stage]:
        """All stages whose traces are sampled in a step."""
        return [*self.stages(), *self.replay_stages()]

    def _draw_of_answers(self, drawn_before: int, step: int, cursor: int) -> np.ndarray:
        key = Key(self.seed, int(Purpose.TRAIN), step, cursor, drawn_before)
        answers = self.subsets * self.aggregation_traces
        return draw_subsets(key, answers, self.subset_size, self.subsets)

    def _draw(self, drawn_before: int, candidates: int, step: int, cursor: int) -> np.ndarray:
        draw = disjoint_subsets if self.partition else draw_subsets
        key = Key(self.seed, int(Purpose.TRAIN), step, cursor, drawn_before)
        return draw(key, candidates, self.subset_size, self.subsets)


@dataclasses.dataclass(frozen=True)
class DynamicSampling:
    """How many problems are tried for a batch; fields of config.batch and config.sampling.

    Attributes:
      problems: B, kept ones.
      max_ratio: at most this many times B are tried.
      keep_rate: share that is expected to carry a signal, until some are decided.
      failures: which shares of verifier failures in a batch end the run.
      verdict_delay: decode chunks from a problem's last trace until its verdicts count.
    """

    problems: int
    max_ratio: float
    keep_rate: float
    failures: VerifierSettings
    verdict_delay: int = 2

    @property
    def most_tried(self) -> int:
        return int(self.max_ratio * self.problems)


def training_stages(c: ConfigDict) -> TrainingStages:
    """Checks the sizes of a rollout, and that the estimator has a signal at them.

    Raises:
      ConfigError: it has none.
    """
    estimator = ESTIMATORS[c.loss.estimator]
    for field in (
        "search.traces",
        "search.max_tokens",
        "aggregation.max_tokens",
        "aggregation.subset_size",
        "aggregation.rounds",
    ):
        section, name = field.split(".")
        require(c[section][name] >= 1, field, c[section][name], ">= 1")
    _check_search(c, estimator)
    if estimator.aggregates:
        _check_sets(c, estimator)
        _check_rounds(c, estimator)
    return TrainingStages(
        seed=c.seed,
        partition=estimator.sets == "partition",
        rounds=c.aggregation.rounds if estimator.aggregates else 0,
        search_traces=c.search.traces,
        search_tokens=c.search.max_tokens,
        subsets=c.aggregation.subsets,
        subset_size=c.aggregation.subset_size,
        aggregation_traces=c.aggregation.traces,
        aggregation_tokens=c.aggregation.max_tokens,
        replay=_replay_settings(c, estimator),
    )


def dynamic_sampling(c: ConfigDict) -> DynamicSampling:
    """Checks config.batch.problems and the fields of config.sampling about problems.

    Raises:
      ConfigError: one is out of range.
    """
    s = c.sampling
    require(c.batch.problems >= 1, "batch.problems", c.batch.problems, ">= 1")
    require(s.max_ratio >= 1, "sampling.max_ratio", s.max_ratio, ">= 1")
    require(s.keep_rate > 0, "sampling.keep_rate", s.keep_rate, "> 0")
    return DynamicSampling(
        problems=c.batch.problems,
        max_ratio=s.max_ratio,
        keep_rate=s.keep_rate,
        failures=VerifierSettings.from_config(c.verifier),
    )


def _check_search(c: ConfigDict, estimator: Estimator) -> None:
    n, least = c.search.traces, estimator.needs.traces
    require(
        n >= least,
        "search.traces",
        n,
        f">= {least} for {c.loss.estimator}",
        "One trace has no baseline, so no signal.",
    )


def _check_sets(c: ConfigDict, estimator: Estimator) -> None:
    """The sets that an estimator needs to tell search traces apart."""
    a, needs, name = c.aggregation, estimator.needs, c.loss.estimator
    n, k, s, m = c.search.traces, a.subsets, a.subset_size, a.traces
    require(s <= n, "aggregation.subset_size", s, f"between 1 and search.traces = {n}")
    require(
        s >= needs.set_size,
        "aggregation.subset_size",
        s,
        f">= {needs.set_size} for {name}",
        "Of single traces it has no baseline, or no diversity.",
    )
    require(
        s < n or not needs.outsider,
        "aggregation.subset_size",
        s,
        f"below search.traces = {n}",
        "A trace that is in every subset has no baseline.",
    )
    every = math.comb(n, s)
    if estimator.sets == "partition":
        require(
            1 <= k <= n // s,
            "aggregation.subsets",
            k,
            f"between 1 and search.traces // subset_size = {n // s}",
            f"The subsets of {name} are disjoint.",
        )
    else:
        require(
            1 <= k <= every,
            "aggregation.subsets",
            k,
            f"between 1 and C(N={n}, S={s}) = {every}",
            "Subsets are distinct: raise search.traces or lower aggregation.subsets.",
        )
    require(
        k >= needs.sets,
        "aggregation.subsets",
        k,
        f">= {needs.sets}",
        "With one subset every set advantage is zero, so search gets no signal.",
    )
    require(
        every <= MOST_SCORED_SETS or not needs.scores_every_set,
        "aggregation.subset_size",
        s,
        f"such that C(N={n}, S) = {every} is at most {MOST_SCORED_SETS}",
        "All sets are scored.",
    )
    require(
        m >= 2,
        "aggregation.traces",
        m,
        ">= 2",
        "With one trace a subset every aggregation advantage is zero.",
    )


def _check_rounds(c: ConfigDict, estimator: Estimator) -> None:
    """The sets of rounds that read the K * M traces of the round before."""
    a = c.aggregation
    if a.rounds == 1:
        return
    several = ", ".join(name for name, row in ESTIMATORS.items() if row.rounds)
    require(
        estimator.rounds,
        "aggregation.rounds",
        a.rounds,
        f"1 for {c.loss.estimator}",
        f"More are defined for {several}.",
    )
    _check_answers(c, "aggregation.rounds", a.rounds, "1")


def _replay_settings(c: ConfigDict, estimator: Estimator) -> ReplaySettings | None:
    """Checks config.replay. Raises `ConfigError`."""
    r = c.replay
    require(r.problems >= 0, "replay.problems", r.problems, ">= 0")
    for name in ("max_age", "uses"):
        require(r[name] >= 1, f"replay.{name}", r[name], ">= 1")
    if not r.problems:
        return None
    require(
        estimator.aggregates,
        "replay.problems",
        r.problems,
        f"0 for {c.loss.estimator}",
        "It has no aggregation stage, so no populations.",
    )
    deeper = c.aggregation.rounds + 1
    require(r.rounds >= deeper, "replay.rounds", r.rounds, f">= aggregation.rounds + 1 = {deeper}")
    _check_answers(c, "replay.problems", r.problems, "0")
    a = c.aggregation
    return ReplaySettings(
        c.seed,
        **r.to_dict(),
        reads=a.rounds,
        answers=a.subsets * a.traces,
        max_tokens=a.max_tokens,
    )


def _check_answers(c: ConfigDict, field: str, value: int, without: str) -> None:
    """Whether the answers of a round are enough for the sets of one that reads them."""
    a = c.aggregation
    n = a.subsets * a.traces
    require(
        a.subset_size < n and a.subsets <= math.comb(n, a.subset_size),
        field,
        value,
        f"{without} at {n} traces a round",
        f"A later round needs {a.subsets} distinct sets of {a.subset_size} of them, with some "
        "trace outside.",
    )
