"""Writes what a run did as static pages, from its curves down to the reason of every advantage.

    python -m spiral_jax.report --workdir=W [--results=R/results.json] [--baseline=B/results.json]
    [--out=DIR]

W is the directory of a training run, also of one in progress, or of an evaluation. DIR (default: W)
gets report.html, one file of its own with a stated sample of the traces, and report/step_*.html
with all of them, opened by plain links: no server, no network. The evaluation shown is
W/results.json, or the newest of W/evaluations; `--results` names another, `--baseline` one that it
is compared with (of the same problems). W and DIR may be addresses that etils' epath knows (gs://,
s3://), where its packages for them are installed.
"""

from __future__ import annotations

import sys

from absl import app, flags
from etils import epath

from spiral_jax.core.errors import UserError
from spiral_jax.evaluation.comparison import check_comparable
from spiral_jax.reporting.main_page import write_report
from spiral_jax.reporting.read_run import read_run


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "directory of the run")
    flags.DEFINE_string(
        "results", None, "results.json of the evaluation to show, if not one in the workdir"
    )
    flags.DEFINE_string("baseline", None, "results.json that the evaluation is compared with")
    flags.DEFINE_string("out", None, "directory that the pages are written to, if not the workdir")
    flags.mark_flag_as_required("workdir")


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    try:
        report(given.workdir, given.out or given.workdir, given.results, given.baseline)
    except UserError as error:
        sys.exit(f"error: {error}")


def report(
    workdir: str, out: str, results: str | None = None, baseline: str | None = None
) -> epath.Path:
    """Writes the pages into `out` and prints where and of what; returns the path of report.html.

    Raises:
      WorkdirError, ResultsError, ConfigError: `workdir` or a results.json is missing, damaged or of
        another version, or the two results.json are not of the same problems.
    """
    run = read_run(workdir, results, baseline)
    if len(run.results) == 2:
        check_comparable(*reversed(run.results.values()))
    path, traces = write_report(run, epath.Path(out))
    held = (
        f"{traces.problems:,} problems of {len(run.traces)} steps in {len(traces.index)} page files"
    )
    print(
        f"{path}: {len(traces.sample):,} of {held}, {traces.sample_bytes / 2**20:.1f} MiB of traces"
    )
    return path


if __name__ == "__main__":
    define_flags()
    app.run(main)
