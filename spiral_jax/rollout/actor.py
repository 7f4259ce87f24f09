"""Who draws rollouts: a sampler, the stages of a problem, and a judge of the answers."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from spiral_jax.core import faults
from spiral_jax.core.groups import Groups, Purpose
from spiral_jax.core.metrics import Mean
from spiral_jax.core.progress import Progress
from spiral_jax.prompts.scaffold import Scaffold
from spiral_jax.rollout.collect import FirstKept, Source
from spiral_jax.rollout.feed import Feed
from spiral_jax.rollout.judge import Judge, Strategy
from spiral_jax.rollout.populations import Population
from spiral_jax.rollout.requests import Writer
from spiral_jax.rollout.settings import DynamicSampling, TrainingStages
from spiral_jax.rollout.stages import Stage
from spiral_jax.rollout.traces import Replayed, Rollouts
from spiral_jax.sampling.protocol import Sampler
from spiral_jax.tasks.problem import Task
from spiral_jax.verifier.rewards import Verdict
from spiral_jax.verifier.verifier import Verifier, check_hopeless


@dataclasses.dataclass(frozen=True)
class Actor:
    """What turns problems into rewarded traces; the policy is an argument of each step.

    Attributes:
      order: config.aggregation.order.
      max_problem_tokens: config.prompt.max_problem_tokens.
      strategy: names the strategy of a search trace; None where the estimator needs no names.
      between_chunks: called once a decode chunk, for whoever must look up in time.
      show: is given each stage's groups before they are judged, and again with their verdicts.
    """

    stages: TrainingStages
    dynamic_sampling: DynamicSampling
    order: str
    max_problem_tokens: int
    task: Task
    scaffold: Scaffold
    sampler: Sampler
    verifier: Verifier
    strategy: Strategy | None
    progress: Progress
    between_chunks: Callable[[], None]
    show: Callable[[Stage, Groups], None]

    def first_kept(self, cursor: int, populations: Sequence[Population] = ()) -> FirstKept:
        """The problems of a step that starts at `cursor`, none of them tried yet.

        Args:
          populations: stored ones that it reads beside them.
        """
        source = Source(self.task.train, self.scaffold, self.max_problem_tokens)
        return FirstKept(self.dynamic_sampling, source, cursor, populations)

    def rollouts(self, policy: Any, step: int, problems: FirstKept) -> Stream:
        """Draws and judges rollouts until the first B kept problems are known."""
        return Stream(self, policy, step, problems)


class Stream:
    """The rollouts of one step: problems -> search -> sets -> aggregation -> rewards.

    Beside them stored populations -> sets -> aggregation -> rewards. Iterating gives each problem
    (B = 1) once its verdicts are due; whoever iterates decides it, by `problems.add`, before it
    asks for the next one.
    """

    def __init__(self, actor: Actor, policy: Any, step: int, problems: FirstKept):
        self._actor, self._problems = actor, problems
        self._stages = actor.stages.stages()
        writer = Writer(actor.scaffold, Purpose.TRAIN, step, actor.stages.seed, actor.order)
        self._feed = Feed(self._stages, writer, problems, actor.stages.replay_stages())
        self._sampling = actor.sampler.stream(policy, self._feed)

    def __iter__(self) -> Iterator[Rollouts | Replayed]:
        actor = self._actor
        delay = actor.dynamic_sampling.verdict_delay
        verdicts: list[Verdict] = []
        with contextlib.ExitStack() as stack:
            stack.enter_context(actor.progress.phase("sampling"))
            judge = stack.enter_context(
                Judge(actor.verifier, actor.scaffold.tokenizer, delay, actor.strategy)
            )
            for now in self._sampling:
                actor.between_chunks()
                for completed in self._feed.take_completed():
                    actor.show(completed.stage, completed.course.of_stage(completed.stage))
                    judge.submit(completed)
                    if completed.stage.reads is None and len(self._stages) > 1:
                        faults.passed("aggregation")
                for rollout in judge.due(now):
                    stages = self._feed.courses[int(rollout.cursor_B[0])].stages
                    for stage, groups in zip(stages, rollout.stages, strict=True):
                        actor.show(stage, groups)
                    verdicts += rollout.verdicts
                    check_hopeless(verdicts, actor.dynamic_sampling.failures)
                    yield rollout
                if self._problems.complete:
                    return
                if not all(course.groups for course in self._feed.courses.values()):
                    faults.passed("search")

    def metrics(self) -> dict[str, Mean | float]:
        """What the log says of the sampling itself, and of what was cleaned out of candidates."""
        metrics = dict(self._sampling.metrics())
        if len(self._stages) > 1:
            for name in ("removed_special", "dropped", "empty"):
                metrics[f"candidates/{name}"] = float(self._feed.cleaned[f"aggregation_{name}"])
        return metrics
