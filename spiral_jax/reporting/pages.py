"""The trace log of a run -> page files with every problem, an index of all, and a sample for the
main file.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from etils import epath
from markupsafe import Markup

from spiral_jax.reporting.problem_page import FLAGS, problem_page, split_problems
from spiral_jax.reporting.quotes import DEFINITION
from spiral_jax.reporting.read_run import Run
from spiral_jax.reporting.render import embed, render
from spiral_jax.run.workdir import WorkdirError, read_traces

FOLDER = "report"
_PAGE_FILE = re.compile(r"step_\d+(_\d+)?\.html")
_PAGE_BYTES = 8 * 2**20  # of a page file's traces, about: a problem is never cut
_PARALLEL_BYTES = 32 * 2**20  # of trace files, packed: above, steps are worked on side by side


@dataclasses.dataclass
class Traces:
    """What the main file holds of the trace log.

    Attributes:
      index: for each page file: href, step, and of each of its problems cursor, id, right, of
        (aggregations that are right, of those verified; without sets: traces), flags (bits, in the
        order of `FLAGS`).
      sample: (key, JSON) of problem pages; the key is "STEP.CURSOR".
      gone: steps whose trace file was deleted while the report was made: the run goes on.
    """

    index: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    sample: list[tuple[str, Markup]] = dataclasses.field(default_factory=list)
    sample_bytes: int = 0
    gone: list[int] = dataclasses.field(default_factory=list)

    @property
    def problems(self) -> int:
        return sum(len(page["cursor"]) for page in self.index)


@dataclasses.dataclass(frozen=True)
class _Step:
    """One trace file and where its pages go; `links` are (label, file) of the steps around it."""

    run: str
    step: int
    file: epath.Path
    config: dict[str, Any]
    folder: epath.Path
    links: list[tuple[str, str]]
    sample_bytes: int  # what the step may give to the sample, but for one problem more


def write_pages(run: Run, out: epath.Path, sample_bytes: int) -> Traces:
    """Writes OUT/report/step_*.html, in place of those of an earlier report.

    The sample are the first problems of each step in data order, whatever became of them. Each step
    may add as much as brings the sample up to its share of `sample_bytes`, so that where problems
    are large it comes from evenly spread steps.

    Raises:
      WorkdirError: a trace file is damaged or lacks what the pages need.
    """
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        if _PAGE_FILE.fullmatch(old.name):
            old.unlink()
    found, names = Traces(), [(f"step {step}", _file_name(step, 0)) for step in run.traces]
    steps = [
        _Step(run.path.name, step, file, run.config, folder, names[max(0, i - 1) : i] + names[i + 1 : i + 2],
              sample_bytes // len(names))
        for i, (step, file) in enumerate(run.traces.items())
    ]  # fmt: skip
    for number, (step, made) in enumerate(zip(steps, _make(steps), strict=True), start=1):
        if made is None:
            found.gone.append(step.step)
            continue
        index, texts = made
        found.index += index
        for key, text in texts:
            if found.sample_bytes + len(text) > sample_bytes * number / len(steps):
                break
            found.sample.append((key, text))
            found.sample_bytes += len(text)
    return found


def _make(
    steps: Sequence[_Step],
) -> Iterator[tuple[list[dict[str, Any]], list[tuple[str, Markup]]] | None]:
    """`_write_step` of each, in order; on all cores where there is much to do."""
    if sum(step.file.stat().length for step in steps if step.file.exists()) < _PARALLEL_BYTES:
        yield from map(_write_step, steps)
        return
    with concurrent.futures.ProcessPoolExecutor(
        mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        yield from pool.map(_write_step, steps)


def _write_step(step: _Step) -> tuple[list[dict[str, Any]], list[tuple[str, Markup]]] | None:
    """Writes the page files of a step; returns their entries in the index, and the step's first
    problems.

    None: its trace file is gone.
    """
    try:
        problems = _problems(step)
    except FileNotFoundError:
        return None
    texts = [(f"{step.step}.{problem['cursor']}", embed(problem)) for problem in problems]
    cuts = _cuts([len(text) for _, text in texts], _PAGE_BYTES)
    names, index = [_file_name(step.step, part) for part in range(len(cuts))], []
    for part, (start, stop) in enumerate(cuts):
        listed = {"href": f"{FOLDER}/{names[part]}", "step": step.step} | index_columns(
            problems[start:stop]
        )
        html = render(
            "step.html.j2",
            ["problems.js"],
            run=step.run,
            step=step.step,
            part=f"part {part + 1} of {len(cuts)}" if len(cuts) > 1 else "",
            count=stop - start,
            links=[(f"part {i + 1}", name) for i, name in enumerate(names) if i != part]
            + step.links,
            flags=FLAGS,
            definition=DEFINITION,
            index=embed([listed]),
            sample=texts[start:stop],
        )
        (step.folder / names[part]).write_text(html, encoding="utf-8")
        index.append(listed)
    return index, list(_first(texts, step.sample_bytes))


def _first(texts: Iterable[tuple[str, Markup]], most: int) -> Iterator[tuple[str, Markup]]:
    """The first texts of up to `most` characters together, and one more."""
    total = 0
    for key, text in texts:
        yield key, text
        total += len(text)
        if total > most:
            return


def _problems(step: _Step) -> list[dict[str, Any]]:
    """The problem pages of a step in data order."""
    groups = split_problems(read_traces(step.file))
    try:
        pages = [problem_page(step.step, rows, step.config) for rows in groups]
    except KeyError as error:
        raise WorkdirError(
            f"{step.file}: its rows have no field {error}, as an older version wrote them. Delete the file to report "
            "the rest of the run."
        ) from error
    return sorted(pages, key=lambda problem: problem["cursor"])


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
        "flags": [
            sum(1 << i for i, flag in enumerate(FLAGS) if flag in problem["flags"])
            for problem in problems
        ],
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
