"""Dynamic sampling: a stream of rollouts -> the first B problems in cursor order with a signal, and loss weights.

A step's batch is a pure function of the policy, the step and the cursor, so a killed step is simply run again.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from spiral_jax.groups import Role, Stop
from spiral_jax.metrics import Mean
from spiral_jax.objective import advantages, loss_weights
from spiral_jax.rollout import Actor, Rollouts
from spiral_jax.rollout_feed import RolloutFeed
from spiral_jax.verifier.verifier import check_error_rate


class NoSignal(RuntimeError):
    """Too few problems with a non-zero advantage: the task is too easy, too hard, or its verifier is broken."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """What one optimizer step learns from.

    Attributes:
      rollouts: the first B kept problems in cursor order, advantages filled in (after the length gate).
      discarded: the problems before `next_cursor` that were not kept, with advantage 0; for the trace log alone.
      search_weight_UxC, aggregation_weight_UxC: loss weights of their traces; the latter None without that stage.
      next_cursor: behind the last kept problem: where the next step starts.
      sampled_tokens: of everything that was drawn for this batch, abandoned traces too.
      metrics: (sum, count) metrics and counts for the log.
    """

    rollouts: Rollouts
    discarded: Rollouts
    search_weight_UxC: np.ndarray
    aggregation_weight_UxC: np.ndarray | None
    next_cursor: int
    sampled_tokens: int
    metrics: dict[str, Mean | float]


def collect_batch(actor: Actor, weights: Any, step: int, cursor: int) -> Batch:
    """Dynamic sampling: tries problems in cursor order until B of them have a non-zero advantage.

    The batch is the first B kept ones in cursor order, never in completion order; what is kept beyond them, and what
    still runs when they are known, is discarded, counted, and tried again by the next step. At most
    `sampling.max_ratio` * B problems are tried; then B / 4 kept ones are enough.

    Raises:
      NoSignal: fewer than that, with the histogram of rewards.
      VerifierFailure: our own failures exceed `config.verifier.max_error_rate`.
    """
    c, B = actor.c, actor.c.batch.problems
    with RolloutFeed(actor, step, cursor, keep=lambda rollouts: bool(_advantages(c, rollouts).keep_B[0])) as feed:
        with actor.progress.phase("sampling"):
            of_sampler = actor.sampler.stream(weights, feed)
        rollouts, counts, verdicts = feed.decided()
    check_error_rate(verdicts, c.verifier.max_error_rate)
    found = _advantages(c, rollouts)
    kept = np.flatnonzero(found.keep_B)
    index = kept[:B]
    if len(index) < max(1, B / 4):
        raise NoSignal(_no_signal_message(c, rollouts, len(index), int(found.starved_B.sum())))
    next_cursor = int(rollouts.cursor_B[index[-1]]) + 1 if len(index) == B else feed.next_cursor
    counts.update(tried=feed.tried, kept=len(index), surplus=len(kept) - len(index), too_long=feed.too_long,
                  undecided=feed.tried - len(rollouts), starved=int(found.starved_B.sum()))  # fmt: skip
    metrics = _metrics(rollouts, found, counts) | of_sampler
    batch, search_weight, aggregation_weight = _weigh(c, rollouts.take(index), found, index)
    sampled_tokens = int(of_sampler["sampling/generated_tokens"])
    discarded = _without_advantage(rollouts.take(np.flatnonzero(~found.keep_B & (rollouts.cursor_B < next_cursor))))
    return Batch(batch, discarded, search_weight, aggregation_weight, next_cursor, sampled_tokens, metrics)


def _without_advantage(rollouts: Rollouts) -> Rollouts:
    """Advantage 0 on every trace: nothing was learned from these problems."""
    zeros = lambda groups: dataclasses.replace(groups, advantage_UxC=np.zeros(groups.trace_len_UxC.shape, np.float32))  # noqa: E731
    aggregation = None if rollouts.aggregation is None else zeros(rollouts.aggregation)
    return dataclasses.replace(rollouts, search=zeros(rollouts.search), aggregation=aggregation)


def _advantages(c: ConfigDict, rollouts: Rollouts) -> advantages.Advantages:
    return advantages.compute(c.loss.estimator, rollouts.rewards())


def _weigh(
    c: ConfigDict, kept: Rollouts, found: advantages.Advantages, index: np.ndarray
) -> tuple[Rollouts, np.ndarray, np.ndarray | None]:
    """Gates the advantages of the kept problems and turns them into loss weights."""
    loss, groups = c.loss, kept.search
    gated = advantages.length_gate(
        found.search_BxN[index], groups.trace_len_UxC, groups.stop_UxC, c.search.max_tokens, loss.length_gate
    )
    kept = dataclasses.replace(kept, search=dataclasses.replace(groups, advantage_UxC=gated))
    rewards = kept.rewards()
    search_weight = loss_weights.search_weights(
        loss.estimator, loss.normalizer, gated, rewards, groups.trace_len_UxC, loss.search_weight
    )
    if kept.aggregation is None:
        return kept, search_weight, None
    reward, groups = rewards.aggregated_BxKxM, kept.aggregation
    gated = advantages.length_gate(
        found.aggregation_BxKxM[index].reshape(groups.trace_len_UxC.shape), groups.trace_len_UxC, groups.stop_UxC,
        c.aggregation.max_tokens, loss.length_gate,
    )  # fmt: skip
    weight = loss_weights.aggregation_weights(
        loss.normalizer, gated.reshape(reward.shape), reward, loss.aggregation_weight
    )
    kept = dataclasses.replace(kept, aggregation=dataclasses.replace(groups, advantage_UxC=gated))
    return kept, search_weight, weight.reshape(gated.shape)


def _no_signal_message(c: ConfigDict, rollouts: Rollouts, kept: int, starved: int) -> str:
    reward = rollouts.search.reward_UxC if rollouts.aggregation is None else rollouts.aggregated_reward_BxKxM()
    per_problem = np.nansum(reward.reshape(len(rollouts), -1), axis=1).astype(int)
    histogram = ", ".join(f"{right} right: {count}" for right, count in sorted(Counter(per_problem.tolist()).items()))
    return (
        f"only {kept} of {len(rollouts)} problems have a non-zero advantage (batch.problems = {c.batch.problems}, at "
        f"least a quarter is needed; {starved} were lost to verifier failures). Right answers a problem, of "
        f"{reward[0].size}: {histogram}. The task is too easy, too hard, or its answers are not understood: look at "
        "the traces, or change the task."
    )


def _metrics(rollouts: Rollouts, found: advantages.Advantages, counts: Counter) -> dict[str, Mean | float]:
    """What is logged about a batch: rewards and lengths of all that was tried, and every count."""
    metrics: dict[str, Mean | float] = {f"sampling/{name}": float(counts[name]) for name in
                                        ("tried", "kept", "surplus", "undecided", "too_long", "starved")}  # fmt: skip
    roles = {Role.SEARCH: rollouts.search} | ({Role.AGGREGATION: rollouts.aggregation} if rollouts.aggregation else {})
    for role, groups in roles.items():
        traces = groups.trace_len_UxC.size
        of_role = lambda name: counts[f"{role.label}_{name}"]  # noqa: B023, E731
        rewards = groups.reward_UxC[~np.isnan(groups.reward_UxC)]
        name = "reward/aggregated" if role is Role.AGGREGATION else "reward/search"
        metrics[name] = Mean(float(rewards.sum()), float(rewards.size))
        metrics[f"length/{role.label}"] = Mean(float(groups.trace_len_UxC.sum()), float(traces))
        cut_off = float((groups.stop_UxC == Stop.LENGTH).sum())
        metrics[f"length/cut_off_{role.label}"] = Mean(cut_off, float(traces))
        metrics[f"verifier/parse_rate_{role.label}"] = Mean(float(of_role("correct") + of_role("wrong")), float(traces))
        for status in ("correct", "wrong", "unparsed", "timeout", "error"):
            metrics[f"verifier/{status}_{role.label}"] = float(of_role(status))
        advantage = found.search_BxN if role is Role.SEARCH else found.aggregation_BxKxM
        metrics[f"advantage/{role.label}_abs"] = Mean(float(np.abs(advantage).sum()), float(advantage.size))
        metrics[f"advantage/{role.label}_nonzero"] = Mean(float((advantage != 0).sum()), float(advantage.size))
    for name in ("removed_special", "dropped", "empty") if rollouts.aggregation else ():
        metrics[f"candidates/{name}"] = float(counts[f"aggregation_{name}"])
    return metrics
