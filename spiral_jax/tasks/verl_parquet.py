"""Problems from parquet files in verl's layout -> `Task`.

Columns: prompt, a list of {"role", "content"}; data_source, which chooses the reward unless the
config does (`verifier/choice.py`); where the reward needs one, reward_model with "ground_truth":
an answer, or tests or instructions in JSON or columns of columns. A user's reward function finds
data_source, extra_info and all other columns in `Problem.metadata`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow
import pyarrow.parquet

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

_NEEDED = ("prompt", "data_source")


def task(train_path: str, eval_path: str, system: str, seed: int) -> Task:
    """As `jsonl.task`, of parquet files.

    Args:
      train_path, eval_path: parquet files; "" = none.
      system: config.prompt.system. A row's own system message must be this one, since prompts are
        made from the problem's text alone.
      seed: >= 0; with the epoch it decides the order.

    Returns:
      A task whose ids are "train:" or "held_out:" and "data_source/index" where extra_info has an
      index, else the row's number from 0. The fingerprint covers the bytes of both files.

    Raises:
      TaskError: a file is missing, empty or not parquet, a column is missing, a row is malformed,
        or ids repeat.
    """
    train_bytes = read_file(train_path, "train_path") if train_path else b""
    eval_bytes = read_file(eval_path, "eval_path") if eval_path else b""
    left_out: set[str] = set()

    def parse(data: bytes, path: str, split: str) -> list[Problem]:
        return unique_problems(_rows(data, path, split, system, left_out), path) if path else []

    train = parse(train_bytes, train_path, TRAIN)
    held_out = parse(eval_bytes, eval_path, HELD_OUT)
    fingerprint = fingerprint_of([train_bytes, eval_bytes])
    of_source = ""  # the reward is that of each problem's data_source
    return finite_task(train, held_out, seed, fingerprint, left_out, reward=of_source)


def _rows(
    data: bytes, path: str, split: str, system: str, left_out: set[str]
) -> Iterator[tuple[str, Problem | TaskError]]:
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
        columns = file.schema_arrow.names
        if missing := [name for name in _NEEDED if name not in columns]:
            raise TaskError(
                f"{path}: lacks the columns {missing} of verl's layout; columns found: {columns}."
            )
        number = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                where = f"{path}, row {number} (from 0)"
                yield where, attempt(_problem, row, where, split, number, system, left_out)
                number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise TaskError(f"{path}: not a readable parquet file ({error}).") from error


def _problem(
    row: dict[str, Any], where: str, split: str, number: int, system: str, left_out: set[str]
) -> Problem:
    rule, more, source = row.get("reward_model"), row.get("extra_info"), row["data_source"]
    text = _users_text(row["prompt"], where, system)
    if not isinstance(source, str):
        raise TaskError(f"{where}: needs data_source, a string, not {source!r}.")
    index = more.get("index") if isinstance(more, dict) else None
    name = number if index is None else f"{source}/{index}"
    return make_problem(
        where,
        f"{split}:{name}",
        text,
        _reference(rule.get("ground_truth")) if isinstance(rule, dict) else None,
        text_name="prompt",
        answer_name="reward_model.ground_truth",
        metadata=plain_columns(
            {"extra_info": None} | {name: row[name] for name in row if name != "prompt"}, left_out
        ),
    )


def _reference(truth: Any) -> Any:
    """The reference answer; what is no answer, but columns of its own, as JSON."""
    has_columns = isinstance(truth, dict) or (
        isinstance(truth, list) and any(isinstance(each, dict) for each in truth)
    )
    return json.dumps(truth) if has_columns else truth


def _users_text(messages: Any, where: str, system: str) -> str:
    """The content of the one user message, behind at most one system message that is `system`."""
    listed = messages if isinstance(messages, list) else []
    turns = [(turn.get("role"), turn.get("content")) for turn in listed if isinstance(turn, dict)]
    roles = [role for role, _ in turns]
    if roles not in (["user"], ["system", "user"]):
        raise TaskError(
            f"{where}: prompt must be one user message, behind a system message or alone; its "
            f"roles are {roles}."
        )
    if len(turns) == 2 and turns[0][1] != system:
        raise TaskError(
            f"{where}: its system message is {turns[0][1]!r}, config.prompt.system is {system!r}. "
            "One system message is used for all prompts: make the two equal."
        )
    return turns[-1][1]
