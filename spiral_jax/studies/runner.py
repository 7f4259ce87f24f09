"""Runs a study: every run and pair that is missing, in processes of their own."""

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
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import IO, Any

from spiral_jax.core.config import ConfigError
from spiral_jax.evaluation.results import read_results
from spiral_jax.run.checkpoint import CheckpointError
from spiral_jax.run.preemption import exit_code, second_interrupt_ends
from spiral_jax.run.start import find_trained
from spiral_jax.run.workdir import WorkdirError
from spiral_jax.studies.cells import columns_with, value_of
from spiral_jax.studies.design import BASE, EVALUATION, SWEEP_SEED, Pair, Study
from spiral_jax.studies.directory import StudyDirectory, pair_name, reading_name
from spiral_jax.studies.history import is_of_other_weights
from spiral_jax.studies.operations import Reading, find_readings
from spiral_jax.studies.processes import Processes
from spiral_jax.studies.rungs import GivesUp, Watch

_DESCRIBE = (
    "import json; from spiral_jax.run import provenance; print(json.dumps(provenance.describe()))"
)
_MOST_SAID = 500  # characters of what a failed command said
_SHARED_MEMORY = 0.85  # of a GPU's memory, for runs that share it; the rest is for CUDA's libraries


def run_study(
    study: Study,
    directory: StudyDirectory,
    processes: Processes,
    chosen: Sequence[tuple[str, int]],
    proposals: int = 0,
) -> Study:
    """Runs what is missing of the `chosen` runs, and a sweep over `proposals` arms.

    Returns:
      The study with the arms of its sweep, when every run is done or has failed.

    Raises:
      ConfigError: several runs at once on a device that they cannot share.
    """
    with (
        _lock(directory) as lock,
        tempfile.TemporaryDirectory(prefix="spiral_jax_programs_") as programs,
        _exit_when_told(processes),
    ):
        directory.journal.cut_back(sys.maxsize)  # repairs a torn last line
        environment = _describe_environment()
        share = share_of_device(environment["devices"], processes.at_once)
        runner = Runner(study, directory, environment, lock, programs, share, processes, chosen)
        for seed in study.seeds:
            processes.each(runner.runs_of(seed))
            processes.each(runner.pairs_of(seed))
            processes.each(runner.readings_of(seed))
        if proposals:
            study = sweep_module().sweep(study, directory, proposals, processes, runner.value_of)
    return study


