"""The trace log's rows of one problem -> what its page shows, in JSON types.

step, cursor, id, kept, text, reference, flags
search   traces, see `_trace`; `sets` are those it is in
sets     name, members, order (as the prompt lists them), right, verified, vote, flags; traces, each with its quotes
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from spiral_jax.groups import Role, Stop
from spiral_jax.measures import vote
from spiral_jax.objective.advantages import length_gate
from spiral_jax.reporting.quotes import Quoting
from spiral_jax.reporting.reasons import (
    OWN_CORRECTNESS,
    Reason,
    Score,
    explain_aggregation,
    explain_own,
    explain_search,
    set_name,
)
from spiral_jax.verifier.extract import last_boxed
from spiral_jax.verifier.rewards import Status
from spiral_jax.verifier.verifier import CORRECT, ERROR

FLAGS = {  # what a problem or set can be filtered by, and what it means
    "rescue": "some aggregation is right although the vote among its candidates is wrong (right with a chance below "
    "one half, ties split)",
    "spoil": "some aggregation is wrong although the vote among its candidates is right (with a chance above one half)",
    "flat": "all aggregations of some set (without sets: all traces) have the same reward, so that they teach each "
    "other nothing, or the whole problem was discarded since no trace has an advantage",
    "truncated": "some trace was cut off at its limit",
    "error": "some trace could not be verified: our failure or a time-out",
}
_ROUNDING = 1e-5  # logged advantages are float32, ours exact


def split_problems(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The rows of one problem after the other; rows of a problem are neighbours in the log."""
    for _, group in itertools.groupby(rows, key=lambda row: (row["cursor"], row["problem"])):
        yield list(group)


def problem_page(step: int, rows: Sequence[dict[str, Any]], config: dict[str, Any]) -> dict[str, Any]:
    """What the page of a problem shows.

    Args:
      rows: all its rows of the trace log.
      config: the run's plain configuration: its estimator and length gate explain the advantages.
    """
    searched = [row for row in rows if row["role"] == Role.SEARCH.label]
    by_set: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        if row["role"] == Role.AGGREGATION.label:
            by_set.setdefault(row["set"], []).append(row)
    drawn = [by_set[k] for k in sorted(by_set)]
    members = [read[0]["subset"] for read in drawn]
    scores, kept = [_score(read) for read in drawn], rows[0]["kept"]
    estimator = config["loss"]["estimator"]

    def reason(row: dict[str, Any]) -> Reason:
        if row["role"] == Role.AGGREGATION.label:
            return explain_aggregation(row["reward"], _score(by_set[row["set"]]))
        if estimator in OWN_CORRECTNESS:
            return explain_own(estimator, row["reward"], _score(searched), config["aggregation"]["subset_size"])
        return explain_search(estimator, row["trace"], members, scores)

    answers = _numbered(rows)
    search = [_trace(row, reason(row), config) for row in searched]
    for trace in search:
        trace["sets"] = [k for k, member_S in enumerate(members) if trace["trace"] in member_S]
    full = config["prompt"]["thinking"] == "full"
    shown = [row["text"] if full else row["text"].rpartition("</think>")[2] for row in searched]
    quoting = Quoting(rows[0]["problem_text"], shown)
    sets = []
    for k, read in enumerate(drawn):
        traces = [_trace(row, reason(row), config) for row in read]
        for trace, row in zip(traces, read, strict=True):
            trace["quotes"] = _quotes(row, searched, quoting, answers)
        sets.append(_set_page(k, read, scores[k], [answers[id(searched[n])] for n in members[k]]) | {"traces": traces})
    flags = {flag for of_set in sets for flag in of_set["flags"]} | _trace_flags(rows)
    if not kept or (not sets and len({row["reward"] for row in searched} - {None}) < 2):
        flags.add("flat")
    return {
        "step": step,
        "cursor": rows[0]["cursor"],
        "id": rows[0]["problem"],
        "kept": kept,
        "text": rows[0]["problem_text"],
        "reference": rows[0]["reference_answer"],
        "flags": [flag for flag in FLAGS if flag in flags],
        "search": search,
        "sets": sets,
    }


