"""The first screen of the README, light and dark, as a forge shows it.

    python -m benchmarks.first_screen      # writes docs/first_screen.png and first_screen_dark.png

Markdown and a style of our own that is close to GitHub's; needs Chromium, which the tests need too.
"""

from __future__ import annotations

import pathlib
import tempfile

from absl import app
from markdown_it import MarkdownIt
from playwright.sync_api import sync_playwright

from benchmarks.browser import find_chromium

ROOT = pathlib.Path(__file__).parents[1]
SCREEN = {"width": 1100, "height": 1400}
STYLE = """
body { font: 16px/1.5 "Liberation Sans", sans-serif; max-width: 900px; margin: 32px auto;
       color: #1f2328; background: #ffffff; }
h1, h2 { border-bottom: 1px solid #d1d9e0; padding-bottom: .3em; line-height: 1.25; }
a { color: #0969da; text-decoration: none; }
img { max-width: 100%; }
code, pre { font: 13.6px/1.45 "Liberation Mono", monospace; background: #f6f8fa;
            border-radius: 6px; }
code { padding: .2em .4em; }
pre { padding: 16px; overflow: auto; }
pre code { padding: 0; }
table { border-collapse: collapse; display: block; overflow: auto; }
th, td { border: 1px solid #d1d9e0; padding: 6px 13px; }
tr:nth-child(2n) { background: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  body { color: #f0f6fc; background: #0d1117; }
  h1, h2 { border-color: #3d444d; }
  a { color: #4493f8; }
  code, pre { background: #151b23; }
  th, td { border-color: #3d444d; }
  tr:nth-child(2n) { background: #151b23; }
}
"""


def main(argv: list[str]) -> None:
    names = {"light": "first_screen.png", "dark": "first_screen_dark.png"}
    with (
        tempfile.NamedTemporaryFile("w", suffix=".html", dir=ROOT) as file,
        sync_playwright() as playwright,
        playwright.chromium.launch(
            executable_path=find_chromium(), args=["--no-sandbox"]
        ) as browser,
    ):
        file.write(page_of((ROOT / "README.md").read_text()))
        file.flush()
        for scheme, name in names.items():
            page = browser.new_page(viewport=SCREEN, color_scheme=scheme)
            page.goto(pathlib.Path(file.name).as_uri())
            page.screenshot(path=ROOT / "docs" / name)
            print(ROOT / "docs" / name)


def page_of(markdown: str) -> str:
    body = MarkdownIt("commonmark").enable("table").render(markdown)
    return f'<!doctype html><meta charset="utf-8"><style>{STYLE}</style><body>{body}</body>'


if __name__ == "__main__":
    app.run(main)
