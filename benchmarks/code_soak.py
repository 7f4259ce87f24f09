"""Does the reward "code" survive hostile programs, and leave nothing behind?

    python -m benchmarks.code_soak --json=docs/results/code_soak.json [--programs=2000]

Hostile programs, every tenth a right one, judged by two workers in random order. Reports verdicts
by kind, and what was found afterwards: files, and processes that were not there before.
"""

from __future__ import annotations

import collections
import json
import pathlib
import random
import tempfile
import time

import psutil
from absl import app, flags

from benchmarks.hostile_programs import HOSTILE
from benchmarks.machine import commit, machine
from spiral_jax.tasks.problem import Problem
from spiral_jax.verifier.settings import VerifierSettings
from spiral_jax.verifier.verifier import Verifier

JSON = flags.DEFINE_string("json", None, "file that gets the report", required=True)
PROGRAMS = flags.DEFINE_integer("programs", 2000, "how many are judged")
SEED = flags.DEFINE_integer("seed", 0, "of their order")

RIGHT = "right"
TIMEOUT_S = 1.0
PROBLEM = Problem("soak", "?", "", {"tests": [{"input": "3\n", "output": "9\n"}]})


def main(argv: list[str]) -> None:
    rng, before = random.Random(SEED.value), set(psutil.pids())
    with tempfile.TemporaryDirectory() as folder:
        canary, secret = pathlib.Path(folder, "canary"), pathlib.Path(folder, "secret")
        secret.write_text("9\n")  # reading it would pass the test
        kinds = [RIGHT if n % 10 == 0 else rng.choice(list(HOSTILE)) for n in range(PROGRAMS.value)]
        items = [(trace_of(kind, canary, secret), PROBLEM) for kind in kinds]
        start = time.monotonic()
        with Verifier("code", VerifierSettings(workers=2, timeout_s=TIMEOUT_S)) as verifier:
            verdicts = verifier.verify(items)
        seconds = time.monotonic() - start
        files = sorted(path.name for path in pathlib.Path(folder).iterdir())
    time.sleep(1)
    left = [describe(pid) for pid in sorted(set(descendants()) - before)]
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for kind, verdict in zip(kinds, verdicts, strict=True):
        counts[kind][f"{verdict.status.value}, reward {verdict.reward:g}"] += 1
    report = {
        "machine": machine(),
        "commit": commit(),
        "programs": PROGRAMS.value,
        "seconds": round(seconds, 1),
        "verdicts": {kind: dict(found) for kind, found in sorted(counts.items())},
        "files": files,
        "processes left behind": left,
    }
    pathlib.Path(JSON.value).write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def trace_of(kind: str, canary: pathlib.Path, secret: pathlib.Path) -> str:
    program = "print(int(input()) ** 2)" if kind == RIGHT else HOSTILE[kind]
    for word, path in (("canary", canary), ("secret", secret)):
        program = program.replace(f"{{{word}}}", str(path))
    return f"```python\n{program}\n```"


def descendants() -> list[int]:
    """Of this process, and orphans that were forked by a worker."""
    children = psutil.Process().children(recursive=True)
    return [child.pid for child in children] + [
        process.pid
        for process in psutil.process_iter(["cmdline", "ppid"])
        if process.info["ppid"] == 1
        and "verifier import pool" in " ".join(process.info["cmdline"] or [])
    ]


def describe(pid: int) -> str:
    try:
        process = psutil.Process(pid)
        return f"{pid}: {process.status()}, {' '.join(process.cmdline())[:100]}"
    except psutil.NoSuchProcess:
        return f"{pid}: has ended by now"


if __name__ == "__main__":
    app.run(main)
