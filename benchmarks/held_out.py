"""Traces of held-out problems: search, and one set of each problem's candidates that is read."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from spiral_jax.core.groups import Groups, Purpose, concat_groups
from spiral_jax.evaluation.measures import BOOTSTRAP_DRAWS
from spiral_jax.evaluation.statistics import bootstrap_weights, mean_and_interval
from spiral_jax.learner.state import variables
from spiral_jax.objective.of_sets import every_subset
from spiral_jax.objective.subsets import Key, disjoint_subsets
from spiral_jax.prompts.prompts import search_prompt
from spiral_jax.rollout.feed import Feed
from spiral_jax.rollout.judge import reward, trace_texts
from spiral_jax.rollout.requests import Asked, Writer
from spiral_jax.rollout.stages import Stage
from spiral_jax.run.setup import Setup, set_up_training
from spiral_jax.tasks.problem import Problem
from spiral_jax.verifier.rewards import Verdict
from spiral_jax.verifier.verifier import Verifier


class JudgedTraces(NamedTuple):
    """Traces of all problems, [B, C]; texts and verdicts are those of all B * C of them."""

    groups: Groups
    texts: list[str]
    verdicts: list[Verdict]


@dataclasses.dataclass
class Listed:
    """`feed.Problems` that are all there from the start."""

    waiting: list[Asked]

    def next(self) -> Asked | None:
        return self.waiting.pop(0) if self.waiting else None

    @property
    def exhausted(self) -> bool:
        return not self.waiting


@contextlib.contextmanager
def open_held_out(c: ConfigDict, problems: int, every_set: bool = False) -> Iterator[HeldOut]:
    """`HeldOut` of a config's task and of its model as it is, before RL."""
    setup = set_up_training(c)
    settings = dataclasses.replace(setup.verifier, workers=1)
    with Verifier(setup.reward, settings) as verifier, jax.set_mesh(setup.mesh):
        policy = setup.sampler.prepare(variables(setup.model, None, setup.start.load_base()))
        yield HeldOut(setup, verifier, policy, problems, every_set)


def share(values: np.ndarray) -> dict[str, float]:
    """Mean over problems, standard error and 95 % interval, rounded."""
    estimate = mean_and_interval(values, bootstrap_weights(0, len(values), BOOTSTRAP_DRAWS))
    return {name: round(value, 4) for name, value in vars(estimate).items()}


class HeldOut:
    """The first held-out problems of a task, and a policy that works on them as in training.

    Attributes:
      setup: of a training of the task.

    Args:
      every_set: whether all C(N, S) sets are read, in the order of `every_subset`; else one is.
    """

    def __init__(
        self, setup: Setup, verifier: Verifier, policy: Any, problems: int, every_set: bool = False
    ):
        self.setup, self._verifier, self._policy = setup, verifier, policy
        self._asked = []
        for index in range(problems):
            problem = setup.task.held_out(index)
            self._asked.append(Asked(index, problem, search_prompt(setup.scaffold, problem.text)))
        stages = setup.training.stages
        self._search = Stage("search", 0, stages.search_traces, stages.search_tokens)
        self._aggregation = Stage(
            name="aggregation/1",
            round=1,
            traces=stages.aggregation_traces,
            max_tokens=stages.aggregation_tokens,
            reads=self._search,
            candidates=stages.search_traces,
            set_size=stages.subset_size,
            sets=self._every_set if every_set else self._one_set,
        )

    @property
    def problems(self) -> list[Problem]:
        return [asked.problem for asked in self._asked]

    @property
    def member_BxS(self) -> np.ndarray:
        """The candidates that are read."""
        return np.concatenate([self._one_set(0, asked.cursor) for asked in self._asked])

    def search(self) -> JudgedTraces:
        return self._draw([self._search], self._feed([self._search], self._asked))

    def aggregate(self, candidates: Groups) -> JudgedTraces:
        """Aggregation traces that read a set of each problem's candidates."""
        stages = [self._search, self._aggregation]
        feed = self._feed(stages, [])
        for b, asked in enumerate(self._asked):
            feed.begin_with(asked, candidates.take([b]))
        return self._draw(stages, feed)

    def _one_set(self, step: int, cursor: int) -> np.ndarray:
        stages = self.setup.training.stages
        key = Key(stages.seed, int(Purpose.EVALUATION), step, cursor, 0)
        return disjoint_subsets(key, stages.search_traces, stages.subset_size, 1)

    def _every_set(self, step: int, cursor: int) -> np.ndarray:
        del step, cursor
        stages = self.setup.training.stages
        return every_subset(stages.search_traces, stages.subset_size)

    def _feed(self, stages: list[Stage], asked: list[Asked]) -> Feed:
        c, scaffold = self.setup.c, self.setup.scaffold
        writer = Writer(scaffold, Purpose.EVALUATION, 0, c.seed, c.aggregation.order)
        return Feed(stages, writer, Listed(list(asked)))

    def _draw(self, stages: list[Stage], feed: Feed) -> JudgedTraces:
        """The judged traces of the last stage, a group for each set."""
        for _ in self.setup.sampler.stream(self._policy, feed):
            pass
        courses = [feed.courses[asked.cursor] for asked in self._asked]
        groups = concat_groups([course.of_stage(stages[-1]) for course in courses])
        texts = trace_texts(self.setup.tokenizer, groups)
        problems = np.repeat(self.problems, groups.trace_len_UxC.size // len(self.problems))
        verdicts = self._verifier.verify(list(zip(texts, problems, strict=True)))
        return JudgedTraces(reward(groups, verdicts), texts, verdicts)
