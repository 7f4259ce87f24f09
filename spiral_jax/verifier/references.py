"""All references of a data set, looked at before anything is judged: none is misread in silence."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence

from spiral_jax.tasks.problem import Problem, TaskError
from spiral_jax.verifier.instructions import check_instructions
from spiral_jax.verifier.notation import Unreadable, is_ambiguous, read_reference
from spiral_jax.verifier.programs import check_tests
from spiral_jax.verifier.rewards import CODE, CODE_ALL, INSTRUCTIONS, MATH

_SHOWN = 10


def check_problems(problems: Sequence[Problem], reward_of: Callable[[Problem], str]) -> str:
    """Looks at what rewards of this package judge by: references, tests, instructions.

    Args:
      reward_of: the name of the reward that judges a problem.

    Returns:
      what a user should know of them; "" where there is nothing.

    Raises:
      TaskError: see `check_references`, `programs.check_tests` and
        `instructions.check_instructions`.
    """
    by_reward: dict[str, list[Problem]] = collections.defaultdict(list)
    for problem in problems:
        by_reward[reward_of(problem)].append(problem)
    check_tests(by_reward[CODE] + by_reward[CODE_ALL])
    check_instructions(by_reward[INSTRUCTIONS])
    return check_references(by_reward[MATH])


def check_references(problems: Sequence[Problem]) -> str:
    """Reads the reference answers of a data set as the reward "math" does.

    LaTeX that does not parse is found only when an answer is compared with it: an error there.

    Returns:
      what a user should know of those that can be read in two ways; "" where there are none.

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
    if failing:
        shown = failing[:_SHOWN]
        if len(failing) > _SHOWN:
            shown.append(f"... and {len(failing) - _SHOWN} more")
        raise TaskError(
            f"{len(failing)} of {len(problems)} reference answers are not mathematics that can be "
            "read in one way:\n  " + "\n  ".join(shown) + "\nWrite them in LaTeX, remove these "
            'problems, or set config.task.reward to a function of your own in place of "math".'
        )
    if not ambiguous:
        return ""
    name, answer = ambiguous[0]
    return (
        f"{len(ambiguous):,} reference answers such as {answer!r} ({name}) may be "
        f"{answer.replace(',', '.')} or a list of two numbers: both answers are taken for "
        "right. Write 3.5 or 3, 5 to have one."
    )
