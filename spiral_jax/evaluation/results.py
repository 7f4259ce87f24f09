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
from rich.table import Table

from spiral_jax.core.errors import UserError
from spiral_jax.evaluation.measures import summarise
from spiral_jax.evaluation.settings import EvaluationSettings
from spiral_jax.tasks.problem import Problem

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
_VERDICTS = {
    "correct": "right",
    "wrong": "wrong",
    "unparsed": "unparsed",
    "timeout": "timeout",
    "error": "error",
}
_CLEANED = {
    "candidates": "read",
    "dropped": "dropped",
    "empty": "empty",
    "removed_special": "special ids",
}


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


def results_tables(results: dict[str, Any]) -> list[Table]:
    """What a reader wants first, in percent with 95 % intervals, as tables for a `rich` console."""
    measures, settings, problems = results["measures"], results["settings"], results["problems"]
    n, S, M = settings["n"], settings["subset_size"], settings["traces"]
    title = f"{results['model']['hf_path']}: {problems['count']} problems of {problems['task']}"
    if problems["too_long"]:
        title += f", {problems['too_long']} too long and left out"
    main = make_table(title, "measure", "% [95 %]", "tokens", "critical path")
    main.caption = "tokens sampled for a problem; intervals: bootstrap over problems"
    main.caption_justify = "left"
    for k in powers_of_two(n):
        row = measures["pass_at_k"][k - 1]
        main.add_row("single trace (pass@1)" if k == 1 else f"pass@{k}", percent(row), *_costs(row))
    for k in [k for k in powers_of_two(n) if k > 2]:
        row = measures["majority_at_k"][k - 1]
        main.add_row(f"maj@{k}", percent(row), *_costs(row))
    row = measures["aggregated"]
    main.add_row(f"aggregated pass@1 (n={n}, S={S}, M={M})", percent(row), *_costs(row))
    main.add_row(
        f"  vote of the same sets (maj@{S})", percent(measures["aggregated_majority"]), "", ""
    )
    for name, label in _RATES.items():
        main.add_row(label, percent(measures[name]), "", "")
    for name, estimate in measures.get("strategies", {}).items():
        main.add_row(_STRATEGIES[name], percent(estimate), "", "")
    for role, label in (
        ("search", "search traces cut off"),
        ("aggregation", "aggregation traces cut off"),
    ):
        main.add_row(label, percent(measures["cut_off"][role]), "", "")

    size = settings["population"]
    heads = (f"pass@{size}", f"maj@{size}", "entropy", "cut off", "tokens", "critical path")
    title = f"recursive self-aggregation (population {size}, set {settings['set_size']})"
    rsa = make_table(title, "round", "mean % [95 %]", *heads)
    for row in measures["rsa"]:
        shares = [number(row[name], 1, scale=100) for name in ("pass_at_n", "majority")]
        cells = (*shares, number(row["entropy"], 2), number(row["cut_off"], 1, scale=100))
        rsa.add_row(str(row["round"]), percent(row["single"]), *cells, *_costs(row))
    tables = [main, rsa]
    if measures["limits"]:
        heads = (f"pass@{n}", f"maj@{n}", "cut off", "tokens")
        limits = make_table(
            "the same search traces, cut off at a limit", "limit", "single trace % [95 %]", *heads
        )
        for row in measures["limits"]:
            shares = [
                number(row[name], 1, scale=100) for name in ("pass_at_n", "majority", "cut_off")
            ]
            limits.add_row(
                str(row["limit"]), percent(row["single"]), *shares, f"{row['tokens']:,.0f}"
            )
        tables.append(limits)
    return [*tables, _counts_table(results["counts"])]


def _counts_table(counts: Mapping[str, Mapping[str, int]]) -> Table:
    """What became of all traces, and what cleaning removed from them where they were candidates."""
    title = "all traces, and how often they were read as candidates"
    table = make_table(title, "stage", *_VERDICTS.values(), *_CLEANED.values())
    for stage in STAGES:
        table.add_row(
            stage, *(f"{counts[stage].get(name, 0):,}" for name in (*_VERDICTS, *_CLEANED))
        )
    return table


_RATES = {
    "rescue_vote_wrong": "  rescue: right when the vote is not",
    "spoil_vote_right": "  spoil: wrong when the vote is right",
    "rescue_none_right": "  rescue: right, no candidate is",
    "spoil_some_right": "  spoil: wrong, a candidate is right",
}


_STRATEGIES = {
    "commonest": "search traces of the commonest strategy",
    "mixed": "sets of two strategies or more",
    "right_if_mixed": "  right aggregation of those",
    "right_if_alike": "  right aggregation of the others",
}


def make_table(title: str, *heads: str) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", title_style="bold", header_style="dim", box=None,
                  padding=(0, 1, 0, 0), pad_edge=False)  # fmt: skip
    for place, head in enumerate(heads):
        table.add_column(head, justify="left" if place == 0 else "right", no_wrap=place > 0)
    return table


def percent(estimate: Mapping[str, Any], sign: str = "") -> str:
    """An estimate (fields of `Estimate`) as percent with its interval, a dash where it is not
    defined.

    `sign` is "+" for differences, which then always have one.
    """
    if estimate["mean"] is None:
        return "–"
    mean, low, high = (
        None if estimate[name] is None else f"{100 * estimate[name]:{sign}z.1f}"
        for name in ("mean", "low", "high")
    )
    return mean if low is None else f"{mean} [{low}, {high}]"


def number(estimate: Mapping[str, Any], decimals: int, scale: float = 1) -> str:
    """An estimate's mean, a dash where it is not defined."""
    return "–" if estimate["mean"] is None else f"{scale * estimate['mean']:.{decimals}f}"


def _costs(row: Mapping[str, float]) -> tuple[str, str]:
    return f"{row['tokens']:,.0f}", f"{row['critical_path']:,.0f}"


def powers_of_two(n: int) -> list[int]:
    """1, 2, 4, ... and n."""
    return sorted({1 << i for i in range(n.bit_length())} | {n})
