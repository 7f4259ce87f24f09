"""What a plan reads of a configuration, and the changes of it that a plan tries."""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from spiral_jax.core.groups import Role
from spiral_jax.core.mesh import AXES
from spiral_jax.rollout.settings import training_stages

Overrides = dict[str, Any]  # field of the configuration, such as "mesh.tensor" -> its new value


@dataclasses.dataclass(frozen=True)
class RoleSettings:
    """The groups of one role.

    Attributes:
      traces: C of a group.
      max_tokens: limit of a trace.
      groups: that a step trains on, at most.
      micro_groups: groups of a micro-batch.
      lengths: (P, G) of each bucket, ascending.
    """

    role: Role
    traces: int
    max_tokens: int
    groups: int
    micro_groups: int
    lengths: tuple[tuple[int, int], ...]

    @property
    def micro_field(self) -> str:
        """The field of the configuration that sets `micro_groups`."""
        return f"batch.{self.role.label}_groups"

    def bucket(self, prompt: int, response: int) -> int:
        """Index of the first bucket that holds a prompt and traces of so many tokens."""
        return next(i for i, (P, G) in enumerate(self.lengths) if prompt <= P and response <= G)


@dataclasses.dataclass(frozen=True)
class PlanSettings:
    """The part of a configuration that decides what fits and how long a step takes.

    Attributes:
      mesh: sizes of the axes data, fsdp and tensor; -1 = all the rest.
      remat: what the forward pass of training keeps.
      logprob_chunk: positions of a trace whose logits exist at once.
      classes: (slots, C, P, G) of each class of the sampler.
      cache_dtype: of the sampler's keys and values.
      keep_rate: share of the sampled problems that dynamic sampling is expected to keep.
      max_ratio: problems that are sampled at most, as a multiple of `problems`.
      problems: B, that a step trains on.
      max_problem_tokens: limit of a search prompt.
      subsets, subset_size, rounds: K, S and R of the aggregation.
      roles: search, and aggregation if the estimator has it.
    """

    mesh: tuple[int, int, int]
    remat: str
    logprob_chunk: int
    classes: tuple[tuple[int, int, int, int], ...]
    cache_dtype: str
    keep_rate: float
    max_ratio: float
    problems: int
    max_problem_tokens: int
    subsets: int
    subset_size: int
    rounds: int
    roles: tuple[RoleSettings, ...]

    @classmethod
    def from_config(cls, c: ConfigDict) -> PlanSettings:
        groups = training_stages(c).groups(c.batch.problems)
        return cls(
            mesh=tuple(c.mesh[axis] for axis in AXES),
            remat=c.model.remat,
            logprob_chunk=c.loss.logprob_chunk,
            classes=tuple(tuple(row) for row in c.sampling.classes),
            cache_dtype=c.sampling.cache_dtype,
            keep_rate=c.sampling.keep_rate,
            max_ratio=c.sampling.max_ratio,
            problems=c.batch.problems,
            max_problem_tokens=c.prompt.max_problem_tokens,
            subsets=c.aggregation.subsets,
            subset_size=c.aggregation.subset_size,
            rounds=c.aggregation.rounds,
            roles=tuple(_role_settings(c, role, count) for role, count in groups.items()),
        )

    def of_role(self, role: Role) -> RoleSettings:
        return next(settings for settings in self.roles if settings.role is role)

    def is_changed_by(self, overrides: Overrides) -> bool:
        """Whether the overrides give a field another value than it has."""
        values = mesh_overrides(self.mesh) | {
            "model.remat": self.remat,
            "sampling.classes": self.classes,
            "sampling.cache_dtype": self.cache_dtype,
            **{role.micro_field: role.micro_groups for role in self.roles},
        }
        return any(values[field] != value for field, value in overrides.items())


def _role_settings(c: ConfigDict, role: Role, groups: int) -> RoleSettings:
    label = role.label
    return RoleSettings(
        role=role,
        traces=c[label].traces,
        max_tokens=c[label].max_tokens,
        groups=groups,
        micro_groups=c.batch[f"{label}_groups"],
        lengths=tuple(tuple(lengths) for lengths in c.batch[f"{label}_lengths"]),
    )


def mesh_overrides(shape: tuple[int, int, int]) -> Overrides:
    """The fields of config.mesh for a mesh of that shape."""
    return {f"mesh.{axis}": size for axis, size in zip(AXES, shape, strict=True)}


def apply_overrides(c: ConfigDict, overrides: Overrides) -> ConfigDict:
    """A copy of the configuration with these fields changed."""
    c = c.copy_and_resolve_references()
    for field, value in overrides.items():
        section, name = field.split(".")
        c[section][name] = value
    return c


def as_flags(overrides: Overrides) -> str:
    """The changes as flags of a command."""
    return " ".join(f"--config.{field}={_word(value)}" for field, value in overrides.items())


def _word(value: Any) -> str:
    return f"'{value}'" if isinstance(value, tuple) else str(value)
