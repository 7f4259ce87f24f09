"""Runs a study: arms x seeds, and reports what came out.

    python -m spiral_jax.study --config=configs/study_two_halves.py --workdir=W

runs what is missing, and reports. Further flags:

    --report [--out=FILE]          run nothing, only report; ours lie in docs/results/
    --at_once=2                    two runs side by side, with half of the cores each
    --arms=A,B --seeds=0           run only these; the report has all that is there
    --sweep=12                     twelve more arms, proposed by optuna, of which those that stay
                                   behind are given up (with --config=configs/study_balance.py,
                                   which has a `propose`)

    python -m spiral_jax.study --across=A.json,B.json,C.json --best=ARM --out=OUT

compares the arms of several studies over all of their tasks, from what --report has written.

Each run is an ordinary training in a process of its own, W/runs/ARM/seed_0, and an ordinary
evaluation of what it has trained, W/evaluations/ARM/seed_0/step_000040; what they print is in
W/logs. Then the arms of `cross` read each other's search, W/evaluations/SEARCHER+READER. With
`equal_operations` each run is evaluated once more, W/evaluations/ARM@equal_operations, where it had
spent as many operations as the others, unless it ended there. Then the next seed begins. The
same command goes on where the study was stopped or killed, since all of these do, and tries failed
runs again. A run that fails is recorded in W/journal.jsonl, reported, and does not end the others;
if it has a checkpoint, that is evaluated.

Written: OUT.md, OUT.json, OUT_*.png (default: W/report). The exit status is 1 if a run failed or
one of the study's claims does not hold.
"""

from __future__ import annotations

import pathlib
import sys

import jax
from absl import app, flags, logging

from spiral_jax.core.command import refuse_arguments, run_command
from spiral_jax.core.config import digest_of
from spiral_jax.core.errors import UserError
from spiral_jax.run.workdir import open_workdir
from spiral_jax.studies.across import write_comparison
from spiral_jax.studies.design import load_study
from spiral_jax.studies.directory import StudyDirectory
from spiral_jax.studies.gather import gather
from spiral_jax.studies.processes import Processes
from spiral_jax.studies.runner import run_study, sweep_module
from spiral_jax.studies.text import list_failures, write_study


def define_flags() -> None:
    flags.DEFINE_string("config", None, "the study: a file of configs/")
    flags.DEFINE_string("workdir", None, "directory of the study")
    flags.DEFINE_integer(
        "at_once", 1, "runs side by side, each with its share of the cores, and of a GPU's memory"
    )
    flags.DEFINE_list("arms", [], "run only these arms; default: all")
    flags.DEFINE_list("seeds", [], "run only these seeds; default: all")
    flags.DEFINE_bool("report", False, "run nothing, only report")
    flags.DEFINE_integer(
        "sweep", 0, "let optuna propose so many arms beside the listed ones", lower_bound=0
    )
    flags.DEFINE_string(
        "out", None, "the report's path without its ending; default: WORKDIR/report"
    )
    flags.DEFINE_list("across", None, "compare these studies' reports, files named *.json")
    flags.DEFINE_string("best", None, "arm of --across that is compared with each other one")


def main(argv: list[str]) -> None:
    values = flags.FLAGS
    refuse_arguments(argv)
    for name in ("best", "out") if values.across else ("config", "workdir"):
        if not getattr(values, name):
            raise app.UsageError(f"--{name} is required" + " with --across" * bool(values.across))
    logging.set_verbosity(logging.ERROR)  # orbax warns that it only reads
    jax.config.update("jax_platforms", "cpu")  # of this process: the accelerator is the runs'
    try:
        failures = compare(values) if values.across else run(values)
    except UserError as error:
        sys.exit(f"error: {error}")
    if failures:
        sys.exit("\n".join(failures))


def run(values: flags.FlagValues) -> list[str]:
    """Runs what is missing of one study, and reports; returns what has failed, a line each."""
    study = load_study(values.config)
    plain = study.plain()
    path = open_workdir(values.workdir, plain, digest_of(plain))
    directory = StudyDirectory(path)
    if values.sweep or directory.sweep.exists():
        study = study.with_proposed(sweep_module().proposed(directory))
    if not values.report:
        chosen = study.chosen(values.arms, values.seeds)
        study = run_study(study, directory, Processes(values.at_once), chosen, values.sweep)
    swept = sweep_module().outcome(directory) if directory.sweep.exists() else None
    gathered = gather(study, directory, swept)
    out = pathlib.Path(values.out) if values.out else path / "report"
    print(write_study(study, gathered, out), flush=True)
    return list_failures(gathered)


def compare(values: flags.FlagValues) -> list[str]:
    """Compares the arms of several studies, from their reports; nothing can fail."""
    files = [pathlib.Path(file) for file in values.across]
    print(write_comparison(files, values.best, pathlib.Path(values.out)), flush=True)
    return []


if __name__ == "__main__":
    define_flags()
    run_command(main)
