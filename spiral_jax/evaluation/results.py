"""results.json: records of an evaluation and what they amount to, the same for the same samples.

version    of this layout, `VERSION`; it rises when a field changes its meaning or goes
model      hf_path, adapter_path, init_from, and a fingerprint of the weights; searcher, where
           another policy drew the search traces
problems   task, reward, asked, too_long (left out), count, fingerprint of their ids, texts, answers
scaffold   the prompts' wording and what they keep of candidates
settings   how much was sampled and at what temperature
counts     by stage, over all problems: verdicts, sampled tokens, and what cleaning removed
measures   see `summarise`
records    what became of each problem, see `measures`: enough to recompute every measure
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from spiral_jax.core.errors import UserError
from spiral_jax.evaluation.measures import (
    BOOTSTRAP_DRAWS,
    RATES,
    REWARD,
    STRATEGIES,
    Column,
    columns,
)
from spiral_jax.evaluation.settings import EvaluationSettings
from spiral_jax.evaluation.statistics import Estimate, bootstrap_weights, ratios_and_intervals
from spiral_jax.tasks.problem import Problem
from spiral_jax.verifier.rewards import Status

VERSION = 1
STAGES = ("search", "aggregation", "rsa")
_PARTS = ("model", "problems", "scaffold", "settings", "counts", "measures")
_RECORD = ("index", "id", "search", "limits", "aggregation", "rsa")
_VERDICTS = tuple(status.value for status in Status)
_CLEANED = ("candidates", "dropped", "empty", "removed_special")  # of the stages that read some


class ResultsError(UserError):
    """A results file that cannot be read or compared; names the file and what differs."""


def make_results(
    settings: EvaluationSettings,
    model_fingerprint: str,
    problems: Mapping[int, Problem],
    records: Sequence[dict],
    counts: Mapping[str, int],
) -> dict[str, Any]:
    """The content of results.json.

    Args:
      problems: those evaluated, by index; `records` are in their order.
      counts: summed over all problems.
    """
    return {
        "version": VERSION,
        "model": _describe_model(settings, model_fingerprint),
        "problems": _describe_problems(settings, problems),
        "scaffold": dict(settings.scaffold),
        "settings": describe_sampling(settings),
        "counts": {stage: _stage_counts(counts, stage) for stage in STAGES},
        "measures": summarise(records, settings.seed),
        "records": list(records),
    }


def _describe_model(settings: EvaluationSettings, fingerprint: str) -> dict[str, str]:
    model = {name: getattr(settings, name) for name in ("hf_path", "adapter_path", "init_from")}
    if settings.searcher:
        model["searcher"] = settings.searcher
    return model | {"fingerprint": fingerprint}


def _describe_problems(
    settings: EvaluationSettings, problems: Mapping[int, Problem]
) -> dict[str, Any]:
    stated = [[problem.id, problem.text, problem.answer] for problem in problems.values()]
    return {
        "task": settings.task,
        "reward": settings.reward,
        "asked": settings.problems,
        "too_long": settings.problems - len(problems),
        "count": len(problems),
        "fingerprint": hashlib.sha256(json.dumps(stated).encode()).hexdigest(),
    }


def describe_sampling(settings: EvaluationSettings) -> dict[str, Any]:
    """The `settings` of results: how much is sampled and how."""
    return {
        "n": settings.n,
        "subsets": settings.subsets,
        "traces": settings.traces,
        "population": settings.population,
        "set_size": settings.set_size,
        "rounds": settings.rounds,
        "limits": list(settings.limits),
        "temperature": settings.search_temperature,
        "aggregation_temperature": settings.aggregation_temperature,
        "top_k": settings.top_k,
        "top_p": settings.top_p,
        "min_p": settings.min_p,
        "seed": settings.seed,
        "subset_size": settings.subset_size,
        "search_max_tokens": settings.search_max_tokens,
        "aggregation_max_tokens": settings.aggregation_max_tokens,
    }


def with_both_temperatures(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of results; earlier results have one temperature alone."""
    return {"aggregation_temperature": settings["temperature"]} | dict(settings)


def describe_temperatures(settings: Mapping[str, Any]) -> str:
    """The temperatures in the settings of results, in words."""
    search = settings["temperature"]
    aggregation = with_both_temperatures(settings)["aggregation_temperature"]
    apart = "" if aggregation == search else f", in aggregation {aggregation:g}"
    return f"T = {search:g}{apart}"


def _stage_counts(counts: Mapping[str, int], stage: str) -> dict[str, int]:
    """The counts of a stage, `counts` without its name in front; zeros too."""
    names = [*_VERDICTS, *(_CLEANED if stage != "search" else ()), "sampled_tokens"]
    return {name: counts.get(f"{stage}_{name}", 0) for name in names}


# Measures


class _Estimates:
    """All columns with intervals by the resamples of `bootstrap_weights`."""

    def __init__(self, measured: Mapping[str, Column], weight_RxB: np.ndarray):
        self._by_name: dict[str, list[Estimate]] = {
            name: ratios_and_intervals(column.total_BxQ, column.count_BxQ, weight_RxB)
            for name, column in measured.items()
        }

    def fields(self, name: str, q: int = 0) -> dict[str, Any]:
        """Measure q of a column, as the fields of an `Estimate`."""
        return dataclasses.asdict(self._by_name[name][q])

    def mean(self, name: str, q: int = 0) -> float | None:
        """Its mean alone, which is what is stated of tokens."""
        return self._by_name[name][q].mean


