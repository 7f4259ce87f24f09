"""How long the report of a large run takes to open: a synthetic run of 500 steps x 256 problems, headless Chromium.

python -m benchmarks.report_size [--json=docs/report.json] [--steps=500] [--problems=256]

Problems have N = 4 search traces, K = 2 sets and M = 2 aggregations of about 20 words, so that writing the run takes
minutes: more and longer traces make page files larger, not the main file, whose index has one entry for each problem
and whose sample has a limit in bytes. Opened from the disk, each time by a new browser: `listed_s` until the problems
are listed, `first_charts_s` until the first chart is drawn, `filtered_s` from a click on a filter to its result;
`*_cpu_s` is what the page's process computed until then, whatever else ran on the machine.
"""

from __future__ import annotations

import collections
import gzip
import json
import pathlib
import shutil
import statistics
import tempfile
import time
from typing import Any

from absl import app, flags
from playwright.sync_api import sync_playwright

from benchmarks.machine import machine
from benchmarks.synthetic_run import write_run
from configs import tiny
from spiral_jax import environment, report
from spiral_jax.workdir import StepLog, read_traces, trace_files

JSON = flags.DEFINE_string("json", "docs/report.json", "file that the numbers are written to")
STEPS = flags.DEFINE_integer("steps", 500, "steps, each with a trace file")
PROBLEMS = flags.DEFINE_integer("problems", 256, "problems of a step")
WORKDIR = flags.DEFINE_string("workdir", None, "keeps run and report, and goes on with what is there; None: temporary")
REPEATS = flags.DEFINE_integer("repeats", 5, "times that the browser opens the main file")
BAR_S = 3.0


def main(argv: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(WORKDIR.value or folder) / "run"
        if not path.exists():
            write_large_run(path, STEPS.value, PROBLEMS.value)
        main_file = path / "report.html"
        if not main_file.exists():
            report.report(str(path), str(path))
        numbers = describe(main_file) | measure(main_file, REPEATS.value)
    numbers |= {"bar_s": BAR_S, "passed": numbers["listed_s"]["worst"] < BAR_S}
    print(json.dumps(numbers, indent=1))
    pathlib.Path(JSON.value).write_text(json.dumps(numbers, indent=1) + "\n")


def describe(main_file: pathlib.Path) -> dict[str, Any]:
    """What is measured, and on what."""
    pages = [file.stat().st_size for file in (main_file.parent / "report").iterdir()]
    return {
        "machine": machine(),
        "commit": environment.commit()[0],
        "steps": STEPS.value,
        "problems": STEPS.value * PROBLEMS.value,
        "traces": STEPS.value * PROBLEMS.value * 8,
        "main_file_mib": round(main_file.stat().st_size / 2**20, 1),
        "page_files": len(pages),
        "page_files_mib": round(sum(pages) / 2**20),
        "largest_page_file_mib": round(max(pages) / 2**20, 1),
    }


def write_large_run(path: pathlib.Path, steps: int, problems: int) -> None:
    """The rollouts of one synthetic step, written again for every step under other problem ids and cursors."""
    c = tiny.get_config()
    c.batch.problems, c.train.steps, c.trace_log.every, c.trace_log.keep_steps = problems, steps, 1, steps
    c.search.traces, c.aggregation.subsets, c.aggregation.subset_size, c.aggregation.traces = 4, 2, 2, 2
    write_run(path, c, range(1), words=20)
    (first,) = trace_files(path / "traces").values()
    lines = []
    for row in read_traces(first):
        place = row["cursor"]
        line = json.dumps(row | {"cursor": "@cursor@", "problem": "@id@"}).replace('"@cursor@"', "@cursor@")
        lines.append((place, line))
    metrics, log = StepLog(path / "metrics.jsonl"), StepLog(path / "metrics.jsonl").read()[0]
    for step in range(1, steps):
        cursors = [(str(step * problems + place), line) for place, line in lines]
        rows = [line.replace("@cursor@", cursor).replace("@id@", f"train:{cursor}") for cursor, line in cursors]
        with gzip.open(path / "traces" / f"step_{step:06d}.jsonl.gz", "wt", compresslevel=1) as file:
            file.write("\n".join(rows) + "\n")
        metrics.append(log | {"step": step, "reward/aggregated": 0.3 + 0.4 * step / steps})


def measure(file: pathlib.Path, repeats: int) -> dict[str, Any]:
    """Seconds to open `file`, median and worst, each time in a new browser."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    found: dict[str, list[float]] = collections.defaultdict(list)
    with sync_playwright() as playwright:
        for _ in range(repeats):
            with playwright.chromium.launch(executable_path=path, args=["--no-sandbox"]) as browser:
                page = browser.new_page(viewport={"width": 1400, "height": 900})
                computed = page.context.new_cdp_session(page)
                computed.send("Performance.enable")

                def note(name: str, start: float, computed: Any = computed) -> None:
                    found[f"{name}_s"].append(time.monotonic() - start)
                    metrics = {m["name"]: m["value"] for m in computed.send("Performance.getMetrics")["metrics"]}
                    found[f"{name}_cpu_s"].append(metrics["ProcessTime"])

                start = time.monotonic()
                page.goto(file.as_uri(), wait_until="commit")
                page.wait_for_selector("#list a", state="attached")
                note("listed", start)
                page.wait_for_selector(".chart .main-svg", state="attached")
                note("first_charts", start)
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
