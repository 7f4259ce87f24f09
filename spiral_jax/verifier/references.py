"""All references of a data set, looked at before anything is judged: none is misread in silence."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any

from spiral_jax.tasks.problem import Problem, TaskError
from spiral_jax.verifier.instructions import BrokenInstructions, check_instructions
from spiral_jax.verifier.notation import Unreadable, is_ambiguous, read_reference
from spiral_jax.verifier.programs import BrokenTests, read_tests
from spiral_jax.verifier.rewards import CODE, CODE_ALL, INSTRUCTIONS, MATH

_SHOWN = 10
_OTHER_ENDS = ("####", "Answer: $Answer")  # of answers, in the problems of GSM8K's and DAPO's files


def check_problems(problems: Sequence[Problem], reward_of: Callable[[Problem], str]) -> str:
    """Looks at what rewards of this package judge by: references, tests, instructions.

    Args:
      reward_of: the name of the reward that judges a problem.

    Returns:
      what a user should know of them; "" where there is nothing.

    Raises:
      TaskError: some cannot be read; lists ten of them with the reasons.
    """
    by_reward: dict[str, list[Problem]] = collections.defaultdict(list)
    for problem in problems:
        by_reward[reward_of(problem)].append(problem)
    with_tests = by_reward[CODE] + by_reward[CODE_ALL]
    _check_each(with_tests, read_tests, "problems have no tests that can be run")
    _check_each(
        by_reward[INSTRUCTIONS],
        check_instructions,
        "problems have no instructions that can be checked",
    )
    return check_references(by_reward[MATH])


def _check_each(problems: Sequence[Problem], check: Callable[[Problem], Any], what: str) -> None:
    failing = []
    for problem in problems:
        try:
            check(problem)
        except (BrokenTests, BrokenInstructions) as error:
            failing.append(f"{problem.id}: {error}")
        except (TypeError, ValueError, AttributeError, KeyError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
            failing.append(f"{problem.id}: a column has a type that cannot be read ({reason})")
    advice = "Correct the data, remove these problems, or set config.task.reward to another reward."
    _refuse(failing, len(problems), what, advice)


def _refuse(failing: list[str], count: int, what: str, advice: str) -> None:
    """Raises `TaskError` if something fails."""
    if not failing:
        return
    shown = failing[:_SHOWN]
    if len(failing) > _SHOWN:
        shown.append(f"... and {len(failing) - _SHOWN} more")
    listed = "\n  ".join(shown)
    raise TaskError(f"{len(failing)} of {count} {what}:\n  {listed}\n{advice}")


def check_references(problems: Sequence[Problem]) -> str:
    """Reads the reference answers of a data set as the reward "math" does.

    LaTeX that does not parse is found only when an answer is compared with it: an error there.

    Returns:
      what a user should know: which can be read in two ways, and whether problems ask for another
      form than a box; "" where there is nothing.

    Raises:
      TaskError: some cannot be read; lists ten of them with the reasons.
    """
    failing, ambiguous = [], []
    for problem in problems:
        if not problem.answer:
            columns = ", ".join(problem.metadata) or "none"
            failing.append(f"{problem.id}: there is no answer (other columns: {columns})")
            continue
        for answer in problem.answers:
            try:
                read_reference(answer)
            except Unreadable as error:
                failing.append(f"{problem.id}: {answer!r}: {error}")
            if is_ambiguous(answer):
                ambiguous.append((problem.id, answer))
    _refuse(
        failing,
        len(problems),
        "reference answers are not mathematics that can be read in one way",
        "Write them in LaTeX, remove these problems, or set config.task.reward to a function of "
        'your own in place of "math".',
    )
    notes = [_note_ambiguous(ambiguous), _note_other_ends(problems)]
    return "\n".join(filter(None, notes))


def _note_other_ends(problems: Sequence[Problem]) -> str:
    """Of problems that ask for their answer in another place than a box; "" if there are none."""
    asking = [
        problem
        for problem in problems
        if any(end in problem.text for end in _OTHER_ENDS) and "\\boxed" not in problem.text
    ]
    if not asking:
        return ""
    return (
        f"{len(asking):,} problems such as {asking[0].id} ask for their answer in a form of their "
        f'own ("####" or "Answer:"), and the reward math reads the last \\boxed{{}} alone: take '
        "that instruction out of the file."
    )


def _note_ambiguous(ambiguous: Sequence[tuple[str, str]]) -> str:
    """Of (id, answer) pairs whose answers may be read in two ways; "" if there are none."""
    if not ambiguous:
        return ""
    name, answer = ambiguous[0]
    return (
        f"{len(ambiguous):,} reference answers such as {answer!r} ({name}) may be "
        f"{answer.replace(',', '.')} or a list of two numbers: both answers are taken for "
        "right. Write 3.5 or 3, 5 to have one."
    )
