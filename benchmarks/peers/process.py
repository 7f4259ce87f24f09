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
}


class ContestantProcess:
    """Runs benchmarks/peers/NAME.py; what it prints goes to LOGS/NAME.log."""

    def __init__(self, name: str, logs: pathlib.Path) -> None:
        python = pathlib.Path(sys.executable)
        if name in VENV_OF:
            python = VENVS / VENV_OF[name] / "bin" / "python"
        if not python.exists():
            raise FileNotFoundError(f"{python}: no such file. Run: bash benchmarks/peers/venvs.sh")
        self.log = logs / f"{name}.log"
        self._process = subprocess.Popen(
            [str(python), "-m", f"benchmarks.peers.{name}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            env={**os.environ, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""},
            text=True,
        )

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Calls a method of the contestant.

        Returns {"returned", "seconds", "cpu_seconds", "peak_rss_bytes"}.
        """
        self._process.stdin.write(json.dumps({"do": method, **arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise RuntimeError(f"the contestant ended with code {code} in {method}: see {self.log}")
        return json.loads(line)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
