"""Which reward function judges which problem: one for all, or one for each data source."""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
import hashlib
from collections.abc import Callable, Mapping, Sequence

from spiral_jax.core.config import ConfigError
from spiral_jax.tasks.problem import Problem
from spiral_jax.verifier.rewards import (
    CODE,
    INSTRUCTIONS,
    MATH,
    WITHOUT_ANSWERS,
    load_reward,
    reward_fingerprint,
)

SOURCE = "data_source"  # the column that chooses, in `Problem.metadata`
_SHOWN = 20  # sources that an error lists

# reward -> the sources of public sets that it reads: shell patterns, of what follows a source's
# last /, in lower case
SOURCES = {
    MATH: (
        *("gsm8k*", "math", "math-lighteval", "math_lighteval", "math-500", "math_500", "math500"),
        *("math_dapo*", "dapo_math*", "aime*", "amc*", "numina*", "deepscaler*", "olympiadbench*"),
    ),
    CODE: (
        *("apps", "taco*", "codecontests*", "code_contests*", "codeforces*", "livecodebench*"),
        "mbpp*",
    ),
    INSTRUCTIONS: ("ifeval*",),
}


@dataclasses.dataclass(frozen=True)
class RewardChoice:
    """The reward functions of a run, of `rewards.NAMED` or "package.module:function" each.

    Attributes:
      default: of problems whose source has none of its own; "" = none.
      by_source: config.task.rewards, and what `SOURCES` adds.
    """

    default: str
    by_source: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Every reward once, in a fixed order."""
        return list(dict.fromkeys(filter(None, (self.default, *self.by_source.values()))))

    def of(self, problem: Problem) -> str:
        """The reward that judges a problem."""
        source = problem.metadata.get(SOURCE)
        is_name = isinstance(source, str)  # a column may hold anything
        return self.by_source.get(source, self.default) if is_name else self.default

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
        sources = set(map(_source, problems))
        absent = sorted(self.by_source.keys() - sources)
        if training and absent:
            raise ConfigError(
                f"config.task.rewards: {absent} are no {SOURCE} of these problems, which have "
                f"{sorted(sources)}."
            )
        unjudged = [_source(problem) for problem in problems if not self.of(problem)]
        if unjudged:
            raise ConfigError(
                f"{len(unjudged):,} of {len(problems):,} problems have no reward, because none is "
                f"known for their {SOURCE}: {_counted(unjudged)}. Name one for each in "
                "config.task.rewards, or one for all others in config.task.reward."
            )

    def describe(self, problems: Sequence[Problem]) -> str:
        """How many problems of which source each reward judges; "" where one judges all."""
        if not self.by_source:
            return ""
        lines = []
        for name in self.names:
            sources = [_source(problem) for problem in problems if self.of(problem) == name]
            lines.append(f"reward {name}: {len(sources):,} problems of {_counted(sources)}")
        return "\n".join(lines)

    def fingerprint(self) -> str:
        """SHA-256 of the sources of all functions of the user's; "" where there are none."""
        of_each = list(filter(None, map(reward_fingerprint, self.names)))
        if len(of_each) <= 1:
            return "".join(of_each)
        return hashlib.sha256("".join(of_each).encode()).hexdigest()


def choose_rewards(
    reward: str, by_source: Mapping[str, str], problems: Sequence[Problem]
) -> RewardChoice:
    """The rewards of a set of problems.

    Args:
      reward: of all sources that have none of their own; "" = what `SOURCES` says of each.
      by_source: config.task.rewards, which goes before both.
    """
    if reward:
        return RewardChoice(reward, by_source)
    known = {source: reward_of_source(source) for source in map(_source, problems)}
    return RewardChoice("", {name: known[name] for name in known if known[name]} | dict(by_source))


def choose_fences(fence: str, rewards: RewardChoice) -> Callable[[Problem], bool] | None:
    """Whether prompts show the candidates of a problem in fences; None = those of no problem.

    Args:
      fence: config.prompt.fence. "auto": where they are judged by tests or instructions, so that
        they are programs or texts, and no way to an answer.
    """
    if fence == "never" or (fence == "auto" and not set(rewards.names) & set(WITHOUT_ANSWERS)):
        return None
    return lambda problem: fence == "always" or rewards.of(problem) in WITHOUT_ANSWERS


def reward_of_source(source: str) -> str:
    """The reward that reads a public set, by its name; "" where none is known."""
    name = source.rpartition("/")[2].lower()
    for reward, patterns in SOURCES.items():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            return reward
    return ""


def _source(problem: Problem) -> str:
    return str(problem.metadata.get(SOURCE))


def _counted(sources: Sequence[str]) -> str:
    """Each source once with how often it is there, the most frequent first."""
    counts = collections.Counter(sources).most_common()
    shown = [f"{source!r} ({count:,})" for source, count in counts[:_SHOWN]]
    if len(counts) > _SHOWN:
        shown.append(f"and {len(counts) - _SHOWN} more")
    return ", ".join(shown)


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
