"""How long the report of a run of 500 steps x 256 problems takes to open: synthetic, from the disk,
headless Chromium.

    python -m benchmarks.report_size [--json=docs/report.json] [--steps=500] [--problems=256]
    [--written=5]

To take minutes it writes traces and page files of `--written` steps alone, and lists their problems
under other ids for
the other steps: what is opened has an entry for each of the 128,000 problems, metrics of all steps,
and a sample of the full 12 MiB. Each time by a new browser, from the beginning of the navigation:
`listed_s` until the problems are listed and the first is shown, `first_charts_s` until the first
chart is drawn; `filtered_s` from a click on a filter to its result. `first_charts_cpu_s` is what
the page's process computed until then, whatever else ran on the machine; `load` is the number of
programs that wanted a core.
"""

from __future__ import annotations

import collections
import json
import os
import pathlib
import shutil
import statistics
import tempfile
import time
from typing import Any

from absl import app, flags
from etils import epath
from playwright.sync_api import sync_playwright

from benchmarks.machine import machine
from benchmarks.synthetic_run import write_run
from configs import tiny
from spiral_jax.reporting import main_page
from spiral_jax.reporting.pages import write_pages
from spiral_jax.reporting.read_run import read_run
from spiral_jax.run import provenance
from spiral_jax.run.workdir import StepLog

JSON = flags.DEFINE_string("json", "docs/report.json", "file that the numbers are written to")
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
    """Traces of the first steps, in the paper's shape (24 a problem, about 30 words each), and
    metrics of all.
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
    found = []
    for round in range(times):
        by = round * WRITTEN.value
        for page in index:
            cursors = [cursor + by * PROBLEMS.value for cursor in page["cursor"]]
            step = page["step"] + by
            moved = {"step": step, "href": f"report/step_{step:06d}.html", "cursor": cursors}
            found.append(page | moved | {"id": [f"train:{cursor}" for cursor in cursors]})
    return found


def measure(file: pathlib.Path, repeats: int) -> dict[str, Any]:
    """Seconds to open `file`, median and worst, each time in a new browser."""
    path = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    found: dict[str, list[float]] = collections.defaultdict(list)
    with sync_playwright() as playwright:
        for _ in range(repeats):
            with playwright.chromium.launch(executable_path=path, args=["--no-sandbox"]) as browser:
                page = browser.new_page(viewport={"width": 1400, "height": 900})
                computed = page.context.new_cdp_session(page)
                computed.send("Performance.enable")

                page.goto(file.as_uri(), wait_until="commit")
                page.wait_for_selector(".chart .main-svg", state="attached")
                found["first_charts_s"].append(page.evaluate("performance.now()") / 1000)
                found["listed_s"].append(
                    page.evaluate("performance.getEntriesByName('listed')[0].startTime") / 1000
                )
                metrics = {
                    m["name"]: m["value"]
                    for m in computed.send("Performance.getMetrics")["metrics"]
                }
                found["first_charts_cpu_s"].append(metrics["ProcessTime"])
                start = time.monotonic()
                page.check("[name=flag] >> nth=0")
                page.inner_text("#matches")
                found["filtered_s"].append(time.monotonic() - start)
                version = browser.version
    times = {name: {"median": round(statistics.median(values), 2), "worst": round(max(values), 2)}
             for name, values in found.items()}  # fmt: skip
    return {"browser": f"Chromium {version}", "opened": repeats} | times


if __name__ == "__main__":
    app.run(main)
