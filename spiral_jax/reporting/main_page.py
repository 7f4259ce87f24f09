"""A run -> all its pages: report.html with overview, problems, evaluation and configuration."""

from __future__ import annotations

import json
from typing import Any

from etils import epath
from markupsafe import Markup

from spiral_jax.evaluation.comparison import check_comparable
from spiral_jax.reporting.charts import overview_charts
from spiral_jax.reporting.evaluation_charts import evaluation_charts, measure_table, training_table
from spiral_jax.reporting.pages import Traces, write_pages
from spiral_jax.reporting.problem_page import FLAGS
from spiral_jax.reporting.quotes import DEFINITION
from spiral_jax.reporting.read_run import RecordedRun, changed_fields, read_run
from spiral_jax.reporting.render import embed, render

NAME = "report.html"
MOST_BYTES = 30 * 2**20  # of the main file
SAMPLE_BYTES = 12 * 2**20  # of its traces
_INDEX_BYTES = 10 * 2**20  # of the list of all problems


def write_report(
    workdir: str, out: str, results: str | None = None, baseline: str | None = None
) -> str:
    """Writes the page files and OUT/report.html; returns in one line where, and of what.

    Args:
      workdir, results, baseline: see `read_run`.

    Raises:
      WorkdirError, ResultsError, ConfigError: `workdir` or a results.json is missing, damaged or of
        another version, or the two results.json are not of the same problems.
    """
    run, folder = read_run(workdir, results, baseline), epath.Path(out)
    if len(run.results) == 2:
        evaluation, compared = run.results.values()
        check_comparable(compared, evaluation)
    traces = write_pages(run, folder, SAMPLE_BYTES)
    html = main_html(run, traces)
    assert len(html.encode()) <= MOST_BYTES, "sample and index leave no room for the rest"
    (folder / NAME).write_text(html, encoding="utf-8")
    return (
        f"{folder / NAME}: {len(traces.sample):,} of {traces.problems:,} problems of "
        f"{len(run.traces)} steps in {len(traces.index)} page files, "
        f"{traces.sample_bytes / 2**20:.1f} MiB of traces"
    )


def main_html(run: RecordedRun, traces: Traces) -> str:
    """The main file."""
    overview = overview_charts(run.metrics, run.evaluations, run.checkpoints)
    evaluation = evaluation_charts(run.results)
    index, unlisted = _newest(traces.index)
    return render(
        "report.html.j2",
        ["problems.js", "plotly", "charts.js"],
        run=run,
        name=run.path.name,
        status=_status(run),
        overview=overview,
        evaluation=evaluation,
        measures=measure_table(run.results),
        training=training_table(run.evaluations),
        changed=changed_fields(run.config),
        traces=traces,
        unlisted=unlisted,
        sample_mib=SAMPLE_BYTES // 2**20,
        flags=FLAGS,
        definition=DEFINITION,
        figures=embed([chart.figure for chart in [*overview, *evaluation]]),
        index=index,
        sample=traces.sample,
        config=json.dumps(run.config, indent=2),
    )


def _status(run: RecordedRun) -> str:
    """How far the run is, in one line."""
    if not run.metrics:
        if run.results and not run.checkpoints:
            return "An evaluation: no training steps."
        failed = ": the traces are those of a step that gave no batch" if run.traces else ""
        return f"No step is finished yet{failed}."
    train = run.config["train"]
    done, asked = run.metrics[-1]["step"] + 1, train["steps"]
    spent = sum(row.get("sampling/generated_tokens") or 0 for row in run.metrics)
    budget = train["max_sampled_tokens"]
    text = f"{done:,} of {asked:,} steps, {spent:,.0f} sampled tokens"
    if done >= asked or (budget and spent >= budget):
        return text
    return f"{text}: in progress or stopped when this report was made"


def _newest(index: list[dict[str, Any]]) -> tuple[Markup, int]:
    """The newest page files' columns that fit, as JSON; and how many older files are left out."""
    texts: list[str] = []
    size = 0
    for page in reversed(index):
        text = embed(page)
        if size + len(text) > _INDEX_BYTES:
            break
        texts.append(text)
        size += len(text)
    return Markup(f"[{','.join(reversed(texts))}]"), len(index) - len(texts)
