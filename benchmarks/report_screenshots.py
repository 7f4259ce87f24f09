"""Pictures of the report of a run, as a browser shows them: docs/report_light.png, report_dark.png,
report_phone.png.

    python -m spiral_jax.train --config=configs/tiny.py --workdir=runs/report
    --config.train.steps=20 \
        --config.trace_log.every=5 --config.eval.every=10 --config.eval.rounds_in_training=2
        --config.eval.problems=128
    python -m spiral_jax.report --workdir=runs/report
    python -m benchmarks.report_screenshots --workdir=runs/report
"""

from __future__ import annotations

import pathlib
import shutil

from absl import app, flags
from playwright.sync_api import Page, sync_playwright

WORKDIR = flags.DEFINE_string("workdir", None, "directory with report.html", required=True)
OUT = flags.DEFINE_string("out", "docs", "directory of the pictures")


def main(argv: list[str]) -> None:
    file, out = pathlib.Path(WORKDIR.value, "report.html").absolute(), pathlib.Path(OUT.value)
    path = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=path, args=["--no-sandbox"]) as browser,
    ):
        for name, size, scheme, show in (
            ("light", (1280, 900), "light", show_problem),
            ("dark", (1280, 900), "dark", show_evaluation),
            ("phone", (400, 860), "light", show_aggregation),
        ):
            page = browser.new_page(
                viewport={"width": size[0], "height": size[1]}, color_scheme=scheme
            )
            page.set_default_timeout(0)
            page.goto(file.as_uri())
            show(page)
            page.wait_for_timeout(1500)  # charts are drawn when they come near
            page.screenshot(path=out / f"report_{name}.png")
            print(out / f"report_{name}.png")


def show_problem(page: Page) -> None:
    page.check("#filters [name=flag][value='0']")
    page.evaluate("document.getElementById('problems').scrollIntoView()")


def show_evaluation(page: Page) -> None:
    page.evaluate("document.getElementById('evaluation').scrollIntoView()")


def show_aggregation(page: Page) -> None:
    show_problem(page)
    page.click("#aggregation-0-0 summary")
    page.evaluate("document.getElementById('set-0').scrollIntoView()")


if __name__ == "__main__":
    app.run(main)
