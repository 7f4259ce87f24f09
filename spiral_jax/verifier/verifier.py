"""(text of a trace, problem) pairs -> verdicts: a reward each, and a count of everything that went
wrong.

    with Verifier(reward="math", workers=2, timeout_s=5.0) as verifier:
        verdicts = verifier.verify([(text, problem), ...])
    check_error_rate(verdicts, max_error_rate=0.05)

Nothing is silent: a verdict is correct, wrong, unparsed, timeout or error, and too many errors stop
the run. Of several processes each judges its share, and all get all verdicts.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

from spiral_jax.core import distributed
from spiral_jax.core.config import ConfigError
from spiral_jax.tasks.problem import Problem
from spiral_jax.verifier.pool import Pool, VerifierFailure
from spiral_jax.verifier.rewards import MATH, Status, Verdict, exact_verdict, load_reward


class Verifier:
    """Verifies answers with one reward function, in child processes that `close` ends; a context
    manager.

    Args:
      reward: "math" or "package.module:function", a function (text of a trace, problem) -> True,
        False, 1, 0 or None (None = unparsed). All else that it returns or raises is an error.
      workers: child processes, >= 1. They start when first needed: integer answers to "math" never
      need them.
      timeout_s: seconds for one answer, > 0; neither the wait for a free worker nor its start
      counts.
      memory_gb: address space of a child process, 10^9 bytes.
      environment: names of variables that child processes see beside those that Python needs; no
      others.

    Raises:
      ConfigError: the reward function cannot be loaded, or a number is out of range.
    """

    def __init__(
        self,
        reward: str,
        workers: int,
        timeout_s: float,
        memory_gb: float = 4.0,
        environment: Sequence[str] = (),
    ):
        if workers < 1:
            raise ConfigError(f"config.verifier.workers = {workers!r}: must be >= 1.")
        if not timeout_s > 0:
            raise ConfigError(f"config.verifier.timeout_s = {timeout_s!r}: must be > 0.")
        if reward != MATH:
            load_reward(reward)
        self._exact = reward == MATH
        self._pool = Pool(reward, workers, timeout_s, memory_gb=memory_gb, environment=environment)

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all child processes. Verifying again would start new ones."""
        self._pool.close()

    @property
    def compares_answers(self) -> bool:
        """Whether any two answers can be compared ("math"), rather than an answer with its
        problem's reference.
        """
        return self._exact

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the child processes that there are now."""
        return self._pool.pids

    @property
    def replaced_workers(self) -> int:
        """Child processes that were killed or had died at an answer, and were replaced."""
        return self._pool.replaced

    def longest_s(self, items: int) -> float:
        """Seconds that `verify` takes at most for so many items."""
        return self._pool.longest_s(items)

    def verify(self, items: Sequence[tuple[str, Problem]]) -> list[Verdict]:
        """The verdict of each (text, problem), in the order given. A collective: see `exchange`.

        Raises:
          VerifierFailure: a worker cannot start.
        """
        return exchange([self.judge([items[i] for i in distributed.share(len(items))])])[0]

    def judge(self, items: Sequence[tuple[str, Problem]]) -> list[Verdict]:
        """The verdict of each (text, problem), by this process alone.

        Raises:
          VerifierFailure: a worker cannot start.
        """
        verdicts = [
            exact_verdict(text, problem) if self._exact else None for text, problem in items
        ]
        undecided = [i for i, verdict in enumerate(verdicts) if verdict is None]
        for i, verdict in zip(
            undecided, self._pool.run([items[i] for i in undecided]), strict=True
        ):
            verdicts[i] = verdict
        return verdicts


def exchange(shares: Sequence[Sequence[Verdict]]) -> list[list[Verdict]]:
    """All verdicts of some sets of answers from this process's `distributed.share` of each; its
    own, if it is alone.

    A collective: all processes call it for the same sets, in the same order, on their main thread.
    """
    own = [[[verdict.status.value, verdict.detail] for verdict in of_set] for of_set in shares]
    found = zip(*distributed.gather(own), strict=True)
    return [
        [Verdict.of(Status(status), detail) for status, detail in distributed.unite(parts)]
        for parts in found
    ]


def count_verdicts(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """How many were "correct", "wrong", "unparsed", "timeout" and "error"; they add up to the
    number of verdicts.
    """
    counts = collections.Counter(verdict.status for verdict in verdicts)
    return {status.value: counts[status] for status in Status}


def check_error_rate(verdicts: Sequence[Verdict], max_error_rate: float) -> None:
    """Raises `VerifierFailure` if the share of errors is above `max_error_rate`: silent NaNs are no
    training signal.
    """
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
