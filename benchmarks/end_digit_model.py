"""What the model of the end digit can do before any RL: search, knowing a hit, reading.

    python -m benchmarks.end_digit_model --out=docs/results/end_digit_model

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

from benchmarks.held_out import open_held_out, share
from benchmarks.machine import machine
from spiral_jax.tasks import end_digit
from spiral_jax.tasks.problem import Problem

CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/end_digit.py", "model and scaffold", lock_config=True
)
OUT = flags.DEFINE_string("out", "docs/results/end_digit_model", "the report, without its ending")
PROBLEMS = flags.DEFINE_integer("problems", 1024, "held-out problems")


def main(argv: list[str]) -> None:
    with open_held_out(CONFIG.value, PROBLEMS.value) as held_out:
        searched = held_out.search()
        read = held_out.aggregate(searched.groups)
    problems, tried, said = held_out.problems, searched.texts, read.texts
    right_BxN, right_BxM = searched.groups.reward_UxC, read.groups.reward_UxC
    has_hit_B = np.take_along_axis(right_BxN, held_out.member_BxS, axis=1).any(axis=1)
    report = {
        "machine": machine(),
        "problems": len(problems),
        "search traces": tries(problems, tried, right_BxN),
    }
    first = [
        tries_the_first_expression(problem, text)
        for problem, text in zip(np.repeat(problems, right_BxN.shape[1]), tried, strict=True)
    ]
    report["search traces"]["try the first expression"] = float(np.mean(first))
    right_shares = [right_share(problem) for problem in problems]
    report |= {
        "right share of all expressions": float(np.mean(right_shares)),
        "aggregation traces": tries(problems, said, right_BxM),
        "sets with a hit": share(has_hit_B.astype(float)),
        "sets with a hit read right": share(right_BxM[has_hit_B].mean(axis=1)),
        "other sets answered right": share(right_BxM[~has_hit_B].mean(axis=1)),
    }
    pathlib.Path(OUT.value).with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def tries_the_first_expression(problem: Problem, text: str) -> bool:
    first = end_digit.try_out(problem, end_digit.EXPRESSIONS[0])
    return end_digit.strategy(text, problem) == end_digit.strategy(first, problem)


def tries(problems: list[Problem], texts: list[str], right_BxC: np.ndarray) -> dict[str, float]:
    """Shares over all traces of a role.

    Of those that are right, and of those that are not: how many say that they hit.
    """
    pairs = zip(np.repeat(problems, right_BxC.shape[1]), texts, strict=True)
    sound = [is_sound(problem, text) for problem, text in pairs]
    says_yes, right = np.array([": yes," in text for text in texts]), right_BxC.reshape(-1) == 1
    return {
        "are sound": float(np.mean(sound)),
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


if __name__ == "__main__":
    app.run(main)
