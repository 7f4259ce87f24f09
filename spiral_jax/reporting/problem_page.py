"""The trace log's rows of one problem -> what its page shows, in JSON types.

step, cursor, id, kept, text, reference, flags
search   traces, see `_trace`; `sets` are those it is in
sets     of all rounds: round, name, members, order (as the prompt lists them), listed (the same by name), right,
         verified, vote, flags; traces, each with its quotes and, unless the round is the last one,
         the `sets` it is in
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from spiral_jax.core.groups import Stop
from spiral_jax.evaluation.answers import CORRECT, ERROR
from spiral_jax.evaluation.measures import vote
from spiral_jax.objective.estimators import length_gate
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
from spiral_jax.tasks.answer import last_boxed
from spiral_jax.verifier.rewards import Status

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


def problem_page(
    step: int, rows: Sequence[dict[str, Any]], config: dict[str, Any]
) -> dict[str, Any]:
    """What the page of a problem shows.

    Args:
      rows: all its rows of the trace log.
      config: the run's plain configuration: its estimator and length gate explain the advantages.
    """
    stages = _stages(rows)
    answers = _numbered(rows)
    search, *read = [
        [
            [
                _trace(row, _reasons(row, stages, config), config) | {"name": _trace_name(row)}
                for row in of_set
            ]
            for of_set in of_stage
        ]
        for of_stage in stages
    ]
    sets = []
    for r, traces_of_sets in enumerate(read, start=1):
        candidates = [row for of_set in stages[r - 1] for row in of_set]
        quoting = _quoting(candidates, config)
        for of_set, traces in zip(stages[r], traces_of_sets, strict=True):
            for trace, row in zip(traces, of_set, strict=True):
                trace["quotes"] = _quotes(row, candidates, quoting, answers)
            sets.append(_set_page(of_set, candidates, answers) | {"traces": traces})
    for r, of_stage in enumerate((search, *read[:-1]), start=1):
        for n, trace in enumerate(itertools.chain(*of_stage)):
            trace["sets"] = [
                k for k, one in enumerate(sets) if one["round"] == r and n in one["members"]
            ]
    flags = {flag for of_set in sets for flag in of_set["flags"]} | _trace_flags(rows)
    kept = rows[0]["kept"]
    if not kept or (not sets and len({row["reward"] for row in rows} - {None}) < 2):
        flags.add("flat")
    return {
        "step": step,
        "cursor": rows[0]["cursor"],
        "id": rows[0]["problem"],
        "kept": kept,
        "text": rows[0]["problem_text"],
        "reference": rows[0]["reference_answer"],
        "flags": [flag for flag in FLAGS if flag in flags],
        "search": search[0],
        "sets": sets,
    }


def _stages(rows: Sequence[dict[str, Any]]) -> list[list[list[dict[str, Any]]]]:
    """The rows by stage and set: the search traces as one set, then the sets of each round."""
    found: dict[int, dict[int, list[dict[str, Any]]]] = {}
    for row in rows:
        found.setdefault(row["round"] or 0, {}).setdefault(row["set"] or 0, []).append(row)
    return [[of_stage[k] for k in sorted(of_stage)] for _, of_stage in sorted(found.items())]


def _trace_name(row: dict[str, Any]) -> str:
    """3, the search trace; A.3, of a set."""
    return f"{_name_of(row)}.{row['trace']}" if row["round"] else str(row["trace"])


def _name_of(row: dict[str, Any]) -> str:
    return set_name(row["set"], row["round"])


def _reasons(row: dict[str, Any], stages: list, config: dict[str, Any]) -> list[Reason]:
    """Why a trace has its advantage: by its own set, and by the sets of the next round that it is
    in.
    """
    estimator, r = config["loss"]["estimator"], row["round"] or 0
    reasons = []
    if r:
        reasons.append(explain_aggregation(row["reward"], _score(stages[r][row["set"]])))
    elif estimator in OWN_CORRECTNESS:
        reasons.append(
            explain_own(
                estimator, row["reward"], _score(stages[0][0]), config["aggregation"]["subset_size"]
            )
        )
    if (r == 0 or r + 1 < len(stages)) and estimator not in OWN_CORRECTNESS:
        sets, place = (*stages, [])[r + 1], (row["set"] or 0) * len(stages[r][0]) + row["trace"]
        members, names = (
            [of_set[0]["subset"] for of_set in sets],
            [_name_of(of_set[0]) for of_set in sets],
        )
        reasons.append(
            explain_search(estimator, place, members, [_score(of_set) for of_set in sets], names)
        )
    return reasons


def _quoting(candidates: Sequence[dict[str, Any]], config: dict[str, Any]) -> Quoting:
    full = config["prompt"]["thinking"] == "full"
    shown = [row["text"] if full else row["text"].rpartition("</think>")[2] for row in candidates]
    return Quoting(candidates[0]["problem_text"], shown)


def _trace(row: dict[str, Any], reasons: list[Reason], config: dict[str, Any]) -> dict[str, Any]:
    """One trace: its answer, what became of it, and its advantage with the reasons in words."""
    words, logged = " ".join(reason.words for reason in reasons), row["advantage"]
    if not row["kept"]:
        words = f"Dynamic sampling discarded the problem: nothing was learned from it. {words}"
    elif all(reason.value is not None for reason in reasons):
        gated = [_is_gated(row, reason.value, config) for reason in reasons]
        taken = f" The length gate takes it: positive, and {_too_long(row, config)}, so 0."
        words = " ".join(
            r.words + (taken if gate else "") for r, gate in zip(reasons, gated, strict=True)
        )
        expected = sum(0.0 if gate else r.value for r, gate in zip(reasons, gated, strict=True))
        if len(reasons) > 1:
            words += f" Together {expected:+.3f}."
        if abs(expected - logged) > _ROUNDING * max(1, abs(logged)):
            words += (
                f" But {logged:+.4f} was logged: the run's objective is not the one explained here."
            )
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
    """id(row) -> number of its answer, as in `answers.number_classes`, but wrong ones by their
    spelling alone.
    """
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
    row: dict[str, Any],
    candidates: Sequence[dict[str, Any]],
    quoting: Quoting,
    answers: dict[int, int | None],
) -> list[dict[str, Any]]:
    """The candidates that an aggregation quotes, in the order of its prompt."""
    found = []
    for n, copied in zip(row["order"], quoting.copied(row["text"], row["order"]), strict=True):
        same = answers[id(row)] == answers[id(candidates[n])] and answers[id(row)] not in (
            None,
            ERROR,
        )
        if same or copied:
            found.append(
                {
                    "name": _trace_name(candidates[n]),
                    "copied": round(copied, 3),
                    "same_answer": same,
                }
            )
    return found


def _set_page(
    of_set: Sequence[dict[str, Any]],
    candidates: Sequence[dict[str, Any]],
    answers: dict[int, int | None],
) -> dict[str, Any]:
    first, score, flags = of_set[0], _score(of_set), set()
    chance = vote([answers[id(candidates[n])] for n in first["subset"]])
    if score.right and chance < 0.5:
        flags.add("rescue")
    if score.right < score.verified and chance > 0.5:
        flags.add("spoil")
    if score.right in (0, score.verified):
        flags.add("flat")
    return {
        "round": first["round"],
        "name": _name_of(first),
        "members": first["subset"],
        "order": first["order"],
        "listed": [_trace_name(candidates[n]) for n in first["order"]],
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
