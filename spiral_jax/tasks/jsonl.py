"""Problems from JSONL files: {"problem" or "question", "answer", optional "id"} a line -> `Task`.

GSM8K's layout is understood: of an answer `... #### 1,234` the reference is `1234`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from typing import Any

import numpy as np

from spiral_jax.tasks.problem import Problem, Task

_GSM8K_MARK = "####"


class TaskError(ValueError):
    """Problems that cannot be had; the message names the file and line or the field, and what to do."""


def task(train_path: str, eval_path: str, seed: int) -> Task:
    """Training problems of one file in an order drawn anew each epoch, held-out problems of another in file order.

    Args:
      train_path: UTF-8 JSONL file. Blank lines are allowed. "" = none, for evaluation: `train` must not be called.
      eval_path: the same for held-out problems; "" = none.
      seed: >= 0; with the epoch it decides the order.

    Returns:
      A task whose cursor runs through all training problems once an epoch. Ids are "train:" or "held_out:" and the
      line's "id", or its line number where it has none. The fingerprint covers the bytes of both files.

    Raises:
      TaskError: a file is missing or empty, a line is malformed, or two lines have the same id.
    """
    train_bytes = _read(train_path, "train_path") if train_path else b""
    eval_bytes = _read(eval_path, "eval_path") if eval_path else b""
    train = _parse(train_bytes, train_path, "train") if train_path else []
    held_out = _parse(eval_bytes, eval_path, "held_out") if eval_path else []

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch]))).permutation(len(train))

    def at(cursor: int) -> Problem:
        if cursor < 0:
            raise IndexError(f"cursor = {cursor}: must be >= 0")
        epoch, position = divmod(cursor, len(train))
        return train[order(epoch)[position]]

    parts = b"".join(hashlib.sha256(data).digest() for data in (train_bytes, eval_bytes))
    return Task(
        train=at,
        held_out=held_out.__getitem__,
        held_out_size=len(held_out),
        fingerprint=hashlib.sha256(parts).hexdigest(),
    )


def _read(path: str, field: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise TaskError(f"config.task.{field} = {path!r}: cannot be read ({error.strerror}).") from error


def _parse(data: bytes, path: str, split: str) -> list[Problem]:
    problems, line_of_id = [], {}
    for number, raw in enumerate(data.split(b"\n"), start=1):  # bytes: str.splitlines cuts at U+2028 inside a text too
        if not raw.strip():
            continue
        where = f"{path}:{number}"
        problem = _problem(raw, where, split, number)
        if problem.id in line_of_id:
            raise TaskError(f"{where}: id {problem.id!r} is that of line {line_of_id[problem.id]} too; ids are unique.")
        line_of_id[problem.id] = number
        problems.append(problem)
    if not problems:
        raise TaskError(f"{path}: the file is empty; expected one JSON object a line.")
    return problems


def _problem(raw: bytes, where: str, split: str, number: int) -> Problem:
    try:
        row = json.loads(raw.decode("utf-8-sig"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise TaskError(f"{where}: not JSON in UTF-8 ({error}).") from error
    if not isinstance(row, dict):
        raise TaskError(f'{where}: a {type(row).__name__}, not an object {{"problem": ..., "answer": ...}}.')
    text = row.get("problem", row.get("question"))
    if not isinstance(text, str) or not text.strip():
        raise TaskError(f'{where}: needs "problem" or "question", a non-empty string; keys found: {sorted(row)}.')
    answer = _answer(row.get("answer"))
    if not answer:
        raise TaskError(f'{where}: needs "answer", a non-empty string or a finite number; keys found: {sorted(row)}.')
    name = row.get("id")
    return Problem(id=f"{split}:{number if name is None else name}", text=text, answer=answer)


def _answer(value: Any) -> str:
    """The reference as text; "" where there is none."""
    if isinstance(value, str):
        _, mark, last = value.rpartition(_GSM8K_MARK)
        return last.replace(",", "").strip() if mark else value.strip()
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return str(value) if number else ""
