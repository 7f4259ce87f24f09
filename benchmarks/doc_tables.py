"""What docs/estimators.md and docs/reproduce.md say of the studies, from their JSON.

    python -m benchmarks.doc_tables      # writes it between the comments of both pages

A test holds the pages to it.
"""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

from absl import app

from benchmarks.markdown import table_lines
from benchmarks.readme_table import STUDIES, arm_cell

DOCS = pathlib.Path(__file__).parents[1] / "docs"
_PLACE = re.compile(r"<!-- (measured \w+|studies) -->\n.*?<!-- /", re.DOTALL)


def main(argv: list[str]) -> None:
    for name in ("estimators.md", "reproduce.md"):
        page = DOCS / name
        page.write_text(with_numbers(page.read_text()))


def with_numbers(text: str) -> str:
    """The page with what stands between its comments as it should be."""

    def filled(match: re.Match[str]) -> str:
        what = match[1]
        content = studies() if what == "studies" else measured(what.removeprefix("measured "))
        return f"<!-- {what} -->\n{content}\n<!-- /"

    return _PLACE.sub(filled, text)


def measured(arm: str) -> str:
    """What an arm has reached in the studies of the README that have it."""
    found = []
    for name, task in STUDIES.items():
        of_study = report(name)
        if arm in of_study["arms"]:
            found.append(f"{task} **{arm_cell(of_study, arm, of_study['measures'][0])}**")
    return ", ".join(found) + "." if found else "No study has this arm yet."


def studies() -> str:
    """A table of all studies: configuration, size, time, machine, commit."""
    heads = ("study", "CONFIG", "runs done", "hours, added up", "at once", "machine", "commit")
    rows = []
    for file in sorted((DOCS / "results").glob("study_*.json")):
        of_study, name = json.loads(file.read_text()), file.stem
        done = sum(run["state"] == "done" for run in of_study["runs"])
        rows.append(
            [
                f"[{of_study['title']}](results/{name}.md)",
                f"`configs/{name}.py`",
                f"{done} of {len(of_study['runs'])}",
                f"{of_study['seconds'] / 3600:.1f}",
                str(of_study.get("at_once", 1)),
                "; ".join(of_study["machines"]),
                ", ".join(commit[:7] for commit in of_study["commits"]),
            ]
        )
    return "\n".join(table_lines(heads, rows))


def report(name: str) -> dict[str, Any]:
    return json.loads((DOCS / "results" / f"{name}.json").read_text())


if __name__ == "__main__":
    app.run(main)
