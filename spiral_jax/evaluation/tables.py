"""Tables of results: for a terminal (`rich`), and in Markdown for a training run."""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

DASH = "–"  # stands for what is not defined
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
_TRAINING_ROWS = {
    "aggregated": "aggregated",
    "majority": "majority vote",
    "single": "single trace",
    "pass_at_n": "pass@N",
    "reward_aggregation": "mean reward, aggregation",
    "reward_search": "mean reward, search",
    "parse_rate_search": "parse rate, search",
    "parse_rate_aggregation": "parse rate, aggregation",
}


# One evaluation


def results_tables(results: Mapping[str, Any]) -> list[Table]:
    """What a reader of results.json wants first, in percent with 95 % intervals."""
    tables = [_main_table(results), _rsa_table(results)]
    if results["measures"]["limits"]:
        tables.append(_limits_table(results))
    return [*tables, _counts_table(results["counts"])]


def _main_table(results: Mapping[str, Any]) -> Table:
    measures, settings, problems = results["measures"], results["settings"], results["problems"]
    n, S, M = settings["n"], settings["subset_size"], settings["traces"]
    title = f"{results['model']['hf_path']}: {problems['count']} problems of {problems['task']}"
    if problems["too_long"]:
        title += f", {problems['too_long']} too long and left out"
    table = _make_table(title, "measure", "% [95 %]", "tokens", "critical path")
    table.caption = "tokens sampled for a problem; intervals: bootstrap over problems"
    table.caption_justify = "left"

    for k in powers_of_two(n):
        row = measures["pass_at_k"][k - 1]
        label = "single trace (pass@1)" if k == 1 else f"pass@{k}"
        table.add_row(label, percent(row), *_costs(row))
    for k in powers_of_two(n):
        if k > 2:
            row = measures["majority_at_k"][k - 1]
            table.add_row(f"maj@{k}", percent(row), *_costs(row))

    row = measures["aggregated"]
    table.add_row(f"aggregated pass@1 (n={n}, S={S}, M={M})", percent(row), *_costs(row))
    table.add_row(f"  vote of the same sets (maj@{S})", percent(measures["aggregated_majority"]))
    for name, label in _RATES.items():
        table.add_row(label, percent(measures[name]))
    for name, estimate in measures.get("strategies", {}).items():
        table.add_row(_STRATEGIES[name], percent(estimate))
    if "rewards" in measures:
        table.add_row("mean reward, single trace", percent(measures["rewards"]["single"]))
        table.add_row("mean reward, aggregated", percent(measures["rewards"]["aggregated"]))
        for row in measures["rewards"]["rsa"][1:]:
            table.add_row(f"mean reward, RSA round {row['round']}", percent(row))
    for role, estimate in measures["cut_off"].items():
        table.add_row(f"{role} traces cut off", percent(estimate))
    return table


def _rsa_table(results: Mapping[str, Any]) -> Table:
    settings = results["settings"]
    size = settings["population"]
    title = f"recursive self-aggregation (population {size}, set {settings['set_size']})"
    heads = (f"pass@{size}", f"maj@{size}", "entropy", "cut off", "tokens", "critical path")
    table = _make_table(title, "round", "mean % [95 %]", *heads)
    for row in results["measures"]["rsa"]:
        table.add_row(
            str(row["round"]),
            percent(row["single"]),
            _percent_alone(row["pass_at_n"]),
            _percent_alone(row["majority"]),
            number(row["entropy"], 2),
            _percent_alone(row["cut_off"]),
            *_costs(row),
        )
    return table


def _limits_table(results: Mapping[str, Any]) -> Table:
    n = results["settings"]["n"]
    title = "the same search traces, cut off at a limit"
    heads = (f"pass@{n}", f"maj@{n}", "cut off", "tokens")
    table = _make_table(title, "limit", "single trace % [95 %]", *heads)
    for row in results["measures"]["limits"]:
        table.add_row(
            str(row["limit"]),
            percent(row["single"]),
            _percent_alone(row["pass_at_n"]),
            _percent_alone(row["majority"]),
            _percent_alone(row["cut_off"]),
            f"{row['tokens']:,.0f}",
        )
    return table


