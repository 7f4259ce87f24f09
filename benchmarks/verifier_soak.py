"""Ten thousand answers made to break the verifier: what became of them, how long it took, what it held.

python -m benchmarks.verifier_soak [--answers=10000] [--timeout_s=1] [--workers=2] [--json=docs/verifier_soak.json]
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import resource
import tempfile
import time

from benchmarks.adversarial import KINDS, answers
from benchmarks.machine import commit, machine, workers_left
from spiral_jax.verifier.rewards import Status
from spiral_jax.verifier.verifier import Verifier, count_verdicts

BATCH = 500  # answers of one call, like a step's


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a soak.

    Attributes:
      counts: by kind and status.
      not_allowed: ids of problems whose status its kind rules out.
      errors: details of `Status.ERROR`, with how often.
      replaced: workers that were killed or died.
      seconds: wall clock.
      peak_worker_bytes: largest resident memory of a worker, of all that have ended.
      orphans: workers that still ran after the end.
      canary: whether some answer created the file that it named.
    """

    counts: dict[str, dict[str, int]]
    not_allowed: list[str]
    errors: dict[str, int]
    replaced: int
    seconds: float
    peak_worker_bytes: int
    orphans: int
    canary: bool


def soak(count: int, seed: int, workers: int, timeout_s: float, memory_gb: float) -> Outcome:
    """Verifies `count` adversarial answers with the reward "math"."""
    counts = {kind: collections.Counter() for kind in KINDS}
    errors, not_allowed = collections.Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        canary = os.path.join(folder, "canary")
        cases = answers(count, seed, canary)
        start = time.monotonic()
        with Verifier("math", workers, timeout_s, memory_gb) as verifier:
            for i in range(0, count, BATCH):
                batch = cases[i : i + BATCH]
                verdicts = verifier.verify([(text, problem) for _, text, problem, _ in batch])
                assert sum(count_verdicts(verdicts).values()) == len(batch)
                for (kind, _, problem, allowed), verdict in zip(batch, verdicts, strict=True):
                    counts[kind][verdict.status] += 1
                    if verdict.status not in allowed:
                        not_allowed.append(f"{problem.id}: {verdict.status}")
                    if verdict.status is Status.ERROR:
                        errors[verdict.detail.partition(" at problem")[0][:100]] += 1
            replaced = verifier.replaced_workers
        seconds = time.monotonic() - start
        found = os.path.exists(canary)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    plain = {kind: {status.value: of_kind[status] for status in Status} for kind, of_kind in counts.items()}
    return Outcome(plain, not_allowed, dict(errors), replaced, seconds, peak, workers_left(), found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout_s", type=float, default=1.0)
    parser.add_argument("--memory_gb", type=float, default=2.0)
    parser.add_argument("--json", type=pathlib.Path, default=pathlib.Path("docs/verifier_soak.json"))
    asked = parser.parse_args()
    os.environ["HF_TOKEN"] = "a secret that no worker may see"
    outcome = soak(asked.answers, asked.seed, asked.workers, asked.timeout_s, asked.memory_gb)
    settings = {"machine": machine(), "commit": commit(), "answers": asked.answers, "seed": asked.seed,
                "workers": asked.workers, "timeout_s": asked.timeout_s, "memory_gb": asked.memory_gb}  # fmt: skip
    result = settings | dataclasses.asdict(outcome)
    asked.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
