"""Which reward function judges which problem: one for all, or one for each data source."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

from spiral_jax.core.config import ConfigError
from spiral_jax.tasks.problem import Problem
from spiral_jax.verifier.rewards import MATH, load_reward, reward_fingerprint

SOURCE = "data_source"  # the column that chooses, in `Problem.metadata`


@dataclasses.dataclass(frozen=True)
class RewardChoice:
    """The reward functions of a run, "math" or "package.module:function" each.

    Attributes:
      default: of problems whose source has none of its own; "" = none.
      by_source: config.task.rewards.
    """

    default: str
    by_source: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Every reward once, in a fixed order."""
        return list(dict.fromkeys(filter(None, (self.default, *self.by_source.values()))))

    def of(self, problem: Problem) -> str:
        """The reward that judges a problem."""
        return self.by_source.get(problem.metadata.get(SOURCE), self.default)

    def load(self) -> None:
        """Loads all. Raises `ConfigError`: one cannot be loaded."""
        for name in self.names or [self.default]:
            if name != MATH:
                load_reward(name)

    def check(self, problems: Sequence[Problem], training: bool) -> None:
        """Checks that every problem has a reward, and in training that every source has problems.

        Raises:
          ConfigError: names the sources.
        """
        sources = {str(problem.metadata.get(SOURCE)) for problem in problems}
        absent = sorted(self.by_source.keys() - sources)
        if training and absent:
            raise ConfigError(
                f"config.task.rewards: {absent} are no {SOURCE} of these problems, which have "
                f"{sorted(sources)}."
            )
        unjudged = sorted(sources - self.by_source.keys())
        if unjudged and self.by_source and not self.default:
            raise ConfigError(
                f"config.task.rewards names no reward for the {SOURCE} {unjudged}: add them, or "
                "set config.task.reward for all others."
            )

    def fingerprint(self) -> str:
        """SHA-256 of the sources of all functions of the user's; "" where there are none."""
        of_each = list(filter(None, map(reward_fingerprint, self.names)))
        if len(of_each) <= 1:
            return "".join(of_each)
        return hashlib.sha256("".join(of_each).encode()).hexdigest()


def as_choice(reward: str | RewardChoice) -> RewardChoice:
    """One reward for all problems, where it is a name.

    Raises:
      ConfigError: it is a function.
    """
    if callable(reward):
        raise ConfigError(
            f"the reward is {reward!r}: it must be named, as "
            '"package.module:function", because processes of their own import it. Write it into a '
            "file, in a folder of sys.path."
        )
    return RewardChoice(reward) if isinstance(reward, str) else reward
