"""No wait without an end: deadlines that name what is waited for, and stacks of work that takes far
too long.
"""

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
_WINDOW, _LEAST = 20, 3  # units in the median, and before there is one
_LEAST_S = 30.0  # below, a slow disk or a busy machine is no finding


@contextlib.contextmanager
def deadline(what: str, seconds: float) -> Iterator[None]:
    """Ends the process with code `HUNG` when the block takes longer, after a message and all
    threads' stacks.

    It ends here and not with an exception: what hangs is inside a library or the file system and
    would not notice one. A run loses nothing but its current step by it.

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
    """Prints the stacks of all threads, once, when a unit of work takes `multiple` times the median
    of its kind.

    Kinds are "step", "evaluation" or "wave"; one unit at a time. While a kind has no median yet,
    `unknown_s` is the limit, so that the first ones, which compile, and rare ones are watched too.

    Args:
      multiple: config.train.watchdog; 0 = off.
      unknown_s: seconds, config.train.wait_s.
      least_s: seconds below which nothing is suspicious.
    """

    def __init__(self, multiple: float, unknown_s: float, least_s: float = _LEAST_S):
        self._multiple, self._unknown_s, self._least_s = multiple, unknown_s, least_s
        self._seconds: dict[str, collections.deque[float]] = {}  # by kind
        self._unit: tuple[str, float] | None = None  # kind and start of what is under way
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *error: object) -> None:
        self._disarm()

    def starts(self, kind: str, number: int) -> None:
        """Arms the watchdog for this unit of work; one that was left without `ends` is forgotten."""
        self._disarm()
        self._unit = kind, time.monotonic()
        if not self._multiple:
            return
        known = self._seconds.get(kind, ())
        limit, compared = self._unknown_s, "there is no median yet (config.train.wait_s)"
        if len(known) >= _LEAST:
            median = statistics.median(known)
            limit = max(self._multiple * median, self._least_s)
            compared = f"the median is {median:.1f} s (config.train.watchdog = {self._multiple:g})"
        text = f"watchdog: {kind} {number} has taken {limit:.0f} s, {compared}. It goes on; where it stands:"
        self._timer = threading.Timer(limit, lambda: print(text, file=sys.stderr, flush=True))
        self._timer.daemon = True
        self._timer.start()
        # Its own thread in C: it also sees a thread that keeps Python's lock.
        faulthandler.dump_traceback_later(limit + 0.1, file=sys.__stderr__)

    def ends(self) -> None:
        """Disarms it and counts the time that the unit has taken."""
        self._disarm()
        kind, start = self._unit
        if kind in self._seconds:
            self._seconds[kind].append(time.monotonic() - start)
        else:  # the first of a process compiles and never counts
            self._seconds[kind] = collections.deque(maxlen=_WINDOW)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            faulthandler.cancel_dump_traceback_later()
            self._timer = None
