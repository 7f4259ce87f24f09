"""How long the report of a run of 500 steps x 256 problems takes to open.

    python -m benchmarks.report_size [--json=docs/results/report.json] [--steps=500]
        [--problems=256] [--written=5]

Synthetic, from the disk, in a headless Chromium. To take minutes it writes traces and page files of
`--written` steps alone, and lists their problems under other ids for the other steps: what is
opened has an entry for each of the 128,000 problems, metrics of all steps, and a sample of the full
12 MiB. Each time by a new browser, from the beginning of the navigation: `listed_s` until the
problems are listed and the first is shown, `first_charts_s` until the first chart is drawn;
`filtered_s` from a click on a filter to its result. `first_charts_cpu_s` is what the page's process
computed until then, whatever else ran on the machine; `load` is the number of programs that wanted
a core.
"""

from __future__ import annotations

import collections
import json
import os
import pathlib
import statistics
import tempfile
import time
from typing import Any

from absl import app, flags
from etils import epath
from playwright.sync_api import Browser, sync_playwright

from benchmarks.browser import find_chromium
from benchmarks.machine import machine
from benchmarks.synthetic_run import write_run
from configs import tiny
from spiral_jax.reporting import main_page
from spiral_jax.reporting.pages import write_pages
from spiral_jax.reporting.read_run import read_run
from spiral_jax.run import provenance
from spiral_jax.run.workdir import StepLog

JSON = flags.DEFINE_string(
    "json", "docs/results/report.json", "file that the numbers are written to"
)
STEPS = flags.DEFINE_integer("steps", 500, "steps, each with a trace file")
PROBLEMS = flags.DEFINE_integer("problems", 256, "problems of a step")
WRITTEN = flags.DEFINE_integer("written", 5, "steps whose traces and page files are written")
REPEATS = flags.DEFINE_integer("repeats", 5, "times that the browser opens the main file")
BAR_S = 3.0


def main(argv: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = epath.Path(folder) / "run"
        write_large_run(path)
        run = read_run(str(path))
        traces = write_pages(run, path, main_page.SAMPLE_BYTES)
        numbers = {
            "machine": machine(),
            "load": round(os.getloadavg()[0], 1),
            "commit": provenance.commit()[0],
            "steps": STEPS.value,
            "problems": STEPS.value * PROBLEMS.value,
            "written_steps": WRITTEN.value,
            "sampled_problems": len(traces.sample),
        }
        traces.index = repeat(traces.index, STEPS.value // WRITTEN.value)
        assert traces.problems == STEPS.value * PROBLEMS.value
        (path / "report.html").write_text(main_page.main_html(run, traces), encoding="utf-8")
        numbers["main_file_mib"] = round((path / "report.html").stat().length / 2**20, 1)
        numbers |= measure(pathlib.Path(path) / "report.html", REPEATS.value)
    numbers |= {"bar_s": BAR_S, "passed": numbers["listed_s"]["worst"] < BAR_S}
    print(json.dumps(numbers, indent=1))
    pathlib.Path(JSON.value).write_text(json.dumps(numbers, indent=1) + "\n")


def write_large_run(path: pathlib.Path) -> None:
    """Traces of the first steps, in the paper's shape, and metrics of all.

    24 traces a problem, of about 30 words each.
    """
    c = tiny.get_config()
    c.batch.problems, c.train.steps = PROBLEMS.value, STEPS.value
    c.trace_log.every, c.trace_log.keep_steps = 1, STEPS.value
    write_run(path, c, range(WRITTEN.value))
    metrics = StepLog(path / "metrics.jsonl")
    rows = metrics.read()
    for step in range(WRITTEN.value, STEPS.value):
        metrics.append(rows[step % WRITTEN.value] | {"step": step})


def repeat(index: list[dict[str, Any]], times: int) -> list[dict[str, Any]]:
    """The entries of the written steps once more under later steps, cursors and ids."""
    pages = []
    for time_around in range(times):
        steps_later = time_around * WRITTEN.value
        for page in index:
            cursors = [cursor + steps_later * PROBLEMS.value for cursor in page["cursor"]]
            step = page["step"] + steps_later
            moved = {
                "step": step,
                "href": f"report/step_{step:06d}.html",
                "cursor": cursors,
                "id": [f"train:{cursor}" for cursor in cursors],
            }
            pages.append(page | moved)
    return pages


def measure(file: pathlib.Path, repeats: int) -> dict[str, Any]:
    """Seconds to open `file`, median and worst, each time in a new browser."""
    seconds: dict[str, list[float]] = collections.defaultdict(list)
    with sync_playwright() as playwright:
        for _ in range(repeats):
            with playwright.chromium.launch(
                executable_path=find_chromium(), args=["--no-sandbox"]
            ) as browser:
                for name, value in open_once(browser, file).items():
                    seconds[name].append(value)
                version = browser.version
    times = {
        name: {"median": round(statistics.median(values), 2), "worst": round(max(values), 2)}
        for name, values in seconds.items()
    }
    return {"browser": f"Chromium {version}", "opened": repeats} | times


def open_once(browser: Browser, file: pathlib.Path) -> dict[str, float]:
    """Seconds of one opening, by name."""
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable")

    page.goto(file.as_uri(), wait_until="commit")
    page.wait_for_selector(".chart .main-svg", state="attached")
    charts = page.evaluate("performance.now()") / 1000
    listed = page.evaluate("performance.getEntriesByName('listed')[0].startTime") / 1000
    metrics = session.send("Performance.getMetrics")["metrics"]
    (computed,) = [metric["value"] for metric in metrics if metric["name"] == "ProcessTime"]

    start = time.monotonic()
    page.check("[name=flag] >> nth=0")
    page.inner_text("#matches")
    return {
        "first_charts_s": charts,
        "listed_s": listed,
        "first_charts_cpu_s": computed,
        "filtered_s": time.monotonic() - start,
    }


if __name__ == "__main__":
    app.run(main)
