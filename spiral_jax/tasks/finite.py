"""Rows of a file or data set -> checked problems -> `Task`: what the formats share."""

from __future__ import annotations

import datetime
import decimal
import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np

from spiral_jax.core import faults
from spiral_jax.tasks.overlap import describe, find_overlap
from spiral_jax.tasks.problem import Problem, Task, TaskError

TRAIN, HELD_OUT = "train", "held_out"  # first part of the ids, so that the splits never share one
_GSM8K_LINE = re.compile(r"####(?!#)(.*)")
_WITH_COMMAS = re.compile(r"-?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")
_SHOWN = 10  # failing rows that an error lists


def make_problem(
    where: str,
    id: str,
    text: Any,
    answer: Any,
    *,
    text_name: str,
    answer_name: str,
    metadata: Mapping[str, Any],
) -> Problem:
    """A problem whose parts are checked.

    Args:
      where: file and row, for errors.
      id: with the split in front.
      text: a non-empty string.
      answer: a non-empty string, a finite number, or a list of these, of which each is right. Of
        GSM8K's layout, whose last line is `#### 1,234`, the reference is `1234`. None: the reward
        needs none.
      text_name, answer_name: what text and answer are called in the row, for errors.
      metadata: JSON types; see `plain_columns`.

    Raises:
      TaskError: something is missing, of another type, or not Unicode.
    """
    if not isinstance(text, str) or not text.strip():
        raise TaskError(f"{where}: needs {text_name}, a non-empty string, not {_short(text)}.")
    several = isinstance(answer, list)
    references = [_answer_text(each) for each in (answer if several else [answer])]
    if answer is not None and (not references or not all(references)):
        raise TaskError(
            f"{where}: needs {answer_name}, a non-empty string, a finite number, a list of these, "
            f"or nothing where the reward needs none; not {_short(answer)}."
        )
    answer = references if several else references[0]
    try:
        # JSON may hold half a surrogate pair (\ud800), which is no character for any tokenizer
        json.dumps([id, text, answer], ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise TaskError(f"{where}: holds what is no Unicode ({error}).") from error
    return Problem(id=id, text=text, answer=answer, metadata=dict(metadata))


def plain_columns(row: Mapping[str, Any], left_out: set[str]) -> dict[str, Any]:
    """The columns of a row in JSON types: dates as text, NaN as None.

    Args:
      left_out: grows by the names of columns that have no such form (images, bytes).
    """
    columns = {}
    for name, value in row.items():
        try:
            columns[name] = _plain(value)
        except TypeError:
            left_out.add(name)
    return columns


def _plain(value: Any) -> Any:
    """Raises `TypeError`: this has no form in JSON."""
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta | decimal.Decimal):
        return str(value)
    raise TypeError(f"{type(value).__name__} is no JSON type")


def attempt(make: Callable[..., Problem], *row: Any, **names: Any) -> Problem | TaskError:
    """`make(...)`, or the `TaskError` that it raises: one bad row does not hide the others."""
    try:
        return make(*row, **names)
    except TaskError as error:
        return error


def unique_problems(rows: Iterable[tuple[str, Problem | TaskError]], source: str) -> list[Problem]:
    """All problems of a split.

    Args:
      rows: (place, problem): file and row of each; a malformed row is its error.
      source: what they were read from, for errors.

    Raises:
      TaskError: there is none, rows are malformed, or two have the same id. All such rows are
        counted, ten are shown.
    """
    place_of: dict[str, str] = {}
    problems, failing = [], []
    for where, problem in rows:
        if isinstance(problem, TaskError):
            failing.append(str(problem))
        elif problem.id in place_of:
            first = place_of[problem.id]
            failing.append(f"{where}: id {problem.id!r} is that of {first} too; ids are unique.")
        else:
            place_of[problem.id] = where
            problems.append(problem)
    if failing:
        shown = failing[:_SHOWN]
        if len(failing) > _SHOWN:
            shown.append(f"... and {len(failing) - _SHOWN} more")
        raise TaskError(
            f"{source}: {len(failing)} of {len(problems) + len(failing)} rows cannot be used; "
            "mend or remove them:\n  " + "\n  ".join(shown)
        )
    if not problems:
        raise TaskError(f"{source}: it is empty; a set of problems has at least one.")
    return problems


def finite_task(
    train: list[Problem],
    held_out: list[Problem],
    seed: int,
    fingerprint: str,
    left_out: Collection[str] = (),
    reward: str = "math",
) -> Task:
    """Training problems in an order drawn anew each epoch, held-out problems in their own order.

    Args:
      train: may be empty for evaluations: `Task.train` must not be called then.
      seed: >= 0; with the epoch it decides the order.
      fingerprint: of the data.
      left_out: columns that do not reach a reward function, for the report.
      reward: `Task.reward`.
    """
    report = describe(find_overlap(train, held_out))
    if left_out:
        names = ", ".join(sorted(left_out))
        report += f"\n  columns that JSON has no form for do not reach a reward: {names}"

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        words = np.random.SeedSequence([seed, epoch])
        return np.random.Generator(np.random.PCG64(words)).permutation(len(train))

    def problem_at(cursor: int) -> Problem:
        if cursor < 0:
            raise IndexError(f"cursor = {cursor}: must be >= 0")
        epoch, position = divmod(cursor, len(train))
        if position == 0 and epoch:
            faults.passed("epoch")
        return train[order(epoch)[position]]

    return Task(
        train=problem_at,
        held_out=held_out.__getitem__,
        held_out_size=len(held_out),
        fingerprint=fingerprint,
        reward=reward,
        report=report,
        problems=[*train, *held_out],
    )


def read_file(path: str, field: str) -> bytes:
    """The bytes of the file that config.task.`field` names. Raises `TaskError`."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        reason = error.strerror
        raise TaskError(f"config.task.{field} = {path!r}: cannot be read ({reason}).") from error


def fingerprint_of(parts: Iterable[bytes]) -> str:
    """SHA-256 of the SHA-256 of each part."""
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def _answer_text(value: Any) -> str:
    """The reference as text; "" where there is none."""
    if isinstance(value, str):
        text = value.strip()
        line = _GSM8K_LINE.fullmatch(text.rpartition("\n")[2].lstrip())
        text = line[1].strip() if line else text
        return text.replace(",", "") if line and _WITH_COMMAS.fullmatch(text) else text
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    # 0.00001, not 1e-05: a text with an e in it is for a reader to puzzle over
    return format(decimal.Decimal(str(value)), "f") if number else ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
