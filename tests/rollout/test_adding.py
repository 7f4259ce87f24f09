"""A new estimator is one function and one row, a new task one file and one row; nothing else.

Both tables are all that is changed here: that a step trains with them shows that no other line of
the program knows estimators or tasks by their names.
"""

import json

import numpy as np
import pytest

from benchmarks import drill
from configs import tiny
from spiral_jax.core.config import ConfigError
from spiral_jax.objective import explain, of_sets
from spiral_jax.objective.estimators import ESTIMATORS, Estimator, Needs
from spiral_jax.run.setup import set_up_training
from spiral_jax.tasks.load import TASKS, TaskRow
from spiral_jax.train import train

# A task's file: its function `task`, and here a reward of its own.
TASK_MODULE = '''
"""Sums of one digit, whose answers are right by chance."""

import zlib

from spiral_jax.tasks.problem import Problem, Task


def task(seed):
    def problem(number):
        return Problem(id=f"sums:{number}", text=f"left={(seed + number) % 10}*1+0", answer="0")

    def held_out(index):
        return problem(-1 - index)

    return Task(problem, held_out, 4, fingerprint=f"sums {seed}", reward="sums_of_a_digit:coin")


def coin(text, problem):
    return zlib.crc32(text.encode("utf-8", "surrogatepass")) % 2 == 0
'''


def best_set(rewards):
    """An estimator's function: the best score among a trace's sets, minus the mean score."""
    with_it_BxKxN = np.where(rewards.incidence_BxKxN, rewards.score_BxK[..., None], -np.inf)
    best_BxN = with_it_BxKxN.max(axis=1)
    mean_Bx1 = rewards.score_BxK.mean(axis=1, keepdims=True)
    return np.where(np.isinf(best_BxN), 0.0, best_BxN - mean_Bx1).astype(np.float32)


def sets_differ(rewards):
    return of_sets.sets_differ(rewards.score_BxK, rewards.incidence_BxKxN)


BEST_SET = Estimator(
    sets="drawn",
    advantage=best_set,
    informative=sets_differ,
    starved=lambda rewards: rewards.sets_B < 2,
    factor=lambda rewards: np.ones(len(rewards.own_BxN)),
    explain=explain.no_words,
    needs=Needs(sets=2, outsider=True),
)


@pytest.fixture
def added(tmp_path, monkeypatch):
    """The two rows, `best_set` and `sums_of_a_digit`."""
    (tmp_path / "sums_of_a_digit.py").write_text(TASK_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(ESTIMATORS, "best_set", BEST_SET)
    row = TaskRow(module="sums_of_a_digit", arguments=("task.seed",))
    monkeypatch.setitem(TASKS, "sums_of_a_digit", row)


def smallest_config(model):
    c = tiny.get_config()
    c.model.hf_path = str(model)
    c.search.traces, c.aggregation.subsets, c.aggregation.subset_size = 3, 2, 2
    c.aggregation.traces = 2
    c.sampling.rows = 16
    c.batch.problems, c.batch.search_groups, c.batch.aggregation_groups = 2, 2, 4
    c.train.steps = 1
    c.eval.problems = 0
    c.trace_log.every = 1
    c.verifier.workers = 1
    return c


def test_a_step_trains_with_an_estimator_and_a_task_that_only_their_tables_know(added, tmp_path):
    drill.write_model(tmp_path / "model", seed=0)
    c = smallest_config(tmp_path / "model")
    c.loss.estimator, c.task.name = "best_set", "sums_of_a_digit"
    setup = set_up_training(c)
    assert (
        setup.training.objective.row is BEST_SET and setup.reward.default == "sums_of_a_digit:coin"
    )

    workdir = tmp_path / "run"
    assert train(setup, str(workdir)) is None  # no signal has ended it
    (row,) = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    assert row["step"] == 0 and row["grad_norm"] > 0 and row["sampling/kept"] >= 1
    assert 0 < row["reward/search"] < 1


def test_a_task_without_strategies_cannot_train_an_estimator_that_needs_them(added, tmp_path):
    drill.write_model(tmp_path / "model", seed=0)
    c = smallest_config(tmp_path / "model")
    c.loss.estimator, c.task.name = "polychromic", "sums_of_a_digit"
    with pytest.raises(ConfigError) as refused:
        set_up_training(c)
    for part in ("task.strategy", "polychromic", "sums_of_a_digit", "package.module:function"):
        assert part in str(refused.value)
