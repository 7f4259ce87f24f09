"""config.task -> `Task`: the one place that knows tasks by name.

A new task is a file in this folder and a row of `TASKS`; or a function elsewhere, which
config.task.name names as "package.module:function".
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from types import ModuleType

from ml_collections import ConfigDict

from spiral_jax.core.config import ConfigError
from spiral_jax.core.errors import UserError
from spiral_jax.core.functions import describe_error, load_function
from spiral_jax.tasks.problem import Task


@dataclasses.dataclass(frozen=True)
class TaskRow:
    """What the program knows of a task by its name.

    Attributes:
      module: its file, imported when the task is loaded: pyarrow and reasoning-gym take seconds.
        Its function `task` returns the `Task`.
      arguments: what `task` is called with, in this order: fields of the config.
      needs: fields of config.task that must not be empty -> what they must be, for messages.
      needs_to_train: the same where the task is trained on.
      needs_to_evaluate: the same where its held-out problems are read.
      demonstrated: whether the module also has the demonstrations that `spiral_jax/sft.py` makes a
        model from: `practice`, `tokenizer_texts`, `demonstrate_search`, `demonstrate_set`.
    """

    module: str
    arguments: tuple[str, ...]
    needs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    needs_to_train: Mapping[str, str] = dataclasses.field(default_factory=dict)
    needs_to_evaluate: Mapping[str, str] = dataclasses.field(default_factory=dict)
    demonstrated: bool = False


_OF_A_TASKSET = 'settings of the taskset or a selection, such as {"select": {"limit": 1000}}'

TASKS = {
    "jsonl": TaskRow(
        module="spiral_jax.tasks.jsonl",
        arguments=("task.train_path", "task.eval_path", "seed"),
        needs_to_train={"train_path": "a jsonl file"},
        needs_to_evaluate={"eval_path": "a jsonl file"},
    ),
    "parquet": TaskRow(
        module="spiral_jax.tasks.verl_parquet",
        arguments=("task.train_path", "task.eval_path", "prompt.system", "seed"),
        needs_to_train={"train_path": "a parquet file"},
        needs_to_evaluate={"eval_path": "a parquet file"},
    ),
    "hf": TaskRow(
        module="spiral_jax.tasks.hub",
        arguments=(
            "task.dataset",
            "task.subset",
            "task.split_train",
            "task.split_eval",
            "task.problem_column",
            "task.answer_column",
            "seed",
        ),
        needs={"dataset": "a name", "problem_column": "a name"},
        needs_to_train={"split_train": "a split of the data set"},
        needs_to_evaluate={"split_eval": "a split of the data set"},
    ),
    "two_halves": TaskRow(
        module="spiral_jax.tasks.two_halves", arguments=("task.seed",), demonstrated=True
    ),
    "end_digit": TaskRow(
        module="spiral_jax.tasks.end_digit", arguments=("task.seed",), demonstrated=True
    ),
    "three_parts": TaskRow(
        module="spiral_jax.tasks.three_parts", arguments=("task.seed",), demonstrated=True
    ),
    "reasoning_gym": TaskRow(
        module="spiral_jax.tasks.reasoning_gym_task",
        arguments=("task.generator", "task.seed", "task.generator_args"),
        needs={"generator": "the name of a reasoning-gym generator"},
    ),
    "verifiers": TaskRow(
        module="spiral_jax.tasks.verifiers_taskset",
        arguments=(
            "task.environment",
            "task.environment_args",
            "task.environment_eval_args",
            "prompt.system",
            "seed",
        ),
        needs={"environment": "the id of an installed taskset"},
        needs_to_train={"environment_args": _OF_A_TASKSET},
        needs_to_evaluate={"environment_eval_args": _OF_A_TASKSET},
    ),
    "small_programs": TaskRow(module="spiral_jax.tasks.small_programs", arguments=("seed",)),
}


def load_task(task: ConfigDict, seed: int, system: str) -> Task:
    """The task that the config names.

    Args:
      task: config.task; its own seed says which procedural problems.
      seed: config.seed, which draws the order of problems from files.
      system: config.prompt.system, which problems with a system message of their own must have.

    Raises:
      ConfigError: unknown name or negative seed; or a function that cannot be loaded, or returns
        something else.
      spiral_jax.tasks.problem.TaskError: the problems cannot be had.
    """
    if ":" in task.name:
        return _load_own(task)
    row = _row(task.name)
    values = {"seed": seed, "prompt.system": system}
    values |= {f"task.{name}": value for name, value in task.to_dict().items()}
    for field in ("seed", "task.seed"):
        if values[field] < 0:
            raise ConfigError(f"config.{field} = {values[field]}: must be >= 0.")
    module = importlib.import_module(row.module)
    return module.task(*(values[field] for field in row.arguments))


def check_task(task: ConfigDict, training: bool, evaluated: bool) -> None:
    """Checks that config.task names a task and all that it reads; reads nothing.

    Args:
      training: whether it is trained on.
      evaluated: whether held-out problems are read.

    Raises:
      ConfigError: an unknown name, or a field that must not be empty.
    """
    if ":" in task.name:  # what it needs it says when it is called
        return
    row = _row(task.name)
    _check_named(task, row.needs)
    if training:
        _check_named(task, row.needs_to_train)
    if evaluated:
        way_out = " Set eval.problems = 0 to train without evaluation." if training else ""
        _check_named(task, row.needs_to_evaluate, way_out)


def load_demonstrations(name: str) -> ModuleType:
    """The module with a task's demonstrations. Raises `ConfigError` if it has none."""
    able = [other for other, row in TASKS.items() if row.demonstrated]
    if name not in able:
        raise ConfigError(
            f"config.task = {name!r}: only {' and '.join(able)} have demonstrations; choose one."
        )
    return importlib.import_module(TASKS[name].module)


def _load_own(task: ConfigDict) -> Task:
    """What a function of the user's returns; it is called with task.seed and task.generator_args.

    Raises:
      ConfigError: there is no such function, it fails, or it returns no `Task`.
    """
    function = load_function("task.name", task.name, 'must be "package.module:function".')
    try:
        loaded = function(task.seed, **task.generator_args.to_dict())
    except UserError:
        raise
    except Exception as error:
        raise ConfigError(
            f"config.task.name = {task.name!r}: it fails where it is called with task.seed and "
            f"task.generator_args ({describe_error(error)})."
        ) from error
    if not isinstance(loaded, Task):
        raise ConfigError(
            f"config.task.name = {task.name!r}: it returned {type(loaded).__name__}, and must "
            "return a spiral_jax.library.Task."
        )
    return loaded


def _row(name: str) -> TaskRow:
    if name not in TASKS:
        raise ConfigError(
            f"config.task.name = {name!r}: must be one of {', '.join(TASKS)}, or your "
            '"package.module:function".'
        )
    return TASKS[name]


def _check_named(task: ConfigDict, fields: Mapping[str, str], way_out: str = "") -> None:
    for field, allowed in fields.items():
        if not task[field]:
            raise ConfigError(f"config.task.{field} = {task[field]!r}: must be {allowed}.{way_out}")
