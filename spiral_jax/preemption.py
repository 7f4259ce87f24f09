"""Preemption: SIGTERM or a maintenance notice -> the run saves where it stands and ends with exit code 0."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils

from spiral_jax.watchdog import deadline

Result = TypeVar("Result")


class _Interrupted(BaseException):
    """Leaves what may be left at any moment. Not an `Exception`: nothing on the way may take it for a failure."""


class Preemption:
    """Notices that this machine is about to go; a context manager.

    One process: SIGTERM ends what `run` was given at once. Several processes: jax's distributed runtime takes the
    signal, tells all of them, and they agree on the next step that none has begun (`reached`).

    Args:
      grace_s: seconds from the notice until the process ends whatever happens.

    Attributes:
      noticed: whether the run must save and end.
    """

    def __init__(self, grace_s: float):
        self._grace_s = grace_s
        self._stack = contextlib.ExitStack()  # of the deadline, from the notice on
        self._inside = False
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

    def run(self, work: Callable[[], Result]) -> Result | None:
        """`work()`, which must change nothing that lasts; None if a notice has ended it where it was."""
        try:
            try:
                self._inside = True
                return None if self.noticed else work()
            finally:
                self._inside = False
        except _Interrupted:
            return None

    def reached(self, step: int) -> bool:
        """Whether to save and end before `step`; with several processes all of them are told the same."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
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
