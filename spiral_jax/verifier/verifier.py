"""(text of a trace, problem) pairs -> verdicts: a reward each, and a count of everything that went wrong.

    with Verifier(reward="math", workers=2, timeout_s=5.0) as verifier:
        verdicts = verifier.verify([(text, problem), ...])
    check_error_rate(verdicts, max_error_rate=0.05)

Nothing is silent: a verdict is correct, wrong, unparsed, timeout or error, and too many errors stop the run.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

from spiral_jax.config import ConfigError
from spiral_jax.tasks.problem import Problem
from spiral_jax.verifier.extract import last_boxed
from spiral_jax.verifier.pool import Pool, VerifierFailure
from spiral_jax.verifier.rewards import MATH, Status, Verdict, exact_verdict, load_reward

CORRECT_CLASS = "correct"


class Verifier:
    """Verifies answers with one reward function, in child processes that `close` ends; a context manager.

    Args:
      reward: "math" or "package.module:function", a function (text of a trace, problem) -> True, False, 1, 0 or None
        (None = unparsed). All else that it returns or raises is an error.
      workers: child processes, >= 1. They start when first needed: integer answers to "math" never need them.
      timeout_s: seconds for one answer, > 0; neither the wait for a free worker nor its start counts.

    Raises:
      ConfigError: the reward function cannot be loaded, or a number is out of range.
    """

    def __init__(self, reward: str, workers: int, timeout_s: float):
        if workers < 1:
            raise ConfigError(f"config.verifier.workers = {workers!r}: must be >= 1.")
        if not timeout_s > 0:
            raise ConfigError(f"config.verifier.timeout_s = {timeout_s!r}: must be > 0.")
        if reward != MATH:
            load_reward(reward)
        self._exact = reward == MATH
        self._pool = Pool(reward, workers, timeout_s)

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all child processes. Verifying again would start new ones."""
        self._pool.close()

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the child processes that there are now."""
        return self._pool.pids

    def verify(self, items: Sequence[tuple[str, Problem]]) -> list[Verdict]:
        """The verdict of each (text, problem), in the order given.

        Raises:
          VerifierFailure: a worker cannot start.
        """
        verdicts = [exact_verdict(text, problem) if self._exact else None for text, problem in items]
        undecided = [i for i, verdict in enumerate(verdicts) if verdict is None]
        for i, verdict in zip(undecided, self._pool.run([items[i] for i in undecided]), strict=True):
            verdicts[i] = verdict
        return verdicts


def count_verdicts(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """How many were "correct", "wrong", "unparsed", "timeout" and "error"; they add up to the number of verdicts."""
    counts = collections.Counter(verdict.status for verdict in verdicts)
    return {status.value: counts[status] for status in Status}


def check_error_rate(verdicts: Sequence[Verdict], max_error_rate: float) -> None:
    """Raises `VerifierFailure` if the share of errors is above `max_error_rate`: silent NaNs are no training signal."""
    errors = [verdict for verdict in verdicts if verdict.status is Status.ERROR]
    if not errors or len(errors) / len(verdicts) <= max_error_rate:
        return
    (detail, times), *_ = collections.Counter(verdict.detail for verdict in errors).most_common(1)
    raise VerifierFailure(
        f"{len(errors)} of {len(verdicts)} answers ({len(errors) / len(verdicts):.1%}) could not be verified; "
        f"config.verifier.max_error_rate allows {max_error_rate:.1%}. Most frequent ({times}x): {detail}. Look at the "
        "reward function that config.task.reward names, at the reference answers of these problems, and whether the "
        "machine runs out of memory (workers killed with exit code -9)."
    )


def answer_class(text: str, verdict: Verdict) -> str | None:
    r"""The class of an answer in a majority vote; equal classes are the same answer.

    All correct answers share `CORRECT_CLASS`. A wrong one is its last \boxed{}, or the whole text where a reward
    function does without boxes, with each run of white space as one space. None, no vote: unparsed, or an error of
    ours, of which nothing is known.
    """
    if verdict.status is Status.CORRECT:
        return CORRECT_CLASS
    if verdict.status in (Status.UNPARSED, Status.ERROR):
        return None
    box = last_boxed(text)
    return "wrong: " + " ".join((text if box is None else box).split())
