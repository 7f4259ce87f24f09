"""A whole training step from its programs' rooflines, under assumptions that are stated."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from spiral_jax.core.groups import Role
from spiral_jax.learner.settings import RoleShapes
from spiral_jax.planning.profile import Profile
from spiral_jax.planning.roofline import roofline
from spiral_jax.planning.settings import PlanSettings
from spiral_jax.planning.topology import Topology


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What a step does that its configuration does not say.

    Attributes:
      problem_share: mean search prompt, as a share of prompt.max_problem_tokens.
      response_share: mean trace of both roles, as a share of its limit.
      row_occupancy: rows that draw a token, as a share of those that are computed.
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
    """

    role: Role
    sampled: int
    trained: int
    traces: int
    prompt: int
    response: int

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
        )
    ]
    if aggregation := shapes.get(Role.AGGREGATION):
        works.append(
            Work(
                role=Role.AGGREGATION,
                sampled=tried * stages.subsets * stages.rounds,
                trained=aggregation.most_groups,
                traces=aggregation.traces,
                prompt=problem + stages.subset_size * candidate,
                response=max(1, round(assumed.response_share * stages.aggregation_tokens)),
            )
        )
    return works


def bucket_of(work: Work, shapes: RoleShapes) -> int:
    """Index of the first bucket that holds a group of mean size."""
    for i, (P, G) in enumerate(shapes.lengths):
        if work.prompt <= P and work.response <= G:
            return i
    raise ValueError(f"{shapes.lengths} hold no {work.prompt} + {work.response} tokens")


def predict(
    settings: PlanSettings,
    topology: Topology,
    works: list[Work],
    assumed: Assumptions,
    profiles: dict[str, Profile],
) -> dict[str, Any]:
    """Seconds of each phase of a step at its roofline, and tokens a second.

    Verifier and host are not in it.

    Args:
      profiles: by the names of `plan_programs`.
    """
    seconds = {
        "prefill": 0.0,
        "train": 0.0,
        "decode copy": profiles["decode_copy"].roofline.seconds,
    }
    flops, micro_batches = 0.0, 0
    for work in works:
        shapes = settings.learner.shapes[work.role]
        prefill = profiles[f"prefill/{work.role.label}"]
        calls = math.ceil(work.sampled / prefill.program.groups)
        seconds["prefill"] += calls * prefill.roofline.seconds

        train = profiles[f"train/{work.role.label}/{bucket_of(work, shapes)}"]
        count = math.ceil(work.trained / shapes.micro_groups)
        seconds["train"] += count * train.roofline.seconds
        flops += count * train.unit.flops
        micro_batches += count
    update = roofline(train.call, topology.chip, topology.chips)
    seconds["train"] += update.seconds

    sampled = sum(work.sampled_tokens for work in works)
    trained = sum(work.trained_tokens for work in works)
    decode = profiles["decode"]
    steps = math.ceil(sampled / (decode.program.tokens * assumed.row_occupancy))
    seconds["decode"] = steps * decode.roofline.seconds
    total = sum(seconds.values())
    return {
        "assumptions": dataclasses.asdict(assumed)
        | {"keep_rate": settings.dynamic_sampling.keep_rate},
        "mean_tokens": {
            work.role.label: {"prompt": work.prompt, "response": work.response} for work in works
        },
        "seconds": seconds,
        "step_seconds": total,
        "sampled_tokens": sampled,
        "trained_tokens": trained,
        "sampled_tokens_per_s_decoding": sampled / seconds["decode"],
        "trained_tokens_per_s_training": trained / seconds["train"],
        "sampled_tokens_per_s": sampled / total,
        "decode_steps": steps,
        "micro_batches": micro_batches,
        "train_flops_a_chip": flops,
    }
