"""A run and its traces -> report.html: overview, problems, evaluation, configuration, in one file."""

from __future__ import annotations

import json
from typing import Any

from etils import epath
from markupsafe import Markup

from spiral_jax.reporting.charts import overview_charts
from spiral_jax.reporting.evaluation_charts import evaluation_charts, measure_table, training_table
from spiral_jax.reporting.pages import Traces, write_pages
from spiral_jax.reporting.problem_page import FLAGS
from spiral_jax.reporting.quotes import DEFINITION
from spiral_jax.reporting.read_run import Run, changed_fields
from spiral_jax.reporting.render import embed, render

NAME = "report.html"
MOST_BYTES = 30 * 2**20  # of the main file
SAMPLE_BYTES = 12 * 2**20  # of its traces
_INDEX_BYTES = 10 * 2**20  # of the list of all problems


def write_report(run: Run, out: epath.Path) -> tuple[epath.Path, Traces]:
    """Writes the page files, then OUT/report.html; returns its path and what it holds of the
    traces.

    Raises:
      WorkdirError: a trace file is damaged or lacks what the pages need.
    """
    traces = write_pages(run, out, SAMPLE_BYTES)
    html = main_html(run, traces)
    assert len(html.encode()) <= MOST_BYTES, (
        "sample and index have limits that leave room for the rest"
    )
    (out / NAME).write_text(html, encoding="utf-8")
    return out / NAME, traces


def main_html(run: Run, traces: Traces) -> str:
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


def _status(run: Run) -> str:
    """How far the run is, in one line."""
    if not run.metrics:
        return "An evaluation: no training steps." if run.results else "No step is finished yet."
    done, asked = run.metrics[-1]["step"] + 1, run.config["train"]["steps"]
    spent, most = (
        sum(row.get("sampling/generated_tokens") or 0 for row in run.metrics),
        run.config["train"]["max_sampled_tokens"],
    )
    finished = done >= asked or (most and spent >= most)
    text = f"{done:,} of {asked:,} steps, {spent:,.0f} sampled tokens"
    return text if finished else f"{text}: in progress or stopped when this report was made"


def _newest(index: list[dict[str, Any]]) -> tuple[Markup, int]:
    """As JSON the newest page files' columns that fit into `_INDEX_BYTES`; how many older files are
    left out.
    """
    texts, size = [], 0
    for page in reversed(index):
        text = embed(page)
        if size + len(text) > _INDEX_BYTES:
            break
        texts.append(text)
        size += len(text)
    return Markup(f"[{','.join(reversed(texts))}]"), len(index) - len(texts)
