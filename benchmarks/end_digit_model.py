"""What the model of the end digit can do before any RL: how it searches, knows a hit, and reads.

    python -m benchmarks.end_digit_model --out=docs/end_digit_model

On held-out problems at T = 1. A try is sound if its digits, arithmetic, verdict and box are
(`is_sound`). A set has a hit if one of its candidates is right.
"""

from __future__ import annotations

import itertools
import json
import pathlib

import numpy as np
from absl import app, flags
from ml_collections import config_flags

from benchmarks.held_out import open_evaluator, set_up
from benchmarks.machine import machine
from spiral_jax.evaluation.statistics import mean_and_interval
from spiral_jax.rollout.judge import trace_texts
from spiral_jax.tasks import end_digit
from spiral_jax.tasks.problem import Problem

CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/end_digit.py", "model and scaffold", lock_config=True
)
OUT = flags.DEFINE_string("out", "docs/end_digit_model", "the report, without its ending")
PROBLEMS = flags.DEFINE_integer("problems", 1024, "held-out problems")


def main(argv: list[str]) -> None:
    setup = set_up(CONFIG.value, PROBLEMS.value)
    with open_evaluator(setup) as evaluator:
        policy = setup.sampler.prepare(setup.start.load_policy())
        rollouts = evaluator.wave(policy, evaluator.held_out()).rollouts
    (of_set,) = rollouts.rounds
    problems = rollouts.problems
    tried = trace_texts(setup.tokenizer, rollouts.search)
    said = trace_texts(setup.tokenizer, of_set.groups)
    right_BxN, right_BxM = rollouts.search.reward_UxC, of_set.groups.reward_UxC

    right_BxS = np.take_along_axis(right_BxN, of_set.member_BxKxS[:, 0], axis=1)
    has_hit_B = right_BxS.any(axis=1)
    report = {
        "machine": machine(),
        "problems": len(problems),
        "search traces": tries(problems, tried, right_BxN),
        "right share of all expressions": float(
            np.mean([right_share(problem) for problem in problems])
        ),
        "aggregation traces": tries(problems, said, right_BxM),
        "sets with a hit": share(has_hit_B.astype(float)),
        "sets with a hit read right": share(right_BxM[has_hit_B].mean(axis=1)),
        "other sets answered right": share(right_BxM[~has_hit_B].mean(axis=1)),
    }
    report["search traces"]["try the first expression"] = first_share(problems, tried)
    pathlib.Path(OUT.value).with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def first_share(problems: list[Problem], texts: list[str]) -> float:
    """Share of search traces that try the first of all expressions."""
    of_text = np.repeat(problems, len(texts) // len(problems))
    first = []
    for problem, text in zip(of_text, texts, strict=True):
        as_first = end_digit.try_out(problem, end_digit.EXPRESSIONS[0])
        first.append(end_digit.strategy(text, problem) == end_digit.strategy(as_first, problem))
    return float(np.mean(first))


def tries(problems: list, texts: list[str], right_BxC: np.ndarray) -> dict[str, float]:
    """Shares over all traces of a role; and of right and of other ones, how many say "yes"."""
    of_text = np.repeat(problems, right_BxC.shape[1])
    says_yes, right = np.array([": yes," in text for text in texts]), right_BxC.reshape(-1) == 1
    return {
        "are sound": float(
            np.mean([is_sound(p, text) for p, text in zip(of_text, texts, strict=True)])
        ),
        "are right": float(right.mean()),
        "say yes if right": float(says_yes[right].mean()),
        "say yes if wrong": float(says_yes[~right].mean()),
    }


def is_sound(problem: Problem, text: str) -> bool:
    """Whether a trace is a try without any error: digits, arithmetic, verdict and box."""
    places = itertools.permutations(range(4), 3)
    return any(text == end_digit.try_out(problem, chosen) for chosen in places)


def right_share(problem: Problem) -> float:
    """Share of the twelve expressions that hit: the chance of a trace that leans to none."""
    tries = [end_digit.try_out(problem, places) for places in end_digit.EXPRESSIONS]
    return float(np.mean([end_digit.reward(text, problem) for text in tries]))


def share(values: np.ndarray) -> dict[str, float]:
    return {name: round(value, 4) for name, value in vars(mean_and_interval(values)).items()}


if __name__ == "__main__":
    app.run(main)
