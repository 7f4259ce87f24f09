"""Kill -9 in every phase, SIGTERM, a checkpoint cut short: the resumed run is the uninterrupted
one, bit for bit.

Processes are forks of one that has imported the program (benchmarks/nursery.py): a start takes a
third of the time. The
same drills by the hundred: `bash launch/soak.sh`.
"""

import shutil

import pytest

from benchmarks import drill
from benchmarks.kill_soak import truncate_newest
from benchmarks.orphans import workers_left
from spiral_jax.core import faults

STEPS = 4


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with drill.Runs(tmp_path_factory.mktemp("drill")) as runs:
        done = runs.run(runs.folder / "reference", STEPS)
        assert done.returncode == 0, done.stderr[-3000:]
        yield runs


@pytest.mark.slow
def test_a_run_that_is_killed_in_every_phase_is_the_uninterrupted_one(runs):
    workdir = runs.folder / "killed"
    for fault in (
        "search:2",
        "aggregation:3",
        "verifier:20",
        "update:1",
        "checkpoint:1",
        "epoch:1",
    ):
        done = runs.run(workdir, STEPS, fault)
        assert done.returncode == -9 and "fault: SIGKILL" in done.stderr, (
            fault,
            done.stderr[-3000:],
        )
        assert drill.finished_steps(workdir) - drill.saved_step(workdir) in (0, 1), fault
    assert drill.saved_step(workdir) < STEPS  # there was something left to do
    done = runs.run(workdir, STEPS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert drill.differences(runs.folder / "reference", workdir) == []
    assert workers_left() == 0


@pytest.mark.slow
def test_sigterm_saves_and_ends_well_and_a_damaged_checkpoint_costs_a_step(runs):
    workdir = runs.folder / "preempted"
    done = runs.run(workdir, STEPS, "verifier:50:TERM")  # in the third step
    assert done.returncode == 0, done.stderr[-3000:]
    saved = drill.saved_step(workdir)
    assert (
        f"preempted: saved at step {saved}" in done.stdout
        and 2 <= saved == drill.finished_steps(workdir) < STEPS
    )
    assert truncate_newest(workdir)
    done = runs.run(workdir, STEPS)
    assert done.returncode == 0 and "Set aside: " in done.stdout, done.stderr[-3000:]
    assert [path.name for path in (workdir / "checkpoints_damaged").iterdir()] == [str(saved)]
    assert drill.differences(runs.folder / "reference", workdir) == []


def test_the_comparison_sees_one_bit_one_metric_and_one_trace(runs, tmp_path):
    for change in ("metric", "trace", "step"):
        copy = tmp_path / change
        shutil.copytree(runs.folder / "reference", copy)
        assert drill.differences(runs.folder / "reference", copy) == []
        if change == "metric":
            text = (copy / "metrics.jsonl").read_text()
            (copy / "metrics.jsonl").write_text(text.replace('"grad_norm": ', '"grad_norm": 1', 1))
        elif change == "trace":
            file = next((copy / "traces").iterdir())
            file.write_bytes(file.read_bytes()[:-1])
        else:
            shutil.rmtree(copy / "checkpoints" / str(STEPS))
        assert len(drill.differences(runs.folder / "reference", copy)) == 1


@pytest.mark.parametrize(
    "text", ["search", "search:0", "search:x", "nowhere:1", "search:1:INT", "search:1:TERM:1", ":1"]
)
def test_a_fault_that_is_none_is_an_error(text):
    with pytest.raises(ValueError, match="SPIRAL_FAULT.*POINT:COUNT"):
        faults.arm(text)


def test_a_point_counts_from_the_first_chunk_on_and_kills_once(monkeypatch):
    sent = []
    monkeypatch.setattr(faults.os, "kill", lambda pid, signal: sent.append(signal.name))
    monkeypatch.setattr(faults, "_fault", None)  # put back afterwards
    faults.arm("update:2:TERM")
    faults.passed("update")
    faults.passed("update")
    faults.chunk_decoded()
    faults.passed("search")
    faults.passed("update")
    assert sent == []
    for _ in range(3):
        faults.passed("update")
    assert sent == ["SIGTERM"]
