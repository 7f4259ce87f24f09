"""config.task -> `Task`."""

from __future__ import annotations

from ml_collections import ConfigDict

from spiral_jax.core.config import TASKS, ConfigError
from spiral_jax.tasks import end_digit, hub, jsonl, two_halves
from spiral_jax.tasks.problem import Task


def load_task(c: ConfigDict) -> Task:
    """The task that `c.task` names. A file's order is drawn by `c.seed`, procedural problems by
    `c.task.seed`.

    Raises:
      ConfigError: unknown name or negative seed.
      spiral_jax.tasks.problem.TaskError: the problems cannot be had.
    """
    for field, seed in (("seed", c.seed), ("task.seed", c.task.seed)):
        if seed < 0:
            raise ConfigError(f"config.{field} = {seed}: must be >= 0.")
    if c.task.name == "jsonl":
        return jsonl.task(c.task.train_path, c.task.eval_path, c.seed)
    if c.task.name == "parquet":
        from spiral_jax.tasks import verl_parquet  # only this task needs pyarrow

        return verl_parquet.task(c.task.train_path, c.task.eval_path, c.prompt.system, c.seed)
    if c.task.name == "hf":
        t = c.task
        splits = (t.split_train, t.split_eval)
        return hub.task(t.dataset, t.subset, splits, t.problem_column, t.answer_column, c.seed)
    if c.task.name == "two_halves":
        return two_halves.task(c.task.seed)
    if c.task.name == "end_digit":
        return end_digit.task(c.task.seed)
    if c.task.name == "reasoning_gym":
        from spiral_jax.tasks import (
            reasoning_gym_task,
        )  # takes seconds to import; only this task needs it

        return reasoning_gym_task.task(
            c.task.generator, c.task.seed, c.task.generator_args.to_dict()
        )
    raise ConfigError(f"config.task.name = {c.task.name!r}: must be one of {', '.join(TASKS)}.")
