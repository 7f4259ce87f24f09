"""The terminal display of a run, and its stopwatch."""

from __future__ import annotations

import collections
import contextlib
import datetime
import math
import time
from collections.abc import Iterator

import rich.console
import rich.progress
import rich.table

WINDOW = 10  # steps in the moving reward and in the estimate of the time left


class Progress:
    """Shows phase, step, speed, reward and time left.

    On a terminal it is a live bar, else one plain line a step. Phases are timed either way. Use as
    a context manager, so that the terminal is restored when the run fails.

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
    """

    def __init__(
        self,
        total_steps: int,
        first_step: int,
        console: rich.console.Console | None = None,
        unit: str = "step",
    ):
        self._total_steps, self._unit = total_steps, unit
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
        start = time.perf_counter()
        try:
            yield
        finally:
            key = "time/" + name.replace(" ", "_")
            self._times[key] = self._times.get(key, 0.0) + time.perf_counter() - start
            self._bar.update(self._task, phase=outer)

    def take_times(self) -> dict[str, float]:
        """Seconds of each phase since the last call, as metrics `time/the_phase`."""
        times, self._times = self._times, {}
        return times

    def step_done(self, step: int, reward: float | None, tokens: int, seconds: float) -> None:
        """Shows a finished step.

        Args:
          step: steps done, this one included: `total_steps` for the last.
          reward: mean reward of the step; None or NaN if it has none.
          tokens: sampled tokens of the step.
          seconds: wall clock of the step.
        """
        if reward is not None and not math.isnan(reward):
            self._rewards.append(reward)
        self._seconds.append(seconds)
        average = f"{sum(self._rewards) / len(self._rewards):.3f}" if self._rewards else "-"
        speed = f"{tokens / seconds:,.0f}" if seconds > 0 else "-"
        left = (self._total_steps - step) * sum(self._seconds) / len(self._seconds)
        status = (
            f"reward {average}  {speed} tokens/s  left {datetime.timedelta(seconds=round(left))}"
        )
        self._bar.update(self._task, completed=step, status=status)
        if not self._console.is_interactive:
            line = f"{self._unit} {step} of {self._total_steps}  {status}  {seconds:.1f} s"
            self._console.print(line, soft_wrap=True, markup=False, highlight=False)
