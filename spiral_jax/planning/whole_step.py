"""A whole training step from its programs' rooflines, under assumptions that are stated: how long
traces are.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ml_collections import ConfigDict

from spiral_jax.core.config import groups_of_step, uses_aggregation
from spiral_jax.core.groups import Role
from spiral_jax.planning.inventory import Run
from spiral_jax.planning.profile import Profile
from spiral_jax.planning.roofline import roofline
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
    """Groups of one role in a step: how many are sampled, how many trained on, and their mean sizes
    in tokens.
    """

    role: Role
    sampled: int
    trained: int
    traces: int
    prompt: int
    response: int


def work_of(c: ConfigDict, assumed: Assumptions) -> list[Work]:
    """Both roles. Problems are sampled until config.batch.problems are kept, of
    config.sampling.keep_rate of them.
    """
    tried = math.ceil(c.batch.problems * min(1 / c.sampling.keep_rate, c.sampling.max_ratio))
    problem = max(1, round(assumed.problem_share * c.prompt.max_problem_tokens))
    response = max(1, round(assumed.response_share * c.search.max_tokens))
    found = [Work(Role.SEARCH, tried, c.batch.problems, c.search.traces, problem, response)]
    if uses_aggregation(c):
        a = c.aggregation
        prompt, length = (
            problem + a.subset_size * response,
            max(1, round(assumed.response_share * a.max_tokens)),
        )
        groups = (tried * a.subsets * a.rounds, groups_of_step(c)["aggregation"])
        found.append(Work(Role.AGGREGATION, *groups, a.traces, prompt, length))
    return found


def bucket(c: ConfigDict, work: Work) -> int:
    """Which of config.batch.*_lengths a group of mean size falls into."""
    lengths = c.batch[f"{work.role.label}_lengths"]
    return next(i for i, (P, G) in enumerate(lengths) if work.prompt <= P and work.response <= G)


def predict(
    run: Run,
    topology: Topology,
    works: list[Work],
    assumed: Assumptions,
    profiles: dict[str, Profile],
) -> dict[str, Any]:
    """Seconds of each phase of a step at its roofline, and tokens a second. Verifier and host are
    not in it.

    Args:
      profiles: by the names of `Run.programs`.
    """
    seconds = {
        "prefill": 0.0,
        "train": 0.0,
        "decode copy": profiles["decode_copy"].roofline.seconds,
    }
    flops, micro_batches = 0.0, 0
    sampled = sum(work.sampled * work.traces * work.response for work in works)
    for work in works:
        prefill = profiles[f"prefill/{work.role.label}"]
        seconds["prefill"] += (
            math.ceil(work.sampled / prefill.program.groups) * prefill.roofline.seconds
        )
        one = profiles[f"train/{work.role.label}/{bucket(run.c, work)}"]
        count = math.ceil(work.trained / run.c.batch[f"{work.role.label}_groups"])
        micro_batches += count
        seconds["train"] += count * one.roofline.seconds
        flops += count * one.unit.flops
    seconds["train"] += roofline(one.call, topology.chip, topology.chips).seconds  # the update
    decode = profiles["decode"]
    steps = math.ceil(sampled / (decode.program.tokens * assumed.row_occupancy))
    seconds["decode"] = steps * decode.roofline.seconds
    trained = sum(work.trained * (work.prompt + work.traces * work.response) for work in works)
    total = sum(seconds.values())
    return {
        "assumptions": dataclasses.asdict(assumed) | {"keep_rate": run.c.sampling.keep_rate},
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
