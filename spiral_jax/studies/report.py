"""What `results.gather` found -> OUT.md, OUT.json and pictures."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spiral_jax.evaluation.tables import DASH, percent
from spiral_jax.studies.figures import plot_study
from spiral_jax.studies.design import Study

_COLUMNS = (  # of an arm's row: key, head
    ("estimator", "estimator"), ("N", "N"), ("S", "S"), ("K", "K"), ("M", "M"), ("R", "R"), ("L search", "L, search"),
    ("L aggregation", "L, aggregation"), ("rollouts", "rollouts"), ("ceiling", "tokens a problem, at most"),
    ("problems a step", "problems a step"), ("steps", "steps, at most"), ("token budget", "sampled tokens, at most"),
    ("lr", "lr"),
)  # fmt: skip


def write(study: Study, found: Mapping[str, Any], out: pathlib.Path) -> str:
    """Writes the report, its numbers and its pictures; returns the report."""
    out.parent.mkdir(parents=True, exist_ok=True)
    pictures = plot_study(found, out)
    out.with_suffix(".json").write_text(_rendered(found) + "\n")
    text = markdown(study, found, [picture.name for picture in pictures])
    out.with_suffix(".md").write_text(text)
    return text


def _rendered(found: Mapping[str, Any]) -> str:
    """JSON with a line for each run, arm, gap and claim."""
    parts = []
    for name, value in found.items():
        if name in ("runs", "claims", "cross"):
            lines = ",\n  ".join(json.dumps(row, allow_nan=False) for row in value)
            parts.append(f"{json.dumps(name)}: [\n  {lines}\n ]")
        elif name in ("arms", "gaps", "efficiency", "curves"):
            lines = ",\n  ".join(
                f"{json.dumps(key)}: {json.dumps(row, allow_nan=False)}"
                for key, row in value.items()
            )
            parts.append(f"{json.dumps(name)}: {{\n  {lines}\n }}")
        else:
            parts.append(f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}")
    return "{\n " + ",\n ".join(parts) + "\n}"


def markdown(study: Study, found: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """The report; a part without content is left out."""
    done = sum(run["state"] == "done" for run in found["runs"])
    settings, problems = found["settings"], found["problems"]
    evaluated = (
        f"{problems['count']} held-out problems of {problems['task']} at T = {settings['temperature']:g}: n = "
        f"{settings['n']} traces each, {settings['subsets']} disjoint sets of {settings['subset_size']}, "
        f"{settings['traces']} aggregations of each; RSA with a population of {settings['population']}, sets of "
        f"{settings['set_size']}, {settings['rounds']} rounds."
    )
    head = [
        f"# {study.s.title}", study.s.question,
        f"{done} of {len(found['runs'])} runs are done, in {found['seconds'] / 3600:.1f} hours, added up over "
        f"trainings and evaluations, of which {found['at_once']} ran at once. Machine: "
        f"{'; '.join(found['machines'])}. Commit: {', '.join(found['commits'])}. Written by "
        f"`python -m spiral_jax.study --config={study.file} --report`.",
        f"Evaluation: {evaluated}",
        found["unnamed"] and f"In the directory, but not in the configuration: {', '.join(found['unnamed'])}.",
    ]  # fmt: skip
    parts = [
        ("What was claimed before the runs", _claims(found)),
        ("What is possible", _optimum(found)),
        ("Results", _results(found)),
        (f"Search of one, read by another: {found['measures'][0]}", _cross(found)),
        (f"Gaps to {found['baseline']}, paired over seeds and problems (points)", _gaps(found)),
        (f"Samples for equal coverage, against {found['baseline']}", _efficiency(found)),
        ("Arms", _arms(found)),
        ("Training: means over an arm's runs", _training(found)),
        ("Runs", _runs(found)),
        ("Pictures", "\n".join(f"![{name}]({name})" for name in pictures)),
        ("How to read this", _HOW),
        ("Notes", study.s.notes),
    ]
    return (
        "\n\n".join(
            [*filter(None, head), *(f"## {title}\n\n{text}" for title, text in parts if text)]
        )
        + "\n"
    )


_HOW = (
    "Percent with 95 % intervals by bootstrap over seeds and over problems: each resample draws the seeds, and one set "
    "of problems for all of them. An arm with one seed has an interval over problems alone; with three to five seeds "
    "the interval is narrower than the truth, so the table of runs shows each. A claim holds if the whole interval of "
    "its gap is beyond what it asks, fails if the whole interval is short of it, and is open otherwise. Sampled tokens "
    "are output of all traces, abandoned ones too; prefilled tokens are the prompts that were read, aggregation "
    "prompts above all: both together are what sampling computes. Seconds are those of the training steps."
)


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Markdown; empty without rows."""
    if not rows:
        return ""
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _claims(found: Mapping[str, Any]) -> str:
    def cell(claim: Mapping[str, Any]) -> str:
        gap = claim["gap"]
        if gap is None:
            return DASH
        if claim["unit"] == "times":
            return f"{gap['mean']:.2f}x [{gap['low']:.2f}, {gap['high']:.2f}]"
        if claim["unit"] == "nat":
            return f"{gap['mean']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}] nat"
        return percent(gap, "+" if claim["unit"] == "points" else "")

    rows = [
        [c["claim"], cell(c), c["gap"]["seeds"] if c["gap"] else 0, f"**{c['verdict']}**"]
        for c in found["claims"]
    ]
    return _table(["claim", "measured", "seeds", "verdict"], rows)


