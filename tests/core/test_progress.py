"""The progress display: what it shows is what it was told."""

import io
import math
import time

import numpy as np
import pytest
from rich.console import Console

from spiral_jax.core import progress
from spiral_jax.core.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when told."""

    class Clock:
        now = 100.0

        def perf_counter(self):
            return self.now

    fake = Clock()
    monkeypatch.setattr(progress, "time", fake)
    return fake


def plain(**options):
    return Console(file=io.StringIO(), width=80, **options)


def test_phases_add_up_and_are_taken_once(clock):
    bar = Progress(3, 0, plain())
    with bar:
        for seconds in (2.0, 3.0):
            with bar.phase("sampling search"):
                clock.now += seconds
            with bar.phase("updating"):
                clock.now += 0.5
        assert bar.take_times() == {"time/sampling_search": 5.0, "time/updating": 1.0}
        assert bar.take_times() == {}


def test_a_phase_is_timed_inside_another_and_when_it_fails(clock):
    bar = Progress(3, 0, plain())
    with pytest.raises(RuntimeError, match="worker"), bar, bar.phase("evaluating"):
        clock.now += 1.0
        with bar.phase("verifying"):
            clock.now += 2.0
            raise RuntimeError("worker")
    assert bar.take_times() == {"time/evaluating": 3.0, "time/verifying": 2.0}


def test_without_a_terminal_each_step_is_one_plain_line():
    console = plain()
    with Progress(1000, 996, console) as bar:
        bar.step_done(997, 0.25, 123_456_000, 9000.0)  # compiles
        for step in (998, 999, 1000):
            with bar.phase("sampling aggregation"):
                pass
            bar.step_done(step, 0.25, 123_456_000, 1000.0)
    lines = console.file.getvalue().splitlines()[1:]
    assert [line.split("  ")[0] for line in lines] == [
        "step 998 of 1000",
        "step 999 of 1000",
        "step 1000 of 1000",
    ]
    assert all("reward 0.250" in line and "123,456 tokens/s" in line for line in lines)
    assert "\x1b" not in console.file.getvalue()


def test_reward_and_time_left_are_means_of_the_last_ten_steps():
    console = plain()
    rewards, seconds = np.linspace(0, 1, 25), np.arange(1.0, 26.0)
    with Progress(40, 0, console) as bar:
        for step in range(1, 26):
            bar.step_done(step, rewards[step - 1], 10, seconds[step - 1])
    last = console.file.getvalue().splitlines()[-1]
    assert f"reward {rewards[-10:].mean():.3f}" in last
    minutes, rest = divmod(round(15 * seconds[-10:].mean()), 60)
    assert f"left 0:{minutes:02d}:{rest:02d}" in last


def test_a_step_without_reward_is_shown_without_nan():
    console = plain()
    with Progress(5, 0, console) as bar:
        bar.step_done(1, None, 0, 0.0)
        bar.step_done(2, None, 0, 0.0)
        bar.step_done(3, 0.5, 10, 1.0)
        bar.step_done(4, math.nan, 10, 1.0)
    lines = console.file.getvalue().splitlines()
    assert "reward -  - tokens/s" in lines[1]
    assert "reward 0.500" in lines[3]
    assert "nan" not in console.file.getvalue().lower()


def test_a_terminal_shows_phase_step_speed_reward_and_time_left_and_no_plain_lines():
    console = plain(force_terminal=True, color_system=None)
    bar = Progress(250, 118, console)
    with bar.phase("sampling aggregation"), bar:  # what is shown last is of the phase
        bar.step_done(119, 0.4, 819_200, 999.0)  # compiles
        bar.step_done(120, 0.4, 819_200, 120.0)
    screen = console.file.getvalue()
    shown = "step 120/250 reward 0.400  6,827 tokens/s  left 4:20:00 sampling aggregation"
    assert shown in screen
    assert "step 120 of 250" not in screen


def test_the_first_step_of_a_process_compiles_and_counts_neither_as_speed_nor_as_time_left():
    console = plain()
    with Progress(10, 4, console) as bar:
        bar.step_done(5, 0.5, 1000, 600.0)
        bar.step_done(6, 0.5, 1000, 10.0, more="kept 2 of 5 problems")
    first, second = console.file.getvalue().splitlines()
    assert "- tokens/s  left -  600.0 s  with compilation" in first
    assert "100 tokens/s  left 0:00:40  10.0 s  kept 2 of 5 problems" in second


def test_without_a_terminal_a_phase_that_takes_long_gets_a_line_while_it_goes_on():
    console = plain()
    with Progress(10, 0, console, long_s=0.05) as bar:
        with bar.phase("updating"):
            pass
        assert console.file.getvalue() == ""
        with bar.phase("evaluating"):
            deadline = time.monotonic() + 30
            while not console.file.getvalue():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            with bar.phase("sampling"):
                while console.file.getvalue().count("\n") < 2:
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
    names = [line.partition(":")[0] for line in console.file.getvalue().splitlines()]
    assert names == ["evaluating", "evaluating > sampling"]
