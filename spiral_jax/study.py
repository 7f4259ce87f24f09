"""Runs a study: arms x seeds, and reports what came out.

    python -m spiral_jax.study --config=configs/study_two_halves.py --workdir=W            # run what is missing, report
    python -m spiral_jax.study --config=configs/study_two_halves.py --workdir=W --report [--out=docs/study]   # report
    python -m spiral_jax.study --config=configs/study_two_halves_budget.py --workdir=W --sweep=12    # and 12 by optuna
    ... --at_once=2    # two runs side by side, with half of the cores each

Each run is an ordinary training in a process of its own, W/runs/ARM/seed_0, and an ordinary
evaluation of what it has trained, W/evaluations/ARM/seed_0/step_000040; what they print is in
W/logs. Then the arms of `cross` read each other's search, W/evaluations/SEARCHER+READER, and the
next seed begins. The same command goes on where the study was stopped or killed, since both do, and
tries failed runs again. A run that fails is recorded in W/journal.jsonl, reported, and does not end
the others; if it has a checkpoint, that is evaluated.

Written: OUT.md, OUT.json, OUT_*.png (default: W/report). The exit status is 1 if a run failed or
one of the study's claims does not hold.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from types import ModuleType
from typing import IO

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict

from spiral_jax.core.config import ConfigError, digest_of
from spiral_jax.core.errors import UserError
from spiral_jax.evaluation.measures import columns
from spiral_jax.evaluation.results import read_results
from spiral_jax.run.checkpoint import CheckpointError
from spiral_jax.run.start import find_trained
from spiral_jax.run.workdir import WorkdirError, open_workdir
from spiral_jax.studies import report
from spiral_jax.studies.cells import value_of
from spiral_jax.studies.design import BASE, EVALUATION, SWEEP_SEED, Study, load_study
from spiral_jax.studies.directory import StudyDirectory, pair_name, read_metrics
from spiral_jax.studies.gather import gather
from spiral_jax.studies.processes import Processes

_ENVIRONMENT = (
    "import json; from spiral_jax.run import environment; print(json.dumps(environment.describe()))"
)


def define_flags() -> None:
    flags.DEFINE_string("config", None, "the study: a file of configs/", required=True)
    flags.DEFINE_string("workdir", None, "directory of the study", required=True)
    flags.DEFINE_integer(
        "at_once", 1, "runs side by side, each with its share of the cores; not on accelerators"
    )
    flags.DEFINE_bool("report", False, "run nothing, only report")
    flags.DEFINE_integer(
        "sweep", 0, "let optuna propose so many arms beside the listed ones", lower_bound=0
    )
    flags.DEFINE_string(
        "out", None, "the report's path without its ending; default: WORKDIR/report"
    )


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    logging.set_verbosity(logging.ERROR)  # orbax warns that it only reads
    jax.config.update("jax_platforms", "cpu")  # of this process: the accelerator is the runs'
    try:
        study = load_study(given.config)
        plain = study.plain()
        path = open_workdir(given.workdir, plain, digest_of(plain))
        directory = StudyDirectory(path)
        if given.sweep or directory.sweep.exists():
            study = study.with_proposed(_sweep_module().proposed(directory))
        if not given.report:
            study = run_study(study, directory, Processes(given.at_once), given.sweep)
        found = gather(study, directory)
        out = pathlib.Path(given.out) if given.out else path / "report"
        print(report.write(study, found, out), flush=True)
    except UserError as error:
        sys.exit(f"error: {error}")
    broken = [row["claim"] for row in found["claims"] if row["verdict"] != "holds"]
    failed = [f"{run['arm']} seed {run['seed']}" for run in found["runs"] if run["state"] != "done"]
    pairs = [row for row in found["cross"] if not row["measures"] or row.get("errors")]
    failed += [f"search of {row['searcher']}, read by {row['reader']}" for row in pairs]
    if broken or failed:
        sys.exit(
            "\n".join(
                [*(f"claim: {claim}" for claim in broken), *(f"not done: {run}" for run in failed)]
            )
        )


def run_study(
    study: Study, directory: StudyDirectory, processes: Processes, proposals: int = 0
) -> Study:
    """Runs what is missing, and a sweep over `proposals` arms. Returns when every run is done or
    has failed: the study with the arms of its sweep.

    Raises:
      ConfigError: several runs at once on an accelerator.
    """
    with (
        _alone(directory) as lock,
        tempfile.TemporaryDirectory(prefix="spiral_jax_programs_") as programs,
        _stoppable(),
    ):
        directory.journal.cut_back(sys.maxsize)  # repairs a torn last line
        environment = _environment()
        if processes.at_once > 1 and "cpu" not in environment["devices"]:
            raise ConfigError(
                f"--at_once={processes.at_once}: must be 1 on {environment['devices']}; runs share a CPU's cores only."
            )
        runner = Runner(study, directory, environment, lock, programs, processes)
        runs, pairs = list(enumerate(study.runs, start=1)), list(enumerate(study.pairs, start=1))
        for seed in study.seeds:
            processes.each(
                functools.partial(runner.run_arm, arm, seed, f"{number}/{len(runs)}")
                for number, (arm, of) in runs
                if of == seed
            )
            processes.each(
                functools.partial(runner.run_pair, pair, seed, f"pair {number}/{len(pairs)}")
                for number, (pair, of) in pairs
                if of == seed
            )
        if proposals:
            study = _sweep_module().sweep(study, directory, proposals, runner.value_of)
    return study


def _sweep_module() -> ModuleType:
    """`studies.sweep`, whose library is optional. Raises ConfigError: it is not installed."""
    try:
        return importlib.import_module("spiral_jax.studies.sweep")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"a sweep needs {error.name}: pip install -r requirements-sweep.txt"
        ) from error


@dataclasses.dataclass(frozen=True)
class Runner:
    """Runs the commands of a study.

    Attributes:
      environment: `environment.describe` of the runs.
      lock: the study's, which its processes hold too.
      programs: directory where they find each other's compiled programs. It lives as long as the
        study's command: what is compiled for one machine's CPUs may not run on another's.
      processes: how many at once.
      guard: of the journal.
    """

    study: Study
    directory: StudyDirectory
    environment: dict
    lock: IO
    programs: str
    processes: Processes
    guard: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def run_arm(self, arm: str, seed: int, number: str) -> None:
        """Trains and evaluates one run, as far as that was not done before; `number`: of it, for
        what is printed.
        """
        print(f"[{number}] {arm}, seed {seed}", flush=True)
        step = 0
        if arm != BASE:
            c, workdir = self.study.experiments[arm], self.directory.run(arm, seed)
            step = _step(workdir)
            if not _ended(c, workdir, step):
                code = self._stage(
                    arm, seed, "train", f"--config={self.study.file}:{arm}", f"--workdir={workdir}"
                )
                step = _step(workdir)
                if step is None or (code == 0 and not _ended(c, workdir, step)):
                    return  # it failed before its first checkpoint, or was told to stop
        self._evaluate(arm, seed, step, *self._policy("model.init_from", arm, seed, step))

    def run_pair(self, pair: tuple[str, str], seed: int, number: str) -> None:
        """Evaluates the search of one arm under the aggregator of another, once both have ended."""
        print(f"[{number}] search of {pair[0]}, read by {pair[1]}, seed {seed}", flush=True)
        steps = [0 if arm == BASE else _step(self.directory.run(arm, seed)) for arm in pair]
        for arm, step in zip(pair, steps, strict=True):
            if arm != BASE and not _ended(
                self.study.experiments[arm], self.directory.run(arm, seed), step
            ):
                return
        reader = self._policy("model.init_from", pair[1], seed, steps[1])
        searcher = self._policy("eval.searcher", pair[0], seed, steps[0]) or [
            f"--config.eval.searcher={BASE}"
        ]
        self._evaluate(pair_name(*pair), seed, steps[1], *reader, *searcher)

    def value_of(self, study: Study, arm: str) -> float | None:
        """What the study's first measure is for an arm that a sweep has proposed to it; None: the
        arm failed.
        """
        dataclasses.replace(self, study=study).run_arm(
            arm, SWEEP_SEED, f"sweep, arm {len(study.proposed)}"
        )
        files = self.directory.evaluations(arm, SWEEP_SEED)
        return (
            value_of(columns(read_results(files[-1])["records"]), study.s.measures[0])
            if files
            else None
        )

    def _policy(self, field: str, arm: str, seed: int, step: int) -> list[str]:
        """The flag that names what an arm has trained; none for the base."""
        return [] if arm == BASE else [f"--config.{field}={self.directory.run(arm, seed)}@{step}"]

    def _evaluate(self, name: str, seed: int, step: int, *policies: str) -> None:
        evaluation = self.directory.evaluation(name, seed, step)
        if not (evaluation / "results.json").exists():
            config = f"--config={self.study.file}:{EVALUATION}"
            self._stage(name, seed, "evaluate", config, f"--workdir={evaluation}", *policies)

    def _stage(self, name: str, seed: int, stage: str, *arguments: str) -> int:
        """One command in a process of its own; its outcome goes to the journal. Returns its exit
        status.
        """
        log = self.directory.log(name, seed, stage)
        log.parent.mkdir(exist_ok=True)
        command = [sys.executable, "-m", f"spiral_jax.{stage}", *arguments, f"--config.seed={seed}"]
        environment = {"JAX_COMPILATION_CACHE_DIR": self.programs} | os.environ
        start = time.monotonic()
        with log.open("ab") as output:
            code = self.processes.run(command, output, environment, pass_fds=(self.lock.fileno(),))
        seconds = round(time.monotonic() - start, 1)
        row = {"arm": name, "seed": seed, "stage": stage, "returncode": code, "seconds": seconds}
        row |= {"at_once": self.processes.at_once, "environment": self.environment}
        if code:
            row["error"] = _last_words(log, code)
        with self.guard:
            self.directory.journal.append({"step": len(self.directory.journal.read())} | row)
        failed = f", failed: {row['error']}" if code else ""
        print(f"    {name}, seed {seed}, {stage}: {seconds:.0f} s{failed}", flush=True)
        return code


def _step(workdir: pathlib.Path) -> int | None:
    """Of the run's newest checkpoint; None: there is none."""
    try:
        return find_trained(workdir, None).step
    except (WorkdirError, CheckpointError):
        return None


