"""Kills one run again and again, in every phase; what comes out must be as if it were left alone.

    python -m benchmarks.kill_soak [--folder=runs/soak] [--kills=100] [--seconds=2700]
        [--json=docs/results/kill_soak.json]

Each kill is SIGKILL at a counted point (spiral_jax/core/faults.py), at which the process has
decoded a chunk at least; then the same command goes on. Beside the kills: SIGTERM while traces are
decoded, and a newest checkpoint that is cut short on disk while nothing runs. A run that ends is
compared bit for bit, and the next round begins. A stopped soak goes on with the same command.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import random
import re
import signal
import time
from subprocess import CompletedProcess

from benchmarks import drill
from benchmarks.machine import commit, machine
from benchmarks.orphans import workers_left
from spiral_jax.core.faults import POINTS

STEPS = 12  # of the run
# passes of a point before the kill, at most
MOST = {"search": 6, "aggregation": 4, "verifier": 30, "update": 2, "checkpoint": 4, "epoch": 2}
SIGTERM, TRUNCATED = "SIGTERM", "truncated"
FRESH = 10  # one process in so many is started as a user does, the others are forks
CYCLE = [*POINTS, *POINTS, SIGTERM, *POINTS, TRUNCATED]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/soak"))
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument(
        "--seconds", type=float, default=2700, help="stop after the drill that ends after this long"
    )
    parser.add_argument(
        "--json", type=pathlib.Path, default=pathlib.Path("docs/results/kill_soak.json")
    )
    asked = parser.parse_args()
    end = time.monotonic() + asked.seconds
    folder = asked.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    reference = folder / "reference"
    with drill.Runs(folder) as runs:
        if drill.saved_step(reference) < STEPS:
            check(runs.run(reference, STEPS, fresh=True))
        soak = Soak(runs, reference)
        while soak.kills < asked.kills and time.monotonic() < end:
            soak.run_drill()
            write(asked.json, asked.kills, soak)
        soak.finish_round()
        write(asked.json, asked.kills, soak)


class Soak:
    """The drills so far, in FOLDER/drills.jsonl, and the round that goes on in FOLDER/round_N."""

    def __init__(self, runs: drill.Runs, reference: pathlib.Path):
        self._runs, self._reference = runs, reference
        self._log = runs.folder / "drills.jsonl"
        self.drills = []
        if self._log.exists():
            self.drills = [json.loads(line) for line in self._log.read_text().splitlines()]

    @property
    def kills(self) -> int:
        return sum(row["drill"] in POINTS for row in self.drills)

    @property
    def comparisons(self) -> list[dict]:
        return [row for row in self.drills if row["drill"] == "comparison"]

    def run_drill(self) -> None:
        """One drill, or the end of a round if the run ended before its fault came."""
        number = sum(row["drill"] != "comparison" for row in self.drills)
        name, rng = CYCLE[number % len(CYCLE)], random.Random(number)
        workdir, start = self._workdir(), time.monotonic()
        if name == TRUNCATED:
            saved = drill.saved_step(workdir)
            applied = truncate_newest(workdir)
            self._note(drill=TRUNCATED, applied=applied, step=saved, lost=int(applied))
            return

        point = rng.choice(["search", "verifier"]) if name == SIGTERM else name
        fault = f"{point}:{rng.randint(1, MOST[point])}"
        if name == SIGTERM:
            fault += ":TERM"
        done = self._runs.run(workdir, STEPS, fault, fresh=number % FRESH == 0)
        stopped = re.search(r"after (\d+) decode chunks", done.stderr)
        if not stopped:  # the run was over first
            check(done)
            self._compare(workdir)
            return
        check(done, expected=0 if name == SIGTERM else -signal.SIGKILL, fault=fault)
        finished, saved = drill.finished_steps(workdir), drill.saved_step(workdir)
        self._note(
            drill=name,
            fault=fault,
            chunks=int(stopped[1]),
            finished=finished,
            saved=saved,
            lost=max(0, finished - saved),
            half_written=drill.half_written(workdir),
            start_up=drill.seconds_to_start(done.stdout),
            seconds=round(time.monotonic() - start, 2),
        )

    def finish_round(self) -> None:
        """Lets the round's run come to its end, and compares."""
        workdir = self._workdir()
        if workdir.exists():
            check(self._runs.run(workdir, STEPS))
            self._compare(workdir)

    def _compare(self, workdir: pathlib.Path) -> None:
        damaged = workdir / "checkpoints_damaged"
        aside = len(list(damaged.iterdir())) if damaged.exists() else 0
        self._note(
            drill="comparison",
            workdir=workdir.name,
            set_aside=aside,
            differences=drill.differences(self._reference, workdir),
        )

    def _workdir(self) -> pathlib.Path:
        return self._runs.folder / f"round_{len(self.comparisons):03d}"

    def _note(self, **row: object) -> None:
        row["commit"] = commit()  # a soak that goes on may be one of other code
        self.drills.append(row)
        with open(self._log, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


def truncate_newest(workdir: pathlib.Path) -> bool:
    """Cuts the largest file of the newest checkpoint in half, if there is one before it.

    Returns whether there is.
    """
    saved = drill.saved_step(workdir)
    folders = [path for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
    if len(folders) < 2:
        return False
    files = [path for path in (workdir / "checkpoints" / str(saved)).rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    with open(largest, "r+b") as file:
        file.truncate(largest.stat().st_size // 2)
    return True


def check(done: CompletedProcess[str], expected: int = 0, fault: str = "no fault") -> None:
    """Ends the soak if a run has ended in another way than it should."""
    if done.returncode != expected:
        output = f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        raise SystemExit(f"{fault}: exit code {done.returncode}, not {expected}\n{output}")


def write(path: pathlib.Path, asked: int, soak: Soak) -> None:
    """The summary that `benchmarks.reliability_table` reads."""
    kills = [row for row in soak.drills if "chunks" in row]
    by_drill = collections.defaultdict(list)
    for row in soak.drills:
        by_drill[row["drill"]].append(row)
    start_ups = sorted(row["start_up"] for row in kills if row["start_up"])
    seconds = sorted(row["seconds"] for row in kills)
    summary = {
        "machine": machine(),
        "commit": ", ".join(sorted({row.get("commit", "unknown") for row in soak.drills})),
        "asked": asked,
        "kills": soak.kills,
        "steps": STEPS,
        "drills": {
            name: summarise(rows) for name, rows in by_drill.items() if name != "comparison"
        },
        "comparisons": len(soak.comparisons),
        "orphans": workers_left(),
        "set_aside": sum(row["set_aside"] for row in soak.comparisons),
        "differences": [text for row in soak.comparisons for text in row["differences"]],
        "median_start_up_s": start_ups[len(start_ups) // 2] if start_ups else None,
        "median_cycle_s": seconds[len(seconds) // 2] if seconds else None,
    }
    path.write_text(json.dumps(summary, indent=1) + "\n")


def summarise(rows: list[dict]) -> dict[str, int | None]:
    """What came of all drills of one name."""
    chunks = [row["chunks"] for row in rows if "chunks" in row]
    return {
        "tried": sum(row.get("applied", True) for row in rows),
        "finished_steps_lost_most": max(row["lost"] for row in rows),
        "least_chunks": min(chunks, default=None),
        "half_written": sum(row.get("half_written", 0) > 0 for row in rows),
    }


if __name__ == "__main__":
    main()