def _counts_table(counts: Mapping[str, Mapping[str, int]]) -> Table:
    """What became of all traces, and what cleaning removed from them where they were candidates."""
    columns = _VERDICTS | _CLEANED
    title = "all traces, and how often they were read as candidates"
    table = _make_table(title, "stage", *columns.values())
    for stage, count in counts.items():
        table.add_row(stage, *(f"{count.get(name, 0):,}" for name in columns))
    return table


# Two evaluations


def comparison_tables(comparison: Mapping[str, Any], names: Sequence[str]) -> list[Table]:
    """The content of comparison.json: efficiency, gaps, gaps at equal tokens.

    Args:
      names: of A and B; see `name_sides`.
    """
    equal_tokens = _equal_tokens_table(comparison["equal_tokens"])
    left_out = [f"left out: {reason}" for reason in comparison["left_out"]]
    equal_tokens.caption = "; ".join(left_out) or None
    return [_efficiency_table(comparison, names), _gaps_table(comparison["gaps"]), equal_tokens]


def _efficiency_table(comparison: Mapping[str, Any], names: Sequence[str]) -> Table:
    title = f"A {names[0]}, B {names[1]}: samples for equal coverage"
    table = _make_table(title, "coverage", "samples of A", "samples of B", "A / B [95 %]")
    for row in comparison["efficiency"]:
        coverage = f"{100 * row['coverage']:.1f} %"
        if row["at"] == "both":
            coverage += " (highest of both)"
        ratio = f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
        if row["bound"]:
            ratio = f"{row['bound']} {ratio}"
        table.add_row(coverage, f"{row['samples_a']:.1f}", f"{row['samples_b']:.1f}", ratio)
    return table


def _gaps_table(gaps: Sequence[Mapping[str, Any]]) -> Table:
    title = "gaps, B - A (paired over problems)"
    table = _make_table(title, "measure", "A (%)", "B (%)", "points [95 %]")
    for row in gaps:
        table.add_row(row["measure"], _share(row["a"]), _share(row["b"]), percent(row["gap"], "+"))
    return table


def _equal_tokens_table(gaps: Sequence[Mapping[str, Any]]) -> Table:
    title = "gaps at equal sampled tokens a problem"
    table = _make_table(title, "method", "tokens", "A (%)", "B (%)", "points [95 %]")
    for row in gaps:
        tokens, gap = f"{row['tokens']:,.0f}", percent(row["gap"], "+")
        table.add_row(row["method"], tokens, _share(row["a"]), _share(row["b"]), gap)
    return table


def name_sides(paths: Sequence[str], models: Sequence[Mapping[str, str]]) -> list[str]:
    """What tables and pictures call A and B: model@step, RUN@STEP where a run has trained it.

    Args:
      paths: of two results.json.
      models: their `model`.
    """
    names = [_name_model(path, model) for path, model in zip(paths, models, strict=True)]
    if names[0] == names[1]:  # the same model, evaluated twice
        folders = (pathlib.Path(path).absolute().parent.name for path in paths)
        names = [f"{name} ({folder})" for name, folder in zip(names, folders, strict=True)]
    return names if names[0] != names[1] else [f"A: {names[0]}", f"B: {names[1]}"]


def _name_model(path: str, model: Mapping[str, str]) -> str:
    folder = pathlib.Path(path).absolute().parent
    if folder.parent.name == "evaluations" and (at := re.fullmatch(r"step_(\d+)", folder.name)):
        return f"{folder.parent.parent.name}@{int(at[1])}"  # made by training
    name = model["init_from"] or model["adapter_path"] or model["hf_path"]
    return pathlib.Path(name).name


# The evaluations of a training run


def evaluation_line(evaluation: Mapping[str, Any]) -> str:
    """An evaluation of a training run, a row of evaluations.jsonl, in one line."""
    measures = [
        f"{label} {percent(evaluation[name])} %"
        for name, label in _TRAINING_ROWS.items()
        if defined_estimate(evaluation, name)
    ]
    of = f"evaluation at step {evaluation['step']}, {evaluation['problems']} problems"
    return f"{of}: {', '.join(measures)}"