def _ended(c: ConfigDict, workdir: pathlib.Path, step: int | None) -> bool:
    """Whether the checkpoint is where the experiment ends: all steps are done, or its tokens are
    spent.
    """
    if step is None:
        return False
    tokens = sum(row["sampling/generated_tokens"] for row in read_metrics(workdir)[:step])
    return step >= c.train.steps or 0 < c.train.max_sampled_tokens <= tokens


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM ends a study as Ctrl-C does."""
    before = signal.signal(
        signal.SIGTERM, lambda *_: sys.exit("told to stop; the same command goes on")
    )
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _last_words(log: pathlib.Path, code: int) -> str:
    """What a failed command said last: its `error:` line if it has one, in at most 500 characters."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = (
        [line for line in lines[-50:] if line.startswith("error:")] or lines[-1:] or ["(nothing)"]
    )
    return (f"killed by signal {-code}; " if code < 0 else "") + said[-1][:500]


@contextlib.contextmanager
def _alone(directory: StudyDirectory) -> Iterator[IO]:
    """The study's lock. Its processes hold it too, so one that outlives a killed study keeps the
    next one out.
    """
    with (directory.path / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WorkdirError(
                f"--workdir={directory.path}: another study, or a run that a killed one has left, is at work there. "
                "Wait for it, or end it."
            ) from None
        yield lock


def _environment() -> dict:
    """`environment.describe` of the runs, asked in a process like theirs."""
    done = subprocess.run(
        [sys.executable, "-c", _ENVIRONMENT], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise WorkdirError(f"JAX does not start here: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    define_flags()
    app.run(main)
