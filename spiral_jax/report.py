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

from absl import flags

from spiral_jax.core.command import refuse_arguments, run_command
from spiral_jax.core.errors import UserError
from spiral_jax.reporting.main_page import write_report


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "directory of the run", required=True)
    flags.DEFINE_string(
        "results", None, "results.json of the evaluation to show, if not one in the workdir"
    )
    flags.DEFINE_string("baseline", None, "results.json that the evaluation is compared with")
    flags.DEFINE_string("out", None, "directory that the pages are written to, if not the workdir")


def main(argv: list[str]) -> None:
    values = flags.FLAGS
    refuse_arguments(argv)
    out = values.out or values.workdir
    try:
        print(write_report(values.workdir, out, values.results, values.baseline))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    define_flags()
    run_command(main)