def evaluation_table(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """The first and the last evaluation of a training run, in Markdown.

    Args:
      evaluations: rows of evaluations.jsonl, each with `step`; any of the measures and rates in
        `_TRAINING_ROWS` may be absent or None.

    Returns:
      the table: percent, and the change in points, where there is more than one step; then a line
      that says what the intervals are and how many problems they are over.

    Raises:
      ValueError: there are no evaluations.
    """
    if not evaluations:
        raise ValueError("evaluations = []: a table needs at least one evaluation.")
    ordered = sorted(evaluations, key=lambda evaluation: evaluation["step"])
    first, last = ordered[0], ordered[-1]
    shown = [first, last] if first["step"] != last["step"] else [last]
    has_change = len(shown) == 2

    heads = ["measure (%)", *(f"step {evaluation['step']}" for evaluation in shown)]
    if has_change:
        heads.append("change (points)")
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1)]
    for name, label in _TRAINING_ROWS.items():
        means = [_mean(evaluation, name) for evaluation in shown]
        if all(mean is None for mean in means):
            continue
        line = [label, *(_markdown_cell(evaluation, name) for evaluation in shown)]
        if has_change:
            line.append(DASH if None in means else f"{100 * (means[1] - means[0]):+z.1f}")
        lines.append(line)
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)

    estimates = [defined_estimate(row, name) for row in shown for name in _TRAINING_ROWS]
    counts = {estimate["count"] for estimate in estimates if estimate}
    if counts:
        span = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
        text += f"\nMean [95 % bootstrap interval over problems]; {span} held-out problems.\n"
    return text


def _markdown_cell(evaluation: Mapping[str, Any], name: str) -> str:
    mean, estimate = _mean(evaluation, name), defined_estimate(evaluation, name)
    if mean is None:
        return DASH
    text = f"{100 * mean:z.1f}"
    if estimate and is_number(estimate["low"]) and is_number(estimate["high"]):
        text += f" [{100 * estimate['low']:z.1f}, {100 * estimate['high']:z.1f}]"
    return text


def _mean(evaluation: Mapping[str, Any], name: str) -> float | None:
    """The mean of an estimate, or a rate; None if it is absent or undefined."""
    value = evaluation.get(name)
    if isinstance(value, dict):
        value = value["mean"]
    return value if is_number(value) else None


def defined_estimate(evaluation: Mapping[str, Any], name: str) -> dict | None:
    """An evaluation's estimate; None if it is absent, undefined or a plain rate."""
    estimate = evaluation.get(name)
    return estimate if isinstance(estimate, dict) and is_number(estimate["mean"]) else None


def is_number(value: Any) -> bool:
    """Whether a value of a log is there and finite."""
    return value is not None and math.isfinite(value)


# Cells


def percent(estimate: Mapping[str, Any], sign: str = "") -> str:
    """An estimate (fields of `Estimate`) in percent with its interval, a dash if it is undefined.

    `sign` is "+" for differences, which then always have one.
    """
    if estimate["mean"] is None:
        return DASH
    mean = f"{100 * estimate['mean']:{sign}z.1f}"
    if estimate["low"] is None:
        return mean
    return f"{mean} [{100 * estimate['low']:{sign}z.1f}, {100 * estimate['high']:{sign}z.1f}]"


def number(estimate: Mapping[str, Any], decimals: int, scale: float = 1) -> str:
    """An estimate's mean, a dash where it is not defined."""
    return DASH if estimate["mean"] is None else f"{scale * estimate['mean']:.{decimals}f}"


def powers_of_two(n: int) -> list[int]:
    """1, 2, 4, ... and n."""
    return sorted({1 << i for i in range(n.bit_length())} | {n})


def _percent_alone(estimate: Mapping[str, Any]) -> str:
    return number(estimate, 1, scale=100)


def _costs(row: Mapping[str, float]) -> tuple[str, str]:
    return f"{row['tokens']:,.0f}", f"{row['critical_path']:,.0f}"


def _share(value: float | None) -> str:
    return DASH if value is None else f"{100 * value:.1f}"


def _make_table(title: str, *heads: str) -> Table:
    table = Table(
        title=f"\n{title}",
        title_justify="left",
        title_style="bold",
        header_style="dim",
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column(heads[0], justify="left")
    for head in heads[1:]:
        table.add_column(head, justify="right", no_wrap=True)
    return table
