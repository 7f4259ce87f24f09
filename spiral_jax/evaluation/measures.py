"""Records of evaluated problems -> measures of each problem. NumPy, float64.

A record is what became of one problem, in JSON types:

    index, id     of the held-out problem
    search        answer, length, cut_off [N]: cut_off is 1 where a trace reached its limit, else 0;
                  strategy [N], where something names them (config.task.strategy): names, or None
    search, aggregation and rounds of rsa have too, where an answer has earned partial credit:
                  reward [..] of each answer, None = an error of ours
    limits        for each smaller limit: limit, answer [N]: the same traces, cut off there
    aggregation   member [K][S], which search traces each set holds;
                  answer, length, cut_off [K * M], by set and trace
    rsa           for each round 1..T: answer, length, cut_off [population]; round 0 is the first
                  search traces, all of them if T = 0

Answers are numbered by `answers.number_classes`: 0 = correct, 1, 2, ... = wrong, None = unparsed,
-1 = an error of ours, which is left out of every share.

Tokens are sampled ones; reading prompts is not counted. The critical path adds up the longest trace
of each stage: what one waits for when all traces of a stage run side by side.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from spiral_jax.evaluation.answers import CORRECT, ERROR
from spiral_jax.evaluation.statistics import (
    answer_entropy,
    longest_of_k,
    majority_at_k,
    majority_correct,
    pass_at_k,
)

BOOTSTRAP_DRAWS = 2000
RATES = ("rescue_vote_wrong", "spoil_vote_right", "rescue_none_right", "spoil_some_right")
STRATEGIES = ("commonest", "mixed", "right_if_mixed", "right_if_alike")
REWARD = "reward/aggregated"  # a column where answers have earned partial credit
Answers = Sequence[int | None]
_NEARLY_ALL = 0.9  # of the problems: those that have k traces, up to `largest_k`
_CURVES = ("pass_at_k", "majority_at_k", "tokens_at_k", "critical_path_at_k")


class Column(NamedTuple):
    """Q measures of B problems: each is the sum of its totals over the sum of its counts.

    Attributes:
      total_BxQ: float64, 0 where the count is 0.
      count_BxQ: float64; 1 in a mean over problems (0: no value), other counts in a rate among sets
        or traces.
    """

    total_BxQ: np.ndarray
    count_BxQ: np.ndarray


class Part(NamedTuple):
    """What one set adds to the total and to the count of a rate."""

    total: float
    count: float


class ReadSet(NamedTuple):
    """A set of search traces that plain aggregation has read.

    Attributes:
      member_S: which traces it holds.
      vote: the chance that a vote among their answers is right.
      some_right: whether one of their answers is right.
      answer_M: of the aggregation traces that have read it.
    """

    member_S: Sequence[int]
    vote: float
    some_right: bool
    answer_M: Answers


# Answers of some traces -> a number


def accuracy(answers: Answers) -> float:
    """Share of correct answers; errors of ours left out; NaN if nothing else is there."""
    valid = [answer == CORRECT for answer in answers if answer != ERROR]
    return sum(valid) / len(valid) if valid else math.nan


def any_correct(answers: Answers) -> float:
    """1.0 if some answer is correct, else 0.0; NaN if all are errors of ours."""
    return float(CORRECT in answers) if any(answer != ERROR for answer in answers) else math.nan


def vote(answers: Answers) -> float:
    """The chance that a plurality vote is correct, ties split evenly; errors of ours have none."""
    return majority_correct([None if answer == ERROR else answer for answer in answers], CORRECT)


def entropy(answers: Answers) -> float:
    """`answer_entropy` without errors of ours."""
    return answer_entropy([answer for answer in answers if answer != ERROR])


def rewards(stage: Mapping[str, Any]) -> list[float]:
    """What a stage's answers have earned; errors of ours are left out."""
    if "reward" in stage:
        return [reward for reward in stage["reward"] if reward is not None]
    return [float(answer == CORRECT) for answer in stage["answer"] if answer != ERROR]


