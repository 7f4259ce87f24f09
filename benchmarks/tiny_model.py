"""What the bundled model can do before any RL: search, working out a half, reading.

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

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from benchmarks.machine import machine
from spiral_jax.core.groups import Groups, Purpose
from spiral_jax.core.progress import Progress
from spiral_jax.evaluation.statistics import mean_and_interval
from spiral_jax.learner.step import variables
from spiral_jax.objective import subsets
from spiral_jax.rollout.requests import Actor, aggregate, search, verify
from spiral_jax.run.setup import set_up
from spiral_jax.tasks import two_halves
from spiral_jax.tasks.problem import Problem
from spiral_jax.verifier.settings import VerifierSettings
from spiral_jax.verifier.verifier import Verifier

CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/tiny.py", "model and scaffold", lock_config=True
)
OUT = flags.DEFINE_string("out", "docs/tiny_model", "the report, without its ending")
PROBLEMS = flags.DEFINE_integer("problems", 1024, "held-out problems")

_SAID = re.compile(r"maybe (left|right):(\d)")


def main(argv: list[str]) -> None:
    setup = set_up(CONFIG.value)
    c, base = setup.c, setup.load_base()
    problems = [setup.task.held_out(index) for index in range(PROBLEMS.value)]
    settings = VerifierSettings(workers=1, timeout_s=c.verifier.timeout_s)
    with Verifier("math", settings) as verifier, jax.set_mesh(setup.mesh):
        actor = Actor(c, setup.task, setup.scaffold, setup.sampler, verifier, Progress(1, 0))
        weights = setup.sampler.prepare(variables(setup.model, None, base))
        index_B = np.arange(len(problems))
        searched, texts, verdicts = verify(
            actor, problems, search(actor, weights, problems, index_B, Purpose.EVALUATION, 0)
        )
        report = {"machine": machine(), "problems": len(problems)} | search_report(
            problems, texts, verdicts
        )
        fair = demonstrate(setup, problems, searched)
        for name, (candidates, shown) in {"own": (searched, texts), "fair": fair}.items():
            read = reader(actor, weights, problems, candidates, shown)
            report |= {f"{name} candidates: {measure}": value for measure, value in read.items()}
    out = pathlib.Path(OUT.value)
    out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def search_report(problems: list, texts: list[str], verdicts: list) -> dict[str, float]:
    """Shares over all search traces."""
    N = len(texts) // len(problems)
    parse = [verdict.status.value in ("correct", "wrong") for verdict in verdicts]
    right = [verdict.reward for verdict in verdicts]
    worked = [
        two_halves.worked_half(problems[i // N], text) is not None for i, text in enumerate(texts)
    ]
    left = [text.startswith("left") for text in texts]
    return {
        "search traces that parse": float(np.mean(parse)),
        "search traces that are right": float(np.mean(right)),
        "search traces that work out a half without an error": float(np.mean(worked)),
        "search traces that start with the left half": float(np.mean(left)),
    }


def demonstrate(setup, problems: list, like: Groups) -> tuple[Groups, list[str]]:
    """Groups in place of `like` whose traces are demonstrations, of either half at random."""
    rng = np.random.default_rng(0)
    trace, length = np.zeros_like(like.trace_UxCxG), np.zeros_like(like.trace_len_UxC)
    texts = []
    for b, problem in enumerate(problems):
        for n in range(trace.shape[1]):
            side = two_halves.SIDES[rng.integers(2)]
            text = two_halves.work_out(problem, side, int(rng.integers(10)))
            ids = setup.tokenizer.encode(text, add_special_tokens=False)
            ids = [*ids, setup.tokenizer.eos_token_id]
            trace[b, n, : len(ids)], length[b, n] = ids, len(ids)
            texts.append(text)
    stop = np.zeros_like(like.stop_UxC)
    return Groups(like.requests, trace, length, like.logprob_UxCxG, stop), texts


def reader(actor: Actor, weights, problems: list, candidates: Groups, texts: list[str]) -> dict:
    """How aggregation traces of one set a problem do, by whether the set is complete."""
    c, N = actor.c, candidates.trace_len_UxC.shape[1]
    S = c.aggregation.subset_size
    member_BxKxS = np.stack(
        [
            subsets.disjoint_subsets(c.seed, int(Purpose.EVALUATION), 0, b, 0, N, S, 1)
            for b in range(len(problems))
        ]
    )
    groups, _ = aggregate(actor, weights, problems, candidates, member_BxKxS, c.aggregation.traces)
    groups, said, verdicts = verify(actor, problems, groups)
    M, counts = c.aggregation.traces, Acceptance()
    complete = []
    for b, problem in enumerate(problems):
        shown = [texts[b * N + n] for n in member_BxKxS[b, 0]]
        worked = {two_halves.worked_half(problem, text) for text in shown} - {None}
        complete.append(len(worked) == 2)
        wrong = wrong_guesses(problem, shown, worked)
        for text in said[b * M : (b + 1) * M]:
            counts.add(text, wrong)
    complete = np.array(complete)
    right_B = groups.reward_UxC.mean(axis=1)
    parse = [verdict.status.value in ("correct", "wrong") for verdict in verdicts]
    return {
        "aggregation traces that parse": float(np.mean(parse)),
        "complete sets": share(complete.astype(float)),
        "complete sets read right": share(right_B[complete]),
        "other sets answered right": share(right_B[~complete]),
        "wrong candidate's digit accepted": counts.accepted / counts.exposed,
    }


def wrong_guesses(problem: Problem, shown: list[str], worked: set[str]) -> list[set[str]]:
    """Wrong digits that candidates guessed for each half which another worked out, else none."""
    guesses = [(match[1], match[2]) for text in shown if (match := _SAID.search(text))]
    wrong = []
    for right, side in zip(problem.answer, two_halves.SIDES, strict=True):
        digits = {digit for guessed, digit in guesses if guessed == side and digit != right}
        wrong.append(digits if side in worked else set())
    return wrong


@dataclasses.dataclass
class Acceptance:
    """Halves for which a wrong digit was shown, and how many were answered by one."""

    exposed: int = 0
    accepted: int = 0

    def add(self, text: str, wrong: list[set[str]]) -> None:
        """Counts an aggregation trace; `wrong`: see `wrong_guesses`."""
        answer = text[text.rfind("{") + 1 : text.rfind("}")]
        if len(answer) != 2:
            return
        for digit, digits in zip(answer, wrong, strict=True):
            if digits:
                self.exposed += 1
                self.accepted += digit in digits


def share(values: np.ndarray) -> dict[str, float]:
    return {name: round(value, 4) for name, value in vars(mean_and_interval(values)).items()}


if __name__ == "__main__":
    app.run(main)
