"""Starts `python -m spiral_jax.train` many times at the price of one import.

A process that has imported the program and nothing more forks one for each run, before JAX has
opened a device. For drills, of which half the time is imports.

    with Nursery(environment) as nursery:
        done = nursery.run(["--config=configs/tiny.py", ...], fault="search:2")
"""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

ROOT = pathlib.Path(__file__).parent.parent
_LONGEST_S = 900  # for one run
# What the program imports when it needs it, as it takes seconds.
_LATE_IMPORTS = ("transformers.models.auto.tokenization_auto", "matplotlib.pyplot")


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

    def run(self, flags: Sequence[str], fault: str = "") -> subprocess.CompletedProcess[str]:
        """One run from its start to its end; its exit code is -9 if it was killed."""
        with tempfile.TemporaryDirectory() as folder:
            out, err = os.path.join(folder, "out"), os.path.join(folder, "err")
            self._process.stdin.write(json.dumps([list(flags), fault, out, err]) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
            if not answer:
                raise RuntimeError("the process that starts the runs has ended")
            texts = [pathlib.Path(path).read_text(errors="replace") for path in (out, err)]
        return subprocess.CompletedProcess(list(flags), int(answer), *texts)


def serve() -> None:
    """Reads a run a line from standard input, forks it, and answers with its exit code."""
    from spiral_jax import train
    from spiral_jax.core import faults
    from spiral_jax.core.command import run_command
    from spiral_jax.run import log as run_log

    for name in _LATE_IMPORTS:
        importlib.import_module(name)
    for line in sys.stdin:
        flags, fault, out, err = json.loads(line)
        child = os.fork()
        if child == 0:
            signal.alarm(_LONGEST_S)  # a run that hangs is killed by it: exit code -14
            for descriptor, path in ((1, out), (2, err)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            faults.arm(fault)
            run_log.STARTED = time.monotonic()
            sys.argv = ["train", *flags]
            train.define_flags()
            run_command(train.main)  # ends the process
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve()
