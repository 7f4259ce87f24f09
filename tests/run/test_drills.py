"""Kill -9 in every phase, SIGTERM, a checkpoint cut short: nothing is lost, bit for bit.

Processes are forks of one that has imported the program (benchmarks/nursery.py): a start takes a
third of the time. The same drills by the hundred: `bash launch/soak.sh`.
"""

import json
import os
import shutil

import pytest

from benchmarks import drill
from benchmarks.kill_soak import truncate_newest
from benchmarks.orphans import workers_left
from spiral_jax.run import lock

STEPS = 4
FAULTS = ("search:2", "aggregation:3", "verifier:20", "update:1", "checkpoint:1", "epoch:1")


def assert_ended(done, code=0):
    assert done.returncode == code, done.stderr[-3000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with drill.Runs(tmp_path_factory.mktemp("drill")) as runs:
        assert_ended(runs.run(runs.folder / "reference", STEPS))
        yield runs


@pytest.mark.slow
def test_a_run_that_is_killed_in_every_phase_is_the_uninterrupted_one(runs):
    workdir = runs.folder / "killed"
    for fault in FAULTS:
        done = runs.run(workdir, STEPS, fault)
        assert_ended(done, code=-9)
        assert "fault: SIGKILL" in done.stderr and (workdir / lock.FILE).exists()
        assert drill.finished_steps(workdir) - drill.saved_step(workdir) in (0, 1), fault
    assert drill.saved_step(workdir) < STEPS  # there was something left to do
    assert_ended(runs.run(workdir, STEPS))
    assert drill.differences(runs.folder / "reference", workdir) == []
    assert workers_left() == 0


@pytest.mark.slow
def test_a_base_in_int8_is_trained_beside_and_resumed_bit_for_bit(runs):
    """It is rounded anew at each start; checkpoints hold the adapters alone."""
    changes = ["--config.model.param_dtype=int8", "--config.model.lora_rank=4"]
    whole, killed = runs.folder / "int8", runs.folder / "int8_killed"
    assert_ended(runs.run(whole, 2, changes=changes))
    assert_ended(runs.run(killed, 2, "update:2", changes=changes), code=-9)
    assert drill.saved_step(killed) == 1
    assert_ended(runs.run(killed, 2, changes=changes))
    assert drill.differences(whole, killed) == []
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["mismatch/max_abs_log_ratio"] < 1e-4 for row in rows)  # float32
    assert all(row["grad_norm"] > 0 for row in rows)


@pytest.mark.slow
def test_a_second_process_in_the_same_directory_is_refused_and_changes_nothing(runs):
    reference = runs.folder / "reference"
    before = {path: path.stat().st_mtime_ns for path in reference.rglob("*") if path.is_file()}
    with lock.hold(reference):
        done = runs.run(reference, STEPS + 1)
    assert_ended(done, code=1)
    assert f"process {os.getpid()} on " in done.stderr and "Traceback" not in done.stderr
    after = {path: path.stat().st_mtime_ns for path in reference.rglob("*") if path.is_file()}
    assert after == before


@pytest.mark.slow
def test_sigterm_and_ctrl_c_save_and_end_well_and_a_damaged_checkpoint_costs_a_step(runs):
    workdir = runs.folder / "preempted"
    done = runs.run(workdir, STEPS, "verifier:58:TERM")  # in the third step
    assert_ended(done)
    saved = drill.saved_step(workdir)
    assert f"preempted: saved at step {saved}" in done.stdout
    assert 2 <= saved == drill.finished_steps(workdir) < STEPS
    done = runs.run(workdir, STEPS, "search:1:INT")
    assert_ended(done, code=130)
    assert f"interrupted: saved at step {saved}" in done.stdout
    assert "Ctrl-C again ends it at once" in done.stderr and "Traceback" not in done.stderr
    assert not (workdir / lock.FILE).exists() and drill.saved_step(workdir) == saved
    assert truncate_newest(workdir)
    done = runs.run(workdir, STEPS)
    assert_ended(done)
    assert "Set aside: " in done.stdout
    assert [path.name for path in (workdir / "checkpoints_damaged").iterdir()] == [str(saved)]
    assert drill.differences(runs.folder / "reference", workdir) == []


@pytest.mark.parametrize("change", ["metric", "traces", "evaluations", "checkpoint"])
def test_the_comparison_sees_one_metric_one_byte_of_a_file_and_one_checkpoint(
    runs, tmp_path, change
):
    copy = shutil.copytree(runs.folder / "reference", tmp_path / change)
    assert drill.differences(runs.folder / "reference", copy) == []
    if change == "metric":
        text = (copy / "metrics.jsonl").read_text()
        (copy / "metrics.jsonl").write_text(text.replace('"grad_norm": ', '"grad_norm": 1', 1))
    elif change == "checkpoint":
        shutil.rmtree(copy / "checkpoints" / str(STEPS))
    else:
        file = next(path for path in (copy / change).rglob("*.json*") if path.is_file())
        file.write_bytes(file.read_bytes()[:-1])
    assert len(drill.differences(runs.folder / "reference", copy)) == 1
