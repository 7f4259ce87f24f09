"""Preemption: a SIGTERM or a maintenance notice -> the run saves where it stands, and ends."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from spiral_jax.run.watchdog import deadline


class _Interrupted(BaseException):
    """Leaves what may be left at any moment.

    Not an `Exception`: nothing on the way may take it for a failure.
    """


class Preemption:
    """Notices that this machine is about to go; a context manager.

    One process: SIGTERM ends an `interruptible` block at once. Several processes look for a notice
    between decode chunks (`look`) and steps (`reached`), as often and in the same order on all:
    jax's distributed runtime takes the signal to any of them and names the next look that none has
    had, at which all leave.

    Args:
      grace_s: seconds from the notice until the process ends whatever happens; with several from
        that look on.

    Attributes:
      noticed: whether the run must save and end.
    """

    def __init__(self, grace_s: float):
        self._grace_s = grace_s
        self._stack = contextlib.ExitStack()  # of the deadline, from the notice on
        self._inside = False
        self._looks = 0  # by this process, not by the run: jax counts from the processes' start
        self.noticed = False

    def __enter__(self) -> Preemption:
        # Handlers belong to the main thread; with several processes jax has installed its own.
        self._old: Any = None
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._old = signal.signal(signal.SIGTERM, self._received)
        return self

    def __exit__(self, *error: object) -> None:
        if self._old is not None:
            signal.signal(signal.SIGTERM, self._old)
        self._stack.close()

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """A notice ends the block where it is; it must change nothing that lasts."""
        try:
            try:
                self._inside = True
                yield
            finally:
                self._inside = False
        except _Interrupted:
            pass

    def look(self) -> None:
        """Ends the `interruptible` block around it if all processes have been told to end."""
        if self.reached():
            raise _Interrupted

    def reached(self) -> bool:
        """Whether to save and end now, between two steps; several processes are told the same."""
        if jax.process_count() > 1 and not self.noticed:
            self._looks += 1
            if multihost_utils.reached_preemption_sync_point(self._looks):
                self._notice()
        return self.noticed

    def _notice(self) -> None:
        if not self.noticed:
            self.noticed = True
            what = "the checkpoint after a preemption notice (config.train.grace_s)"
            self._stack.enter_context(deadline(what, self._grace_s))

    def _received(self, *_: object) -> None:
        self._notice()
        if self._inside:
            self._inside = False
            raise _Interrupted
