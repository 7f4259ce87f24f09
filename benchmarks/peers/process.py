"""The driver's end: a contestant in an interpreter of its own, idle while another one works."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

PEERS = ("transformers_generate", "tunix_sampler")
OURS = "spiral"
VENVS = pathlib.Path(".venv-peers")
# The training benchmark's peers are the same packages.
VENV_OF = {name: name for name in PEERS} | {
    "transformers_step": "transformers_generate",
    "transformers_step_all": "transformers_generate",
    "tunix_step": "tunix_sampler",
    "transformers_device": "transformers_generate",
}
ON_CPU = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}


class ContestantError(RuntimeError):
    """A contestant's method raised an error, or its process ended."""


def interpreter(name: str) -> pathlib.Path:
    """Of a peer its own, of others the driver's; it may not exist."""
    if name in VENV_OF:
        return VENVS / VENV_OF[name] / "bin" / "python"
    return pathlib.Path(sys.executable)


class ContestantProcess:
    """Runs benchmarks/peers/NAME.py; what it prints is added to LOGS/NAME.log.

    Args:
      environment: variables beside the driver's.
      python: interpreter; None: the one that `VENV_OF` says.

    Raises:
      FileNotFoundError: there is no such interpreter.
    """

    def __init__(
        self,
        name: str,
        logs: pathlib.Path,
        environment: dict[str, str] = ON_CPU,
        python: pathlib.Path | None = None,
    ) -> None:
        python = python or interpreter(name)
        if not python.exists():
            raise FileNotFoundError(f"{python}: no such file. Run: bash benchmarks/peers/venvs.sh")
        self.log = logs / f"{name}.log"
        self._process = subprocess.Popen(
            [str(python), "-m", f"benchmarks.peers.{name}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("a"),
            env={**os.environ, **environment},
            text=True,
        )

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Calls a method of the contestant.

        Returns {"returned", "seconds", "cpu_seconds", "peak_rss_bytes"}.

        Raises:
          ContestantError: the method raised an error, or the process ended.
        """
        self._process.stdin.write(json.dumps({"do": method, **arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise ContestantError(f"it ended with code {code} in {method}: see {self.log}")
        answer = json.loads(line)
        if "failed" in answer:
            raise ContestantError(answer["failed"])
        return answer

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
