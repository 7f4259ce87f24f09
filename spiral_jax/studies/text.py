"""What `gather` returns -> OUT.md, OUT.json and pictures."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from spiral_jax.evaluation.results import describe_temperatures
from spiral_jax.evaluation.tables import DASH, percent
from spiral_jax.studies.cost_tables import arms_table, mean_cell, runs_table, training_table
from spiral_jax.studies.design import Study
from spiral_jax.studies.figures import plot_study
from spiral_jax.studies.markdown import escape, table
from spiral_jax.studies.rungs import GIVEN_UP
from spiral_jax.studies.sweep_text import sweep_text

_SEEN = {  # in a picture, by the end of its name: what it shows, and what to see in it
    "arms": (
        "The first measure of every arm after training",
        "Best arms stand above. Arms whose bars are far apart differ; dots that lie far apart are "
        "seeds that learnt different things.",
    ),
    "mixed": (
        "Aggregated accuracy of every run over the share of its sets that are mixed",
        "Runs on the line read as the base does, so that their search alone has changed; runs "
        "below it read worse.",
    ),
    "pass_at_k": (
        "Share of problems that some of k traces solves, by k",
        "A curve that is flat says that more traces bring nothing new; one that rises on says "
        "that search tries different things.",
    ),
    "rsa": (
        "Accuracy after each round of self-aggregation",
        "A curve that rises is of a model that can read what it has written; one that falls is of "
        "one that cannot.",
    ),
    "training": (
        "Rewards of aggregation and search, and the entropy of search, over sampled tokens",
        "Aggregation may get better while own correctness of search falls. Entropy near 0 says "
        "that all traces do the same.",
    ),
}
_HOW_TO_READ = (
    "Percent with 95 % intervals by bootstrap over seeds and over problems: each resample draws "
    "the seeds, and one set of problems for all of them. An arm with one seed has an interval over "
    "problems alone; with three to five seeds the interval is narrower than the truth, so the "
    "table of runs shows each. A claim holds if the whole interval of its gap is beyond what it "
    "asks, fails if the whole interval is short of it, and is open otherwise. Sampled tokens are "
    "output of all traces, abandoned ones too; prefilled tokens are the prompts that were read, "
    "aggregation prompts above all: both together are what sampling computes. TFLOP are 10^12 "
    "operations, of sampling (products with weights alone) and of updates. Seconds are those of "
    "the training steps."
)


def write_study(study: Study, gathered: Mapping[str, Any], out: pathlib.Path) -> str:
    """Writes the report, its numbers and its pictures; returns the report."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_name(f"{out.name}.json").write_text(_json(gathered) + "\n")
    report = out.with_name(f"{out.name}.md")
    # stays if a picture cannot be plotted
    report.write_text(markdown(study, gathered, pictures=[]))
    pictures = plot_study(gathered, out)
    text = markdown(study, gathered, [picture.name for picture in pictures])
    report.write_text(text)
    return text


def list_failures(gathered: Mapping[str, Any]) -> list[str]:
    """A line for each claim that does not hold, and each run, pair or reading that is not done."""
    operations = gathered["operations"] or {"missing": []}
    lines = [f"claim: {row['claim']}" for row in gathered["claims"] if row["verdict"] != "holds"]
    for run in gathered["runs"]:
        if run["state"] not in ("done", GIVEN_UP):
            lines.append(f"not done: {run['arm']} seed {run['seed']}")
    for row in gathered["cross"]:
        if not row["measures"] or row.get("errors"):
            lines.append(f"not done: search of {row['searcher']}, read by {row['reader']}")
    lines += [f"not done: at equal operations, {line}" for line in operations["missing"]]
    return lines


def _json(gathered: Mapping[str, Any]) -> str:
    """JSON with a line for each run, arm, gap and claim."""

    def dump(value: Any) -> str:
        return json.dumps(value, allow_nan=False)

    parts = []
    for name, value in gathered.items():
        if name in ("runs", "claims", "cross"):
            lines = ",\n  ".join(dump(row) for row in value)
            parts.append(f"{dump(name)}: [\n  {lines}\n ]")
        elif value and name in ("arms", "gaps", "efficiency", "operations", "curves"):
            lines = ",\n  ".join(f"{dump(key)}: {dump(row)}" for key, row in value.items())
            parts.append(f"{dump(name)}: {{\n  {lines}\n }}")
        else:
            parts.append(f"{dump(name)}: {dump(value)}")
    return "{\n " + ",\n ".join(parts) + "\n}"


