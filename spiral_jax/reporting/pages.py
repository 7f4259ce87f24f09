"""The trace log of a run -> page files with every problem, an index of all, and a sample for the main file."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

from etils import epath
from markupsafe import Markup

from spiral_jax.reporting.problem import FLAGS, problem_page, split_problems
from spiral_jax.reporting.quotes import DEFINITION
from spiral_jax.reporting.render import escape_json, render
from spiral_jax.reporting.run import Run
from spiral_jax.workdir import WorkdirError, read_traces

FOLDER = "report"
_PAGE_FILE = re.compile(r"step_\d+(_\d+)?\.html")
_PAGE_BYTES = 8 * 2**20  # of a page file's traces, about: a problem is never cut


@dataclasses.dataclass
class Traces:
    """What the main file holds of the trace log.

    Attributes:
      index: for each page file: href, step, and of each of its problems cursor, id, right, of (aggregations that are
        right, of those verified; grpo: traces), flags (bits, in the order of `FLAGS`).
      sample: JSON of problem pages.
      gone: steps whose trace file was deleted while the report was made: the run goes on.
    """

    index: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    sample: list[str] = dataclasses.field(default_factory=list)
    sample_bytes: int = 0
    gone: list[int] = dataclasses.field(default_factory=list)

    @property
    def problems(self) -> int:
        return sum(len(page["cursor"]) for page in self.index)


def write_pages(run: Run, out: epath.Path, sample_bytes: int) -> Traces:
    """Writes OUT/report/step_*.html, in place of those of an earlier report.

    The sample are the first problems of each step in data order, whatever became of them. Each step may add as much as
    brings the sample up to its share of `sample_bytes`, so that where problems are large it comes from evenly spread
    steps.

    Raises:
      WorkdirError: a trace file is damaged or lacks what the pages need.
    """
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        if _PAGE_FILE.fullmatch(old.name):
            old.unlink()
    found, steps = Traces(), list(run.traces)
    for number, step in enumerate(steps):
        try:
            problems = _problems(run, step)
        except FileNotFoundError:
            found.gone.append(step)
            continue
        texts = [escape_json(json.dumps(problem, separators=(",", ":"))) for problem in problems]
        for text in texts:
            if found.sample_bytes + len(text) > sample_bytes * (number + 1) / len(steps):
                break
            found.sample.append(text)
            found.sample_bytes += len(text)
        _write_step(step, problems, texts, folder, found, steps, run)
    return found


def _problems(run: Run, step: int) -> list[dict[str, Any]]:
    """The problem pages of a step in data order."""
    groups = split_problems(read_traces(run.traces[step]))
    try:
        return sorted((problem_page(step, rows, run.config) for rows in groups), key=lambda problem: problem["cursor"])
    except KeyError as error:
        raise WorkdirError(
            f"{run.traces[step]}: its rows have no field {error}, as an older version wrote them. Delete the file to "
            "report the rest of the run."
        ) from error


def _write_step(
    step: int, problems: list[dict], texts: list[str], folder: epath.Path, found: Traces, steps: Sequence[int], run: Run
) -> None:
    """The page files of a step, and their entries in the index."""
    cuts = _cuts([len(text) for text in texts], _PAGE_BYTES)
    names = [_file_name(step, part) for part in range(len(cuts))]
    place = steps.index(step)
    around = [(f"step {other}", _file_name(other, 0)) for other in (*steps[max(0, place - 1) : place],
                                                                    *steps[place + 1 : place + 2])]  # fmt: skip
    for part, (start, stop) in enumerate(cuts):
        html = render(
            "step.html.j2",
            ["problems.js"],
            run=run.path.name,
            step=step,
            part=f"part {part + 1} of {len(cuts)}" if len(cuts) > 1 else "",
            count=stop - start,
            links=[(f"part {i + 1}", name) for i, name in enumerate(names) if i != part] + around,
            flags=FLAGS,
            definition=DEFINITION,
            sample=Markup(f"[{','.join(texts[start:stop])}]"),
        )
        (folder / names[part]).write_text(html, encoding="utf-8")
        found.index.append({"href": f"{FOLDER}/{names[part]}", "step": step} | index_columns(problems[start:stop]))


def index_columns(problems: Sequence[dict[str, Any]]) -> dict[str, list]:
    """What the list of problems shows and filters by, one list a column."""
    judged = [
        [(one["right"], one["verified"]) for one in problem["sets"]]
        or [(sum(trace["reward"] or 0 for trace in problem["search"]),
             sum(trace["reward"] is not None for trace in problem["search"]))]
        for problem in problems
    ]  # fmt: skip
    return {
        "cursor": [problem["cursor"] for problem in problems],
        "id": [problem["id"] for problem in problems],
        "right": [int(sum(right for right, _ in pairs)) for pairs in judged],
        "of": [sum(verified for _, verified in pairs) for pairs in judged],
        "flags": [sum(1 << i for i, flag in enumerate(FLAGS) if flag in problem["flags"]) for problem in problems],
    }


def _cuts(sizes: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Ranges of neighbours whose sizes add up to at most `most`, or that are one alone."""
    cuts, start, total = [], 0, 0
    for i, size in enumerate(sizes):
        if i > start and total + size > most:
            cuts.append((start, i))
            start, total = i, 0
        total += size
    return [*cuts, (start, len(sizes))] if sizes else []


def _file_name(step: int, part: int) -> str:
    return f"step_{step:06d}{f'_{part + 1}' if part else ''}.html"
