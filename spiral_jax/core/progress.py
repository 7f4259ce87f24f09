"""The terminal display of a run, and its stopwatch."""

from __future__ import annotations

import collections
import contextlib
import datetime
import math
import threading
import time
from collections.abc import Iterator

import rich.console
import rich.progress
import rich.table

WINDOW = 10  # steps in the moving reward and in the estimate of the time left
_LONG_S = 10.0  # a phase that takes so long gets a line where there is no bar


class Progress:
    """Shows phase, step, speed, reward and time left.

    On a terminal it is a live bar, else one plain line a step, and one for each phase that takes
    long. Phases are timed either way. The first step of a process compiles: its time is shown, and
    counts neither in the speed nor in the time left. Use as a context manager, so that the terminal
    is restored when the run fails.

        with Progress(total_steps=60, first_step=0) as progress:
            with progress.phase("sampling search"):
                ...
            progress.step_done(step=1, reward=0.25, tokens=81_920, seconds=12.5)
            metrics |= progress.take_times()  # {"time/sampling_search": 9.1}

    Args:
      total_steps: steps of the whole run, those before a resume included.
      first_step: steps that are done already: 0, or the checkpoint's step.
      console: where to print; default: standard output. `Console(quiet=True)` on all processes but
        the first.
      unit: what a step is called.
      long_s: seconds after which a phase gets a line.
    """

    def __init__(
        self,
        total_steps: int,
        first_step: int,
        console: rich.console.Console | None = None,
        unit: str = "step",
        long_s: float = _LONG_S,
    ):
        self._total_steps, self._unit, self._long_s = total_steps, unit, long_s
        self._phases: list[str] = []  # outer ones first
        self._has_compiled = False
        self._console = console or rich.console.Console()
        self._times: dict[str, float] = {}
        self._rewards: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self._seconds: collections.deque[float] = collections.deque(maxlen=WINDOW)
        unwrapped = rich.table.Column(no_wrap=True)
        self._bar = rich.progress.Progress(
            rich.progress.BarColumn(bar_width=12),
            rich.progress.TextColumn(
                unit + " {task.completed:.0f}/{task.total:.0f}",
                markup=False,
                table_column=unwrapped,
            ),
            rich.progress.TextColumn("{task.fields[status]}", markup=False, table_column=unwrapped),
            rich.progress.TextColumn(
                "{task.fields[phase]}", style="bold", markup=False, table_column=unwrapped
            ),
            console=self._console,
            disable=not self._console.is_interactive,
        )
        self._task = self._bar.add_task(
            "", total=total_steps, completed=first_step, phase="", status=""
        )

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Shows `name` and adds the seconds spent inside to its time, also when an error leaves it.

        An inner phase counts in the outer one too. Block on device results inside, or the next
        phase is charged.
        """
        outer = self._bar.tasks[0].fields["phase"]
        self._bar.update(self._task, phase=name)
        self._phases.append(name)
        long = threading.Timer(self._long_s, self._say_phase, [" > ".join(self._phases)])
        long.daemon = True
        if not self._console.is_interactive:
            long.start()
        start = time.perf_counter()
        try:
            yield
        finally:
            long.cancel()
            self._phases.pop()
            key = "time/" + name.replace(" ", "_")
            self._times[key] = self._times.get(key, 0.0) + time.perf_counter() - start
            self._bar.update(self._task, phase=outer)

    def _say_phase(self, name: str) -> None:
        self.say(f"{name}: {self._long_s:.0f} s so far")

    def say(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)

    def go_on_from(self, step: int) -> None:
        """Shows that so many steps are done."""
        self._bar.update(self._task, completed=step)

    def take_times(self) -> dict[str, float]:
        """Seconds of each phase since the last call, as metrics `time/the_phase`."""
        times, self._times = self._times, {}
        return times

    def step_done(
        self, step: int, reward: float | None, tokens: int, seconds: float, more: str = ""
    ) -> None:
        """Shows a finished step.

        Args:
          step: steps done, this one included: `total_steps` for the last.
          reward: mean reward of the step; None or NaN if it has none.
          tokens: sampled tokens of the step.
          seconds: wall clock of the step.
          more: what else the plain line says.
        """
        if reward is not None and not math.isnan(reward):
            self._rewards.append(reward)
        average = f"{sum(self._rewards) / len(self._rewards):.3f}" if self._rewards else "-"
        speed, left, compiled = "-", "-", "with compilation"
        if self._has_compiled:
            self._seconds.append(seconds)
            speed = f"{tokens / seconds:,.0f}" if seconds > 0 else "-"
            left_s = (self._total_steps - step) * sum(self._seconds) / len(self._seconds)
            left, compiled = str(datetime.timedelta(seconds=round(left_s))), ""
        self._has_compiled = True
        status = f"reward {average}  {speed} tokens/s  left {left}"
        self._bar.update(self._task, completed=step, status=status)
        if not self._console.is_interactive:
            parts = [f"{self._unit} {step} of {self._total_steps}", status, f"{seconds:.1f} s"]
            self.say("  ".join([*parts, *filter(None, [compiled, more])]))
