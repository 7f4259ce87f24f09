"""What the bundled model can do before any RL: search, working out a half, reading.

    python -m benchmarks.tiny_model --out=docs/results/tiny_model

On held-out problems at T = 1. A set is complete if its candidates worked out both halves without an
error. A wrong candidate's digit is accepted if a half that one candidate worked out rightly is
answered by another digit, which some candidate only guessed.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from absl import app, flags
from ml_collections import config_flags

from benchmarks.held_out import HeldOut, open_held_out, share
from benchmarks.machine import machine
from spiral_jax.core.groups import Groups
from spiral_jax.tasks import two_halves
from spiral_jax.tasks.problem import Problem

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PreTrainedTokenizerBase

CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/tiny.py", "model and scaffold", lock_config=True
)
OUT = flags.DEFINE_string("out", "docs/results/tiny_model", "the report, without its ending")
PROBLEMS = flags.DEFINE_integer("problems", 1024, "held-out problems")

_SAID = re.compile(r"maybe (left|right):(\d)")


def main(argv: list[str]) -> None:
    with open_held_out(CONFIG.value, PROBLEMS.value) as held_out:
        problems, searched = held_out.problems, held_out.search()
        report = {"machine": machine(), "problems": len(problems)}
        report |= search_report(problems, searched.texts, searched.verdicts)
        fair = demonstrate(held_out.setup.tokenizer, problems, searched.groups)
        own = Candidates(searched.groups, searched.texts)
        for name, candidates in {"own": own, "fair": fair}.items():
            measures = reading_report(held_out, candidates)
            report |= {f"{name} candidates: {key}": value for key, value in measures.items()}
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


class Candidates(NamedTuple):
    """What aggregation traces read: groups [B, N], and the texts of all B * N traces."""

    groups: Groups
    texts: list[str]


def demonstrate(
    tokenizer: PreTrainedTokenizerBase, problems: list[Problem], like: Groups
) -> Candidates:
    """Groups in place of `like` whose traces are demonstrations, of either half at random."""
    rng = np.random.default_rng(0)
    trace, length = np.zeros_like(like.trace_UxCxG), np.zeros_like(like.trace_len_UxC)
    texts = []
    for b, problem in enumerate(problems):
        for n in range(trace.shape[1]):
            side = two_halves.SIDES[rng.integers(2)]
            text = two_halves.work_out(problem, side, int(rng.integers(10)))
            ids = tokenizer.encode(text, add_special_tokens=False)
            ids = [*ids, tokenizer.eos_token_id]
            trace[b, n, : len(ids)], length[b, n] = ids, len(ids)
            texts.append(text)
    stop = np.zeros_like(like.stop_UxC)
    groups = Groups(like.requests, trace, length, like.logprob_UxCxG, stop)
    return Candidates(groups, texts)


def reading_report(held_out: HeldOut, candidates: Candidates) -> dict[str, Any]:
    """How aggregation traces of one set a problem do, by whether the set is complete."""
    problems, member_BxS = held_out.problems, held_out.member_BxS
    groups, said, verdicts = held_out.aggregate(candidates.groups)
    N, M = candidates.groups.trace_len_UxC.shape[1], groups.trace_len_UxC.shape[1]
    counts, complete = Acceptance(), []
    for b, problem in enumerate(problems):
        shown = [candidates.texts[b * N + n] for n in member_BxS[b]]
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


if __name__ == "__main__":
    app.run(main)
