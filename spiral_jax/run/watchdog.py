"""No wait without an end: deadlines that say for what, and stacks of work that takes too long."""

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
_WINDOW, _LEAST = 20, 3  # times that make the median, and how many there must be
_LEAST_S = 30.0  # below, a slow disk or a busy machine is no finding


@contextlib.contextmanager
def deadline(what: str, seconds: float) -> Iterator[None]:
    """Ends the process with code `HUNG` when the block takes longer than `seconds`.

    First it prints a message and all threads' stacks. It raises no exception: what hangs is inside
    a library or the file system and would not notice one. A run loses only its current step by it.

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
    """Prints all threads' stacks, once, when work takes `multiple` times the median of its kind.

    Kinds are "step", "evaluation" or "wave"; one piece of work at a time. While a kind has no
    median yet, `unknown_s` is the limit, so that the first ones, which compile, and rare ones are
    watched too. A context manager.

    Args:
      multiple: config.train.watchdog; 0 = off.
      unknown_s: seconds, config.train.wait_s.
      least_s: seconds below which nothing is suspicious.
    """

    def __init__(self, multiple: float, unknown_s: float, least_s: float = _LEAST_S):
        self._multiple, self._unknown_s, self._least_s = multiple, unknown_s, least_s
        self._seconds: dict[str, collections.deque[float]] = {}  # by kind
        self._kind, self._began = "", 0.0  # what is under way
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *error: object) -> None:
        self._disarm()

    def begin(self, kind: str, number: int) -> None:
        """Watches a piece of work; one that was left without `end` is forgotten."""
        self._disarm()
        self._kind, self._began = kind, time.monotonic()
        if not self._multiple:
            return
        known = self._seconds.get(kind, ())
        if len(known) >= _LEAST:
            median = statistics.median(known)
            limit = max(self._multiple * median, self._least_s)
            reason = f"the median is {median:.1f} s (config.train.watchdog = {self._multiple:g})"
        else:
            limit = self._unknown_s
            reason = "there is no median yet (config.train.wait_s)"
        text = (
            f"watchdog: {kind} {number} has taken {limit:.0f} s, {reason}. It goes on; where it "
            "stands:"
        )
        self._arm(limit, text)

    def end(self) -> None:
        """Stops watching, and counts the time that the work has taken."""
        self._disarm()
        if self._kind in self._seconds:
            self._seconds[self._kind].append(time.monotonic() - self._began)
        else:  # the first of a process compiles and never counts
            self._seconds[self._kind] = collections.deque(maxlen=_WINDOW)

    def _arm(self, seconds: float, text: str) -> None:
        self._timer = threading.Timer(seconds, print, [text], {"file": sys.stderr, "flush": True})
        self._timer.daemon = True
        self._timer.start()
        # Its own thread in C: it also sees a thread that keeps Python's lock.
        faulthandler.dump_traceback_later(seconds + 0.1, file=sys.__stderr__)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            faulthandler.cancel_dump_traceback_later()
            self._timer = None
