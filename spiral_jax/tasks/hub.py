"""A data set of the Hugging Face Hub, or a local directory that `datasets` reads -> `Task`.

The package is optional: pip install -r requirements-datasets.txt. From version 4 on it runs no code
of data sets.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from spiral_jax.tasks.finite import (
    HELD_OUT,
    TRAIN,
    attempt,
    fingerprint_of,
    finite_task,
    make_problem,
    unique_problems,
)
from spiral_jax.tasks.problem import Problem, Task, TaskError


def task(
    dataset: str,
    subset: str,
    split_train: str,
    split_eval: str,
    problem_column: str,
    answer_column: str,
    seed: int,
) -> Task:
    """As `jsonl.task`, of two splits of a data set.

    Args:
      dataset: name on the Hub, or a local directory.
      subset: configuration of the data set; "" = its only one.
      split_train, split_eval: such as "train" or "train[:100]"; "" = none.
      problem_column, answer_column: columns with a problem's text and its reference answer.
      seed: >= 0; with the epoch it decides the order.

    Returns:
      A task whose ids are "train:" or "held_out:" and the row's "id" where there is such a column,
      else its number from 0. The fingerprint covers ids, texts and answers.

    Raises:
      TaskError: the package or the data set is not there, a column is missing, a row is malformed,
        or ids repeat.
    """

    def read(split: str, prefix: str) -> list[Problem]:
        if not split:
            return []
        rows = problems(dataset, subset, split, problem_column, answer_column, prefix)
        return unique_problems(rows, f"{dataset}, {split}")

    train, held_out = read(split_train, TRAIN), read(split_eval, HELD_OUT)
    texts = [[[p.id, p.text, p.answer] for p in split] for split in (train, held_out)]
    parts = [json.dumps(rows).encode() for rows in texts]
    return finite_task(train, held_out, seed, fingerprint_of(parts))


def problems(
    dataset: str, subset: str, split: str, problem_column: str, answer_column: str, prefix: str
) -> Iterator[tuple[str, Problem | TaskError]]:
    """(place, problem) of each row of a split; ids begin with `prefix`.

    Raises:
      TaskError: see `task`.
    """
    rows = _load(dataset, subset, split)
    for field, column in (("problem_column", problem_column), ("answer_column", answer_column)):
        if column not in rows.column_names:
            raise TaskError(
                f"config.task.{field} = {column!r}: not a column of {dataset}, which has "
                f"{rows.column_names}."
            )
    for number, row in enumerate(rows):
        where = f"{dataset}, {split}, row {number} (from 0)"
        name = number if row.get("id") is None else row["id"]
        problem = attempt(
            make_problem,
            where,
            f"{prefix}:{name}",
            row[problem_column],
            row[answer_column],
            text_name=problem_column,
            answer_name=answer_column,
        )
        yield where, problem


def _load(dataset: str, subset: str, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise TaskError(
            'config.task.name = "hf" needs the package datasets, which is optional: '
            "pip install -r requirements-datasets.txt"
        ) from error
    try:
        return datasets.load_dataset(dataset, subset or None, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        # of unknown names, subsets and splits, unreachable networks, and data sets that would need
        # code of their own
        reason = " ".join(str(error).split())
        raise TaskError(
            f"config.task.dataset = {dataset!r} (subset {subset!r}, split {split!r}): cannot be "
            f"loaded ({reason}). Without a network give a local directory, or use task.name = "
            "jsonl or parquet."
        ) from error
