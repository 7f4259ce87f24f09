"""Metric writers: TensorBoard's files read back, and the calls that W&B and trackio get."""

import itertools
import math
import struct
import sys
import time
import types

import pytest
from tensorboardX.proto.event_pb2 import Event

from spiral_jax.core.config import ConfigError
from spiral_jax.run.metric_writers import MetricWriters, check_installed

ROW = {
    "step": 3,
    "reward/search": 0.5,
    "grad_norm": None,
    "loss": math.nan,
    "name": "x",
    "single": {"mean": 0.25, "low": 0.125, "high": None, "count": 8},
}
NUMBERS = {
    "evaluation/reward/search": 0.5,
    "evaluation/single/mean": 0.25,
    "evaluation/single/low": 0.125,
}


def events_of(directory):
    """All events of all files, in the order of their names.

    A record is a length, a checksum, the content, a checksum.
    """
    events = []
    for file in sorted(directory.iterdir()):
        content, at = file.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            events.append(Event.FromString(content[at + 12 : at + 12 + length]))
            at += length + 16
    return events


def test_tensorboard_files_hold_every_finite_number_at_its_step_and_a_resume_purges_what_it_repeats(
    tmp_path, monkeypatch
):
    clock = itertools.count(1_000_000)  # a file is named after its second
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    for start in (0, 3):
        with MetricWriters(("tensorboard",), tmp_path, "run", {}, start) as writers:
            writers.write(ROW, "evaluation/")
    events = events_of(tmp_path / "tensorboard")
    shown = [(event.step, event.summary.value) for event in events if event.HasField("summary")]
    assert {step for step, _ in shown} == {3} and len(shown) == 2 * len(NUMBERS)
    first = [value for _, values in shown[: len(NUMBERS)] for value in values]
    assert {value.tag: value.simple_value for value in first} == NUMBERS
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


@pytest.mark.parametrize(
    ("writer", "logged"),
    [
        ("wandb", ("log", ({"step": 3} | NUMBERS,), {})),
        ("trackio", ("log", (NUMBERS,), {"step": 3})),
    ],
)
def test_wandb_and_trackio_resume_one_run_under_its_name(tmp_path, monkeypatch, writer, logged):
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, writer, recorder)
    with MetricWriters((writer,), tmp_path, "run-1", {"seed": 0}, 0) as writers:
        writers.write(ROW, "evaluation/")
    (started, _, named), *between, ended = recorder.calls
    assert started == "init" and ended[0] == "finish" and between[-1] == logged
    expected = {"name": "run-1", "project": "spiral_jax", "config": {"seed": 0}, "resume": "allow"}
    assert expected.items() <= named.items()
    assert named.get("id", "run-1") == "run-1"


def test_a_writer_whose_package_is_missing_is_an_error_that_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as refusal:
        check_installed(("wandb",))
    for part in ("config.metrics.writers", "wandb", 'pip install ".[writers]"'):
        assert part in str(refusal.value)
    check_installed(())
