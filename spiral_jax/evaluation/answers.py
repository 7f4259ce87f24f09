"""Answers of a problem's traces -> small integers that are equal where the answers are the same.

Does without jax, as all that a report reads from this room.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from spiral_jax.tasks.answer import last_boxed
from spiral_jax.tasks.problem import Problem
from spiral_jax.verifier.rewards import Status, Verdict

if TYPE_CHECKING:
    from spiral_jax.verifier.verifier import Verifier

CORRECT, ERROR = 0, -1  # numbers of answers, see `number_classes`
CORRECT_CLASS = "correct"
_WRONG = "wrong: "


def answer_class(text: str, verdict: Verdict) -> str | None:
    r"""The class of an answer in a majority vote; equal classes are the same answer.

    All correct answers share `CORRECT_CLASS`. A wrong one is what the reward function says that it
    is, else its last \boxed{}, else the whole text, with each run of white space as one space.
    None, no vote: unparsed, an answer that is said to be "", or an error of ours, of which nothing
    is known.
    """
    if verdict.status is Status.CORRECT:
        return CORRECT_CLASS
    if verdict.is_failure or verdict.status is Status.UNPARSED or verdict.answer == "":
        return None
    return _WRONG + " ".join(spelling(text, verdict.answer).split())


def spelling(text: str, answer: str | None) -> str:
    """A final answer as it is written; `answer` is what a reward function says, if it does."""
    if answer is not None:
        return answer
    box = last_boxed(text)
    return text if box is None else box


def number_classes(
    verifier: Verifier,
    problems: Sequence[Problem],
    texts: Sequence[str],
    verdicts: Sequence[Verdict],
) -> list[list[int | None]]:
    """The answers of each problem's traces as small integers; equal numbers are the same answer.

    Wrong answers that the verifier takes for the same (1/2 and 0.5) have one number where it can
    compare them. With a reward function of the user's, or where an answer had timed out, those that
    are spelt alike have one number. All pairs of different spellings of a problem are compared, so
    a hundred answers that are no integers take seconds.

    Args:
      problems: B problems.
      texts, verdicts: those of the traces, the same number for each problem, in problem order.

    Returns:
      B rows: `CORRECT` = 0, wrong classes 1, 2, ... in order of appearance, None = unparsed,
      `ERROR` = -1: failed by us, so nothing is known.
    """
    per_problem = len(texts) // len(problems)
    classes = [answer_class(text, verdict) for text, verdict in zip(texts, verdicts, strict=True)]
    spans = [slice(b * per_problem, (b + 1) * per_problem) for b in range(len(problems))]

    wrong = [
        name if verdict.status is Status.WRONG else None
        for name, verdict in zip(classes, verdicts, strict=True)
    ]
    comparable = [
        wrong[span] if verifier.compares_answers(problem) else ()
        for problem, span in zip(problems, spans, strict=True)
    ]
    first_spellings = _equal_spellings(verifier, problems, comparable)

    return [
        _number_row(classes[span], verdicts[span], first)
        for span, first in zip(spans, first_spellings, strict=True)
    ]


def _number_row(
    classes: Sequence[str | None], verdicts: Sequence[Verdict], first_spelling: dict[str, str]
) -> list[int | None]:
    """The numbers of one problem's answers."""
    number_of = {CORRECT_CLASS: CORRECT}
    numbers: list[int | None] = []
    for name, verdict in zip(classes, verdicts, strict=True):
        if verdict.is_failure:
            numbers.append(ERROR)
        elif name is None:
            numbers.append(None)
        else:
            numbers.append(number_of.setdefault(first_spelling.get(name, name), len(number_of)))
    return numbers


def _equal_spellings(
    verifier: Verifier, problems: Sequence[Problem], rows: Sequence[Sequence[str | None]]
) -> list[dict[str, str]]:
    """For each problem: a wrong class -> the first class that the verifier takes for the same."""
    items, pairs = [], []
    for b, row in enumerate(rows):
        distinct = [name for name in dict.fromkeys(row) if name is not None]
        for first, later in itertools.combinations(distinct, 2):
            as_reference = dataclasses.replace(problems[b], answer=first.removeprefix(_WRONG))
            items.append((rf"\boxed{{{later.removeprefix(_WRONG)}}}", as_reference))
            pairs.append((b, first, later))

    first_spellings: list[dict[str, str]] = [{} for _ in problems]
    for (b, first, later), verdict in zip(pairs, verifier.verify(items), strict=True):
        if verdict.status is Status.CORRECT:
            spelling = first_spellings[b]
            spelling.setdefault(later, spelling.get(first, first))
    return first_spellings
