"""(text of a trace, problem) pairs -> verdicts, none of them silent about what went wrong.

    settings = VerifierSettings(workers=2, timeout_s=5.0)
    with Verifier("math", settings) as verifier:
        verdicts = verifier.verify([(text, problem), ...])
    check_failures(verdicts, settings)

A verdict is correct, wrong, unparsed, timeout or error, and too many errors stop the run. Of
several processes each judges its share, and all get all verdicts.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

from spiral_jax.core import distributed
from spiral_jax.tasks.problem import Problem
from spiral_jax.verifier.choice import RewardChoice, as_choice
from spiral_jax.verifier.pool import Item, Pool, VerifierFailure
from spiral_jax.verifier.rewards import MATH, Status, Verdict, exact_verdict
from spiral_jax.verifier.settings import VerifierSettings

_ENOUGH = 32  # answers, to see that something is broken


class Verifier:
    """Verifies answers, each with the reward function of its problem, in child processes.

    A context manager, which ends them.

    Args:
      reward: "math" or "package.module:function", a function (text of a trace, problem) -> what
        `judge` allows: all else that it returns or raises is an error. Or several of these.
      settings: of the child processes. They start when first needed: integer answers to "math"
        never need them. Each reward function has its own.

    Raises:
      ConfigError: a reward function cannot be loaded, or is given as such and not named.
    """

    def __init__(self, reward: str | RewardChoice, settings: VerifierSettings):
        self._choice = as_choice(reward)
        self._choice.load()
        self._pools = {name: Pool(name, settings) for name in self._choice.names}

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all child processes. Verifying again would start new ones."""
        for pool in self._pools.values():
            pool.close()

    def compares_answers(self, problem: Problem) -> bool:
        """Whether any two answers to it can be compared, as "math" can, and not one alone."""
        return self._choice.of(problem) == MATH

    def longest_s(self, items: int) -> float:
        """Seconds that `verify` takes at most for so many items."""
        return sum(pool.longest_s(items) for pool in self._pools.values())

    def verify(self, items: Sequence[Item]) -> list[Verdict]:
        """The verdict of each (text, problem), in the order given. A collective: see `exchange`.

        Raises:
          VerifierFailure: a worker cannot start.
        """
        return exchange([self.judge([items[i] for i in distributed.share(len(items))])])[0]

    def judge(self, items: Sequence[Item]) -> list[Verdict]:
        """The verdict of each (text, problem), by this process alone.

        Raises:
          VerifierFailure: a worker cannot start.
        """
        verdicts: list[Verdict | None] = [None] * len(items)
        undecided: dict[str, list[int]] = {name: [] for name in self._pools}
        for i, (text, problem) in enumerate(items):
            name = self._choice.of(problem)
            verdicts[i] = exact_verdict(text, problem) if name == MATH else None
            if verdicts[i] is None:
                undecided[name].append(i)
        for name, indices in undecided.items():
            judged = self._pools[name].run([items[i] for i in indices])
            for i, verdict in zip(indices, judged, strict=True):
                verdicts[i] = verdict
        return verdicts


def exchange(shares: Sequence[Sequence[Verdict]]) -> list[list[Verdict]]:
    """All verdicts of some sets of answers from this process's `distributed.share` of each.

    A collective: all processes call it for the same sets, in the same order, on their main thread.
    """
    own = [[verdict.to_plain() for verdict in share] for share in shares]
    everybodys = distributed.gather(own)
    sets = []
    for parts in zip(*everybodys, strict=True):
        sets.append([Verdict.from_plain(plain) for plain in distributed.unite(parts)])
    return sets


def count_verdicts(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """How many were "correct", "wrong", "unparsed", "timeout" and "error": all verdicts."""
    counts = collections.Counter(verdict.status for verdict in verdicts)
    return {status.value: counts[status] for status in Status}


def check_failures(verdicts: Sequence[Verdict], settings: VerifierSettings) -> None:
    """Checks that few answers failed by our own doing: silent NaNs are no training signal.

    Raises:
      VerifierFailure: the share of errors is above `max_error_rate`, or that of answers for which a
        reward function of the user's took too long is above `max_timeout_rate`.
    """
    _check_errors(verdicts, settings.max_error_rate)
    _check_slow(verdicts, settings.max_timeout_rate)


def check_hopeless(verdicts: Sequence[Verdict], settings: VerifierSettings) -> None:
    """The same as soon as most of the first answers fail: the end of the batch may be hours away.

    Raises: see `check_failures`.
    """
    failed = sum(verdict.is_failure for verdict in verdicts)
    if len(verdicts) >= _ENOUGH and failed > len(verdicts) / 2:
        check_failures(verdicts, settings)


def _check_slow(verdicts: Sequence[Verdict], max_timeout_rate: float) -> None:
    slow = [v for v in verdicts if v.status is Status.TIMEOUT and v.is_failure]
    if len(slow) <= max_timeout_rate * len(verdicts):
        return
    raise VerifierFailure(
        f"{len(slow)} of {len(verdicts)} answers {slow[0].detail}; "
        f"config.verifier.max_timeout_rate allows {max_timeout_rate:.1%}. The reward function that "
        "config.task.reward names is slow, and what it has not judged is not wrong: raise "
        "config.verifier.timeout_s, raise config.verifier.workers if it waits for others, or make "
        "it faster."
    )


def _check_errors(verdicts: Sequence[Verdict], max_error_rate: float) -> None:
    details = [verdict.detail for verdict in verdicts if verdict.status is Status.ERROR]
    if not details or len(details) / len(verdicts) <= max_error_rate:
        return
    [(detail, times)] = collections.Counter(details).most_common(1)
    share = len(details) / len(verdicts)
    raise VerifierFailure(
        f"{len(details)} of {len(verdicts)} answers ({share:.1%}) could not be verified; "
        f"config.verifier.max_error_rate allows {max_error_rate:.1%}. Most frequent ({times}x): "
        f"{detail}. Look at the reward function that config.task.reward names, at the reference "
        "answers of these problems, and whether the machine runs out of memory (workers killed "
        "with exit code -9)."
    )
