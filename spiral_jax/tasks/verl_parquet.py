"""Problems from parquet files in verl's layout -> `Task`.

Columns: prompt, a list of {"role", "content"}; reward_model, with "ground_truth"; data_source; and,
where they are there, extra_info and others, which are not read. A user's reward function finds
data_source and extra_info in `Problem.metadata`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow
import pyarrow.parquet

from spiral_jax.tasks.finite import (
    HELD_OUT,
    TRAIN,
    checked,
    distinct,
    fingerprint_of,
    finite_task,
    make_problem,
    read_file,
)
from spiral_jax.tasks.problem import Problem, Task, TaskError

_NEEDED, _OPTIONAL = ("prompt", "reward_model", "data_source"), ("extra_info",)


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
    contents, splits = [], []
    for path, field, split in (
        (train_path, "train_path", TRAIN),
        (eval_path, "eval_path", HELD_OUT),
    ):
        contents.append(read_file(path, field) if path else b"")
        splits.append(distinct(_problems(contents[-1], path, split, system), path) if path else [])
    return finite_task(*splits, seed, fingerprint_of(contents))


def _problems(
    data: bytes, path: str, split: str, system: str
) -> Iterator[tuple[str, Problem | TaskError]]:
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
        columns = file.schema_arrow.names
        if missing := [name for name in _NEEDED if name not in columns]:
            raise TaskError(
                f"{path}: lacks the columns {missing} of verl's layout; columns found: {columns}."
            )
        number = 0
        for batch in file.iter_batches(
            columns=[name for name in (*_NEEDED, *_OPTIONAL) if name in columns]
        ):
            for row in batch.to_pylist():
                where = f"{path}, row {number} (from 0)"
                yield where, checked(_problem, row, where, split, number, system)
                number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise TaskError(f"{path}: not a readable parquet file ({error}).") from error


def _problem(row: dict[str, Any], where: str, split: str, number: int, system: str) -> Problem:
    text = _users_text(row["prompt"], where, system)
    rule, more = row["reward_model"], row.get("extra_info")
    answer = rule.get("ground_truth") if isinstance(rule, dict) else None
    source = row["data_source"]
    if not isinstance(source, str):
        raise TaskError(f"{where}: needs data_source, a string, not {source!r}.")
    index = more.get("index") if isinstance(more, dict) else None
    name = number if index is None else f"{source}/{index}"
    metadata = {"data_source": source, "extra_info": more}
    return make_problem(
        where, f"{split}:{name}", text, answer, ("prompt", "reward_model.ground_truth"), metadata
    )


def _users_text(messages: Any, where: str, system: str) -> str:
    """The content of the one user message, behind at most one system message that is `system`."""
    listed = messages if isinstance(messages, list) else []
    pairs = [(m.get("role"), m.get("content")) for m in listed if isinstance(m, dict)]
    if [role for role, _ in pairs] not in (["user"], ["system", "user"]):
        raise TaskError(f"{where}: prompt must be one user message, behind a system message or alone; its roles are "
                        f"{[role for role, _ in pairs]}.")  # fmt: skip
    if len(pairs) == 2 and pairs[0][1] != system:
        raise TaskError(f"{where}: its system message is {pairs[0][1]!r}, config.prompt.system is {system!r}. One "
                        "system message is used for all prompts: make the two equal.")  # fmt: skip
    return pairs[-1][1]
