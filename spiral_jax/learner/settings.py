"""How the policy is updated: the config at the door of this room."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ml_collections import ConfigDict

from spiral_jax.core.config import require
from spiral_jax.core.groups import Role

SCHEDULES = ("constant", "linear", "cosine")


@dataclasses.dataclass(frozen=True)
class RoleShapes:
    """Static shapes of one role's micro-batches.

    Attributes:
      lengths: ascending (P, G); a group goes into the first that holds it.
      micro_groups: U of a micro-batch.
      most_groups: of a step; fixes the arrays' size, whatever the lengths of today's groups.
      traces: C.
    """

    lengths: tuple[tuple[int, int], ...]
    micro_groups: int
    most_groups: int
    traces: int


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """Adam and its schedule over `steps`; the other fields are those of config.optimizer."""

    steps: int
    lr: float
    schedule: str
    warmup_steps: int
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float


@dataclasses.dataclass(frozen=True)
class LearnerSettings:
    """Attributes:
    seed: of fresh adapters.
    shapes: of each role that is trained.
    temperature: of the sampler: log-probs are those of the distribution that was sampled from.
    tis_cap, kl_coef, logprob_chunk: fields of config.loss.
    """

    seed: int
    shapes: Mapping[Role, RoleShapes]
    optimizer: OptimizerSettings
    temperature: float
    tis_cap: float
    kl_coef: float
    logprob_chunk: int


def learner_settings(c: ConfigDict, groups: Mapping[Role, int]) -> LearnerSettings:
    """Checks config.batch, config.optimizer and the rest of config.loss.

    Args:
      groups: how many groups of each role that is trained a step has, at most.

    Raises:
      ConfigError: a value that is not allowed.
    """
    for field in ("loss.tis_cap", "loss.kl_coef"):
        section, name = field.split(".")
        require(c[section][name] >= 0, field, c[section][name], ">= 0")
    require(c.loss.logprob_chunk >= 1, "loss.logprob_chunk", c.loss.logprob_chunk, ">= 1")
    return LearnerSettings(
        seed=c.seed,
        shapes={role: _role_shapes(c, role, count) for role, count in groups.items()},
        optimizer=optimizer_settings(c.optimizer, c.train.steps),
        temperature=c.sampling.temperature,
        tis_cap=c.loss.tis_cap,
        kl_coef=c.loss.kl_coef,
        logprob_chunk=c.loss.logprob_chunk,
    )


def optimizer_settings(optimizer: ConfigDict, steps: int) -> OptimizerSettings:
    """Checks config.optimizer. Raises `ConfigError`."""
    o = optimizer
    require(o.lr > 0, "optimizer.lr", o.lr, "> 0")
    require(
        o.schedule in SCHEDULES, "optimizer.schedule", o.schedule, f"one of {', '.join(SCHEDULES)}"
    )
    for name in ("warmup_steps", "weight_decay", "clip_norm"):
        require(o[name] >= 0, f"optimizer.{name}", o[name], ">= 0")
    return OptimizerSettings(steps=steps, **o.to_dict())


def _role_shapes(c: ConfigDict, role: Role, groups: int) -> RoleShapes:
    micro_field, lengths_field = f"batch.{role.label}_groups", f"batch.{role.label}_lengths"
    micro = c.batch[f"{role.label}_groups"]
    require(micro >= 1, micro_field, micro, ">= 1")
    require(
        groups % micro == 0,
        micro_field,
        micro,
        f"a divisor of the {groups} {role.label} groups of a step",
    )
    lengths = tuple(tuple(pair) for pair in c.batch[f"{role.label}_lengths"])
    ascending = bool(lengths) and all(len(pair) == 2 for pair in lengths)
    ascending = ascending and list(lengths) == sorted(lengths)
    require(ascending, lengths_field, lengths, "ascending (prompt, response) lengths")
    limit = c[role.label].max_tokens
    require(
        lengths[-1][1] >= limit,
        lengths_field,
        lengths,
        f"wide enough in its last entry for {role.label}.max_tokens = {limit}",
    )
    return RoleShapes(lengths, micro, groups, c[role.label].traces)
