"""(text of a trace, problem) -> verdict: a reward of this package, or a user's own function."""

from __future__ import annotations

import dataclasses
import enum
import itertools
import logging
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from spiral_jax.core.config import ConfigError
from spiral_jax.core.functions import describe_error, hint_at, load_function, source_fingerprint
from spiral_jax.tasks.answer import last_boxed
from spiral_jax.tasks.problem import Problem
from spiral_jax.verifier import instructions, mathematics, programs

MATH = "math"
CODE, CODE_ALL, INSTRUCTIONS = "code", "code_all", "instructions"
# Those of this package; others are "package.module:function".
NAMED = (MATH, CODE, CODE_ALL, INSTRUCTIONS)
# Of them those that judge by tests or instructions: a problem's reference is no answer to it.
WITHOUT_ANSWERS = (CODE, CODE_ALL, INSTRUCTIONS)
_CALLS_OTHERS = "spiral_jax.tasks.verifiers_taskset:"  # rewards of whoever wrote the taskset
Reward = bool | float | None
RewardFunction = Callable[[str, Problem], Reward | tuple[Reward, str | None]]

_DETAIL_LENGTH = 500
# Rewards are multiples of this: float32 holds them, and float64 holds the sums of any number of
# them, without rounding. So whether sums differ is decided exactly.
_GRID = 2.0**-24
# characters, and brackets around one another, that are read as mathematics
_LONGEST_BOX, _DEEPEST_BOX = 10_000, 20
_INTEGER = re.compile(r"-?[0-9]{1,18}")


class Status(enum.StrEnum):
    """What became of an answer. All five are counted."""

    CORRECT = "correct"  # the full reward, 1
    WRONG = "wrong"  # a smaller one
    UNPARSED = "unparsed"  # no final answer, or one that cannot be read: reward 0
    # took too long on two fresh workers: the model's doing, reward 0; or that of a reward function
    # of the user's, reward NaN
    TIMEOUT = "timeout"
    ERROR = "error"  # our own failure or that of the reward function: reward NaN


_REWARD = {
    Status.CORRECT: 1.0,
    Status.WRONG: 0.0,
    Status.UNPARSED: 0.0,
    Status.TIMEOUT: 0.0,
    Status.ERROR: math.nan,
}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What one answer is worth, and why.

    Attributes:
      reward: 0.0 ... 1.0; NaN: our failure.
      detail: of a failure, what happened.
      answer: what a reward function of the user's says the final answer is; None: it does not say.
    """

    reward: float
    status: Status
    detail: str = ""
    answer: str | None = None

    @classmethod
    def of(cls, status: Status, detail: str = "") -> Verdict:
        return cls(_REWARD[status], status, detail)

    @classmethod
    def of_slow_reward(cls, timeout_s: float) -> Verdict:
        """Of a reward function of the user's that takes too long, which is no wrong answer."""
        return cls(math.nan, Status.TIMEOUT, f"took over verifier.timeout_s = {timeout_s:g}")

    @property
    def is_failure(self) -> bool:
        """Whether nothing is known of the answer: an error, or a reward function too slow."""
        return math.isnan(self.reward)

    @classmethod
    def of_reward(cls, reward: float, answer: str | None = None) -> Verdict:
        """Of a reward on the grid: 1 is correct, all below it wrong."""
        return cls(reward, Status.CORRECT if reward == 1 else Status.WRONG, "", answer)

    def to_plain(self) -> list:
        """JSON types, for another process."""
        reward = None if math.isnan(self.reward) else self.reward
        return [reward, self.status.value, self.detail, self.answer]

    @classmethod
    def from_plain(cls, plain: Sequence) -> Verdict:
        reward, status, detail, answer = plain
        return cls(math.nan if reward is None else reward, Status(status), detail, answer)


class BrokenReference(ValueError):
    """A problem's reference answer cannot be parsed; the message names the problem."""


def exact_verdict(text: str, problem: Problem) -> Verdict | None:
    r"""The verdict of reward "math" where it needs no mathematics; None = undecided.

    Without a box, or with an empty one: unparsed. The box equals a reference up to surrounding
    space: correct. All are plain integers of at most 18 digits: compared as integers. What is not
    a reference and has more than 10,000 characters or brackets more than 20 deep, which a parser
    needs minutes for, is no final answer: unparsed.
    """
    box = (last_boxed(text) or "").strip()
    references = [answer.strip() for answer in problem.answers]
    if not box:
        return Verdict.of(Status.UNPARSED)
    if box in references:
        return Verdict.of(Status.CORRECT)
    if all(_INTEGER.fullmatch(each) for each in (box, *references)):
        is_right = int(box) in map(int, references)
        return Verdict.of(Status.CORRECT if is_right else Status.WRONG)
    if len(box) > _LONGEST_BOX or _depth(box) > _DEEPEST_BOX:
        return Verdict.of(Status.UNPARSED)
    return None


