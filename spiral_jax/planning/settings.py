"""What a plan reads of a configuration, and the changes of it that a plan tries."""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from spiral_jax.core.groups import Role
from spiral_jax.core.mesh import AXES
from spiral_jax.learner.settings import LearnerSettings, derived_lengths
from spiral_jax.rollout.settings import DynamicSampling, TrainingStages
from spiral_jax.run.setup import check_training, sampled_stages
from spiral_jax.sampling.settings import GroupLimits

Overrides = dict[str, Any]  # field of the configuration, such as "mesh.tensor" -> its new value


@dataclasses.dataclass(frozen=True)
class PlanSettings:
    """The part of a configuration that decides what fits and how long a step takes.

    Attributes:
      mesh: sizes of the axes data, fsdp and tensor; -1 = all the rest.
      remat: what the forward pass of training keeps.
      memory: for pages: at most 1, a share of what is free, or above it, bytes.
      cache_dtype: of the sampler's keys and values.
      limits: of the groups of every stage. No tokenizer is read, so their prompts may be as long
        as the micro-batches have room for; in a run they can be a little shorter.
      max_problem_tokens: limit of a search prompt.
      steps: of the whole run, at most.
      max_sampled_tokens: it ends after the step that reaches them; 0 = no limit.
    """

    mesh: tuple[int, int, int]
    remat: str
    memory: float
    cache_dtype: str
    limits: tuple[GroupLimits, ...]
    max_problem_tokens: int
    steps: int
    max_sampled_tokens: int
    stages: TrainingStages
    dynamic_sampling: DynamicSampling
    learner: LearnerSettings

    @classmethod
    def from_config(cls, c: ConfigDict) -> PlanSettings:
        """Checks the whole configuration. Raises `ConfigError`."""
        checked = check_training(c)
        training = checked.training
        return cls(
            mesh=tuple(c.mesh[axis] for axis in AXES),
            remat=c.model.remat,
            memory=c.sampling.memory,
            cache_dtype=c.sampling.cache_dtype,
            limits=tuple(
                GroupLimits(_widest_prompt(c, stage.role), stage.traces, stage.max_tokens)
                for stage in sampled_stages(checked)
            ),
            max_problem_tokens=c.prompt.max_problem_tokens,
            steps=c.train.steps,
            max_sampled_tokens=c.train.max_sampled_tokens,
            stages=training.stages,
            dynamic_sampling=training.dynamic_sampling,
            learner=training.learner,
        )

    def is_changed_by(self, overrides: Overrides) -> bool:
        """Whether the overrides give a field another value than it has."""
        values = mesh_overrides(self.mesh) | {
            "model.remat": self.remat,
            "sampling.memory": self.memory,
            "sampling.cache_dtype": self.cache_dtype,
        }
        for role, shapes in self.learner.shapes.items():
            values[micro_field(role)] = shapes.micro_groups
        return any(values[field] != value for field, value in overrides.items())


def _widest_prompt(c: ConfigDict, role: Role) -> int:
    """Tokens of the longest prompt that a micro-batch of the role has room for."""
    lengths = c.batch[f"{role.label}_lengths"] or derived_lengths(c, role)
    return max(prompt for prompt, _ in lengths)


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
