"""How fast is the 4B model on one accelerator, and one layer's attention, beside their peers?

    python -m benchmarks.one_device --json=docs/results/one_device.json [--minutes=30] [--small]

Qwen3-4B's sizes with random weights, in bfloat16: prefill, decoding and training, ours and those of
transformers and torch, and one layer's attention by each backend beside jax's cuDNN attention. Each
contestant is a process of its own, so that the device's memory is free for it, and a crash ends one
of them alone. Cases run in the order of their worth; the report is written after each, with its
failure where it failed, and none starts after --minutes. --small tries the program itself, on CPUs
too. Peers run in the interpreter that benchmarks/peers/venvs.sh makes, or in this one where it has
torch and transformers. What processes print is in REPORT.logs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import sys
import time
from typing import Any

from absl import app, flags

from benchmarks.machine import commit, machine
from benchmarks.markdown import table_lines
from benchmarks.one_device_cases import DATA_SHEET, THEIRS, Case, Contestant, all_cases
from benchmarks.peers.process import ContestantError, ContestantProcess, interpreter
from spiral_jax.planning.topology import CHIPS

JSON = flags.DEFINE_string("json", "runs/one_device.json", "file that gets the report")
MINUTES = flags.DEFINE_float("minutes", 30.0, "after which no further case starts")
SMALL = flags.DEFINE_bool("small", False, "two thin layers and short groups")

# Of a process that has the device for itself; what jax leaves is for cuBLAS and cuDNN.
MEMORY = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}


def main(argv: list[str]) -> None:
    started = time.monotonic()
    report = Report(pathlib.Path(JSON.value), all_cases(SMALL.value), SMALL.value)
    if SMALL.value:
        print("small sizes: times, shares and ratios say nothing of the 4B model", flush=True)
    running = Running(report.path.with_suffix(".logs"))
    over = {"skipped": f"--minutes={MINUTES.value:g} were over"}
    for case in report.cases:
        minutes = (time.monotonic() - started) / 60
        if minutes > MINUTES.value:
            report.put(case, over)
        else:
            report.put(case, running.measure(case, report))
    running.close()
    print("\n".join(report.table()), flush=True)
    if any("failed" in result for result in report.results.values()):
        sys.exit(f"error: some cases failed; see {report.path}")


class Running:
    """The contestant that has the device, and those that cannot have it."""

    def __init__(self, logs: pathlib.Path):
        logs.mkdir(parents=True, exist_ok=True)
        for old in logs.glob("*.log"):
            old.unlink()
        self.logs = logs
        self.contestant: Contestant | None = None
        self.process: ContestantProcess | None = None
        self.unusable: dict[str, str] = {}  # why nothing of a contestant can be measured

    def measure(self, case: Case, report: Report) -> dict[str, Any]:
        """The case's result, or {"skipped" or "failed": why}."""
        if case.contestant != self.contestant:
            self.close()
            self.contestant, self.unusable = case.contestant, {}
        if self.process is None and not self.unusable:
            print(f"starting {self.contestant}", flush=True)
            self.unusable = self._start(report)
        if self.unusable:
            return self.unusable
        try:
            returned = self.process.call(case.method, **case.arguments)["returned"]
        except (ContestantError, OSError) as error:
            if not self.process.is_alive():
                self.close()  # the next case starts it again
            return {"failed": _one_line(error)}
        return {"skipped": returned["skip"]} if "skip" in returned else returned

    def _start(self, report: Report) -> dict[str, str]:
        """{} where it runs, else why not."""
        python = interpreter(self.contestant.file)
        if self.contestant.file == THEIRS and not python.exists():
            if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
                return {"skipped": "no torch and transformers: bash benchmarks/peers/venvs.sh"}
            python = pathlib.Path(sys.executable)
        environment = {name: os.environ.get(name, value) for name, value in MEMORY.items()}
        try:
            self.process = ContestantProcess(self.contestant.file, self.logs, environment, python)
            facts = self.process.call("load", **self.contestant.arguments)["returned"]
        except (ContestantError, OSError) as error:
            self.close()
            return {"failed": f"it could not start: {_one_line(error)}"}
        if "skip" in facts:
            self.close()
            return {"skipped": facts["skip"]}
        report.facts[self.contestant.file] = facts
        return {}

    def close(self) -> None:
        if self.process is not None:
            self.process.close()
        self.process = None


class Report:
    """What is measured so far, written after each case.

    Attributes:
      facts: what each contestant says of itself.
      results: by the name of the case.
    """

    def __init__(self, path: pathlib.Path, cases: list[Case], small: bool):
        self.path, self.cases, self.small = path, cases, small
        self.facts: dict[str, Any] = {}
        self.results: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)

    def put(self, case: Case, result: dict[str, Any]) -> None:
        is_said = bool(self.results) and list(self.results.values())[-1] is result
        self.results[case.name] = result
        self._compare()
        if not is_said:  # one line where nothing of a contestant can be measured
            print(f"{case.name}: {', '.join(filter(None, self._words(case)))}", flush=True)
        text = json.dumps(
            {
                "machine": machine(),
                "commit": commit(),
                "small": self.small,
                "shares_are_of": CHIPS[DATA_SHEET].name,
                "contestants": self.facts,
                "cases": self.results,
            },
            indent=1,
        )
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(text + "\n")
        part.rename(self.path)

    def _compare(self) -> None:
        """Ratios to peers that are there by now, and which targets are met."""
        for case in self.cases:
            result, peer = self.results.get(case.name, {}), self.results.get(case.peer, {})
            if "seconds" not in result:
                continue
            if "seconds" in peer:
                result[f"ratio_to_{case.peer_name}"] = peer["seconds"] / result["seconds"]
            if case.targets:
                result["targets"] = case.targets
                result["met"] = {
                    name: result[name] >= least
                    for name, least in case.targets.items()
                    if name in result
                }

    def _words(self, case: Case) -> list[str]:
        """The result in a table's cells; a failure in one."""
        result = self.results.get(case.name, {"skipped": "not reached"})
        for reason in ("failed", "skipped"):
            if reason in result:
                return [f"{reason}: {result[reason]}"]
        rate = f"{result['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in result else ""
        if "tflop_per_s" in result:
            rate = f"{result['tflop_per_s']:.3g} TFLOP/s"
        cells = [f"{1000 * result['seconds']:.4g} ms", rate]
        cells.append(self._share(case, result, "mfu", "{:.1%} of the peak", "{:.0%}"))
        ratio = f"ratio_to_{case.peer_name}"
        return [*cells, self._share(case, result, ratio, "{:.2f}x " + case.peer_name, "{:g}x")]

    @staticmethod
    def _share(case: Case, result: dict[str, Any], name: str, form: str, least_form: str) -> str:
        if name not in result:
            return ""
        least = case.targets.get(name)
        asked = "" if least is None else f" (>= {least_form.format(least)})"
        return form.format(result[name]) + asked

    def table(self) -> list[str]:
        rows = [[case.name, *(self._words(case) + [""] * 3)[:4]] for case in self.cases]
        heads = ["case", "time", "rate", f"share of {CHIPS[DATA_SHEET].name}'s peak", "to its peer"]
        return table_lines(heads, rows)


def _one_line(error: Exception) -> str:
    """Its first line, cut: compilers print programs."""
    return str(error).strip().partition("\n")[0][:400]


if __name__ == "__main__":
    app.run(main)
