"""results.json of `python -m spiral_jax.evaluate`: records -> one file, the same for the same
samples; and its table.

version    of this layout, `VERSION`; it rises when a field changes its meaning or goes
model      hf_path, and a fingerprint of its weights; searcher, where another policy drew the search traces
problems   task, asked, too_long (left out), count, fingerprint of their ids, texts and answers
scaffold   the prompts' wording and what they keep of candidates
settings   how much was sampled and at what temperature
counts     verdicts, sampled tokens and what cleaning removed from candidates, by stage, over all problems
measures   `measures.summarise`
records    what became of each problem, see `measures`: enough to recompute every measure
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from spiral_jax.core.errors import UserError
from spiral_jax.evaluation.measures import summarise
from spiral_jax.evaluation.settings import EvaluationSettings
from spiral_jax.tasks.problem import Problem
from spiral_jax.verifier.rewards import Status

VERSION = 1


class ResultsError(UserError):
    """A results file that cannot be read or compared; the message names the file and what differs."""


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
        "settings": _describe_sampling(settings),
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


def _describe_sampling(settings: EvaluationSettings) -> dict[str, Any]:
    return {
        "n": settings.n,
        "subsets": settings.subsets,
        "traces": settings.traces,
        "population": settings.population,
        "set_size": settings.set_size,
        "rounds": settings.rounds,
        "limits": list(settings.limits),
        "temperature": settings.temperature,
        "top_k": settings.top_k,
        "top_p": settings.top_p,
        "min_p": settings.min_p,
        "seed": settings.seed,
        "subset_size": settings.subset_size,
        "search_max_tokens": settings.search_max_tokens,
        "aggregation_max_tokens": settings.aggregation_max_tokens,
    }


def _stage_counts(counts: Mapping[str, int], stage: str) -> dict[str, int]:
    """The counts of a stage without its name in front, zeros too."""
    names = [*_VERDICTS, *(_CLEANED if stage != "search" else ()), "sampled_tokens"]
    found = {
        name.removeprefix(f"{stage}_"): count
        for name, count in counts.items()
        if name.startswith(f"{stage}_")
    }
    return dict.fromkeys(names, 0) | found


STAGES = ("search", "aggregation", "rsa")
_VERDICTS = tuple(status.value for status in Status)
_CLEANED = ("candidates", "dropped", "empty", "removed_special")  # none of search traces


def write_results(path: pathlib.Path, results: dict[str, Any]) -> None:
    """Writes results.json: one line for each record and row, which keeps a file of megabytes
    readable.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_render(results, 0) + "\n")


def _render(value: Any, depth: int) -> str:
    """JSON, broken into lines down to rows of tables."""
    if depth < 3 and isinstance(value, dict | list) and value and not _is_row(value):
        pad = " " * (depth + 1)
        if isinstance(value, dict):
            lines = [
                f"{pad}{json.dumps(key)}: {_render(item, depth + 1)}" for key, item in value.items()
            ]
            return "{\n" + ",\n".join(lines) + f"\n{' ' * depth}}}"
        return (
            "[\n"
            + ",\n".join(pad + _render(item, depth + 1) for item in value)
            + f"\n{' ' * depth}]"
        )
    return json.dumps(value, allow_nan=False)


def _is_row(value: Any) -> bool:
    return isinstance(value, dict) and ("mean" in value or "id" in value)


def read_results(path: str | os.PathLike) -> dict[str, Any]:
    """The content of a results file. Raises `ResultsError`: missing, damaged, or of another
    version.
    """
    try:
        results = json.loads(epath.Path(path).read_bytes())
        version = results["version"]
    except OSError as error:
        raise ResultsError(
            f"{path}: cannot be read ({error.strerror}). Give the results.json of a run."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ResultsError(
            f"{path}: not a results.json ({type(error).__name__}: {error})."
        ) from error
    if version != VERSION:
        raise ResultsError(
            f"{path}: layout version {version}; this program reads {VERSION}. Evaluate again."
        )
    return results