def mean_reward(stage: Mapping[str, Any]) -> float:
    """NaN if all are errors of ours."""
    earned = rewards(stage)
    return sum(earned) / len(earned) if earned else math.nan


def set_votes(search: dict, member_KxS: Sequence[Sequence[int]]) -> list[float]:
    """`vote` among the candidates of each set."""
    return [vote([search["answer"][n] for n in member_S]) for member_S in member_KxS]


def read_sets(record: dict) -> list[ReadSet]:
    """The K sets of a record's plain aggregation."""
    search, aggregation = record["search"], record["aggregation"]
    member_KxS = aggregation["member"]
    M = len(aggregation["answer"]) // len(member_KxS)
    sets = []
    for k, member_S in enumerate(member_KxS):
        candidates = [search["answer"][n] for n in member_S]
        answer_M = aggregation["answer"][k * M : (k + 1) * M]
        sets.append(ReadSet(member_S, vote(candidates), CORRECT in candidates, answer_M))
    return sets


def populations(record: dict) -> list[dict]:
    """Populations of rounds 0..T of RSA."""
    size = len((record["rsa"] or [record["search"]])[0]["answer"])
    return [{name: values[:size] for name, values in record["search"].items()}, *record["rsa"]]


# Curves over k


def largest_k(measured: Mapping[str, Column]) -> int:
    """The largest k for which nearly all problems have k search traces; at least 1.

    Traces that are errors of ours do not count. Above it, pass@k and maj@k are means over the few
    problems without such an error.
    """
    share_N = measured["pass_at_k"].count_BxQ.mean(axis=0)
    return max(1, int((share_N >= _NEARLY_ALL).sum()))


def cut_curves(measured: Mapping[str, Column], k: int) -> dict[str, Column]:
    """The columns, of which the curves over the number of traces end at k."""
    cut = {name: Column(*(part[:, :k] for part in measured[name])) for name in _CURVES}
    return {**measured, **cut}


# Records -> columns


def columns(records: Sequence[dict], with_rewards: bool = False) -> dict[str, Column]:
    """Every measure of `records`, all sampled with the same numbers N, K, S, M, T and limits.

    Q is N for names in `_at_k` (k = 1..N), T + 1 for `rsa/` (rounds 0..T), the number of limits for
    `limits/`, T + 1 for `reward/rsa`, else 1. Those in `reward/` are there if answers have earned
    partial credit, or if they are asked for.

    Args:
      with_rewards: asks for those in `reward/`, also of answers that are all right or wrong.
    """
    found = _search_columns(records) | _aggregation_columns(records) | _rate_columns(records)
    found |= _rsa_columns(records) | _limit_columns(records)
    if "strategy" in records[0]["search"]:
        found |= _strategy_columns(records)
    stages = [stage for record in records for stage in _rewarded_stages(record)]
    if with_rewards or any("reward" in stage for stage in stages):
        found |= _reward_columns(records)
    return found


def _search_columns(records: Sequence[dict]) -> dict[str, Column]:
    """One trace, and k of N traces."""

    def tokens_at_k(search: dict) -> np.ndarray:
        return np.mean(search["length"]) * np.arange(1, len(search["length"]) + 1)

    search = [record["search"] for record in records]
    return {
        "single": _means(search, lambda s: [accuracy(s["answer"])]),
        "pass_at_k": _means(search, lambda s: _all_k(s["answer"], _pass)),
        "majority_at_k": _means(search, lambda s: _all_k(s["answer"], _majority)),
        "tokens_at_k": _means(search, tokens_at_k),
        "critical_path_at_k": _means(search, lambda s: longest_of_k(s["length"])),
        "cut_off/search": _means(search, lambda s: [_cut_off(s)]),
    }


