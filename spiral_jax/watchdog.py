"""No wait without an end: deadlines that name what is waited for, and stacks of a step that takes far too long."""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterator

HUNG = 75  # exit code of a passed deadline: EX_TEMPFAIL, "try again", which launchers do
_STEPS = 20  # in the median
_LEAST_STEPS = 3  # before there is one; the first of a process compiles and never counts
_LEAST_S = 30.0  # below, a slow disk or a busy machine is no finding


@contextlib.contextmanager
def deadline(what: str, seconds: float) -> Iterator[None]:
    """Ends the process with code `HUNG` when the block takes longer, after a message and all threads' stacks.

    It ends here and not with an exception: what hangs is inside a library or the file system and would not notice one.
    A run loses nothing but its current step by it.

    Args:
      what: completes "waited N s for ...".
    """

    def expired() -> None:
        text = f"error: waited {seconds:g} s for {what}. The process ends; where it stands:"
        print(text, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        os._exit(HUNG)

    timer = threading.Timer(seconds, expired)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Watchdog:
    """Prints the stacks of all threads, once, when a step takes `multiple` times the median of those before it.

    Args:
      multiple: 0 = off.
      least_s: seconds below which no step is suspicious.
    """

    def __init__(self, multiple: float, least_s: float = _LEAST_S):
        self._multiple, self._least_s = multiple, least_s
        self._seconds: collections.deque[float] = collections.deque(maxlen=_STEPS)
        self._start: float | None = None
        self._first = True
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *error: object) -> None:
        self._disarm()

    def step_starts(self, step: int) -> None:
        """Arms the watchdog for this step, if enough steps have been timed."""
        self._start = time.monotonic()
        if not self._multiple or len(self._seconds) < _LEAST_STEPS:
            return
        median = statistics.median(self._seconds)
        limit = max(self._multiple * median, self._least_s)
        text = (
            f"watchdog: step {step} has taken {limit:.0f} s, the median is {median:.1f} s (config.train.watchdog = "
            f"{self._multiple:g}). It goes on; where it stands:"
        )
        self._timer = threading.Timer(limit, lambda: print(text, file=sys.stderr, flush=True))
        self._timer.daemon = True
        self._timer.start()
        # Its own thread in C: it also sees a thread that keeps Python's lock.
        faulthandler.dump_traceback_later(limit + 0.1, file=sys.__stderr__)

    def step_ends(self) -> None:
        """Disarms it and counts the step's time."""
        self._disarm()
        if not self._first:
            self._seconds.append(time.monotonic() - self._start)
        self._first = False

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            faulthandler.cancel_dump_traceback_later()
            self._timer = None
