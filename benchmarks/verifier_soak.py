"""Ten thousand answers made to break the verifier: what became of them, and what it cost.

    python -m benchmarks.verifier_soak [--answers=10000] [--seconds=1800]
        [--json=docs/results/verifier_soak.json]

A stopped soak goes on with the same command: batches that are done are in --log.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import resource
import subprocess
import tempfile
import time
import unittest.mock
from collections.abc import Iterator
from typing import Any

from benchmarks.adversarial import KINDS, answers
from benchmarks.machine import commit, machine
from benchmarks.orphans import workers_left
from spiral_jax.verifier.rewards import Status
from spiral_jax.verifier.settings import VerifierSettings
from spiral_jax.verifier.verifier import Verifier

BATCH = 500  # answers of one call, like a step's; its number is its seed


@dataclasses.dataclass
class Outcome:
    """What came of some answers.

    Attributes:
      answers: how many.
      counts: by kind and status.
      not_allowed: problems whose status their kind rules out.
      errors: details of `Status.ERROR`, with how often.
      replaced: workers that were killed or died.
      seconds: wall clock, the workers' start included.
      peak_worker_bytes: largest resident memory of a worker, or of another child that the process
        has had before.
      canary: whether some answer created the file that it named.
      commits: of the code that verified them.
    """

    answers: int = 0
    counts: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    not_allowed: list[str] = dataclasses.field(default_factory=list)
    errors: dict[str, int] = dataclasses.field(default_factory=dict)
    replaced: int = 0
    seconds: float = 0.0
    peak_worker_bytes: int = 0
    canary: bool = False
    commits: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: Outcome) -> None:
        """Adds what came of other answers."""
        self.answers += other.answers
        for kind, of_kind in other.counts.items():
            mine = self.counts.setdefault(kind, dict.fromkeys(of_kind, 0))
            self.counts[kind] = {status: mine[status] + count for status, count in of_kind.items()}
        self.not_allowed += other.not_allowed
        self.errors = dict(collections.Counter(self.errors) + collections.Counter(other.errors))
        self.replaced += other.replaced
        self.seconds += other.seconds
        self.peak_worker_bytes = max(self.peak_worker_bytes, other.peak_worker_bytes)
        self.canary |= other.canary
        self.commits = sorted({*self.commits, *other.commits})


def soak(count: int, seed: int, workers: int, timeout_s: float, memory_gb: float) -> Outcome:
    """Verifies `count` adversarial answers with the reward "math", as one batch."""
    counts = {kind: collections.Counter() for kind in KINDS}
    errors, not_allowed = collections.Counter(), []
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        canary = os.path.join(folder, "canary")
        cases = answers(count, seed, canary)
        settings = VerifierSettings(workers, timeout_s, memory_gb)
        with counted_processes() as started, Verifier("math", settings) as verifier:
            verdicts = verifier.verify([(case.text, case.problem) for case in cases])
        for case, verdict in zip(cases, verdicts, strict=True):
            counts[case.kind][verdict.status] += 1
            if verdict.status not in case.allowed:
                not_allowed.append(f"{case.problem.id}: {verdict.status}")
            if verdict.status is Status.ERROR:
                errors[verdict.detail.partition(" at problem")[0][:100]] += 1
        canary_exists = os.path.exists(canary)
    return Outcome(
        answers=count,
        counts={
            kind: {status.value: by_status[status] for status in Status}
            for kind, by_status in counts.items()
        },
        not_allowed=not_allowed,
        errors=dict(errors),
        replaced=len(started) - workers,
        seconds=time.monotonic() - start,
        peak_worker_bytes=resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        canary=canary_exists,
        commits=[commit()],
    )


@contextlib.contextmanager
def counted_processes() -> Iterator[list[subprocess.Popen]]:
    """All child processes that are started inside: the workers, and their replacements."""
    started = []

    class Counted(subprocess.Popen):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            started.append(self)

    with unittest.mock.patch("subprocess.Popen", Counted):
        yield started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--answers", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout_s", type=float, default=1.0)
    parser.add_argument("--memory_gb", type=float, default=2.0)
    parser.add_argument(
        "--seconds", type=float, default=1800, help="stop after the batch that ends after this long"
    )
    parser.add_argument(
        "--log", type=pathlib.Path, default=pathlib.Path("runs/verifier_soak.jsonl")
    )
    parser.add_argument(
        "--json", type=pathlib.Path, default=pathlib.Path("docs/results/verifier_soak.json")
    )
    asked = parser.parse_args()
    os.environ["HF_TOKEN"] = "a secret that no worker may see"
    end, total, batches = time.monotonic() + asked.seconds, Outcome(), []
    if asked.log.exists():
        rows = [json.loads(line) for line in asked.log.read_text().splitlines()]
        batches = [Outcome(**{"commits": ["unknown"]} | row) for row in rows]
    asked.log.parent.mkdir(parents=True, exist_ok=True)
    while sum(batch.answers for batch in batches) < asked.answers and time.monotonic() < end:
        batches.append(soak(BATCH, len(batches), asked.workers, asked.timeout_s, asked.memory_gb))
        with open(asked.log, "a") as file:
            file.write(json.dumps(dataclasses.asdict(batches[-1])) + "\n")
        done = sum(batch.answers for batch in batches)
        print(f"{done} answers, the last {BATCH} in {batches[-1].seconds:.0f} s", flush=True)
    for batch in batches:
        total.add(batch)
    settings = {
        "machine": machine(),
        "commit": ", ".join(total.commits),
        "asked": asked.answers,
        "workers": asked.workers,
        "timeout_s": asked.timeout_s,
        "memory_gb": asked.memory_gb,
        "orphans": workers_left(),
    }
    asked.json.write_text(json.dumps(settings | dataclasses.asdict(total), indent=1) + "\n")


if __name__ == "__main__":
    main()
