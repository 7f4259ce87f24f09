"""A data set of the Hugging Face Hub, or a local directory that `datasets` reads -> `Task`.

The package is optional: pip install ".[datasets]". From version 4 on it runs no code
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
    plain_columns,
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
      problem_column, answer_column: columns with a problem's text and its reference answer; no
        answer_column: the reward needs none. All others are `Problem.metadata`.
      seed: >= 0; with the epoch it decides the order.

    Returns:
      A task whose ids are "train:" or "held_out:" and the row's "id" where there is such a column,
      else its number from 0. The fingerprint covers all that a problem holds.

    Raises:
      TaskError: the package or the data set is not there, a column is missing, a row is malformed,
        or ids repeat.
    """

    left_out: set[str] = set()

    def read(split: str, prefix: str) -> list[Problem]:
        if not split:
            return []
        rows = problems(dataset, subset, split, problem_column, answer_column, prefix, left_out)
        return unique_problems(rows, f"{dataset}, {split}")

    train, held_out = read(split_train, TRAIN), read(split_eval, HELD_OUT)
    texts = [[_content(problem) for problem in split] for split in (train, held_out)]
    parts = [json.dumps(rows).encode() for rows in texts]
    return finite_task(train, held_out, seed, fingerprint_of(parts), left_out)


def _content(problem: Problem) -> list:
    """What a fingerprint is made of; as in earlier versions where there are no other columns."""
    content = [problem.id, problem.text, problem.answer]
    return [*content, problem.metadata] if problem.metadata else content


def problems(
    dataset: str,
    subset: str,
    split: str,
    problem_column: str,
    answer_column: str,
    prefix: str,
    left_out: set[str],
) -> Iterator[tuple[str, Problem | TaskError]]:
    """(place, problem) of each row of a split; ids begin with `prefix`.

    `left_out` grows by the columns that have no form in JSON.

    Raises:
      TaskError: see `task`.
    """
    rows = _load(dataset, subset, split)
    for field, column in (("problem_column", problem_column), ("answer_column", answer_column)):
        if column not in rows.column_names and (column or field == "problem_column"):
            raise TaskError(
                f"config.task.{field} = {column!r}: not a column of {dataset}, which has "
                f"{rows.column_names}."
            )
    for number, row in enumerate(rows):
        where = f"{dataset}, {split}, row {number} (from 0)"
        name = number if row.get("id") is None else row["id"]
        used = {problem_column, answer_column, "id"}
        others = {column: value for column, value in row.items() if column not in used}
        problem = attempt(
            make_problem,
            where,
            f"{prefix}:{name}",
            row[problem_column],
            row[answer_column] if answer_column else None,
            text_name=problem_column,
            answer_name=answer_column,
            metadata=plain_columns(others, left_out),
        )
        yield where, problem


def _load(dataset: str, subset: str, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise TaskError(
            'config.task.name = "hf" needs the package datasets, which is optional: '
            'pip install ".[datasets]"'
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
