"""The directory of a run that never was: random rollouts and their advantages, as files.

For the report's size benchmark and its tests; nothing is sampled and no model is loaded.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from spiral_jax.core.config import digest, to_plain
from spiral_jax.core.groups import Purpose, Stop
from spiral_jax.objective.advantages import compute_advantages, length_gate
from spiral_jax.objective.estimators import ESTIMATORS
from spiral_jax.objective.rewards import Rewards
from spiral_jax.objective.subsets import Key, draw_subsets
from spiral_jax.run.trace_log import TraceLog
from spiral_jax.run.workdir import StepLog, open_workdir

_TEXT = "so the sum of all terms is then we add check x 12 7 35 + = ."
_WORDS = _TEXT.split()
_VERDICTS = ("correct", "wrong", "unparsed", "error")
_REWARD = {"correct": 1.0, "wrong": 0.0, "unparsed": 0.0, "error": np.nan}
_ESTIMATES = ("single", "pass_at_n", "majority", "aggregated")
Text = Callable[[str, int], str]


def write_run(
    path: pathlib.Path,
    c: ConfigDict,
    steps: range,
    words: int = 30,
    text: Text | None = None,
    failing: float = 0.01,
) -> None:
    """Writes the logs of the steps, with a trace file for each.

    Args:
      c: `batch.problems` problems a step, all of them logged, with N, K, S, M and the estimator of
        `c`.
      words: of a trace, on average.
      text: (text of a trace, its number in the run) -> what is logged in its place.
      failing: share of the traces that could not be verified.
    """
    open_workdir(path, to_plain(c), digest(c))
    metrics, evaluations = StepLog(path / "metrics.jsonl"), StepLog(path / "evaluations.jsonl")
    traces = TraceLog(path / "traces", c.trace_log.keep_steps)
    StepLog(path / "starts.jsonl").append(_START)
    traces_so_far = 0
    for step in steps:
        rng = np.random.default_rng([c.seed, step])
        rows = []
        for b in range(c.batch.problems):
            rows += _problem(c, rng, step, b, words, failing)
        if text:
            for number, row in enumerate(rows, start=traces_so_far):
                row["text"] = text(row["text"], number)
        traces_so_far += len(rows)
        traces.write(step, rows)
        metrics.append(_metrics(c, rng, step, len(steps)))
        if step == steps[0] or step == steps[-1]:
            estimates = {name: _estimate(rng) for name in _ESTIMATES}
            evaluations.append({"step": step} | estimates)


def _problem(
    c: ConfigDict, rng: np.random.Generator, step: int, b: int, words: int, failing: float
) -> Iterator[dict[str, Any]]:
    """The rows of one problem, which aggregation solves more often than search."""
    cursor, N = step * c.batch.problems + b, c.search.traces
    skill = rng.random()
    shared = {
        "problem": f"train:{cursor}",
        "cursor": cursor,
        "kept": True,
        "problem_text": f"What is {cursor} * 7 + {b}?",
        "reference_answer": "42",
    }
    search = [_trace(c, "search", rng, 0.2 + 0.3 * skill, words, failing) for _ in range(N)]
    own_1xN = np.array([[_REWARD[row["verdict"]] for row in search]])
    if not ESTIMATORS[c.loss.estimator].aggregates:
        (advantages,) = compute_advantages(c.loss.estimator, [Rewards(own_1xN)]).rounds
        yield from _gated(c, shared | _place("search"), search, advantages.candidate_BxN[0])
        return

    a = c.aggregation
    key = Key(c.seed, int(Purpose.TRAIN), step, cursor, 0)
    member_KxS = draw_subsets(key, N, a.subset_size, a.subsets)
    sets = []
    for _ in range(a.subsets):
        traces = range(a.traces)
        sets.append(
            [_trace(c, "aggregation", rng, 0.2 + 0.6 * skill, words, failing) for _ in traces]
        )
    reward_1xKxM = np.array([[[_REWARD[row["verdict"]] for row in rows] for rows in sets]])
    rewards = Rewards(own_1xN, reward_1xKxM, member_KxS[None])
    (advantages,) = compute_advantages(c.loss.estimator, [rewards]).rounds
    yield from _gated(c, shared | _place("search"), search, advantages.candidate_BxN[0])
    for k, rows in enumerate(sets):
        for row in rows:  # some of it is read off a candidate
            candidate = search[rng.choice(member_KxS[k])]["text"].split()
            row["text"] = " ".join([*candidate[: len(candidate) // 2], row["text"]])
        order = rng.permutation(member_KxS[k]).tolist()
        place = _place("aggregation", k, member_KxS[k].tolist(), order)
        yield from _gated(c, shared | place, rows, advantages.aggregation_BxKxM[0, k])


def _place(
    role: str, k: int | None = None, member_S: list | None = None, order: list | None = None
) -> dict[str, Any]:
    return {
        "role": role,
        "round": None if k is None else 1,
        "set": k,
        "subset": member_S,
        "order": order,
    }


def _trace(
    c: ConfigDict, role: str, rng: np.random.Generator, right: float, words: int, failing: float
) -> dict[str, Any]:
    judged = np.array([right, 0.9 - right, 0.1, 0.0]) * (1 - failing)
    chances = judged + np.array([0, 0, 0, failing])
    verdict = _VERDICTS[rng.choice(4, p=chances)]
    length = int(rng.integers(words // 2, words * 3 // 2))
    box = {"correct": r"\boxed{42}", "unparsed": ""}.get(verdict, rf"\boxed{{{rng.integers(5)}}}")
    stop = Stop.LENGTH if rng.random() < 0.05 else Stop.STOP
    limit = c[role].max_tokens
    return {
        "text": f"{' '.join(_WORDS[i] for i in rng.integers(len(_WORDS), size=length))} {box}",
        "ids": rng.integers(1000, size=length).tolist(),
        "logprobs": (-rng.random(length)).round(3).tolist(),
        "length": limit if stop == Stop.LENGTH else min(length, limit),
        "stop": stop.name.lower(),
        "verdict": verdict,
        "verdict_detail": "worker killed" if verdict == "error" else "",
        "reward": _REWARD[verdict],
    }


def _gated(
    c: ConfigDict, shared: dict[str, Any], rows: list[dict[str, Any]], advantage_C: np.ndarray
) -> Iterator:
    length = np.array([row["length"] for row in rows])
    stop = np.array([Stop[row["stop"].upper()] for row in rows])
    limit = c[shared["role"]].max_tokens
    gated_C = length_gate(advantage_C, length, stop, limit, c.loss.length_gate)
    for i, row in enumerate(rows):
        yield shared | {"trace": i} | row | {"advantage": float(gated_C[i])}


def _metrics(c: ConfigDict, rng: np.random.Generator, step: int, steps: int) -> dict[str, Any]:
    done = step / max(1, steps)
    row = {
        "step": step,
        "tokens_per_s": 1000 + 50 * rng.random(),
        "grad_norm": 1 / (1 + done) + 0.1 * rng.random(),
        "mismatch/kl": 1e-6 * rng.random(),
        "sampling/generated_tokens": 1e5,
        "sampling/tried": 2 * c.batch.problems,
        "sampling/kept": c.batch.problems,
    }
    rewards = {"search": "search"}
    if ESTIMATORS[c.loss.estimator].aggregates:
        rewards["aggregation"] = "aggregated"
    for role, name in rewards.items():
        row |= {
            f"reward/{name}": 0.3 + 0.4 * done + 0.05 * rng.random(),
            f"length/{role}": 100 + 50 * done,
            f"entropy/{role}": 1 - 0.5 * done,
            f"length/cut_off_{role}": 0.1 * rng.random(),
            f"verifier/parse_rate_{role}": 0.9,
            f"verifier/error_{role}": 0.0,
        }
    return row


def _estimate(rng: np.random.Generator) -> dict[str, Any]:
    mean = 0.3 + 0.4 * rng.random()
    return {
        "mean": mean,
        "low": mean - 0.05,
        "high": mean + 0.05,
        "standard_error": 0.025,
        "count": 512,
    }


_START = {
    "step": 0,
    "time": "2026-01-01T00:00:00+00:00",
    "hardware": "2 CPU cores",
    "devices": "1 x cpu (cpu)",
    "processes": 1,
    "versions": {"python": "3.11", "jax": "0.10.2"},
    "commit": "0" * 40,
    "modified": False,
}