def _results(found: Mapping[str, Any]) -> str:
    rows = []
    for arm, row in found["arms"].items():
        measures = row["measures"]
        seeds = next(iter(measures.values()))["seeds"] if measures else 0
        rows.append(
            [arm, seeds, *(percent(measures[m]) if measures else DASH for m in found["measures"])]
        )
    if found["optimum"]:
        best = found["optimum"]
        known = {"aggregated": percent(best["aggregated"]), "mixed": f"{100 * best['mixed']:.1f}"}
        rows.append(["best possible", "", *(known.get(m, "") for m in found["measures"])])
    return _table(["arm", "seeds", *found["measures"]], rows)


def _optimum(found: Mapping[str, Any]) -> str:
    """The bound and what it is made of."""
    o = found["optimum"]
    if not o:
        return ""
    V, S = o["strategies"], o["subset_size"]
    return (
        f"Of sets of {S} independent traces of one policy at most 1 - {V} * {V}^-{S} = {100 * o['mixed']:.1f} % are "
        "mixed, that is, hold two strategies or more. The base, before any training, is right on "
        f"{percent(o['right_if_mixed'])} % of its mixed sets and on {percent(o['right_if_alike'])} % of the others. "
        f"Read like that, the best sets give **{percent(o['aggregated'])} %** aggregated accuracy."
    )


def _cross(found: Mapping[str, Any]) -> str:
    measure = found["measures"][0]
    arms = list(dict.fromkeys(row["searcher"] for row in found["cross"]))
    cell = {(row["searcher"], row["reader"]): _cross_cell(row, measure) for row in found["cross"]}
    rows = [[searcher, *(cell[searcher, reader] for reader in arms)] for searcher in arms]
    return _table(["search \\ aggregation", *arms], rows)


def _cross_cell(row: Mapping[str, Any], measure: str) -> str:
    """Estimate and its number of seeds; and what failed."""
    of = row["measures"].get(measure)
    value = [f"{percent(of)} ({of['seeds']})"] if of else []
    return "; ".join([*value, *row.get("errors", [])]).replace("|", "\\|") or DASH


def _gaps(found: Mapping[str, Any]) -> str:
    rows = [
        [arm, *(DASH if gaps[m] is None else percent(gaps[m], "+") for m in found["measures"])]
        for arm, gaps in found["gaps"].items()
    ]
    return _table(["arm", *found["measures"]], rows)


def _efficiency(found: Mapping[str, Any]) -> str:
    rows = [
        [arm, f"{100 * row['coverage']:.1f}", f"{row['samples_a']:.1f}", f"{row['samples_b']:.1f}",
         f"{row['ratio']:.2f}x [{row['low']:.2f}, {row['high']:.2f}]" + (f" ({row['bound']})" if row["bound"] else "")]
        for arm, row in found["efficiency"].items()
    ]  # fmt: skip
    return _table(
        ["arm", "coverage (%)", f"samples, {found['baseline']}", "samples, arm", "times fewer"],
        rows,
    )


def _arms(found: Mapping[str, Any]) -> str:
    rows = [
        [arm, *(_count(row.get(key)) for key, _ in _COLUMNS), len(row["seeds"])]
        for arm, row in found["arms"].items()
        if "estimator" in row
    ]
    return _table(["arm", *(head for _, head in _COLUMNS), "seeds"], rows)


def _training(found: Mapping[str, Any]) -> str:
    heads = ["arm", "steps", "sampled tokens", "prefilled tokens", "seconds", "entropy of search, start", "end (nat)",
             "gradient norm, search", "aggregation", "lowest parse rate, search", "aggregation (%)"]  # fmt: skip
    rows = []
    for arm in found["arms"]:
        runs = [run for run in found["runs"] if run["arm"] == arm and "steps" in run]
        if not runs:
            continue

        def mean(key: str, decimals: int, scale: float = 1, runs: Sequence[Mapping] = runs) -> str:
            values = [run[key] for run in runs if run.get(key) is not None]
            return f"{scale * np.mean(values):,.{decimals}f}" if values else DASH

        rows.append([
            arm, mean("steps", 0), mean("sampled_tokens", 0), mean("prefilled_tokens", 0), mean("seconds", 0),
            mean("entropy_start", 3), mean("entropy_end", 3), mean("grad_norm_search", 3),
            mean("grad_norm_aggregation", 3), mean("lowest_parse_rate_search", 1, 100),
            mean("lowest_parse_rate_aggregation", 1, 100),
        ])  # fmt: skip
    return _table(heads, rows)


def _runs(found: Mapping[str, Any]) -> str:
    def measure(run: Mapping[str, Any], name: str) -> str:
        value = run.get("measures", {}).get(name)
        return DASH if value is None else f"{100 * value:.1f}"

    costs = ("steps", "sampled_tokens", "seconds")
    rows = [
        [run["arm"], run["seed"], run["state"], *(_count(run.get(key)) for key in costs),
         *(measure(run, name) for name in found["measures"]), run["error"].replace("|", "\\|")]
        for run in found["runs"]
    ]  # fmt: skip
    return _table(
        ["arm", "seed", "state", "steps", "sampled tokens", "seconds", *found["measures"], "error"],
        rows,
    )


def _count(value: Any) -> str:
    if value is None or value == 0:
        return DASH
    return (
        value
        if isinstance(value, str)
        else f"{value:,}"
        if isinstance(value, int)
        else f"{value:g}"
    )
