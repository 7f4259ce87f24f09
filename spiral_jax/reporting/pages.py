"""A run's trace log -> page files with every problem, an index of all, and a sample of them."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from etils import epath
from markupsafe import Markup

from spiral_jax.reporting.logged_problem import split_problems
from spiral_jax.reporting.problem_page import FLAGS, PageSettings, problem_page
from spiral_jax.reporting.quotes import DEFINITION
from spiral_jax.reporting.read_run import RecordedRun
from spiral_jax.reporting.render import embed, render
from spiral_jax.run.trace_log import read_traces
from spiral_jax.run.workdir import WorkdirError
from spiral_jax.verifier.rewards import Status

FOLDER = "report"
PAGE_BYTES = 8 * 2**20  # of a page file's traces, about: a problem is never cut
PARALLEL_BYTES = 32 * 2**20  # of trace files, packed: above, steps are worked on side by side
_PAGE_FILE = re.compile(r"step_\d+(_\d+)?\.html")


class Sampled(NamedTuple):
    """A problem that a file holds: its page as JSON; the key is "STEP.CURSOR"."""

    key: str
    text: Markup


@dataclasses.dataclass
class Traces:
    """What the main file holds of the trace log.

    Attributes:
      index: for each page file: href, step, and of each of its problems cursor, id, right, of
        (aggregations that are right, of those verified; without sets: traces), flags (bits, in the
        order of `FLAGS`).
      gone: steps whose trace file was deleted while the report was made: the run goes on.
    """

    index: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    sample: list[Sampled] = dataclasses.field(default_factory=list)
    sample_bytes: int = 0
    gone: list[int] = dataclasses.field(default_factory=list)

    @property
    def problems(self) -> int:
        return sum(len(page["cursor"]) for page in self.index)


@dataclasses.dataclass(frozen=True)
class _Step:
    """One trace file and how its pages are made.

    Attributes:
      links: (label, file) of the steps around it.
      page_bytes: of a page file's traces, about.
      sample_bytes: what the step may give to the sample, but for one problem more.
    """

    run: str
    step: int
    file: epath.Path
    settings: PageSettings
    folder: epath.Path
    links: list[tuple[str, str]]
    page_bytes: int
    sample_bytes: int


class _WrittenStep(NamedTuple):
    """The page files of a step, as entries of the index, and its first problems."""

    index: list[dict[str, Any]]
    first: list[Sampled]


def write_pages(
    run: RecordedRun, out: epath.Path, sample_bytes: int, page_bytes: int = PAGE_BYTES
) -> Traces:
    """Writes OUT/report/step_*.html, in place of those of an earlier report.

    The sample are the first problems of each step in data order, whatever became of them. Each step
    may add as much as brings the sample up to its share of `sample_bytes`, so that where problems
    are large it comes from evenly spread steps.

    Args:
      page_bytes: of the traces in a page file, about; a step with more has several.

    Raises:
      WorkdirError: a trace file is damaged or lacks what the pages need.
    """
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        if _PAGE_FILE.fullmatch(old.name):
            old.unlink()
    traces, steps = Traces(), _steps(run, folder, sample_bytes, page_bytes)
    for number, (step, written) in enumerate(zip(steps, _write_steps(steps), strict=True), start=1):
        if written is None:
            traces.gone.append(step.step)
            continue
        traces.index += written.index
        for sampled in written.first:
            if traces.sample_bytes + len(sampled.text) > sample_bytes * number / len(steps):
                break
            traces.sample.append(sampled)
            traces.sample_bytes += len(sampled.text)
    return traces


def _steps(run: RecordedRun, folder: epath.Path, sample_bytes: int, page_bytes: int) -> list[_Step]:
    settings = PageSettings.from_plain(run.config)
    metrics = {row["step"]: row for row in run.metrics}
    links = [(f"step {step}", _file_name(step, 0)) for step in run.traces]
    steps = []
    for i, (step, file) in enumerate(run.traces.items()):
        around = links[max(0, i - 1) : i] + links[i + 1 : i + 2]
        steps.append(
            _Step(
                run=run.path.name,
                step=step,
                file=file,
                settings=settings.at_step(metrics.get(step, {})),
                folder=folder,
                links=around,
                page_bytes=page_bytes,
                sample_bytes=sample_bytes // len(links),
            )
        )
    return steps


def _write_steps(steps: Sequence[_Step]) -> Iterator[_WrittenStep | None]:
    """`_write_step` of each, in order; on all cores where there is much to do."""
    if sum(step.file.stat().length for step in steps if step.file.exists()) < PARALLEL_BYTES:
        yield from map(_write_step, steps)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(mp_context=context) as pool:
        yield from pool.map(_write_step, steps)


def _write_step(step: _Step) -> _WrittenStep | None:
    """Writes the page files of a step. None: its trace file is gone."""
    try:
        problems = _problems(step)
    except FileNotFoundError:
        return None
    texts = [Sampled(f"{step.step}.{page['cursor']}", embed(page)) for page in problems]
    cuts = _cuts([len(sampled.text) for sampled in texts], step.page_bytes)
    names = [_file_name(step.step, part) for part in range(len(cuts))]
    index = []
    for part, (start, stop) in enumerate(cuts):
        entry = {"href": f"{FOLDER}/{names[part]}", "step": step.step}
        entry |= index_columns(problems[start:stop])
        others = [(f"part {i + 1}", name) for i, name in enumerate(names) if i != part]
        html = render(
            "step.html.j2",
            ["problems.js"],
            run=step.run,
            step=step.step,
            part=f"part {part + 1} of {len(cuts)}" if len(cuts) > 1 else "",
            count=stop - start,
            links=others + step.links,
            flags=FLAGS,
            definition=DEFINITION,
            index=embed([entry]),
            sample=texts[start:stop],
        )
        (step.folder / names[part]).write_text(html, encoding="utf-8")
        index.append(entry)
    return _WrittenStep(index, list(_first(texts, step.sample_bytes)))


def _first(texts: Iterable[Sampled], most: int) -> Iterator[Sampled]:
    """The first texts of up to `most` characters together, and one more."""
    total = 0
    for sampled in texts:
        yield sampled
        total += len(sampled.text)
        if total > most:
            return


def _problems(step: _Step) -> list[dict[str, Any]]:
    """The problem pages of a step in data order."""
    groups = split_problems(read_traces(step.file))
    try:
        pages = [problem_page(step.step, rows, step.settings) for rows in groups]
    except KeyError as error:
        raise WorkdirError(
            f"{step.file}: its rows have no field {error}, as an older version wrote them. Delete "
            "the file to report the rest of the run."
        ) from error
    return sorted(pages, key=lambda problem: problem["cursor"])


def index_columns(problems: Sequence[dict[str, Any]]) -> dict[str, list]:
    """What the list of problems shows and filters by, one list a column."""
    columns: dict[str, list] = {"cursor": [], "id": [], "right": [], "of": [], "flags": []}
    for problem in problems:
        right, verified = _count_right(problem)
        bits = sum(1 << i for i, flag in enumerate(FLAGS) if flag in problem["flags"])
        columns["cursor"].append(problem["cursor"])
        columns["id"].append(problem["id"])
        columns["right"].append(right)
        columns["of"].append(verified)
        columns["flags"].append(bits)
    return columns


def _count_right(problem: dict[str, Any]) -> tuple[int, int]:
    """(right, verified) aggregations of a problem page; without sets, search traces."""
    if sets := problem["sets"]:
        return sum(page["right"] for page in sets), sum(page["verified"] for page in sets)
    verified = [trace for trace in problem["search"] if trace["reward"] is not None]
    return sum(trace["verdict"] == Status.CORRECT for trace in verified), len(verified)


def _cuts(sizes: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Ranges of neighbours whose sizes add up to at most `most`, or that are one alone."""
    if not sizes:
        return []
    cuts, start, total = [], 0, 0
    for i, size in enumerate(sizes):
        if i > start and total + size > most:
            cuts.append((start, i))
            start, total = i, 0
        total += size
    return [*cuts, (start, len(sizes))]


def _file_name(step: int, part: int) -> str:
    return f"step_{step:06d}{f'_{part + 1}' if part else ''}.html"
