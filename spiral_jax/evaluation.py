"""Held-out accuracy of one policy: single traces, majority vote and aggregation over the same candidates.

held-out problems -> N search traces -> disjoint subsets -> aggregation traces -> one number a problem and measure
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from spiral_jax.config import ConfigError, uses_aggregation
from spiral_jax.estimators import majority_correct, mean_and_interval
from spiral_jax.groups import Groups, Purpose, Stop
from spiral_jax.objective import subsets
from spiral_jax.rollout import Actor, aggregate, fits, search, verify
from spiral_jax.verifier.rewards import Verdict
from spiral_jax.verifier.verifier import CORRECT_CLASS, answer_class, count_verdicts


def evaluate(actor: Actor, weights: Any, step: int) -> dict[str, Any]:
    """Evaluates `eval.problems` held-out problems at the training temperature.

    Measures with mean, 95 % interval over problems, standard error and count: `single` (mean own correctness of the N
    traces), `pass_at_n` (some trace is right), and with an aggregation stage `majority` (tie-aware vote of each
    aggregated subset's S candidates) and `aggregated` (mean over the `eval.subsets` disjoint subsets and their
    `eval.traces` traces). Shares: parse rate, cut-off share and mean length of each role. Problems whose prompt is too
    long are left out and counted (`too_long`).
    """
    c, size = actor.c, actor.c.search.traces
    asked = {index: actor.task.held_out(index) for index in range(c.eval.problems)}
    asked = {index: problem for index, problem in asked.items() if fits(actor, problem)}
    if not asked:
        raise ConfigError(
            f"none of the {c.eval.problems} held-out problems has a search prompt of at most "
            f"config.prompt.max_problem_tokens = {c.prompt.max_problem_tokens} tokens: raise it."
        )
    problems, index_B = list(asked.values()), np.array(list(asked))
    found = search(actor, weights, problems, index_B, Purpose.EVALUATION, step)
    found, texts, verdicts = verify(actor, problems, found)
    result = {"step": step, "problems": len(problems), "too_long": c.eval.problems - len(problems), "traces": size}
    result["sampled_tokens"] = found.sampled_tokens
    measures = {"single": _mean_reward(found.reward_UxC), "pass_at_n": _any_right(found.reward_UxC)}
    result |= _shares("search", found, verdicts)
    if uses_aggregation(c):
        a = c.aggregation
        member_BxKxS = np.stack([
            subsets.disjoint_subsets(c.seed, int(Purpose.EVALUATION), step, int(index), 0, size, a.subset_size,
                                     c.eval.subsets)
            for index in index_B
        ])  # fmt: skip
        groups, _ = aggregate(actor, weights, problems, found, member_BxKxS, c.eval.traces)
        groups, _, of_groups = verify(actor, problems, groups)
        measures["majority"] = _majority(texts, verdicts, member_BxKxS)
        measures["aggregated"] = _mean_reward(groups.reward_UxC.reshape(len(problems), -1))
        result |= _shares("aggregation", groups, of_groups)
        result |= {"subsets": c.eval.subsets, "subset_size": a.subset_size, "aggregation_traces": c.eval.traces}
        result["sampled_tokens"] += groups.sampled_tokens
    return result | {name: dataclasses.asdict(mean_and_interval(value_B)) for name, value_B in measures.items()}


def _mean_reward(reward_BxR: np.ndarray) -> np.ndarray:
    """Mean over the valid rewards of each problem; NaN where there is none."""
    valid = ~np.isnan(reward_BxR)
    total = np.where(valid, reward_BxR, 0.0).sum(axis=1, dtype=np.float64)
    return np.where(valid.any(axis=1), total / np.maximum(valid.sum(axis=1), 1), np.nan)


def _any_right(reward_BxR: np.ndarray) -> np.ndarray:
    """1 where some valid reward is 1; NaN where none is valid."""
    any_right = (reward_BxR == 1).any(axis=1).astype(np.float64)
    return np.where(np.isnan(reward_BxR).all(axis=1), np.nan, any_right)


def _majority(texts: list[str], verdicts: list[Verdict], member_BxKxS: np.ndarray) -> np.ndarray:
    """[B]: chance that a vote among a subset's candidates is right, mean over the problem's subsets."""
    classes = [answer_class(text, verdict) for text, verdict in zip(texts, verdicts, strict=True)]
    N = len(classes) // len(member_BxKxS)
    votes = [
        [majority_correct([classes[b * N + n] for n in member_S], CORRECT_CLASS) for member_S in member_KxS]
        for b, member_KxS in enumerate(member_BxKxS)
    ]
    return np.array(votes).mean(axis=1)


def _shares(role: str, groups: Groups, verdicts: list[Verdict]) -> dict[str, float]:
    counts, traces = count_verdicts(verdicts), groups.trace_len_UxC.size
    return {
        f"parse_rate_{role}": (counts["correct"] + counts["wrong"]) / traces,
        f"cut_off_{role}": float((groups.stop_UxC == Stop.LENGTH).mean()),
        f"length_{role}": float(groups.trace_len_UxC.mean()),
    }
