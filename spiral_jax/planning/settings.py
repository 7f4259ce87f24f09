"""What a plan reads of a configuration, and the changes of it that a plan tries."""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from spiral_jax.core.groups import Role
from spiral_jax.core.mesh import AXES
from spiral_jax.learner.settings import LearnerSettings
from spiral_jax.rollout.settings import DynamicSampling, TrainingStages
from spiral_jax.run.setup import check_training

Overrides = dict[str, Any]  # field of the configuration, such as "mesh.tensor" -> its new value


@dataclasses.dataclass(frozen=True)
class PlanSettings:
    """The part of a configuration that decides what fits and how long a step takes.

    Attributes:
      mesh: sizes of the axes data, fsdp and tensor; -1 = all the rest.
      remat: what the forward pass of training keeps.
      classes: (slots, C, P, G) of each class of the sampler.
      cache_dtype: of the sampler's keys and values.
      max_problem_tokens: limit of a search prompt.
    """

    mesh: tuple[int, int, int]
    remat: str
    classes: tuple[tuple[int, int, int, int], ...]
    cache_dtype: str
    max_problem_tokens: int
    stages: TrainingStages
    dynamic_sampling: DynamicSampling
    learner: LearnerSettings

    @classmethod
    def from_config(cls, c: ConfigDict) -> PlanSettings:
        """Checks the whole configuration. Raises `ConfigError`."""
        training = check_training(c).training
        return cls(
            mesh=tuple(c.mesh[axis] for axis in AXES),
            remat=c.model.remat,
            classes=tuple(tuple(row) for row in c.sampling.classes),
            cache_dtype=c.sampling.cache_dtype,
            max_problem_tokens=c.prompt.max_problem_tokens,
            stages=training.stages,
            dynamic_sampling=training.dynamic_sampling,
            learner=training.learner,
        )

    def is_changed_by(self, overrides: Overrides) -> bool:
        """Whether the overrides give a field another value than it has."""
        values = mesh_overrides(self.mesh) | {
            "model.remat": self.remat,
            "sampling.classes": self.classes,
            "sampling.cache_dtype": self.cache_dtype,
        }
        for role, shapes in self.learner.shapes.items():
            values[micro_field(role)] = shapes.micro_groups
        return any(values[field] != value for field, value in overrides.items())


def micro_field(role: Role) -> str:
    """The field of the configuration that says how many groups a micro-batch of a role has."""
    return f"batch.{role.label}_groups"


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
