"""The benchmark of one device goes on after whatever fails; its report is there after each case."""

import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from benchmarks import one_device
from benchmarks.one_device_cases import Case, Contestant, all_cases
from benchmarks.peers.process import ContestantError

ROOT = pathlib.Path(__file__).parents[2]
OURS, THEIRS = Contestant("ours", {"small": True}), Contestant("theirs", {})
CASES = [
    Case("fast, ours", OURS, "fast", {}, "fast, peer", {"mfu": 0.5, "ratio_to_peer": 3.0}),
    Case("too large, ours", OURS, "raise", {}),
    Case("dies, ours", OURS, "die", {}),
    Case("absent, ours", OURS, "skip", {}),
    Case("again, ours", OURS, "fast", {}, "fast, peer"),
    Case("fast, peer", THEIRS, "slow", {}),
    Case("nothing, other", Contestant("broken", {}), "fast", {}),
    Case("nothing more, other", Contestant("broken", {}), "fast", {}),
]


class Process:
    """A contestant that needs no process."""

    started: list[str] = []

    def __init__(self, name: str, *_: Any):
        self.name, self.alive = name, True
        self.started.append(name)

    def call(self, method: str, **_: Any) -> dict[str, Any]:
        if self.name == "broken":
            raise ContestantError("no device\nand a long story")
        if method == "die":
            self.alive = False
        if method in ("raise", "die"):
            raise ContestantError(f"{method}: out of memory")
        seconds = {"fast": 1.0, "slow": 4.0}.get(method)
        results = {"load": {"device": "d"}, "skip": {"skip": "not here"}}
        return {"returned": results.get(method, {"seconds": seconds, "mfu": 0.4})}

    def is_alive(self) -> bool:
        return self.alive

    def close(self) -> None:
        pass


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """(the report after each case, its table, the processes that were started)."""
    Process.started.clear()
    monkeypatch.setattr(one_device, "ContestantProcess", Process)
    report = one_device.Report(tmp_path / "new" / "report.json", CASES, small=True)
    running, written = one_device.Running(tmp_path / "logs"), []
    for case in CASES:
        report.put(case, running.measure(case, report))
        written.append(json.loads(report.path.read_text())["cases"])
    return written, report.table(), list(Process.started)


def test_a_failure_is_recorded_with_its_message_and_the_next_case_runs(measured):
    written, table, started = measured
    assert [len(cases) for cases in written] == list(range(1, len(CASES) + 1))
    cases = written[-1]
    assert cases["too large, ours"] == {"failed": "raise: out of memory"}
    assert cases["dies, ours"] == {"failed": "die: out of memory"}
    assert cases["absent, ours"] == {"skipped": "not here"}
    assert cases["again, ours"]["seconds"] == 1.0
    for name in ("nothing, other", "nothing more, other"):
        assert cases[name] == {"failed": "it could not start: no device"}
    # one that has died starts again; one that cannot start is tried once
    assert started == ["ours", "ours", "theirs", "broken"]
    assert len(table) == 2 + len(CASES) and "failed: die: out of memory" in "\n".join(table)


def test_ratios_and_targets_are_there_once_the_peer_is(measured):
    written, table, _ = measured
    first = written[0]["fast, ours"]
    assert "ratio_to_peer" not in first and first["met"] == {"mfu": False}
    last = written[-1]["fast, ours"]
    assert last["ratio_to_peer"] == 4.0 and last["met"] == {"mfu": False, "ratio_to_peer": True}
    (row,) = [line for line in table if line.startswith("| fast, ours")]
    for part in ("40.0% of the peak (>= 50%)", "4.00x peer (>= 3x)"):
        assert part in row


@pytest.mark.parametrize("small", [False, True])
def test_every_peer_that_a_case_names_is_a_case(small):
    cases = all_cases(small)
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    assert {case.peer for case in cases} - {""} <= set(names)
    with_targets = [case for case in cases if case.targets]
    assert len(with_targets) == 6 and all(case.peer for case in with_targets)


def test_a_contestant_answers_after_an_error():
    code = (
        "from benchmarks.peers.contestant import serve\n"
        "class Divides:\n"
        "    def divide(self, a, b):\n"
        "        print('to the log')\n"
        "        return a / b\n"
        "serve(Divides())\n"
    )
    asked = [{"do": "divide", "a": 6, "b": b} for b in (0, 3)]
    done = subprocess.run(
        [sys.executable, "-c", code],
        input="".join(json.dumps(request) + "\n" for request in asked),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    failed, answered = map(json.loads, done.stdout.splitlines())
    assert failed == {"failed": "ZeroDivisionError: division by zero"}
    assert answered["returned"] == 2.0
    assert "Traceback" in done.stderr and "to the log" in done.stderr