def _depth(box: str) -> int:
    """How many brackets are open at once, at most; closing ones need not match."""
    steps = ((char in "({[") - (char in ")}]") for char in box)
    return max(itertools.accumulate(steps), default=0)


def math_reward(text: str, problem: Problem) -> bool | None:
    r"""Whether the last \boxed{} of `text` equals one of `problem.answers`; None = unparsed.

    As mathematics, see `mathematics.is_equal`: may take for ever, so belongs in a killable process.

    Raises:
      BrokenReference: an answer of the problem cannot be read.
    """
    exact = exact_verdict(text, problem)
    if exact is not None:
        return None if exact.status is Status.UNPARSED else exact.status is Status.CORRECT
    box = last_boxed(text)
    try:
        found = [mathematics.is_equal(answer, box) for answer in problem.answers]
        return None if None in found else any(found)
    except ValueError as error:
        raise BrokenReference(
            f"problem {problem.id!r}: its reference answer {problem.answer!r} cannot be read as "
            f"mathematics ({error}). Correct the data, or set config.task.reward to a reward "
            "function of your own."
        ) from error


def load_reward(path: str, timeout_s: float = 60.0) -> RewardFunction:
    """The reward function that config.task.reward names, with all its imports done.

    Args:
      path: one of NAMED, or "package.module:function".
      timeout_s: that an answer may take.

    Raises:
      ConfigError: the path has another form, the module cannot be imported, or it has no such
        function.
    """
    if path == MATH:
        # it warns that its time limits are off
        logging.getLogger("math_verify").setLevel(logging.ERROR)
        # imports and tables take seconds, which are to be no part of the first answer's time
        mathematics.warm_up()
        return math_reward
    if path in (CODE, CODE_ALL):
        return programs.make_code_reward(timeout_s, needs_all=path == CODE_ALL)
    if path.startswith("__main__:"):
        raise ConfigError(
            f"config.task.reward = {path!r}: its processes import it, and their __main__ is not "
            "yours. Write the function into a file of its own."
        )
    if path == INSTRUCTIONS:
        return instructions.instructions_reward
    named = ", ".join(f'"{name}"' for name in NAMED)
    return load_function("task.reward", path, f'must be {named} or "package.module:function".')


def is_users(path: str) -> bool:
    """Whether config.task.reward names a function that is none of this package's, or calls one."""
    ours = path in NAMED or path.startswith("spiral_jax.")
    return not ours or path.startswith(_CALLS_OTHERS)


def reward_fingerprint(path: str) -> str:
    """SHA-256 of the source of a reward function of the user's; "" for one of this package."""
    return source_fingerprint(load_reward(path)) if is_users(path) else ""


def judge(reward: RewardFunction, text: str, problem: Problem) -> Verdict:
    """Calls a reward function.

    It may return True, False, a number in [0, 1] or None (= unparsed), or a pair of one of these
    and the answer that it found, a string or None. All else is an error of ours. Numbers are
    rounded to multiples of 2^-24.
    """
    try:
        returned = reward(text, problem)
        value, answer = returned if _is_pair(returned) else (returned, None)
        if value is None:
            return Verdict(0.0, Status.UNPARSED, "", answer)
        plain = _plain(value)
        if isinstance(plain, bool | int | float) and -1 <= plain <= 2:
            on_grid = round(plain / _GRID) * _GRID
            if 0 <= on_grid <= 1:
                return Verdict.of_reward(on_grid, answer)
        detail = (
            f"the reward function returned {returned!r} for problem {problem.id!r}; allowed: True, "
            "False, a number in [0, 1], None, or (one of these, the answer as a string)"
        )
    except Exception as error:
        detail = describe_error(error) + hint_at(error)
    return Verdict.of(Status.ERROR, detail[:_DETAIL_LENGTH])


def _plain(value: Any) -> Any:
    """The one number of a numpy scalar or an array; all else as it is."""
    try:
        return value.item()
    except Exception:  # it has no `item`, or holds several
        return value


def _is_pair(returned: Any) -> bool:
    """Whether this is (reward, answer)."""
    if not isinstance(returned, tuple) or len(returned) != 2:
        return False
    return returned[1] is None or isinstance(returned[1], str)
