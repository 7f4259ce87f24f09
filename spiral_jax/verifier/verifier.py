"""(text of a trace, problem) pairs -> verdicts, none of them silent about what went wrong.

    settings = VerifierSettings(workers=2, timeout_s=5.0)
    with Verifier("math", settings) as verifier:
        verdicts = verifier.verify([(text, problem), ...])
    check_error_rate(verdicts, settings.max_error_rate)

A verdict is correct, wrong, unparsed, timeout or error, and too many errors stop the run. Of
several processes each judges its share, and all get all verdicts.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Sequence

from spiral_jax.core import distributed
from spiral_jax.tasks.answer import last_boxed
from spiral_jax.tasks.problem import Problem
from spiral_jax.verifier.pool import Pool, VerifierFailure
from spiral_jax.verifier.rewards import MATH, Status, Verdict, exact_verdict, load_reward
from spiral_jax.verifier.settings import VerifierSettings

CORRECT_CLASS = "correct"
_WRONG = "wrong: "
CORRECT, ERROR = 0, -1  # of `number_classes`


class Verifier:
    """Verifies answers with one reward function, in child processes that `close` ends.

    A context manager, which closes.

    Args:
      reward: "math" or "package.module:function", a function (text of a trace, problem) -> True,
        False, 1, 0 or None (None = unparsed). All else that it returns or raises is an error.
      settings: of the child processes. They start when first needed: integer answers to "math"
        never need them.

    Raises:
      ConfigError: the reward function cannot be loaded.
    """

    def __init__(self, reward: str, settings: VerifierSettings):
        if reward != MATH:
            load_reward(reward)
        self._is_math = reward == MATH
        self._pool = Pool(reward, settings)

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all child processes. Verifying again would start new ones."""
        self._pool.close()

    @property
    def compares_answers(self) -> bool:
        """Whether any two answers can be compared, as "math" can, not only one with a reference."""
        return self._is_math

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
        verdicts: list[Verdict | None] = [None] * len(items)
        if self._is_math:
            verdicts = [exact_verdict(text, problem) for text, problem in items]
        undecided = [i for i, verdict in enumerate(verdicts) if verdict is None]
        judged = self._pool.run([items[i] for i in undecided])
        for i, verdict in zip(undecided, judged, strict=True):
            verdicts[i] = verdict
        return verdicts


def exchange(shares: Sequence[Sequence[Verdict]]) -> list[list[Verdict]]:
    """All verdicts of some sets of answers from this process's `distributed.share` of each.

    A collective: all processes call it for the same sets, in the same order, on their main thread.
    """
    own = [[(verdict.status.value, verdict.detail) for verdict in share] for share in shares]
    everybodys = distributed.gather(own)
    sets = []
    for parts in zip(*everybodys, strict=True):
        verdicts = distributed.unite(parts)
        sets.append([Verdict.of(Status(status), detail) for status, detail in verdicts])
    return sets


def count_verdicts(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """How many were "correct", "wrong", "unparsed", "timeout" and "error": all verdicts."""
    counts = collections.Counter(verdict.status for verdict in verdicts)
    return {status.value: counts[status] for status in Status}


def check_error_rate(verdicts: Sequence[Verdict], max_error_rate: float) -> None:
    """Checks that few answers failed by our own doing: silent NaNs are no training signal.

    Raises:
      VerifierFailure: the share of errors is above `max_error_rate`.
    """
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


def answer_class(text: str, verdict: Verdict) -> str | None:
    r"""The class of an answer in a majority vote; equal classes are the same answer.

    All correct answers share `CORRECT_CLASS`. A wrong one is its last \boxed{}, or the whole text
    where a reward function does without boxes, with each run of white space as one space. None, no
    vote: unparsed, or an error of ours, of which nothing is known.
    """
    if verdict.status is Status.CORRECT:
        return CORRECT_CLASS
    if verdict.status in (Status.UNPARSED, Status.ERROR):
        return None
    box = last_boxed(text)
    return _WRONG + " ".join((text if box is None else box).split())


def number_classes(
    verifier: Verifier,
    problems: Sequence[Problem],
    texts: Sequence[str],
    verdicts: Sequence[Verdict],
) -> list[list[int | None]]:
    """The answers of each problem's traces as small integers; equal numbers are the same answer.

    Wrong answers that the verifier takes for the same (1/2 and 0.5) have one number where it can
    compare them; with a reward function of the user's, or where an answer had timed out, those that
    are spelt alike. All pairs of different spellings of a problem are compared, so that a hundred
    non-integer ones take seconds.

    Args:
      problems: B problems.
      texts, verdicts: those of the traces, the same number for each problem, in problem order.

    Returns:
      B rows: `CORRECT` = 0, wrong classes 1, 2, ... in order of appearance, None = unparsed,
      `ERROR` = -1: failed by us, so nothing is known.
    """
    size = len(texts) // len(problems)
    spelt = [answer_class(text, verdict) for text, verdict in zip(texts, verdicts, strict=True)]
    same = [{} for _ in problems]
    if verifier.compares_answers:
        wrong = [
            name if v.status is Status.WRONG else None
            for name, v in zip(spelt, verdicts, strict=True)
        ]
        same = _equal_spellings(
            verifier, problems, [wrong[b * size : (b + 1) * size] for b in range(len(problems))]
        )
    rows = []
    for b, names in enumerate(same):
        number: dict[str | None, int | None] = {None: None, CORRECT_CLASS: CORRECT}
        row = []
        for i in range(b * size, (b + 1) * size):
            name = names.get(spelt[i], spelt[i])
            failed = verdicts[i].status is Status.ERROR
            row.append(ERROR if failed else number.setdefault(name, len(number) - 1))
        rows.append(row)
    return rows


def _equal_spellings(
    verifier: Verifier, problems: Sequence[Problem], rows: Sequence[Sequence[str | None]]
) -> list[dict[str | None, str]]:
    """For each problem: wrong class -> the first of its classes that the verifier takes for the
    same answer.
    """
    items, pairs = [], []
    for b, row in enumerate(rows):
        distinct = [name for name in dict.fromkeys(row) if name is not None]
        for first, later in itertools.combinations(distinct, 2):
            reference, box = (name.removeprefix(_WRONG) for name in (first, later))
            items.append((rf"\boxed{{{box}}}", dataclasses.replace(problems[b], answer=reference)))
            pairs.append((b, first, later))
    same: list[dict[str | None, str]] = [{} for _ in problems]
    for (b, first, later), verdict in zip(pairs, verifier.verify(items), strict=True):
        if verdict.status is Status.CORRECT:
            same[b].setdefault(later, same[b].get(first, first))
    return same
