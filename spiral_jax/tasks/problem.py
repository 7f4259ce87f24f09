"""What a task hands out: problems by cursor, and how an answer to them is rewarded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from spiral_jax.core.errors import UserError


class TaskError(UserError):
    """Problems cannot be had; the message names the file and row, or the field, and what to do."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
      id: stable name, unique in its task; train and held-out problems never share one.
      text: what is asked; goes into the prompts as `{problem}`.
      answer: the reference that a reward function compares with; a list of those that are right;
        "" where there is none.
      metadata: whatever else a reward function needs, such as all other columns of a row; JSON
        types only, since it crosses a process boundary.

    Raises:
      TaskError: the answer has another type.
    """

    id: str
    text: str
    answer: str | list[str]
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        listed = self.answer if isinstance(self.answer, list) else [self.answer]
        if not listed or not all(isinstance(each, str) for each in listed):
            raise TaskError(
                f"problem {self.id!r}: answer = {self.answer!r}: must be a string or a list of "
                'strings. Write a number as str(number), and "" where there is no answer.'
            )

    @property
    def columns(self) -> Mapping[str, Any]:
        """`metadata`, and in it what verl's files have in `extra_info`."""
        extra = self.metadata.get("extra_info")
        return {**extra, **self.metadata} if isinstance(extra, Mapping) else self.metadata

    @property
    def answers(self) -> list[str]:
        """Every reference that is right; [""] where there is none."""
        return [self.answer] if isinstance(self.answer, str) else self.answer


@dataclasses.dataclass(frozen=True)
class Task:
    """A stream of training problems and a list of held-out ones.

    Attributes:
      train: cursor (0, 1, 2, ... without end) -> problem; a pure function, so that a cursor is all
        the state there is.
      held_out: index below `held_out_size` -> problem.
      held_out_size: number of held-out problems.
      fingerprint: changes when the data do; a resumed run refuses another one.
      reward: default for config.task.reward: the name of a reward, the path
        "package.module:function" of a reward function, or "" = that of each problem's data_source.
      strategy: default for config.task.strategy: path of a function, or "" where strategies have
        no name.
      report: what a user should know of the data (sizes, duplicates, overlap), for the terminal;
        "" where problems are made without end.
      problems: all of them, of both splits; () where they are made without end.
    """

    train: Callable[[int], Problem]
    held_out: Callable[[int], Problem]
    held_out_size: int
    fingerprint: str
    reward: str = "math"
    strategy: str = ""
    report: str = ""
    problems: Sequence[Problem] = ()
