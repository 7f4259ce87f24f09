"""Metric writers: TensorBoard's files read back, the calls that W&B and trackio get, and what a
missing one says.
"""

import math
import struct
import sys
import time
import types

import pytest
from tensorboardX.proto.event_pb2 import Event

from configs import tiny
from spiral_jax.core.config import ConfigError, to_plain
from spiral_jax.core.config_checks import validate
from spiral_jax.run import environment
from spiral_jax.run.metric_writers import MetricWriters, check_installed

ROW = {"step": 3, "reward/search": 0.5, "grad_norm": None, "loss": math.nan, "name": "x",
       "single": {"mean": 0.25, "low": 0.125, "high": None, "count": 8}}  # fmt: skip
NUMBERS = {
    "evaluation/reward/search": 0.5,
    "evaluation/single/mean": 0.25,
    "evaluation/single/low": 0.125,
}


def events_of(directory):
    """All events of all files, in the order of their names: records of length, checksum, content,
    checksum.
    """
    found = []
    for file in sorted(directory.iterdir()):
        content, at = file.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            found.append(Event.FromString(content[at + 12 : at + 12 + length]))
            at += length + 16
    return found


def test_tensorboard_files_hold_every_finite_number_at_its_step_and_a_resume_purges_what_it_repeats(
    tmp_path,
):
    for start in (0, 3):
        with MetricWriters(("tensorboard",), tmp_path, "run", {}, start) as writers:
            writers.write(ROW, "evaluation/")
        time.sleep(1.01)  # a file is named after its second
    events = events_of(tmp_path / "tensorboard")
    values = [(event.step, {value.tag: value.simple_value for value in event.summary.value})
              for event in events if event.HasField("summary")]  # fmt: skip
    assert {step for step, _ in values} == {3}
    first = {tag: value for _, tags in values[: len(NUMBERS)] for tag, value in tags.items()}
    assert first == NUMBERS and len(values) == 2 * len(NUMBERS)
    restarts = [event.step for event in events if event.session_log.status == 1]  # SessionLog.START
    assert 3 in restarts


class Recorder(types.SimpleNamespace):
    """A stand-in for the module and for its run: it keeps what it is called with."""

    def __init__(self):
        super().__init__(calls=[])

    def __getattr__(self, name):
        def call(*arguments, **named):
            self.calls.append((name, arguments, named))
            return self

        return call


@pytest.mark.parametrize(("writer", "logged"), [
    ("wandb", ("log", ({"step": 3} | NUMBERS,), {})),
    ("trackio", ("log", (NUMBERS,), {"step": 3})),
])  # fmt: skip
def test_wandb_and_trackio_resume_one_run_under_its_name(tmp_path, monkeypatch, writer, logged):
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, writer, recorder)
    with MetricWriters((writer,), tmp_path, "run-1", {"seed": 0}, 0) as writers:
        writers.write(ROW, "evaluation/")
    (started, _, named), *between, ended = recorder.calls
    assert started == "init" and ended[0] == "finish" and between[-1] == logged
    assert (named["name"], named["project"], named["config"], named["resume"]) == (
        "run-1", "spiral_jax", {"seed": 0}, "allow",
    )  # fmt: skip
    assert named.get("id", "run-1") == "run-1"


def test_unknown_and_missing_writers_are_errors_before_anything_runs(monkeypatch):
    c = tiny.get_config()
    for writers in (("tensorbord",), ("tensorboard", "tensorboard")):
        c.metrics.writers = writers
        with pytest.raises(ConfigError, match=r"metrics\.writers"):
            validate(c)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError,
        match=r"'wandb', which needs the package wandb: pip install -r requirements-writers",
    ):
        check_installed(("wandb",))
    check_installed(())


def test_a_start_names_hardware_versions_and_the_commit_of_the_checkout(monkeypatch):
    found = environment.describe()
    assert (
        found["versions"]["python"].startswith("3.")
        and {"jax", "flax", "numpy"} <= found["versions"].keys()
    )
    assert "cpu" in found["devices"] and found["processes"] == 1
    monkeypatch.setattr(environment, "__file__", "/")
    assert environment.commit() == (None, None)  # not tracked by any repository
    assert to_plain(tiny.get_config())["metrics"] == {"writers": []}
