"""Stored populations that are made up, scripted answers to them, and a policy of three numbers."""

import itertools

import numpy as np
from scripted_sampler import TOKENIZER

from spiral_jax.core.groups import GroupRequests, Groups, Stop
from spiral_jax.rollout.populations import Population
from spiral_jax.run.trace_log import TraceRows
from spiral_jax.verifier.rewards import Status, Verdict

NAN = float("nan")


def population(cursor, step=0, round=1, rewards=(1.0, 0.0)):
    """One whose traces, of growing length, have these rewards; NaN: our failure."""
    C = len(rewards)
    length_C = np.arange(1, C + 1, dtype=np.int32)
    trace_CxG = np.where(np.arange(C) < length_C[:, None], 100 * cursor + length_C[:, None], 0)
    verdicts = [
        Verdict.of(Status.ERROR, "broken") if np.isnan(reward) else Verdict.of_reward(reward, "é")
        for reward in rewards
    ]
    stop_C = np.arange(C, dtype=np.int32) % 2
    verdict_C = np.array(verdicts, object)
    return Population(cursor, step, round, trace_CxG.astype(np.int32), length_C, stop_C, verdict_C)


def script(right):
    """Answers are named by two digits and are right where `right[round, cursor, set, trace]`."""

    def text(round, cursor, k, i):
        if round == 0:
            return f"left:{i}, \\boxed{{1}}"
        return f"{k}{i} \\boxed{{{7 if right[round, cursor, k, i] else 8}}}"

    return text


def rows_of(training, batch):
    c = training.c
    rows = TraceRows(TOKENIZER, 1.0, c.aggregation.order, c.seed, drops_truncated=False)
    return list(rows.make(batch))


# an enumerable policy

THETA = np.array([-0.7, 0.2, 0.9])  # log-odds that an answer is right, by shown right ones
STORED = ((1, 0, 1, 0), (0, 0, 1, 0), (0, 0, 0, 0))  # rewards of three populations


def chance(theta):
    return 1 / (1 + np.exp(-theta))


def outcomes_of(stored):
    """Every draw of two sets of two, and every reward of two answers to each: arrays by outcome."""
    sets = np.array(list(itertools.combinations(itertools.combinations(range(4), 2), 2)))
    rewards = np.array(list(itertools.product((0.0, 1.0), repeat=4))).reshape(-1, 2, 2)
    member = np.repeat(sets, len(rewards), axis=0)
    reward = np.tile(rewards, (len(sets), 1, 1))
    shown = np.array(stored)[member].sum(axis=-1)[:, :, None].repeat(2, axis=2)
    return member, reward, shown, len(sets)


def probability(theta, reward, shown, draws):
    right = chance(theta[shown])
    return np.where(reward == 1, right, 1 - right).prod(axis=(1, 2)) / draws


def answers_with(reward_UxC):
    U, C = reward_UxC.shape
    one_U, id_Ux6 = np.ones(U, np.int32), np.tile(np.int32([0, 5, 0, 2, 1, 0]), (U, 1))
    requests = GroupRequests(one_U[:, None], one_U, id_Ux6, C, 4)
    trace = np.ones((U, C, 4), np.int32)
    stop = np.full((U, C), Stop.STOP, np.int32)
    return Groups(requests, trace, trace[:, :, 0], np.zeros(trace.shape), stop, reward_UxC)