def share_of_device(devices: str, at_once: int) -> dict[str, str]:
    """The variables with which `at_once` runs share the devices that `provenance.describe` names.

    A process of JAX takes three quarters of a GPU's memory when it starts, so that several of them
    must be told how much is theirs.

    Raises:
      ConfigError: a TPU belongs to one process.
    """
    if at_once == 1 or "(cpu)" in devices:
        return {}
    if "(gpu)" in devices:
        return {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{_SHARED_MEMORY / at_once:.3f}"}
    raise ConfigError(
        f"--at_once={at_once}: must be 1 on {devices}; runs can share CPUs and GPUs only."
    )


def sweep_module() -> ModuleType:
    """`studies.sweep`, whose library is optional. Raises ConfigError: it is not installed."""
    try:
        return importlib.import_module("spiral_jax.studies.sweep")
    except ModuleNotFoundError as error:
        raise ConfigError(f'a sweep needs {error.name}: pip install ".[sweep]"') from error


@dataclasses.dataclass(frozen=True)
class Runner:
    """Runs the commands of a study.

    Attributes:
      environment: `provenance.describe` of the runs.
      lock: the study's, which its processes hold too.
      programs: directory where they find each other's compiled programs. It lives as long as the
        study's command: what is compiled for one machine's CPUs may not run on another's.
      share: `share_of_device` of its processes.
      processes: how many at once.
      chosen: (arm, seed) of the runs that are wanted.
      guard: of the journal.
    """

    study: Study
    directory: StudyDirectory
    environment: dict[str, Any]
    lock: IO
    programs: str
    share: dict[str, str]
    processes: Processes
    chosen: Sequence[tuple[str, int]]
    guard: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def runs_of(self, seed: int) -> Iterator[functools.partial[None]]:
        """`run_arm` of every chosen arm that has the seed."""
        for number, (arm, run_seed) in enumerate(self.chosen, start=1):
            if run_seed == seed:
                yield functools.partial(self.run_arm, arm, seed, f"{number}/{len(self.chosen)}")

    def pairs_of(self, seed: int) -> Iterator[functools.partial[None]]:
        """`run_pair` of every pair that has the seed."""
        pairs = self.study.pairs
        for number, pair in enumerate(pairs, start=1):
            if pair.seed == seed:
                yield functools.partial(self.run_pair, pair, f"pair {number}/{len(pairs)}")

    def readings_of(self, seed: int) -> Iterator[functools.partial[None]]:
        """`run_reading` of every chosen run with the seed that is to be read before its end.

        A run that was not evaluated where it ended is not read elsewhere either.
        """
        if not self.study.equal_operations:
            return
        for row in find_readings(self.study, self.directory).rows:
            is_wanted = row.seed == seed and (row.arm, seed) in self.chosen
            if not is_wanted or row.step is None or not self.directory.evaluations(row.arm, seed):
                continue
            reading = self.directory.reading(row.arm, seed, row.step)
            trained = f"{self.directory.run(row.arm, seed)}@{row.step}"
            if not reading.exists() or is_of_other_weights(reading.parent, trained):
                yield functools.partial(self.run_reading, row)

    def run_arm(self, arm: str, seed: int, number: str, gives_up: GivesUp | None = None) -> None:
        """Trains and evaluates one run, as far as that was not done before.

        Args:
          number: is printed with it.
          gives_up: decides while it trains whether it is ended there, and not evaluated.
        """
        print(f"[{number}] {arm}, seed {seed}", flush=True)
        if arm == BASE:
            self._evaluate(arm, seed, 0)
            return
        workdir = self.directory.run(arm, seed)
        step = _newest_step(workdir)
        if not self._has_ended(arm, seed, step):
            config = f"--config={self.study.file}:{arm}"
            experiment, watch = self.study.experiments[arm], None
            if gives_up:
                watch = Watch(self.directory, arm, seed, experiment, gives_up)
            code = self._run_command(arm, seed, "train", config, f"--workdir={workdir}", ends=watch)
            step = _newest_step(workdir)
            was_told = code == 0 or watch and watch.given_up
            told_to_stop = was_told and not self._has_ended(arm, seed, step)
            if step is None or told_to_stop:
                return  # or it failed before its first checkpoint
        self._evaluate(arm, seed, step, f"{workdir}@{step}")

    def run_pair(self, pair: Pair, number: str) -> None:
        """Evaluates the search of one arm under the aggregator of another, once both have ended."""
        searcher, reader, seed = pair
        print(f"[{number}] search of {searcher}, read by {reader}, seed {seed}", flush=True)
        steps = {BASE: 0}
        for arm in (searcher, reader):
            if arm != BASE:
                steps[arm] = _newest_step(self.directory.run(arm, seed))
                if not self._has_ended(arm, seed, steps[arm]):
                    return
        trained = {arm: f"{self.directory.run(arm, seed)}@{steps[arm]}" for arm in steps}
        init_from = trained[reader] if reader != BASE else ""
        searched = trained[searcher] if searcher != BASE else BASE
        self._evaluate(pair_name(searcher, reader), seed, steps[reader], init_from, searched)

    def run_reading(self, row: Reading) -> None:
        """Evaluates a run where it had spent what all have."""
        arm, seed, step = row.arm, row.seed, row.step
        print(f"[at equal operations] {arm}, seed {seed}, step {step}", flush=True)
        self._evaluate(reading_name(arm), seed, step, f"{self.directory.run(arm, seed)}@{step}")

    def value_of(self, study: Study, arm: str, gives_up: GivesUp) -> float | None:
        """The study's first measure of an arm that a sweep has proposed.

        None: the arm failed, or was given up. `study` is the one with that arm.
        """
        runner = dataclasses.replace(self, study=study)
        runner.run_arm(arm, SWEEP_SEED, f"sweep, arm {len(study.proposed)}", gives_up)
        files = self.directory.evaluations(arm, SWEEP_SEED)
        if not files:
            return None
        records = read_results(files[-1])["records"]
        return value_of(columns_with(records, study.measures), study.measures[0])

    def _has_ended(self, arm: str, seed: int, step: int | None) -> bool:
        """Whether the newest checkpoint is where the arm's experiment ends."""
        if step is None:
            return False
        return self.study.experiments[arm].has_ended(self.directory.metrics(arm, seed)[:step])

    def _evaluate(
        self, name: str, seed: int, step: int, init_from: str = "", searcher: str = ""
    ) -> None:
        """Evaluates an arm or a pair, if that was not done with the same weights.

        Args:
          init_from, searcher: config.model.init_from and config.eval.searcher; "" = the file's.
        """
        evaluation = self.directory.evaluation(name, seed, step)
        if is_of_other_weights(evaluation, init_from, searcher):
            kept = self.directory.set_aside(evaluation)
            print(f"    {name}, seed {seed}: was trained anew; set aside: {kept}", flush=True)
        if not (evaluation / "results.json").exists():
            arguments = [f"--config={self.study.file}:{EVALUATION}", f"--workdir={evaluation}"]
            named = {"model.init_from": init_from, "eval.searcher": searcher}
            arguments += [f"--config.{field}={run}" for field, run in named.items() if run]
            self._run_command(name, seed, "evaluate", *arguments)

    def _run_command(
        self,
        name: str,
        seed: int,
        stage: str,
        *arguments: str,
        ends: Callable[[], bool] | None = None,
    ) -> int:
        """One command in a process of its own, noted in the journal; returns its exit status."""
        log = self.directory.log(name, seed, stage)
        log.parent.mkdir(exist_ok=True)
        command = [sys.executable, "-m", f"spiral_jax.{stage}", *arguments, f"--config.seed={seed}"]
        environment = {"JAX_COMPILATION_CACHE_DIR": self.programs} | self.share | os.environ
        start = time.monotonic()
        with log.open("ab") as output:
            fds = (self.lock.fileno(),)
            code = self.processes.run(command, output, environment, fds, ends)
        seconds = round(time.monotonic() - start, 1)
        row = {
            "arm": name,
            "seed": seed,
            "stage": stage,
            "returncode": code,
            "seconds": seconds,
            "at_once": self.processes.at_once,
            "environment": self.environment,
        }
        if code:
            row["error"] = _last_words(log, code)
        with self.guard:
            self.directory.journal.append({"step": len(self.directory.journal.read())} | row)
        failed = f", failed: {row['error']}" if code else ""
        print(f"    {name}, seed {seed}, {stage}: {seconds:.0f} s{failed}", flush=True)
        return code


def _newest_step(workdir: pathlib.Path) -> int | None:
    """The step of the run's newest checkpoint; None: there is none."""
    try:
        return find_trained(workdir, None).step
    except (WorkdirError, CheckpointError):
        return None


@contextlib.contextmanager
def _exit_when_told(processes: Processes) -> Iterator[None]:
    """SIGTERM, a closed terminal or Ctrl-C end a study once its runs have saved.

    A second Ctrl-C ends all of them at once.
    """
    told = False

    def stop(number: int, _: object) -> None:
        nonlocal told
        if told:  # it waits for its runs
            return
        told = True
        print("told to stop; the same command goes on", file=sys.stderr)
        sys.exit(exit_code(signal.Signals(number), preempted=1))

    signals = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = {number: signal.signal(number, stop) for number in signals}
    try:
        with second_interrupt_ends("interrupted: the runs save and end", processes.kill):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _last_words(log: pathlib.Path, code: int) -> str:
    """What a failed command said last: its `error:` line if it has one."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines[-50:] if line.startswith("error:")]
    last = (errors or lines or ["(nothing)"])[-1][:_MOST_SAID]
    return f"killed by signal {-code}; {last}" if code < 0 else last


@contextlib.contextmanager
def _lock(directory: StudyDirectory) -> Iterator[IO]:
    """The study's lock.

    Its processes hold it too, so one that outlives a killed study keeps the next one out.
    """
    with (directory.path / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WorkdirError(
                f"--workdir={directory.path}: another study, or a run that a killed one has left, "
                "is at work there. Wait for it, or end it."
            ) from None
        yield lock


def _describe_environment() -> dict[str, Any]:
    """`provenance.describe` of the runs, asked in a process like theirs."""
    done = subprocess.run(
        [sys.executable, "-c", _DESCRIBE], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise WorkdirError(f"JAX does not start here: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])
