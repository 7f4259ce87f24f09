"""What the model of the three parts can do before any RL: search, and putting together.

    python -m benchmarks.three_parts_model --out=docs/results/three_parts_model

On held-out problems at T = 1. A trace is sound if it works out one part without any error. An
aggregation is perfect if it names all parts that its candidates name, with their values, and no
other. Beside what sets earn stands what a perfect reader of the same candidates would, and what
the closed form of the task gives for the shares of parts that were measured, and at best.
"""

from __future__ import annotations

import json
import pathlib

import numpy as np
from absl import app, flags
from ml_collections import config_flags

from benchmarks.held_out import JudgedTraces, open_held_out, share
from benchmarks.machine import machine
from spiral_jax.tasks import three_parts
from spiral_jax.tasks.problem import Problem

CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/three_parts.py", "model and scaffold", lock_config=True
)
OUT = flags.DEFINE_string("out", "docs/results/three_parts_model", "the report, without its ending")
PROBLEMS = flags.DEFINE_integer("problems", 1024, "held-out problems")


def main(argv: list[str]) -> None:
    with open_held_out(CONFIG.value, PROBLEMS.value) as held_out:
        searched = held_out.search()
        read = held_out.aggregate(searched.groups)
    problems, size = held_out.problems, held_out.member_BxS.shape[1]
    report = {"machine": machine(), "problems": len(problems)}
    shares = search_report(report, problems, searched)
    read_report(report, problems, searched, read, held_out.member_BxS)
    report["a perfect reader, at these shares of sound traces"] = three_parts.expected_score(
        shares, size
    )
    best = three_parts.best_shares(size)
    report["at best"] = three_parts.expected_score(best, size)
    report["best shares"] = dict(zip(three_parts.PARTS, best.round(4).tolist(), strict=True))
    pathlib.Path(OUT.value).with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def search_report(report: dict, problems: list[Problem], searched: JudgedTraces) -> list[float]:
    """Adds what search traces do; returns the shares of those that work out each part rightly."""
    texts, N = searched.texts, searched.groups.trace_len_UxC.shape[1]
    pairs = [(text, problems[i // N]) for i, text in enumerate(texts)]
    part = [sound_part(text, problem) for text, problem in pairs]
    tried = [three_parts.strategy(text, problem) for text, problem in pairs]
    shares = [part.count(name) / len(part) for name in three_parts.PARTS]
    report["search traces"] = {
        "are sound": sum(shares),
        "earn": share(searched.groups.reward_UxC.mean(axis=1)),
        "work on": {name: tried.count(name) / len(tried) for name in three_parts.PARTS},
    }
    return shares


def sound_part(text: str, problem: Problem) -> str | None:
    """The part that a trace works out without any error."""
    for name in three_parts.PARTS:
        if text == three_parts.work_out(problem, name):
            return name
    return None


def read_report(
    report: dict,
    problems: list[Problem],
    searched: JudgedTraces,
    read: JudgedTraces,
    member_BxS: np.ndarray,
) -> None:
    """Adds how sets are read; those with an unsound candidate are left out of what is perfect."""
    N, M = searched.groups.trace_len_UxC.shape[1], read.groups.trace_len_UxC.shape[1]
    perfect, possible_B = [], []
    for b, problem in enumerate(problems):
        named = {sound_part(searched.texts[b * N + n], problem) for n in member_BxS[b]}
        expected = three_parts.put_together(problem, named - {None})
        possible_B.append(three_parts.reward(expected, problem) or 0.0)
        if None not in named:
            perfect += [text == expected for text in read.texts[b * M : (b + 1) * M]]
    report["aggregations"] = {
        "are perfect": float(np.mean(perfect)),
        "earn": share(read.groups.reward_UxC.mean(axis=1)),
        "a perfect reader of the same candidates would earn": share(np.array(possible_B)),
    }


if __name__ == "__main__":
    app.run(main)
