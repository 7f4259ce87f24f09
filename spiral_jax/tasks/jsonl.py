"""Problems from JSONL files: {"problem" or "question", "answer", optional "id"} a line -> `Task`.

GSM8K's layout is understood: of an answer whose last line is `#### 1,234` the reference is `1234`.
All other fields of a line are `Problem.metadata`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from spiral_jax.tasks.finite import (
    HELD_OUT,
    TRAIN,
    attempt,
    fingerprint_of,
    finite_task,
    make_problem,
    plain_columns,
    read_file,
    unique_problems,
)
from spiral_jax.tasks.problem import Problem, Task, TaskError


def task(train_path: str, eval_path: str, seed: int) -> Task:
    """Training problems of one file, shuffled each epoch, and held-out ones of another in order.

    Args:
      train_path: UTF-8 JSONL file. Blank lines are allowed. "" = none, for evaluation: `train` must
        not be called.
      eval_path: the same for held-out problems; "" = none.
      seed: >= 0; with the epoch it decides the order.

    Returns:
      A task whose cursor runs through all training problems once an epoch. Ids are "train:" or
      "held_out:" and the line's "id", or its line number where it has none. The fingerprint covers
      the bytes of both files.

    Raises:
      TaskError: a file is missing or empty, a line is malformed, or two lines have the same id.
    """
    train_bytes = read_file(train_path, "train_path") if train_path else b""
    eval_bytes = read_file(eval_path, "eval_path") if eval_path else b""
    train = parse(train_bytes, train_path, TRAIN) if train_path else []
    held_out = parse(eval_bytes, eval_path, HELD_OUT) if eval_path else []
    return finite_task(train, held_out, seed, fingerprint_of([train_bytes, eval_bytes]))


def parse(data: bytes, path: str, split: str) -> list[Problem]:
    """The problems of a file's bytes; their ids begin with `split`. Raises `TaskError`."""
    return unique_problems(_rows(data, path, split), path)


def _rows(data: bytes, path: str, split: str) -> Iterator[tuple[str, Problem | TaskError]]:
    # lines are cut as bytes, because str.splitlines cuts at a U+2028 inside a text too
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            where = f"{path}:{number}"
            yield where, attempt(_problem, line, where, split, number)


def _problem(line: bytes, where: str, split: str, number: int) -> Problem:
    try:
        return _read(line, where, split, number)
    except RecursionError as error:
        raise TaskError(f"{where}: lists or objects are nested too deep in one another.") from error


def _read(line: bytes, where: str, split: str, number: int) -> Problem:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise TaskError(f"{where}: not JSON in UTF-8 ({error}).") from error
    if not isinstance(row, dict):
        kind = type(row).__name__
        raise TaskError(f'{where}: a {kind}, not an object {{"problem": ..., "answer": ...}}.')
    name = number if row.get("id") is None else row["id"]
    text_field = "problem" if "problem" in row else "question"
    others = {field: row[field] for field in row.keys() - {text_field, "answer", "id"}}
    keys = f"(keys found: {sorted(row)})"
    return make_problem(
        where,
        f"{split}:{name}",
        row.get(text_field),
        row.get("answer"),
        text_name=f'"problem" or "question" {keys}',
        answer_name=f'"answer" {keys}',
        metadata=plain_columns(dict(sorted(others.items())), set()),
    )