def _aggregation_columns(records: Sequence[dict]) -> dict[str, Column]:
    """Aggregated pass@1, the vote among the same candidates, and what one such answer costs."""

    def cost(record: dict, of_candidates: Callable[[list[int]], float]) -> float:
        lengths, aggregation = record["search"]["length"], record["aggregation"]
        candidates = [
            of_candidates([lengths[n] for n in member_S]) for member_S in aggregation["member"]
        ]
        return np.mean(candidates) + np.mean(aggregation["length"])

    def mean_vote(record: dict) -> float:
        return np.mean(set_votes(record["search"], record["aggregation"]["member"]))

    return {
        "aggregated": _means(records, lambda r: [accuracy(r["aggregation"]["answer"])]),
        "aggregated/majority": _means(records, lambda r: [mean_vote(r)]),
        "aggregated/tokens": _means(records, lambda r: [cost(r, sum)]),
        "aggregated/critical_path": _means(records, lambda r: [cost(r, max)]),
        "cut_off/aggregation": _means(records, lambda r: [_cut_off(r["aggregation"])]),
    }


def _rate_columns(records: Sequence[dict]) -> dict[str, Column]:
    """Rescues and spoils: a set's aggregation traces against its own S candidates.

    With v the chance that a vote among the candidates is right (ties split) and r the share of the
    set's aggregation traces that are right, over all sets:

        rescue_vote_wrong   sum (1 - v) r / sum (1 - v)      right although the vote was wrong
        spoil_vote_right    sum v (1 - r) / sum v            wrong although the vote was right
        rescue_none_right   mean of r, sets in which no candidate is right
        spoil_some_right    mean of 1 - r, sets in which some candidate is right
    """

    def parts(candidates: ReadSet) -> dict[str, Part]:
        r, v, some = accuracy(candidates.answer_M), candidates.vote, candidates.some_right
        if math.isnan(r):
            return {}
        return {
            "rescue_vote_wrong": Part((1 - v) * r, 1 - v),
            "spoil_vote_right": Part(v * (1 - r), v),
            "rescue_none_right": Part((not some) * r, not some),
            "spoil_some_right": Part(some * (1 - r), some),
        }

    return _pool(RATES, [[parts(s) for s in read_sets(record)] for record in records])


def _strategy_columns(records: Sequence[dict]) -> dict[str, Column]:
    """What the sets hold, and what is made of it.

    A set is mixed if its candidates have two strategies or more.

        commonest        share of the search traces that have the most frequent strategy of all
        mixed            share of the sets that are mixed
        right_if_mixed   share of right aggregation traces among those of mixed sets
        right_if_alike   the same among those of all other sets
    """
    counts = Counter(name for record in records for name in record["search"]["strategy"])
    del counts[None]
    commonest = max(counts, key=counts.get, default="")

    def parts(candidates: ReadSet, strategy_N: Sequence[str | None]) -> dict[str, Part]:
        is_mixed = len({strategy_N[n] for n in candidates.member_S} - {None}) >= 2
        valid = [answer == CORRECT for answer in candidates.answer_M if answer != ERROR]
        right = Part(sum(valid), len(valid))
        return {
            "mixed": Part(is_mixed, 1),
            "right_if_mixed" if is_mixed else "right_if_alike": right,
        }

    parts_BxK = []
    for record in records:
        strategy_N = record["search"]["strategy"]
        parts_K = [parts(candidates, strategy_N) for candidates in read_sets(record)]
        of_traces = {"commonest": Part(strategy_N.count(commonest), len(strategy_N))}
        parts_BxK.append([*parts_K, of_traces])
    return _pool(STRATEGIES, parts_BxK)


def _pool(
    names: Sequence[str], parts_BxK: Sequence[Sequence[Mapping[str, Part]]]
) -> dict[str, Column]:
    """Rates by name: the sums of what a problem's sets add to each."""
    pooled = {}
    for name in names:
        total_Bx1, count_Bx1 = np.zeros((2, len(parts_BxK), 1))
        for b, parts in enumerate(parts_BxK):
            for part in parts:
                total, count = part.get(name, Part(0, 0))
                total_Bx1[b] += total
                count_Bx1[b] += count
        pooled[name] = Column(total_Bx1, count_Bx1)
    return pooled


