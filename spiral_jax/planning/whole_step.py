"""A whole training step, and a whole run, from its programs' rooflines; what is assumed is said."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from spiral_jax.learner.settings import RoleShapes
from spiral_jax.planning.profile import Profile
from spiral_jax.planning.roofline import roofline
from spiral_jax.planning.settings import PlanSettings
from spiral_jax.planning.topology import Topology
from spiral_jax.planning.usage import Usage
from spiral_jax.planning.work import Assumptions, Work


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
    usage: Usage,
    shards: int,
    profiles: dict[str, Profile],
) -> dict[str, Any]:
    """Seconds of each phase of a step at its roofline, and tokens a second.

    Verifier and host are not in it.

    Args:
      usage: of the rows of each of so many shards.
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
    steps = math.ceil(sampled / (shards * usage.rows))
    seconds["decode"] = steps * decode.roofline.seconds
    total = sum(seconds.values())
    return {
        "assumptions": dataclasses.asdict(assumed)
        | {"keep_rate": settings.dynamic_sampling.keep_rate},
        "mean_tokens": {
            work.role.label: {"prompt": work.prompt, "response": work.response} for work in works
        },
        "usage_of_a_shard": dataclasses.asdict(usage) | {"tokens_read": usage.tokens_read},
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


def whole_run(settings: PlanSettings, step: dict[str, Any], chips: int) -> dict[str, Any]:
    """Steps, hours and chip-hours of the run, all steps alike.

    Training alone: evaluations, compiling and checkpoints are not in it.

    Args:
      step: what `predict` says of one.
    """
    steps = settings.steps
    if settings.max_sampled_tokens:
        steps = min(steps, math.ceil(settings.max_sampled_tokens / step["sampled_tokens"]))
    hours = steps * step["step_seconds"] / 3600
    return {"steps": steps, "hours": hours, "chip_hours": hours * chips}
