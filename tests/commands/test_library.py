"""The package in a script: train, ask, judge, learn from arrays; a task from outside."""

import sys

import numpy as np
import pytest
from small_training import small_training

from spiral_jax import library
from spiral_jax.core.config import ConfigError
from spiral_jax.run.setup import set_up_training

TASK = """
import zlib

from spiral_jax.library import Problem, Task


def sums(seed, right="+0"):
    def problem(number):
        return Problem(f"sums:{number}", f"left={(seed + number) % 10}*1{right}", "0")

    return Task(
        problem, lambda index: problem(-1 - index), 4, f"sums {seed}", "task_of_a_stranger:coin"
    )


def coin(text, problem):
    return zlib.crc32(text.encode("utf-8", "surrogatepass")) % 2 == 0


def nothing(seed):
    return []
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Of a small run on a task that stands in a file of its own."""
    (tmp_path / "task_of_a_stranger.py").write_text(TASK)
    monkeypatch.syspath_prepend(str(tmp_path))
    c = small_training(tmp_path, steps=1)
    c.task.name, c.task.reward = "task_of_a_stranger:sums", ""
    c.eval.problems, c.eval.n = 0, 8
    with c.task.generator_args.unlocked():
        c.task.generator_args = {"right": "+7"}
    return c


def test_a_script_trains_on_a_task_of_its_own_and_asks_what_it_has_trained(config, tmp_path):
    setup = library.set_up_training(config)
    assert setup.task.train(3).text == "left=3*1+7"
    assert library.train(setup, str(tmp_path / "run")) is None  # no signal has ended it

    config.model.init_from, config.eval.problems = f"{tmp_path}/run@1", 1
    weights = library.load_weights(library.set_up_evaluation(config))
    # the sampler of training, which is compiled already
    problem = "left=6*5+4 right=4*8+6"
    asked = library.ask(setup, weights, problem)
    e = config.eval
    assert len(asked.search) == 4 and len(set(asked.search)) > 1
    assert sorted(asked.sets.flat) == [0, 1, 2, 3]  # disjoint sets of two
    assert [len(of_set) for of_set in asked.aggregation] == [e.traces] * e.subsets
    again, other = (library.ask(setup, weights, problem, number) for number in (0, 1))
    assert again.search == asked.search and again.aggregation == asked.aggregation
    assert other.search != asked.search

    untrained = library.load_weights(setup)
    assert library.ask(setup, untrained, problem).search != asked.search
    with pytest.raises(ConfigError, match=r"prompt\.max_problem_tokens = 16"):
        library.ask(setup, weights, problem + problem)


def test_advantages_and_weights_of_arrays():
    # four traces, the sets {0, 1} and {1, 2}, two aggregations of each; f = (1/2, 0), mean 1/4
    rewards = library.Rewards(
        own_BxN=[[0, 0, 0, 0]],
        aggregated_BxKxM=[[[1, 0], [0, 0]]],
        member_BxKxS=np.array([[[0, 1], [1, 2]]]),
    )
    advantages = library.compute_advantages("marginal_mean", [rewards])
    search, aggregation = advantages.by_stage()
    assert search.tolist() == [[0.25, 0, -0.25, 0]]
    assert aggregation.tolist() == [[[0.5, -0.5], [0, 0]]]
    c = library.defaults()
    c.loss.normalizer, c.loss.search_weight, c.loss.aggregation_weight = "sum", 2.0, 3.0
    settings = library.objective_settings(c.loss)
    weights = library.candidate_weights(settings, search, rewards, np.full((1, 4), 9))
    assert weights.tolist() == [[0.5, 0, -0.5, 0]]
    weights = library.aggregation_weights(settings, aggregation, rewards.aggregated_BxKxM)
    assert weights.tolist() == [[[1.5, -1.5], [0, 0]]]


def test_judging_and_that_a_reward_must_have_a_name():
    settings, problem = library.VerifierSettings(1, 5.0), library.Problem("p", "6 * 7?", "42")
    with library.Verifier("math", settings) as verifier:
        texts = ("so \\boxed{42}", "so \\boxed{41}", "so 42")
        verdicts = verifier.verify([(text, problem) for text in texts])
    assert [verdict.status for verdict in verdicts] == ["correct", "wrong", "unparsed"]
    with pytest.raises(ConfigError, match="lambda.*package.module:function"):
        library.Verifier(lambda text, problem: True, settings)
    with pytest.raises(ConfigError, match="__main__:reward.*file of its own"):
        library.Verifier("__main__:reward", settings)


def test_a_strategy_may_be_one_of_the_script_itself(config, monkeypatch):
    def plan_of(text, problem):
        return text[:4]

    monkeypatch.setattr(sys.modules["__main__"], "plan_of", plan_of, raising=False)
    config.task.strategy, config.loss.estimator = "__main__:plan_of", "polychromic"
    assert set_up_training(config).strategy is plan_of


@pytest.mark.parametrize(
    "name, expected",
    [
        ("task_of_a_stranger:nothing", r"returned list.*spiral_jax\.library\.Task"),
        ("task_of_a_stranger:missing", "has no function 'missing'"),
        ("no_such_module:task", r"cannot be imported.*PYTHONPATH"),
    ],
)
def test_a_task_from_outside_that_is_none_is_refused(config, name, expected):
    config.task.name = name
    with config.task.generator_args.unlocked():
        config.task.generator_args = {}
    with pytest.raises(ConfigError, match=rf"config\.task\.name = '{name}': [^$]*{expected}"):
        set_up_training(config)