def _trace(row: dict[str, Any], reason: Reason, config: dict[str, Any]) -> dict[str, Any]:
    """One trace: its answer, what became of it, and its advantage with the reason in words."""
    words, logged = reason.words, row["advantage"]
    if not row["kept"]:
        words = f"Dynamic sampling discarded the problem: nothing was learned from it. {words}"
    elif reason.value is not None:
        expected = reason.value
        if _is_gated(row, expected, config):
            words += f" The length gate takes it: positive, and {_too_long(row, config)}, so 0."
            expected = 0.0
        if abs(expected - logged) > _ROUNDING * max(1, abs(logged)):
            words += f" But {logged:+.4f} was logged: the run's objective is not the one explained here."
    return {
        "trace": row["trace"],
        "answer": last_boxed(row["text"]),
        "verdict": row["verdict"],
        "detail": row["verdict_detail"],
        "reward": row["reward"],
        "length": row["length"],
        "stop": row["stop"],
        "advantage": logged,
        "why": words,
        "text": row["text"],
    }


def _is_gated(row: dict[str, Any], advantage: float, config: dict[str, Any]) -> bool:
    """Whether the length gate makes this advantage 0."""
    if advantage <= 0:
        return False
    stop, limit = Stop[row["stop"].upper()], config[row["role"]]["max_tokens"]
    values = (np.array(value) for value in (advantage, row["length"], stop))
    return bool(length_gate(*values, limit, config["loss"]["length_gate"]) == 0)


def _too_long(row: dict[str, Any], config: dict[str, Any]) -> str:
    gate = config["loss"]["length_gate"]
    if gate == 0:
        return "cut off at its limit"
    limit = gate if gate > 1 else gate * config[row["role"]]["max_tokens"]
    return f"longer than {limit:g} tokens"


def _score(rows: Sequence[dict[str, Any]]) -> Score:
    verified = [row["reward"] for row in rows if row["reward"] is not None]
    return Score(int(sum(verified)), len(verified))


def _numbered(rows: Sequence[dict[str, Any]]) -> dict[int, int | None]:
    """id(row) -> number of its answer, as in `verifier.number_classes`, but wrong ones by their spelling alone."""
    number: dict[str, int] = {}
    numbers = {}
    for row in rows:
        box = last_boxed(row["text"])
        if row["verdict"] == Status.CORRECT:
            numbers[id(row)] = CORRECT
        elif row["verdict"] == Status.ERROR:
            numbers[id(row)] = ERROR
        elif row["verdict"] == Status.UNPARSED:
            numbers[id(row)] = None
        else:
            spelt = " ".join((row["text"] if box is None else box).split())
            numbers[id(row)] = number.setdefault(spelt, len(number) + 1)
    return numbers


def _quotes(
    row: dict[str, Any], searched: Sequence[dict[str, Any]], quoting: Quoting, answers: dict[int, int | None]
) -> list[dict[str, Any]]:
    """The candidates that an aggregation quotes, in the order of its prompt."""
    found = []
    for n, copied in zip(row["order"], quoting.copied(row["text"], row["order"]), strict=True):
        same = answers[id(row)] == answers[id(searched[n])] and answers[id(row)] not in (None, ERROR)
        if same or copied:
            found.append({"trace": n, "copied": round(copied, 3), "same_answer": same})
    return found


def _set_page(k: int, read: Sequence[dict[str, Any]], score: Score, candidates: list[int | None]) -> dict[str, Any]:
    chance, flags = vote(candidates), set()
    if score.right and chance < 0.5:
        flags.add("rescue")
    if score.right < score.verified and chance > 0.5:
        flags.add("spoil")
    if score.right in (0, score.verified):
        flags.add("flat")
    return {
        "name": set_name(k),
        "members": read[0]["subset"],
        "order": read[0]["order"],
        "right": score.right,
        "verified": score.verified,
        "vote": chance,
        "flags": [flag for flag in FLAGS if flag in flags],
    }


def _trace_flags(rows: Sequence[dict[str, Any]]) -> set[str]:
    flags = set()
    if any(row["stop"] == Stop.LENGTH.name.lower() for row in rows):
        flags.add("truncated")
    if any(row["verdict"] in (Status.ERROR, Status.TIMEOUT) for row in rows):
        flags.add("error")
    return flags
