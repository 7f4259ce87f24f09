"""Records of evaluated problems -> measures with intervals over problems. NumPy, float64.

A record is what became of one problem, in JSON types; answers are numbered by
`answers.number_classes`: 0 = correct, 1, 2, ... = wrong, None = unparsed, -1 = an error of ours,
which is left out of every share.

    index, id       of the held-out problem
    search          answer, length, cut_off [N]: cut_off is 1 where the trace reached its limit, else 0; strategy [N],
                    names or None for none, where something names them (config.task.strategy)
    limits          for each smaller limit: limit, answer [N]: the same traces, cut off there
    aggregation     member [K][S], which search traces each set holds; answer, length, cut_off [K * M], by set and trace
    rsa             for each round 1..T: answer, length, cut_off [population]; round 0 is the first search traces, all
                    of them if T = 0

Tokens are sampled ones; reading prompts is not counted. The critical path adds up the longest trace
of each stage: what one waits for when all traces of a stage run side by side.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from spiral_jax.evaluation.answers import CORRECT, ERROR
from spiral_jax.evaluation.statistics import (
    answer_entropy,
    bootstrap_weights,
    longest_of_k,
    majority_at_k,
    majority_correct,
    pass_at_k,
    ratios_and_intervals,
)

BOOTSTRAP_DRAWS = 2000
Answers = Sequence[int | None]


class Column(NamedTuple):
    """Q measures of B problems: each is the sum of its totals over the sum of its counts.

    Attributes:
      total_BxQ: float64, 0 where the count is 0.
      count_BxQ: float64; 1 in a mean over problems (0: no value), other counts in a rate among sets
      or traces.
    """

    total_BxQ: np.ndarray
    count_BxQ: np.ndarray


def accuracy(answers: Answers) -> float:
    """Share of correct answers; errors of ours left out; NaN if nothing else is there."""
    valid = [answer == CORRECT for answer in answers if answer != ERROR]
    return sum(valid) / len(valid) if valid else math.nan


def any_correct(answers: Answers) -> float:
    """1.0 if some answer is correct, else 0.0; NaN if all are errors of ours."""
    return float(CORRECT in answers) if any(answer != ERROR for answer in answers) else math.nan


def vote(answers: Answers) -> float:
    """The chance that a plurality vote is correct, ties split evenly; errors of ours have no vote."""
    return majority_correct([None if answer == ERROR else answer for answer in answers], CORRECT)


def set_votes(search: dict, member_KxS: Sequence[Sequence[int]]) -> list[float]:
    """`vote` among the candidates of each set."""
    return [vote([search["answer"][n] for n in member_S]) for member_S in member_KxS]


def columns(records: Sequence[dict]) -> dict[str, Column]:
    """Every measure of `records`, all sampled with the same numbers N, K, S, M, T and limits.

    Q is N for names in `_at_k` (k = 1..N), T + 1 for `rsa/` (rounds 0..T), the number of limits for
    `limits/`, else 1.
    """
    search = [record["search"] for record in records]
    found = {
        "single": _means(search, lambda s: [accuracy(s["answer"])]),
        "pass_at_k": _means(search, lambda s: _all_k(s["answer"], _pass)),
        "majority_at_k": _means(search, lambda s: _all_k(s["answer"], _majority)),
        "tokens_at_k": _means(
            search, lambda s: np.mean(s["length"]) * np.arange(1, len(s["length"]) + 1)
        ),
        "critical_path_at_k": _means(search, lambda s: longest_of_k(s["length"])),
        "cut_off/search": _means(search, lambda s: [_cut_off(s)]),
    }
    found |= _aggregation_columns(records) | _rsa_columns(records) | _limit_columns(records)
    return found | (_strategy_columns(records) if "strategy" in search[0] else {})


def _aggregation_columns(records: Sequence[dict]) -> dict[str, Column]:
    """Aggregated pass@1, the vote among the same candidates, what one such answer costs, rescues
    and spoils.

    Rescue and spoil compare a set's aggregation traces with its own S candidates. With v the chance
    that a vote among them is right (ties split) and r the share of the set's aggregation traces
    that are right, over all sets:

        rescue_vote_wrong   sum (1 - v) r / sum (1 - v)      right although the vote was wrong
        spoil_vote_right    sum v (1 - r) / sum v            wrong although the vote was right
        rescue_none_right   mean of r, sets in which no candidate is right
        spoil_some_right    mean of 1 - r, sets in which some candidate is right
    """
    names = ("rescue_vote_wrong", "spoil_vote_right", "rescue_none_right", "spoil_some_right")
    total_BxQ, count_BxQ = np.zeros((2, len(records), len(names)))
    for b, record in enumerate(records):
        for member_S, v, answers_M in _sets(record):
            r = accuracy(answers_M)
            if math.isnan(r):
                continue
            some = CORRECT in [record["search"]["answer"][n] for n in member_S]
            total_BxQ[b] += (1 - v) * r, v * (1 - r), (not some) * r, some * (1 - r)
            count_BxQ[b] += 1 - v, v, not some, some
    rates = {name: Column(total_BxQ[:, [q]], count_BxQ[:, [q]]) for q, name in enumerate(names)}

    def cost(record: dict, of_candidates: Callable) -> list[float]:
        lengths, stage = record["search"]["length"], record["aggregation"]
        candidates = [of_candidates([lengths[n] for n in member_S]) for member_S in stage["member"]]
        return [np.mean(candidates) + np.mean(stage["length"])]

    votes = lambda record: [np.mean([v for _, v, _ in _sets(record)])]  # noqa: E731
    return rates | {
        "aggregated": _means(records, lambda record: [accuracy(record["aggregation"]["answer"])]),
        "aggregated/majority": _means(records, votes),
        "aggregated/tokens": _means(records, lambda record: cost(record, sum)),
        "aggregated/critical_path": _means(records, lambda record: cost(record, max)),
        "cut_off/aggregation": _means(records, lambda record: [_cut_off(record["aggregation"])]),
    }


STRATEGIES = ("commonest", "mixed", "right_if_mixed", "right_if_alike")


def _strategy_columns(records: Sequence[dict]) -> dict[str, Column]:
    """What the sets hold, and what is made of it. A set is mixed if its candidates have two
    strategies or more.

    commonest        share of the search traces whose strategy is the one that most of all traces have
    mixed            share of the sets that are mixed
    right_if_mixed   share of right aggregation traces among those of mixed sets
    right_if_alike   the same among those of all other sets
    """
    names = Counter(
        name for record in records for name in record["search"]["strategy"] if name is not None
    )
    (commonest, _), *_ = names.most_common(1) or [("", 0)]
    total_BxQ, count_BxQ = np.zeros((2, len(records), len(STRATEGIES)))
    for b, record in enumerate(records):
        strategy_N = record["search"]["strategy"]
        total_BxQ[b, 0], count_BxQ[b, 0] = strategy_N.count(commonest), len(strategy_N)
        for member_S, _, answers_M in _sets(record):
            mixed = len({strategy_N[n] for n in member_S} - {None}) >= 2
            valid = [answer == CORRECT for answer in answers_M if answer != ERROR]
            total_BxQ[b, 1:] += mixed, mixed * sum(valid), (not mixed) * sum(valid)
            count_BxQ[b, 1:] += 1, mixed * len(valid), (not mixed) * len(valid)
    return {name: Column(total_BxQ[:, [q]], count_BxQ[:, [q]]) for q, name in enumerate(STRATEGIES)}


def _sets(record: dict) -> list[tuple[list[int], float, Answers]]:
    """(members, chance that their vote is right, answers of the aggregation traces) of each set."""
    member_KxS, answers = record["aggregation"]["member"], record["aggregation"]["answer"]
    M = len(answers) // len(member_KxS)
    votes = set_votes(record["search"], member_KxS)
    return [
        (member_S, votes[k], answers[k * M : (k + 1) * M]) for k, member_S in enumerate(member_KxS)
    ]


def _rsa_columns(records: Sequence[dict]) -> dict[str, Column]:
    """By round: the population's mean, pass@N, vote, answer entropy (nats), share cut off; tokens
    spent until then.
    """

    def by_round(value: Callable[[dict], float]) -> Column:
        return _means(records, lambda record: [value(stage) for stage in populations(record)])

    def spent(of_round: Callable) -> Column:
        return _means(
            records,
            lambda record: np.cumsum([of_round(stage["length"]) for stage in populations(record)]),
        )

    return {
        "rsa/single": by_round(lambda stage: accuracy(stage["answer"])),
        "rsa/pass_at_n": by_round(lambda stage: any_correct(stage["answer"])),
        "rsa/majority": by_round(lambda stage: vote(stage["answer"])),
        "rsa/entropy": by_round(
            lambda stage: answer_entropy([a for a in stage["answer"] if a != ERROR])
        ),
        "rsa/cut_off": by_round(_cut_off),
        "rsa/tokens": spent(sum),
        "rsa/critical_path": spent(max),
    }


def populations(record: dict) -> list[dict]:
    """Populations of rounds 0..T."""
    size = len((record["rsa"] or [record["search"]])[0]["answer"])
    return [{name: values[:size] for name, values in record["search"].items()}, *record["rsa"]]


def _limit_columns(records: Sequence[dict]) -> dict[str, Column]:
    """By response limit: single trace, pass@N, vote among N, share cut off, tokens of one trace."""

    def by_limit(value: Callable[[dict], float]) -> Column:
        return _means(records, lambda record: [value(stage) for stage in record["limits"]])

    def cut_off(record: dict) -> list[float]:
        length, before = (np.array(record["search"][name]) for name in ("length", "cut_off"))
        return [
            np.mean((length > stage["limit"]) | ((length == stage["limit"]) & (before == 1)))
            for stage in record["limits"]
        ]

    def tokens(record: dict) -> list[float]:
        return [
            np.mean(np.minimum(record["search"]["length"], stage["limit"]))
            for stage in record["limits"]
        ]

    return {
        "limits/single": by_limit(lambda stage: accuracy(stage["answer"])),
        "limits/pass_at_n": by_limit(lambda stage: any_correct(stage["answer"])),
        "limits/majority": by_limit(lambda stage: vote(stage["answer"])),
        "limits/cut_off": _means(records, cut_off),
        "limits/tokens": _means(records, tokens),
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


def summarise(records: Sequence[dict], seed: int) -> dict[str, Any]:
    """The `measures` of results.json: estimates (fields of `Estimate`), plain means for tokens,
    rows for curves.

    Intervals are bootstrap percentiles over problems, `BOOTSTRAP_DRAWS` resamples drawn by `seed`.
    """
    weight_RxB = bootstrap_weights(seed, len(records), BOOTSTRAP_DRAWS)
    found = columns(records)
    estimates = {
        name: [
            dataclasses.asdict(estimate) for estimate in ratios_and_intervals(*column, weight_RxB)
        ]
        for name, column in found.items()
    }
    mean = lambda name, q=0: estimates[name][q]["mean"]  # noqa: E731

    def curve(name: str) -> list[dict]:
        return [
            {
                "k": q + 1,
                **row,
                "tokens": mean("tokens_at_k", q),
                "critical_path": mean("critical_path_at_k", q),
            }
            for q, row in enumerate(estimates[name])
        ]

    def rows(prefix: str, key: str, values: Sequence[int], plain: Sequence[str]) -> list[dict]:
        names = [name.removeprefix(prefix) for name in estimates if name.startswith(prefix)]
        of = lambda name, q: (
            mean(prefix + name, q) if name in plain else estimates[prefix + name][q]
        )  # noqa: E731
        return [
            {key: value} | {name: of(name, q) for name in names} for q, value in enumerate(values)
        ]

    limits = [stage["limit"] for stage in records[0]["limits"]]
    costs = {name: mean(f"aggregated/{name}") for name in ("tokens", "critical_path")}
    rates = ("rescue_vote_wrong", "spoil_vote_right", "rescue_none_right", "spoil_some_right")
    return {
        **(
            {"strategies": {name: estimates[name][0] for name in STRATEGIES}}
            if STRATEGIES[0] in estimates
            else {}
        ),
        "single": estimates["single"][0],
        "pass_at_k": curve("pass_at_k"),
        "majority_at_k": curve("majority_at_k"),
        "aggregated": estimates["aggregated"][0] | costs,
        "aggregated_majority": estimates["aggregated/majority"][0],
        **{name: estimates[name][0] for name in rates},
        "rsa": rows(
            "rsa/", "round", range(len(records[0]["rsa"]) + 1), ("tokens", "critical_path")
        ),
        "limits": rows("limits/", "limit", limits, ("tokens",)),
        "cut_off": {role: estimates[f"cut_off/{role}"][0] for role in ("search", "aggregation")},
    }
