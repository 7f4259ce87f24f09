"""Does step 0 of the quickstart still compute what it computed? Against a recorded run.

    python -m benchmarks.step_zero                                  # runs the step, then compares
    python -m benchmarks.step_zero --workdir=DIR                    # compares a run that has ended
    python -m benchmarks.step_zero --workdir=DIR --record           # writes the recording instead

The run is `python -m spiral_jax.train` with the flags of `FLAGS`, in a process of its own, as a
user would start it. Only the files of its directory are read, so that a directory which other code
has left can be recorded. Compared are all traces of its trace log (where log-probs have six
decimals) and all metrics but the clock's. Exit code 1: a trace is missing, tokens, sets, verdicts
or rewards differ, or log-probs differ by more than `TOLERANCE`.

The recording that is kept is of an Intel CPU. On an AMD EPYC the recorded commit itself is 2.4e-5
away from it: run it there, record it, and compare with that, --recording=FILE.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

RECORDING = pathlib.Path("docs/results/step_zero_38af4ae.json.gz")
FLAGS = [
    "--config=configs/tiny.py",
    "--config.train.steps=1",
    "--config.trace_log.every=1",
    "--config.eval.problems=0",
]
TOLERANCE = 1e-5  # of a log-prob

KEY = ("cursor", "round", "set", "trace")  # tell the traces of a step apart
EXACT = ("kept", "role", "subset", "order", "ids", "length", "stop", "verdict", "reward")
NUMBERS = ("logprobs", "advantage")
CLOCK = re.compile(r"^time/|^memory/|tokens_per_s|mfu")  # metrics that equal runs need not share

Trace = dict[str, Any]


@dataclasses.dataclass
class Row:
    """One line of the table.

    Attributes:
      compared: values on both sides.
      different: those that are not equal bit for bit.
      largest: the largest difference; None where values are not numbers.
      is_failure: whether the difference is one that must not be.
    """

    what: str
    compared: int
    different: int
    largest: float | None = None
    is_failure: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=pathlib.Path, help="a run that has ended")
    parser.add_argument("--record", action="store_true", help="write the recording")
    parser.add_argument("--recording", type=pathlib.Path, default=RECORDING)
    asked = parser.parse_args()

    if asked.workdir:
        run = read_run(asked.workdir)
    else:
        with tempfile.TemporaryDirectory() as folder:
            workdir = pathlib.Path(folder) / "run"
            command = [sys.executable, "-m", "spiral_jax.train", *FLAGS, f"--workdir={workdir}"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            run = read_run(workdir)

    if asked.record:
        text = json.dumps(run, separators=(",", ":"))
        asked.recording.write_bytes(gzip.compress(text.encode(), mtime=0))
        return
    recorded = json.loads(gzip.decompress(asked.recording.read_bytes()))
    rows = [*compare_traces(recorded["traces"], run["traces"])]
    rows += compare_metrics(recorded["metrics"], run["metrics"])
    print(table(recorded, run, rows), flush=True)
    sys.exit(any(row.is_failure for row in rows))


def read_run(workdir: pathlib.Path) -> dict[str, Any]:
    """What a recording holds of a run; `machine` is the one that reads it."""
    start = json.loads((workdir / "starts.jsonl").read_text().splitlines()[0])
    metrics = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[0])
    packed = (workdir / "traces" / "step_000000.jsonl.gz").read_bytes()
    traces = [json.loads(line) for line in gzip.decompress(packed).splitlines()]
    fields = (*KEY, *EXACT, *NUMBERS)
    return {
        "machine": processor(),
        "jax": start["versions"]["jax"],
        "commit": start["commit"],
        "modified": start["modified"],
        "flags": FLAGS,
        "metrics": {name: value for name, value in metrics.items() if not CLOCK.search(name)},
        "traces": [{field: trace[field] for field in fields} for trace in traces],
    }


def processor() -> str:
    """The processor's name, and the number of its cores that this machine has."""
    names = []
    if pathlib.Path("/proc/cpuinfo").exists():
        text = pathlib.Path("/proc/cpuinfo").read_text()
        names = re.findall(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {len(names) or 'unknown'} cores, {platform.system()}"


def compare_traces(recorded: list[Trace], now: list[Trace]) -> Iterator[Row]:
    """The table's rows about traces; those of one side alone are counted, and are a failure."""
    by_key = {key_of(trace): trace for trace in now}
    shared = [trace for trace in recorded if key_of(trace) in by_key]
    pairs = [(trace, by_key[key_of(trace)]) for trace in shared]
    alone = len(recorded) + len(now) - 2 * len(pairs)
    yield Row("traces on both sides", len(recorded), alone, is_failure=alone > 0)

    in_order = list(map(key_of, recorded)) == list(map(key_of, now))
    yield Row("order of the log", 1, int(not in_order))
    for field in EXACT:
        different = sum(old[field] != new[field] for old, new in pairs)
        yield Row(field, len(pairs), different, is_failure=different > 0)

    logprobs = differences(pairs, "logprobs")
    largest = max(logprobs, default=0.0)
    different = sum(gap > 0 for gap in logprobs)
    yield Row("logprobs", len(logprobs), different, largest, is_failure=largest > TOLERANCE)
    advantages = differences(pairs, "advantage")
    different = sum(gap > 0 for gap in advantages)
    yield Row("advantage", len(advantages), different, max(advantages, default=0.0))


def key_of(trace: Trace) -> tuple[int | None, ...]:
    return tuple(trace[field] for field in KEY)


def differences(pairs: list[tuple[Trace, Trace]], field: str) -> list[float]:
    """Absolute differences of a field's numbers, which may be lists of the same length."""
    gaps = []
    for old, new in pairs:
        if isinstance(old[field], list):
            # traces of other lengths have failed already
            gaps += [abs(a - b) for a, b in zip(old[field], new[field], strict=False)]
        else:
            gaps.append(abs(old[field] - new[field]))
    return gaps


def compare_metrics(recorded: dict[str, float], now: dict[str, float]) -> Iterator[Row]:
    """The table's rows about metrics: all together, then each that differs."""
    shared = [name for name in recorded if name in now]
    alone = sorted(recorded.keys() ^ now.keys())
    different = [name for name in shared if recorded[name] != now[name]]
    yield Row("metrics", len(shared), len(different))
    for name in different:
        yield Row(f"metric {name}", 1, 1, abs(recorded[name] - now[name]))
    for name in alone:
        side = "recorded" if name in recorded else "new"
        yield Row(f"metric {name}, {side} alone", 0, 0)


def table(recorded: dict[str, Any], run: dict[str, Any], rows: list[Row]) -> str:
    """Markdown: who is compared with whom, and a line a row."""
    lines = [f"- {side}: {describe(of)}" for side, of in (("recorded", recorded), ("now", run))]
    lines += ["", "| what | compared | equal bit for bit | largest difference | verdict |"]
    lines += ["| --- | ---: | ---: | ---: | --- |"]
    for row in rows:
        largest = "" if row.largest is None else f"{row.largest:.3g}"
        verdict = "FAILS" if row.is_failure else "differs" if row.different else ""
        equal = row.compared - row.different
        lines.append(f"| {row.what} | {row.compared:,} | {equal:,} | {largest} | {verdict} |")
    return "\n".join(lines)


def describe(run: dict[str, Any]) -> str:
    commit = (run["commit"] or "unknown")[:7] + ("+" if run["modified"] else "")
    return f"commit {commit}, jax {run['jax']}, {run['machine']}"


if __name__ == "__main__":
    main()