def summarise(records: Sequence[dict], seed: int) -> dict[str, Any]:
    """The `measures` of results.json.

    Estimates (fields of `Estimate`), plain means for tokens, rows for curves. Intervals are
    bootstrap percentiles over problems, `BOOTSTRAP_DRAWS` resamples drawn by `seed`.
    """
    measured = columns(records)
    estimates = _Estimates(measured, bootstrap_weights(seed, len(records), BOOTSTRAP_DRAWS))

    measures = {}
    if STRATEGIES[0] in measured:
        measures["strategies"] = {name: estimates.fields(name) for name in STRATEGIES}

    rounds = range(len(records[0]["rsa"]) + 1)
    if REWARD in measured:
        measures["rewards"] = {
            "single": estimates.fields("reward/single"),
            "aggregated": estimates.fields(REWARD),
            "rsa": [{"round": t} | estimates.fields("reward/rsa", t) for t in rounds],
        }

    ks = range(1, len(records[0]["search"]["answer"]) + 1)
    measures["single"] = estimates.fields("single")
    measures["pass_at_k"] = [_curve_row(estimates, "pass_at_k", k) for k in ks]
    measures["majority_at_k"] = [_curve_row(estimates, "majority_at_k", k) for k in ks]

    costs = {
        "tokens": estimates.mean("aggregated/tokens"),
        "critical_path": estimates.mean("aggregated/critical_path"),
    }
    measures["aggregated"] = estimates.fields("aggregated") | costs
    measures["aggregated_majority"] = estimates.fields("aggregated/majority")
    measures |= {name: estimates.fields(name) for name in RATES}

    limits = [stage["limit"] for stage in records[0]["limits"]]
    measures["rsa"] = [_rsa_row(estimates, t) for t in rounds]
    measures["limits"] = [_limit_row(estimates, q, limit) for q, limit in enumerate(limits)]
    measures["cut_off"] = {
        "search": estimates.fields("cut_off/search"),
        "aggregation": estimates.fields("cut_off/aggregation"),
    }
    return measures


def _curve_row(estimates: _Estimates, name: str, k: int) -> dict[str, Any]:
    costs = {
        "tokens": estimates.mean("tokens_at_k", k - 1),
        "critical_path": estimates.mean("critical_path_at_k", k - 1),
    }
    return {"k": k} | estimates.fields(name, k - 1) | costs


def _rsa_row(estimates: _Estimates, t: int) -> dict[str, Any]:
    return {
        "round": t,
        "single": estimates.fields("rsa/single", t),
        "pass_at_n": estimates.fields("rsa/pass_at_n", t),
        "majority": estimates.fields("rsa/majority", t),
        "entropy": estimates.fields("rsa/entropy", t),
        "cut_off": estimates.fields("rsa/cut_off", t),
        "tokens": estimates.mean("rsa/tokens", t),
        "critical_path": estimates.mean("rsa/critical_path", t),
    }


def _limit_row(estimates: _Estimates, q: int, limit: int) -> dict[str, Any]:
    return {
        "limit": limit,
        "single": estimates.fields("limits/single", q),
        "pass_at_n": estimates.fields("limits/pass_at_n", q),
        "majority": estimates.fields("limits/majority", q),
        "cut_off": estimates.fields("limits/cut_off", q),
        "tokens": estimates.mean("limits/tokens", q),
    }


# The file


def write_results(path: pathlib.Path, results: dict[str, Any]) -> None:
    """Writes results.json: a line for each record and row, so that megabytes can be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_render(results, 0) + "\n")


def _render(value: Any, depth: int) -> str:
    """JSON, broken into lines down to rows of tables."""
    is_broken = depth < 3 and isinstance(value, dict | list) and value and not _is_row(value)
    if not is_broken:
        return json.dumps(value, allow_nan=False)

    if isinstance(value, dict):
        lines = [f"{json.dumps(key)}: {_render(item, depth + 1)}" for key, item in value.items()]
        opening, closing = "{}"
    else:
        lines = [_render(item, depth + 1) for item in value]
        opening, closing = "[]"
    indent = "\n" + " " * depth
    return opening + ",".join(f"{indent} {line}" for line in lines) + indent + closing


def _is_row(value: Any) -> bool:
    return isinstance(value, dict) and ("mean" in value or "id" in value)


def read_results(path: str | os.PathLike) -> dict[str, Any]:
    """The content of a results file.

    Raises:
      ResultsError: it is missing, damaged, or of another version.
    """
    try:
        results = json.loads(epath.Path(path).read_bytes())
        version = results["version"]
    except OSError as error:
        reason = f"cannot be read ({error.strerror}). Give the results.json of a run."
        raise ResultsError(f"{path}: {reason}") from error
    except (ValueError, KeyError, TypeError) as error:
        reason = f"not a results.json ({type(error).__name__}: {error})."
        raise ResultsError(f"{path}: {reason}") from error
    if version != VERSION:
        reason = f"layout version {version}; this program reads {VERSION}. Evaluate again."
        raise ResultsError(f"{path}: {reason}")
    if lacking := _lacking(results):
        reason = f"damaged: it lacks {', '.join(lacking)}. Put it back, or evaluate again."
        raise ResultsError(f"{path}: {reason}")
    return results


def _lacking(results: dict[str, Any]) -> list[str]:
    """What a results.json of this version has and this one has not."""
    kinds = dict.fromkeys(_PARTS, dict) | {"records": list}
    lacking = [name for name, kind in kinds.items() if not isinstance(results.get(name), kind)]
    if lacking:
        return lacking
    if not results["records"]:
        return ["records"]
    for number, record in enumerate(results["records"]):
        fields = record if isinstance(record, dict) else {}
        lacking += [f"records[{number}].{name}" for name in _RECORD if name not in fields]
    return lacking[:5]
