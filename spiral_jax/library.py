"""The package in a script or a notebook: the parts that its commands are made of.

    from spiral_jax import library

    c = library.defaults()                    # all fields: spiral_jax/core/config.py
    c.model.hf_path, c.task.name = "models/Qwen3-0.6B", "my_module:task"
    library.train(library.set_up_training(c), "runs/mine")      # again: resumes

    c.model.init_from = "runs/mine@250"
    setup = library.set_up_evaluation(c)
    asked = library.ask(setup, library.load_weights(setup), "What is 6 * 7?")
    asked.search, asked.sets, asked.aggregation

Judging: `Verifier`, with `Problem` and `VerifierSettings`. Learning from arrays of rewards:
`Rewards` -> `compute_advantages` -> `length_gate` -> `candidate_weights`, `aggregation_weights`.

Rewards are functions by name, "package.module:function", since processes of their own import them;
a lambda is refused. Strategies (task.strategy) and tasks (task.name) are called in this process, so
"__main__:function" names one of the script or notebook itself.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from spiral_jax.core.config import ConfigError, defaults
from spiral_jax.core.groups import Purpose
from spiral_jax.evaluation.stages import evaluation_stages
from spiral_jax.objective.advantages import compute_advantages, length_gate
from spiral_jax.objective.rewards import Rewards
from spiral_jax.objective.settings import ObjectiveSettings, objective_settings
from spiral_jax.objective.weights import aggregation_weights, candidate_weights
from spiral_jax.prompts.prompts import search_prompt
from spiral_jax.rollout.feed import Feed, Listed
from spiral_jax.rollout.judge import trace_texts
from spiral_jax.rollout.requests import Asked, Writer
from spiral_jax.run.setup import Setup, set_up_evaluation, set_up_training
from spiral_jax.tasks.problem import Problem, Task
from spiral_jax.train import train
from spiral_jax.verifier.rewards import Verdict
from spiral_jax.verifier.settings import VerifierSettings
from spiral_jax.verifier.verifier import Verifier

__all__ = [
    "Answers",
    "ObjectiveSettings",
    "Problem",
    "Rewards",
    "Setup",
    "Task",
    "Verdict",
    "Verifier",
    "VerifierSettings",
    "aggregation_weights",
    "ask",
    "candidate_weights",
    "compute_advantages",
    "defaults",
    "length_gate",
    "load_weights",
    "objective_settings",
    "set_up_evaluation",
    "set_up_training",
    "train",
]


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a model makes of one problem.

    Attributes:
      search: texts of the N search traces.
      sets: int [K, S], which of them each set holds; [0, 0] where nothing is aggregated.
      aggregation: texts of the M aggregation traces of each of the K sets.
    """

    search: list[str]
    sets: np.ndarray
    aggregation: list[list[str]]


def load_weights(setup: Setup) -> Any:
    """The weights that config.model names, laid out for sampling.

    Raises:
      ConfigError, WeightsError, CheckpointError: they are not there, or damaged.
    """
    with jax.set_mesh(setup.mesh):
        return setup.eval_sampler.prepare(setup.start.load_policy())


def ask(setup: Setup, weights: Any, text: str, number: int = 0) -> Answers:
    """Searches and aggregates once, as evaluations do: sizes and draws are those of config.eval.

    The first call compiles the sampler.

    Args:
      weights: see `load_weights`.
      text: the problem.
      number: of the random numbers; the same number and text give the same answers.

    Raises:
      ConfigError: the problem has more tokens than prompt.max_problem_tokens.
    """
    prompt_P = search_prompt(setup.scaffold, text)
    most = setup.evaluation.max_problem_tokens
    if len(prompt_P) > most:
        raise ConfigError(
            f"config.prompt.max_problem_tokens = {most}: this problem's prompt has {len(prompt_P)} "
            "tokens. Raise it."
        )
    asked = Asked(number, Problem(f"asked:{number}", text, ""), prompt_P)
    stages = evaluation_stages(dataclasses.replace(setup.evaluation, rounds=0))
    seed, order = setup.evaluation.seed, setup.c.aggregation.order
    writer = Writer(setup.scaffold, Purpose.EVALUATION, 0, seed, order)
    feed = Feed(stages, writer, Listed([asked]))
    with jax.set_mesh(setup.mesh):
        for _ in setup.eval_sampler.stream(weights, feed):
            pass
    course = feed.courses[number]
    texts = [trace_texts(setup.tokenizer, course.of_stage(stage)) for stage in stages]
    if len(stages) == 1:
        return Answers(texts[0], np.zeros((0, 0), np.int32), [])
    M = stages[1].traces
    by_set = [texts[1][i : i + M] for i in range(0, len(texts[1]), M)]
    return Answers(texts[0], course.member[stages[1].name], by_set)
