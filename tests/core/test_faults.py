"""Faults of drills: what the variable may say, and when a point kills."""

import os

import pytest

from spiral_jax.core import faults


@pytest.mark.parametrize(
    "text", ["search", "search:0", "search:x", "nowhere:1", "search:1:HUP", "search:1:TERM:1", ":1"]
)
def test_a_fault_that_is_none_is_an_error(text):
    with pytest.raises(ValueError, match="SPIRAL_FAULT.*POINT:COUNT"):
        faults.arm(text)


@pytest.fixture
def sent(monkeypatch):
    """The signals that are sent instead of killing this process."""
    signals = []
    monkeypatch.setattr(os, "kill", lambda pid, signal: signals.append(signal.name))
    yield signals
    faults.arm("")


@pytest.mark.parametrize(
    ("more", "name"), [("", "SIGKILL"), (":TERM", "SIGTERM"), (":INT", "SIGINT")]
)
def test_a_point_counts_from_the_first_chunk_on_and_kills_once(sent, more, name):
    faults.arm(f"update:2{more}")
    faults.passed("update")
    faults.passed("update")
    faults.chunk_decoded()
    faults.passed("search")
    faults.passed("update")
    assert sent == []
    for _ in range(3):
        faults.passed("update")
    assert sent == [name]


def test_without_a_fault_a_point_is_nothing(sent):
    faults.arm("")
    faults.chunk_decoded()
    for point in faults.POINTS:
        faults.passed(point)
    assert sent == []