def _rsa_columns(records: Sequence[dict]) -> dict[str, Column]:
    """By round of RSA, of its population; tokens are those spent until then."""

    def by_round(value: Callable[[dict], float]) -> Column:
        return _means(records, lambda record: [value(stage) for stage in populations(record)])

    def spent(of_round: Callable[[list[int]], float]) -> Column:
        def until(record: dict) -> np.ndarray:
            return np.cumsum([of_round(stage["length"]) for stage in populations(record)])

        return _means(records, until)

    return {
        "rsa/single": by_round(lambda stage: accuracy(stage["answer"])),
        "rsa/pass_at_n": by_round(lambda stage: any_correct(stage["answer"])),
        "rsa/majority": by_round(lambda stage: vote(stage["answer"])),
        "rsa/entropy": by_round(lambda stage: entropy(stage["answer"])),
        "rsa/cut_off": by_round(_cut_off),
        "rsa/tokens": spent(sum),
        "rsa/critical_path": spent(max),
    }


def _rewarded_stages(record: dict) -> list[dict]:
    return [record["search"], record["aggregation"], *record["rsa"]]


def _reward_columns(records: Sequence[dict]) -> dict[str, Column]:
    """Mean rewards where some are partial credit; of rsa by round."""
    return {
        "reward/single": _means(records, lambda r: [mean_reward(r["search"])]),
        REWARD: _means(records, lambda r: [mean_reward(r["aggregation"])]),
        "reward/rsa": _means(records, lambda r: [mean_reward(stage) for stage in populations(r)]),
    }


def _limit_columns(records: Sequence[dict]) -> dict[str, Column]:
    """By response limit: single trace, pass@N, vote among N, share cut off, tokens of one trace."""

    def by_limit(value: Callable[[dict, dict], float]) -> Column:
        def values(record: dict) -> list[float]:
            return [value(stage, record["search"]) for stage in record["limits"]]

        return _means(records, values)

    def cut_off(stage: dict, search: dict) -> float:
        length_N, cut_off_N = np.array(search["length"]), np.array(search["cut_off"])
        reached = (length_N == stage["limit"]) & (cut_off_N == 1)
        return np.mean((length_N > stage["limit"]) | reached)

    def tokens(stage: dict, search: dict) -> float:
        return np.mean(np.minimum(search["length"], stage["limit"]))

    return {
        "limits/single": by_limit(lambda stage, _: accuracy(stage["answer"])),
        "limits/pass_at_n": by_limit(lambda stage, _: any_correct(stage["answer"])),
        "limits/majority": by_limit(lambda stage, _: vote(stage["answer"])),
        "limits/cut_off": by_limit(cut_off),
        "limits/tokens": by_limit(tokens),
    }


def _means(rows: Sequence[dict], values: Callable[[dict], Any]) -> Column:
    """Means over problems of `values(row)` [Q]; NaN = no value."""
    value_BxQ = np.array([values(row) for row in rows], np.float64)
    known = ~np.isnan(value_BxQ)
    return Column(np.where(known, value_BxQ, 0.0), known.astype(np.float64))


def _cut_off(stage: dict) -> float:
    return float(np.mean(stage["cut_off"]))


def _all_k(answers: Answers, curve: Callable[[Answers], np.ndarray]) -> np.ndarray:
    """`curve` of the answers that are no errors of ours, [N]; NaN above their number."""
    valid = [answer for answer in answers if answer != ERROR]
    padded = np.full(len(answers), np.nan)
    if valid:
        padded[: len(valid)] = curve(valid)
    return padded


def _pass(answers: Answers) -> np.ndarray:
    return _pass_curve(answers.count(CORRECT), len(answers))


@functools.lru_cache(maxsize=1024)  # problems share counts
def _pass_curve(correct: int, n: int) -> np.ndarray:
    return np.array([pass_at_k(np.array(correct), n, k) for k in range(1, n + 1)])


def _majority(answers: Answers) -> np.ndarray:
    wrong = [answers.count(answer) for answer in set(answers) - {CORRECT, None}]
    return majority_at_k(answers.count(CORRECT), wrong, answers.count(None))
