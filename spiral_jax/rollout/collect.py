"""Dynamic sampling: a stream of rollouts -> the first B problems in cursor order with a signal, and
loss weights.

A step's batch is a pure function of the policy, the step and the cursor, so a killed step is simply
run again.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from spiral_jax.core.errors import UserError
from spiral_jax.core.groups import Groups, Role, Stop
from spiral_jax.core.metrics import Mean
from spiral_jax.objective import estimators as advantages
from spiral_jax.objective import weights as loss_weights
from spiral_jax.rollout.feed import RolloutFeed
from spiral_jax.rollout.requests import Actor, Rollouts
from spiral_jax.verifier.verifier import check_error_rate


class NoSignal(UserError):
    """Too few problems with a non-zero advantage: the task is too easy, too hard, or its verifier
    is broken.
    """


@dataclasses.dataclass(frozen=True)
class Batch:
    """What one optimizer step learns from.

    Attributes:
      rollouts: the first B kept problems in cursor order, advantages filled in (after the length
      gate).
      discarded: the problems before `next_cursor` that were not kept, with advantage 0; for the
      trace log alone.
      search_weight_UxC: loss weights of the search traces.
      aggregation_weight_UxC: of the aggregation traces, round by round; None without that stage.
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

    The batch is the first B kept ones in cursor order, never in completion order; what is kept
    beyond them, and what still runs when they are known, is discarded, counted, and tried again by
    the next step. At most `sampling.max_ratio` * B problems are tried; then B / 4 kept ones are
    enough.

    Raises:
      NoSignal: fewer than that, with the histogram of rewards.
      VerifierFailure: our own failures exceed `config.verifier.max_error_rate`.
    """
    c, B = actor.c, actor.c.batch.problems
    with RolloutFeed(
        actor, step, cursor, keep=lambda rollouts: bool(find_advantages(c, rollouts).keep_B[0])
    ) as feed:
        with actor.progress.phase("sampling"):
            sampling = actor.sampler.stream(weights, feed)
            for now in sampling:
                feed.take_verdicts(now)
            of_sampler = sampling.metrics()
        rollouts, counts, verdicts = feed.decided()
    check_error_rate(verdicts, c.verifier.max_error_rate)
    found = find_advantages(c, rollouts)
    kept = np.flatnonzero(found.keep_B)
    index = kept[:B]
    if len(index) < max(1, B / 4):
        raise NoSignal(_no_signal_message(c, rollouts, len(index), int(found.starved_B.sum())))
    next_cursor = int(rollouts.cursor_B[index[-1]]) + 1 if len(index) == B else feed.next_cursor
    counts.update(tried=feed.tried, kept=len(index), surplus=len(kept) - len(index), too_long=feed.too_long,
                  undecided=feed.tried - len(rollouts), starved=int(found.starved_B.sum()))  # fmt: skip
    metrics = _metrics(rollouts, found, counts) | of_sampler
    batch, (search_weight, *read_weight) = weigh(c, rollouts.take(index), found.take(index))
    sampled_tokens = int(of_sampler["sampling/generated_tokens"])
    discarded = rollouts.take(np.flatnonzero(~found.keep_B & (rollouts.cursor_B < next_cursor)))
    discarded = discarded.with_advantages(
        [np.zeros(g.trace_len_UxC.shape, np.float32) for g in discarded.stages]
    )
    aggregation_weight = np.concatenate(read_weight) if read_weight else None
    return Batch(
        batch, discarded, search_weight, aggregation_weight, next_cursor, sampled_tokens, metrics
    )


@dataclasses.dataclass(frozen=True)
class AdvantagesOfRounds:
    """Of B problems: one of `advantages.Advantages` for each of `Rollouts.rewards`.

    The traces of a round that another one reads earn both: against the others of their own set, and
    by the sets of the next round that they are in. So the rounds' objectives are added up, as any
    of them may be the last one at evaluation; how search serves the second round and later ones is
    left to the first.
    """

    rounds: list[advantages.Advantages]

    @property
    def starved_B(self) -> np.ndarray:
        return np.any([found.starved_B for found in self.rounds], axis=0)

    @property
    def keep_B(self) -> np.ndarray:
        return np.any([found.keep_B for found in self.rounds], axis=0) & ~self.starved_B

    def take(self, index: np.ndarray) -> AdvantagesOfRounds:
        return AdvantagesOfRounds([found.take(index) for found in self.rounds])

    def by_stage(self) -> list[np.ndarray]:
        """Of the traces of search and of every round, before the length gate: [B, N], then [B, K,
        M] each.
        """
        first, *later = (found.search_BxN for found in self.rounds)
        own = [
            found.aggregation_BxKxM for found in self.rounds if found.aggregation_BxKxM is not None
        ]
        for r, read_BxN in enumerate(later):
            own[r] = own[r] + read_BxN.reshape(own[r].shape)
        return [first, *own]


def find_advantages(c: ConfigDict, rollouts: Rollouts) -> AdvantagesOfRounds:
    """Advantages of verified rollouts under config.loss.estimator, before the length gate."""
    return AdvantagesOfRounds(
        [advantages.compute(c.loss.estimator, rewards) for rewards in rollouts.rewards()]
    )


def weigh(
    c: ConfigDict, kept: Rollouts, found: AdvantagesOfRounds
) -> tuple[Rollouts, list[np.ndarray]]:
    """Gates the advantages of the kept problems and turns them into loss weights.

    Returns:
      the problems with gated advantages (those of being aggregated and of being read again added
      up), and the loss weights of each of `Rollouts.stages`, float32 [U, C].
    """
    loss, stages = c.loss, kept.stages
    advantage = [np.zeros(groups.trace_len_UxC.shape, np.float32) for groups in stages]
    weight = [np.zeros_like(advantage_UxC) for advantage_UxC in advantage]

    def add(stage: int, gated: np.ndarray, weights: np.ndarray) -> None:
        advantage[stage] += gated.reshape(advantage[stage].shape)
        weight[stage] += weights.reshape(weight[stage].shape)

    for r, (of_round, rewards) in enumerate(zip(found.rounds, kept.rewards(), strict=True)):
        gated_BxN = _gated(c, stages[r], of_round.search_BxN)
        length_BxN = stages[r].trace_len_UxC.reshape(gated_BxN.shape)
        add(r, gated_BxN, loss_weights.search_weights(
            loss.estimator, loss.normalizer, gated_BxN, rewards, length_BxN, loss.search_weight
        ))  # fmt: skip
        if of_round.aggregation_BxKxM is not None:
            gated_BxKxM = _gated(c, stages[r + 1], of_round.aggregation_BxKxM)
            add(r + 1, gated_BxKxM, loss_weights.aggregation_weights(
                loss.normalizer, gated_BxKxM, rewards.aggregated_BxKxM, loss.aggregation_weight
            ))  # fmt: skip
    return kept.with_advantages(advantage), weight


def _gated(c: ConfigDict, groups: Groups, advantage: np.ndarray) -> np.ndarray:
    """Advantages of the traces of a stage behind the length gate; their shape may be any that lists
    the same traces.
    """
    length, stop = (a.reshape(advantage.shape) for a in (groups.trace_len_UxC, groups.stop_UxC))
    return advantages.length_gate(
        advantage, length, stop, groups.requests.max_tokens, c.loss.length_gate
    )


def _no_signal_message(c: ConfigDict, rollouts: Rollouts, kept: int, starved: int) -> str:
    reward = rollouts.stages[-1].reward_UxC.reshape(len(rollouts), -1)
    per_problem = np.nansum(reward, axis=1).astype(int)
    histogram = ", ".join(
        f"{right} right: {count}" for right, count in sorted(Counter(per_problem.tolist()).items())
    )
    return (
        f"only {kept} of {len(rollouts)} problems have a non-zero advantage (batch.problems = {c.batch.problems}, at "
        f"least a quarter is needed; {starved} were lost to verifier failures). Right answers a problem, of "
        f"{reward[0].size}: {histogram}. The task is too easy, too hard, or its answers are not understood: look at "
        "the traces, or change the task."
    )


def _metrics(
    rollouts: Rollouts, found: AdvantagesOfRounds, counts: Counter
) -> dict[str, Mean | float]:
    """What is logged about a batch: rewards and lengths of all that was tried, and every count."""
    metrics: dict[str, Mean | float] = {f"sampling/{name}": float(counts[name]) for name in
                                        ("tried", "kept", "surplus", "undecided", "too_long", "starved")}  # fmt: skip
    metrics |= _reward_metrics(rollouts)
    advantage, *read = found.by_stage()
    metrics |= _role_metrics(Role.SEARCH, rollouts.search, advantage, counts)
    if rollouts.rounds:
        metrics |= _role_metrics(
            Role.AGGREGATION, rollouts.aggregation, np.concatenate(read), counts
        )
        for name in ("removed_special", "dropped", "empty"):
            metrics[f"candidates/{name}"] = float(counts[f"aggregation_{name}"])
    return metrics


def _reward_metrics(rollouts: Rollouts) -> dict[str, Mean]:
    """Of search, of the last round, and of those before it by their number."""
    names = ["search", *(f"aggregated_round_{r}" for r in range(1, len(rollouts.rounds) + 1))]
    if rollouts.rounds:
        names[-1] = "aggregated"
    valid = [groups.reward_UxC[~np.isnan(groups.reward_UxC)] for groups in rollouts.stages]
    return {
        f"reward/{name}": Mean(float(r.sum()), float(r.size))
        for name, r in zip(names, valid, strict=True)
    }


def _role_metrics(
    role: Role, groups: Groups, advantage: np.ndarray, counts: Counter
) -> dict[str, Mean | float]:
    traces = float(groups.trace_len_UxC.size)
    of_role = {status: float(counts[f"{role.label}_{status}"]) for status in
               ("correct", "wrong", "unparsed", "timeout", "error")}  # fmt: skip
    return {
        f"length/{role.label}": Mean(float(groups.trace_len_UxC.sum()), traces),
        f"length/cut_off_{role.label}": Mean(float((groups.stop_UxC == Stop.LENGTH).sum()), traces),
        f"verifier/parse_rate_{role.label}": Mean(of_role["correct"] + of_role["wrong"], traces),
        **{f"verifier/{status}_{role.label}": count for status, count in of_role.items()},
        f"advantage/{role.label}_abs": Mean(float(np.abs(advantage).sum()), float(advantage.size)),
        f"advantage/{role.label}_nonzero": Mean(
            float((advantage != 0).sum()), float(advantage.size)
        ),
    }
