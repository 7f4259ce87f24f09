"""The table of results of README.md, from the studies' JSON.

    python -m benchmarks.readme_table      # writes it between the two comments

A test holds the README to it.
"""

from __future__ import annotations

import json
import pathlib

from absl import app

from benchmarks.markdown import table_lines

ROOT = pathlib.Path(__file__).parents[1]
BEGIN, END = "<!-- results -->\n", "<!-- /results -->"
ARMS = {
    "base": "base",
    "marginal_mean": "**SPIRAL**",
    "paragator": "ParaGator",
    "aggregator_only": "aggregator only",
    "grpo": "GRPO",
}
STUDIES = {
    "study_two_halves": "two halves",
    "study_end_digit": "end digit",
    "study_estimators_three_parts": "three parts, mean reward, one or two seeds",
}


def main(argv: list[str]) -> None:
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text()))


def with_table(text: str) -> str:
    """The README with the table as it should be."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + "\n".join(table()) + "\n" + END + rest.partition(END)[2]


def table() -> list[str]:
    heads = ("task", *ARMS.values(), "best possible", "configuration")
    return table_lines(heads, [row(*study) for study in STUDIES.items()])


def row(name: str, task: str) -> list[str]:
    report = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())
    measure, optimum = report["measures"][0], report["optimum"]
    arms = [arm_cell(report, arm, measure) for arm in ARMS]
    best = cell(optimum["aggregated"]) if optimum else ""
    return [f"[{task}](docs/results/{name}.md)", *arms, best, f"`{name}.py`"]


def arm_cell(report: dict, arm: str, measure: str) -> str:
    """An arm's measure, and whether all of its runs stopped before their tokens were spent."""
    states = {run["state"] for run in report["runs"] if run["arm"] == arm and "measures" in run}
    stopped = ", *stopped*" if states == {"failed"} else ""
    return cell(report["arms"][arm]["measures"][measure]) + stopped


def cell(estimate: dict) -> str:
    mean, low, high = (100 * estimate[key] for key in ("mean", "low", "high"))
    return f"{mean:.0f} [{low:.0f}, {high:.0f}]"


if __name__ == "__main__":
    app.run(main)
