"""Starts the program's commands, and scripts, many times at the price of one import.

A process that has imported the program and nothing more forks one for each run, before JAX has
opened a device. For drills, of which half the time is imports, and for the commands of the guides.

    with Nursery(environment) as nursery:
        done = nursery.run(["--config=configs/tiny.py", ...], fault="search:2")
        done = nursery.run(["--workdir=runs/tiny"], program="spiral_jax.report", folder=folder)
"""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import NoReturn

ROOT = pathlib.Path(__file__).parent.parent
_LONGEST_S = 900  # for one run
# What most commands need, and what they import when they need it, as it takes seconds.
_IMPORTS = (
    "spiral_jax.train",
    "transformers.models.auto.tokenization_auto",
    "matplotlib.pyplot",
)


class Nursery:
    """A context manager; `environment` is that of all runs."""

    def __init__(self, environment: Mapping[str, str]):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.nursery"],
            cwd=ROOT,
            env=dict(environment),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.stdin.close()
        self._process.wait()

    def run(
        self,
        flags: Sequence[str],
        fault: str = "",
        program: str = "spiral_jax.train",
        folder: str | os.PathLike[str] = ROOT,
        parse_only: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """One run from its start to its end; its exit code is -9 if it was killed.

        Args:
          program: a command of the package, or a script that ends in .py.
          folder: where it is started.
          parse_only: its flags are parsed and its configuration is loaded, and nothing is run.
        """
        with tempfile.TemporaryDirectory() as answers:
            out, err = os.path.join(answers, "out"), os.path.join(answers, "err")
            job = program, list(flags), fault, str(folder), parse_only, out, err
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
            if not answer:
                raise RuntimeError("the process that starts the runs has ended")
            texts = [pathlib.Path(path).read_text(errors="replace") for path in (out, err)]
        return subprocess.CompletedProcess(list(flags), int(answer), *texts)


def serve() -> None:
    """Reads a run a line from standard input, forks it, and answers with its exit code."""
    from spiral_jax.core import faults
    from spiral_jax.run import log as run_log

    for name in _IMPORTS:
        importlib.import_module(name)
    for line in sys.stdin:
        program, flags, fault, folder, parse_only, out, err = json.loads(line)
        child = os.fork()
        if child == 0:
            signal.alarm(_LONGEST_S)  # a run that hangs is killed by it: exit code -14
            for descriptor, path in ((1, out), (2, err)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.chdir(folder)
            sys.path.insert(0, folder)
            faults.arm(fault)
            run_log.STARTED = time.monotonic()
            sys.argv = [program, *flags]
            _start(program, parse_only)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _start(program: str, parse_only: bool) -> NoReturn:
    """Runs what sys.argv asks for, and ends the process."""
    from spiral_jax.core.command import run_command

    if program.endswith(".py"):
        try:
            runpy.run_path(program, run_name="__main__")
        except Exception:
            traceback.print_exc()
            sys.exit(1)
        _leave([])
    command = importlib.import_module(program)
    command.define_flags()
    run_command(_leave if parse_only else command.main)


def _leave(argv: list[str]) -> NoReturn:
    """Ends the process at once: to take down what the program has imported takes a second."""
    del argv
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve()
