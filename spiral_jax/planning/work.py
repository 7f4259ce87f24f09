"""What a step samples and trains on, under assumptions that are stated."""

from __future__ import annotations

import dataclasses
import math

from spiral_jax.core.groups import Role
from spiral_jax.planning.settings import PlanSettings


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What a step does that its configuration does not say.

    Attributes:
      problem_share: mean search prompt, as a share of prompt.max_problem_tokens.
      response_share: mean trace of both roles, as a share of its limit.
      row_occupancy: rows that draw a token, as a share of those that are computed, where pages do
        not bound them.
    """

    problem_share: float = 0.25
    response_share: float = 0.5
    row_occupancy: float = 0.8


@dataclasses.dataclass(frozen=True)
class Work:
    """The groups of one role in a step.

    Attributes:
      sampled, trained: how many groups are sampled, and trained on.
      traces: of a group.
      prompt, response: mean tokens of a prompt and of a trace.
      limit: tokens of the longest trace.
    """

    role: Role
    sampled: int
    trained: int
    traces: int
    prompt: int
    response: int
    limit: int

    @property
    def sampled_tokens(self) -> int:
        return self.sampled * self.traces * self.response

    @property
    def trained_tokens(self) -> int:
        return self.trained * (self.prompt + self.traces * self.response)


def work_of_step(settings: PlanSettings, assumed: Assumptions) -> list[Work]:
    """What a step samples and trains on, by role.

    Problems are sampled until config.batch.problems are kept, of config.sampling.keep_rate of them.
    """
    stages, sampling = settings.stages, settings.dynamic_sampling
    tried = math.ceil(sampling.problems * min(1 / sampling.keep_rate, sampling.max_ratio))
    problem = max(1, round(assumed.problem_share * settings.max_problem_tokens))
    candidate = max(1, round(assumed.response_share * stages.search_tokens))
    shapes = settings.learner.shapes
    search = shapes[Role.SEARCH]
    works = [
        Work(
            role=Role.SEARCH,
            sampled=tried,
            trained=search.most_groups,
            traces=search.traces,
            prompt=problem,
            response=candidate,
            limit=stages.search_tokens,
        )
    ]
    if aggregation := shapes.get(Role.AGGREGATION):
        works.append(
            Work(
                role=Role.AGGREGATION,
                sampled=stages.groups(tried)[Role.AGGREGATION],
                trained=aggregation.most_groups,
                traces=aggregation.traces,
                prompt=problem + stages.subset_size * candidate,
                response=max(1, round(assumed.response_share * stages.aggregation_tokens)),
                limit=stages.aggregation_tokens,
            )
        )
    return works