def markdown(study: Study, gathered: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """The report; a part without content is left out."""
    measure, baseline = gathered["measures"][0], gathered["baseline"]
    parts = {
        "What was claimed before the runs": _claims(gathered),
        "What is possible": _optimum(gathered),
        "Results": _results(gathered),
        f"Search of one, read by another: {measure}": _cross(gathered),
        f"Gaps to {baseline}, paired over seeds and problems (points)": _gaps_table(
            gathered, gathered["gaps"]
        ),
        f"Samples for equal coverage, against {baseline}": _efficiency(gathered),
        "At equal operations": _operations(gathered),
        "What the sweep has found": sweep_text(gathered),
        "Arms": arms_table(gathered),
        "Training: means over an arm's runs": training_table(gathered),
        "Runs": runs_table(gathered),
        "Pictures": "\n\n".join(map(_picture, pictures)),
        "How to read this": _HOW_TO_READ,
        "Notes": study.notes,
    }
    sections = [f"## {title}\n\n{text}" for title, text in parts.items() if text]
    return "\n\n".join([*_head(study, gathered), *sections]) + "\n"


def _picture(name: str) -> str:
    """A picture with what it shows as its text, and what to see in it."""
    shows, see = next(seen for end, seen in _SEEN.items() if name.endswith(f"_{end}.png"))
    return f"![{shows}]({name})\n\n{see}"


def _head(study: Study, gathered: Mapping[str, Any]) -> list[str]:
    """The paragraphs above the first section."""
    settings, problems, runs = gathered["settings"], gathered["problems"], gathered["runs"]
    done = sum(run["state"] == "done" for run in runs)
    paragraphs = [
        f"# {study.title}",
        study.question,
        f"{done} of {len(runs)} runs are done{_hours(gathered)}. Machine: "
        f"{'; '.join(gathered['machines']) or 'not known'}. Commit: "
        f"{', '.join(gathered['commits']) or 'not known'}. Written by "
        f"`python -m spiral_jax.study --config={study.file} --report`.",
        f"Evaluation: {problems['count']} held-out problems of {problems['task']} at "
        f"{describe_temperatures(settings)}: n = {settings['n']} traces each, "
        f"{settings['subsets']} disjoint sets of {settings['subset_size']}, "
        f"{settings['traces']} aggregations of each; "
        f"RSA with a population of {settings['population']}, sets of {settings['set_size']}, "
        f"{settings['rounds']} rounds.",
    ]
    if gathered["largest_k"] < settings["n"]:
        paragraphs.append(
            f"pass@k and maj@k are stated up to k = {gathered['largest_k']}: in some run fewer "
            "than 90 % of the problems have more traces that are no errors of ours."
        )
    if gathered["unnamed"]:
        unnamed = ", ".join(gathered["unnamed"])
        paragraphs.append(f"In the directory, but not in the configuration: {unnamed}.")
    if gathered["unrecorded"]:
        paragraphs.append(
            "The study was killed while these ran, and they ended by themselves, so how long they "
            f"took is not known: {', '.join(gathered['unrecorded'])}."
        )
    return [paragraph for paragraph in paragraphs if paragraph]


def _hours(gathered: Mapping[str, Any]) -> str:
    """How long the study took, as far as its journal knows."""
    if gathered["at_once"] is None:
        return ""
    least = "at least " if gathered["unrecorded"] else ""
    return (
        f", in {least}{gathered['seconds'] / 3600:.1f} hours, added up over trainings and "
        f"evaluations, of which {gathered['at_once']} ran at once"
    )


def _claims(gathered: Mapping[str, Any]) -> str:
    rows = []
    for claim in gathered["claims"]:
        seeds = claim["gap"]["seeds"] if claim["gap"] else 0
        rows.append([claim["claim"], _measured(claim), seeds, f"**{claim['verdict']}**"])
    return table(["claim", "measured", "seeds", "verdict"], rows)


def _measured(claim: Mapping[str, Any]) -> str:
    """A claim's gap in its unit."""
    gap, unit = claim["gap"], claim["unit"]
    if gap is None:
        return DASH
    if unit == "times":
        bound = f"{gap['bound']} " if gap["bound"] else ""
        return f"{bound}{gap['mean']:.2f}x [{gap['low']:.2f}, {gap['high']:.2f}]"
    if unit == "nat":
        return f"{gap['mean']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}] nat"
    return percent(gap, "+" if unit == "points" else "")


def _results(gathered: Mapping[str, Any]) -> str:
    rows = []
    for arm, row in gathered["arms"].items():
        measures = row["measures"]
        seeds = next(iter(measures.values()))["seeds"] if measures else 0
        cells = [percent(measures[m]) if measures else DASH for m in gathered["measures"]]
        rows.append([arm, seeds, *cells])
    if gathered["optimum"]:
        best = gathered["optimum"]
        known = {"aggregated": percent(best["aggregated"]), "mixed": f"{100 * best['mixed']:.1f}"}
        rows.append(["best possible", "", *(known.get(m, "") for m in gathered["measures"])])
    return table(["arm", "seeds", *gathered["measures"]], rows)


def _optimum(gathered: Mapping[str, Any]) -> str:
    """The bound and what it is made of."""
    best = gathered["optimum"]
    if not best:
        return ""
    V, S = best["strategies"], best["subset_size"]
    return (
        f"Of sets of {S} independent traces of one policy at most 1 - {V} * {V}^-{S} = "
        f"{100 * best['mixed']:.1f} % are mixed, that is, hold two strategies or more. The base, "
        f"before any training, is right on {percent(best['right_if_mixed'])} % of its mixed sets "
        f"and on {percent(best['right_if_alike'])} % of the others. Read like that, the best sets "
        f"give **{percent(best['aggregated'])} %** aggregated accuracy."
    )


def _cross(gathered: Mapping[str, Any]) -> str:
    measure = gathered["measures"][0]
    arms = list(dict.fromkeys(row["searcher"] for row in gathered["cross"]))
    cell = {
        (row["searcher"], row["reader"]): _cross_cell(row, measure) for row in gathered["cross"]
    }
    rows = [[searcher, *(cell[searcher, reader] for reader in arms)] for searcher in arms]
    return table(["search \\ aggregation", *arms], rows)


def _cross_cell(row: Mapping[str, Any], measure: str) -> str:
    """Estimate and its number of seeds; and what failed."""
    estimate = row["measures"].get(measure)
    parts = [f"{percent(estimate)} ({estimate['seeds']})"] if estimate else []
    return escape("; ".join([*parts, *row.get("errors", [])])) or DASH


def _gaps_table(gathered: Mapping[str, Any], gaps: Mapping[str, Any]) -> str:
    rows = []
    for arm, by_measure in gaps.items():
        in_order = [by_measure[measure] for measure in gathered["measures"]]
        rows.append([arm, *(DASH if gap is None else percent(gap, "+") for gap in in_order)])
    return table(["arm", *gathered["measures"]], rows)


def _operations(gathered: Mapping[str, Any]) -> str:
    """The second reading: its budget, its tables, and what is missing."""
    found = gathered["operations"]
    if found is None:
        return ""
    budget = found["budget"]
    if budget is None:
        return f"The budget is not known yet: {', '.join(found['waits_for'])}."
    parts = [
        f"Each run at its newest checkpoint that had spent at most **{budget['tflop']:,.3f} "
        "TFLOP** in training: sampling with all prompts that it read, and updates. So much has "
        f"{budget['arm']} with seed {budget['seed']} spent in all, the least of the arms with "
        "that seed that ended where their steps or tokens do. A run that ended with less is read "
        "at its end. One that is read before its end had a learning rate made for more steps: "
        "planned for this budget it might have come further.",
        _operations_table(gathered),
    ]
    if found["gaps"]:
        parts.append(f"Gaps to {gathered['baseline']}, paired over seeds and problems (points):")
        parts.append(_gaps_table(gathered, found["gaps"]))
    if found["missing"]:
        parts.append("Not read: " + "; ".join(found["missing"]) + ".")
    return "\n\n".join(parts)


def _operations_table(gathered: Mapping[str, Any]) -> str:
    found = gathered["operations"]
    rows = []
    for arm, measures in found["arms"].items():
        read = [run for run in found["runs"] if run["arm"] == arm and "measures" in run]
        spent = [
            mean_cell(read, "step", 1),
            mean_cell(read, "tflop", 3),
            mean_cell(read, "tflop", 1, 100 / found["budget"]["tflop"]),
        ]
        cells = [percent(measures[measure]) for measure in gathered["measures"]]
        rows.append([arm, next(iter(measures.values()))["seeds"], *spent, *cells])
    costs = ["step", "TFLOP", "of the budget (%)"]
    return table(["arm", "seeds", *costs, *gathered["measures"]], rows)


def _efficiency(gathered: Mapping[str, Any]) -> str:
    rows = []
    for arm, row in gathered["efficiency"].items():
        ratio = f"{row['ratio']:.2f}x [{row['low']:.2f}, {row['high']:.2f}]"
        ratio += f" ({row['bound']})" if row["bound"] else ""
        coverage = f"{100 * row['coverage']:.1f}"
        rows.append([arm, coverage, f"{row['samples_a']:.1f}", f"{row['samples_b']:.1f}", ratio])
    heads = [
        "arm",
        "coverage (%)",
        f"samples, {gathered['baseline']}",
        "samples, arm",
        "times fewer",
    ]
    return table(heads, rows)
