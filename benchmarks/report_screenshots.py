r"""Pictures of the report of a run, as a browser shows them.

    python -m spiral_jax.train --config=configs/tiny.py --workdir=runs/report \
        --config.train.steps=20 --config.trace_log.every=5 --config.eval.every=10 \
        --config.eval.rounds_in_training=2 --config.eval.problems=128
    python -m spiral_jax.report --workdir=runs/report
    python -m benchmarks.report_screenshots --workdir=runs/report

Writes report_light.png, report_dark.png and report_phone.png.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import NamedTuple

from absl import app, flags
from playwright.sync_api import Page, sync_playwright

from benchmarks.browser import find_chromium

WORKDIR = flags.DEFINE_string("workdir", None, "directory with report.html", required=True)
OUT = flags.DEFINE_string("out", "docs/results", "directory of the pictures")


class Picture(NamedTuple):
    """`show` brings the page to what is to be seen."""

    name: str
    width: int
    height: int
    scheme: str
    show: Callable[[Page], None]


def main(argv: list[str]) -> None:
    file, out = pathlib.Path(WORKDIR.value, "report.html").absolute(), pathlib.Path(OUT.value)
    pictures = (
        Picture("light", 1280, 900, "light", show_problem),
        Picture("dark", 1280, 900, "dark", show_evaluation),
        Picture("phone", 400, 860, "light", show_aggregation),
    )
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(
            executable_path=find_chromium(), args=["--no-sandbox"]
        ) as browser,
    ):
        for picture in pictures:
            page = browser.new_page(
                viewport={"width": picture.width, "height": picture.height},
                color_scheme=picture.scheme,
            )
            page.set_default_timeout(0)
            page.goto(file.as_uri())
            picture.show(page)
            page.wait_for_timeout(1500)  # charts are drawn when they come near
            target = out / f"report_{picture.name}.png"
            page.screenshot(path=target)
            print(target)


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
