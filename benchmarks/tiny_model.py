"""What the bundled model can do before any RL: how it searches, works out a half, and reads.

    python -m benchmarks.tiny_model --out=docs/tiny_model

On held-out problems at T = 1. A set is complete if its candidates worked out both halves without an
error. A wrong candidate's digit is accepted if a half that one candidate worked out rightly is
answered by another digit, which some candidate only guessed.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import app, flags
from ml_collections import config_flags

from benchmarks.held_out import open_evaluator, set_up
from benchmarks.machine import machine
from spiral_jax.core.groups import GroupRequests, Groups
from spiral_jax.evaluation.statistics import mean_and_interval
from spiral_jax.rollout.judge import trace_texts
from spiral_jax.rollout.traces import Rollouts
from spiral_jax.run.setup import Setup
from spiral_jax.sampling.protocol import Feed
from spiral_jax.tasks import two_halves
from spiral_jax.tasks.problem import Problem

CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/tiny.py", "model and scaffold", lock_config=True
)
OUT = flags.DEFINE_string("out", "docs/tiny_model", "the report, without its ending")
PROBLEMS = flags.DEFINE_integer("problems", 1024, "held-out problems")

DEMONSTRATIONS = "demonstrations"  # a policy of `Demonstrating`
_SAID = re.compile(r"maybe (left|right):(\d)")


def main(argv: list[str]) -> None:
    setup = set_up(CONFIG.value, PROBLEMS.value)
    with open_evaluator(setup) as evaluator:
        evaluator = dataclasses.replace(evaluator, sampler=Demonstrating(setup))
        policy = setup.sampler.prepare(setup.start.load_policy())
        asked = evaluator.held_out()
        own = evaluator.wave(policy, asked).rollouts
        fair = evaluator.wave(policy, asked, search_policy=DEMONSTRATIONS).rollouts
    report = {"machine": machine(), "problems": len(asked)} | search_report(setup, own)
    for name, rollouts in {"own": own, "fair": fair}.items():
        for measure, value in reading_report(setup, rollouts).items():
            report[f"{name} candidates: {measure}"] = value
    pathlib.Path(OUT.value).with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


class Demonstrating:
    """The setup's sampler; but `DEMONSTRATIONS` writes search traces, left or right evenly."""

    def __init__(self, setup: Setup):
        self._setup, self._rng = setup, np.random.default_rng(0)

    def stream(self, policy: Any, feed: Feed) -> Iterator[int]:
        if policy is DEMONSTRATIONS:
            return self._write(feed)
        return iter(self._setup.sampler.stream(policy, feed))

    def _write(self, feed: Feed) -> Iterator[int]:
        yield 0
        while (request := feed.next(0)) is not None:
            feed.done(self._demonstrate(request), 0)

    def _demonstrate(self, request: GroupRequests) -> Groups:
        tokenizer = self._setup.tokenizer
        problem = self._setup.task.held_out(int(request.id_Ux6[0, 2]))
        shape = (1, request.traces)
        trace_1xCxG = np.zeros((*shape, request.max_tokens), np.int32)
        trace_len_1xC = np.zeros(shape, np.int32)
        for n in range(request.traces):
            side, guess = two_halves.SIDES[self._rng.integers(2)], int(self._rng.integers(10))
            text = two_halves.work_out(problem, side, guess)
            ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
            trace_1xCxG[0, n, : len(ids)], trace_len_1xC[0, n] = ids, len(ids)
        logprob_1xCxG = np.zeros(trace_1xCxG.shape, np.float32)
        return Groups(request, trace_1xCxG, trace_len_1xC, logprob_1xCxG, np.zeros(shape, np.int32))


def search_report(setup: Setup, rollouts: Rollouts) -> dict[str, float]:
    """Shares over all search traces."""
    texts = trace_texts(setup.tokenizer, rollouts.search)
    problems = np.repeat(rollouts.problems, len(texts) // len(rollouts))
    worked = [
        two_halves.worked_half(problem, text) for problem, text in zip(problems, texts, strict=True)
    ]
    return {
        "search traces that parse": parse_rate(rollouts.search),
        "search traces that are right": float(rollouts.search.reward_UxC.mean()),
        "search traces that work out a half without an error": float(
            np.mean([side is not None for side in worked])
        ),
        "search traces that start with the left half": float(
            np.mean([text.startswith("left") for text in texts])
        ),
    }


def reading_report(setup: Setup, rollouts: Rollouts) -> dict[str, Any]:
    """How aggregation traces of one set a problem do, by whether the set is complete."""
    (of_set,) = rollouts.rounds
    N, M = rollouts.search.requests.traces, of_set.groups.requests.traces
    texts = trace_texts(setup.tokenizer, rollouts.search)
    said = trace_texts(setup.tokenizer, of_set.groups)
    complete, exposed, accepted = [], 0, 0
    for b, problem in enumerate(rollouts.problems):
        shown = [texts[b * N + n] for n in of_set.member_BxKxS[b, 0]]
        worked = {two_halves.worked_half(problem, text) for text in shown} - {None}
        complete.append(len(worked) == 2)
        wrong = wrong_digits(problem, worked, shown)
        for text in said[b * M : (b + 1) * M]:
            answer = text[text.rfind("{") + 1 : text.rfind("}")]
            for i, digits in wrong.items():
                if len(answer) == 2:
                    exposed += 1
                    accepted += answer[i] in digits
    complete = np.array(complete)
    right_B = of_set.groups.reward_UxC.mean(axis=1)
    return {
        "aggregation traces that parse": parse_rate(of_set.groups),
        "complete sets": share(complete.astype(float)),
        "complete sets read right": share(right_B[complete]),
        "other sets answered right": share(right_B[~complete]),
        "wrong candidate's digit accepted": accepted / exposed,
    }


def wrong_digits(problem: Problem, worked: set[str], shown: Sequence[str]) -> dict[int, set[str]]:
    """Of the halves (0, 1) that a candidate worked out: the other digits that some guessed."""
    wrong = {}
    for i, side in enumerate(two_halves.SIDES):
        guesses = {match[2] for text in shown if (match := _SAID.search(text)) and match[1] == side}
        digits = guesses - {problem.answer[i]}
        if side in worked and digits:
            wrong[i] = digits
    return wrong


def parse_rate(groups: Groups) -> float:
    statuses = [verdict.status.value for verdict in groups.verdict_UxC.reshape(-1)]
    return float(np.mean([status in ("correct", "wrong") for status in statuses]))


def share(values: np.ndarray) -> dict[str, float]:
    return {name: round(value, 4) for name, value in vars(mean_and_interval(values)).items()}


if __name__ == "__main__":
    app.run(main)
