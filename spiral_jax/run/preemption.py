"""Being told to end: SIGTERM, a maintenance notice or Ctrl-C -> the run saves where it stands.

A second Ctrl-C ends the process at once, also where it computes and no Python runs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from spiral_jax.run.watchdog import deadline

_INTERRUPTED = 128 + signal.SIGINT  # exit code, as shells give it


def exit_code(notice: signal.Signals, preempted: int) -> int:
    """Of a command that `notice` has ended; `preempted`: the code of all but a Ctrl-C."""
    return _INTERRUPTED if notice is signal.SIGINT else preempted


@contextlib.contextmanager
def second_interrupt_ends(
    said: str, before_end: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Prints `said` at the first Ctrl-C, and ends the process with code 130 at the second.

    What else the first one does is up to its handler. A thread counts them, for a handler waits
    until Python runs in the main thread. Elsewhere than there this does nothing.

    Args:
      before_end: called before the process ends.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def count() -> None:
        interrupts = 0
        while number := os.read(reading, 1):
            interrupts += number[0] == signal.SIGINT
            if number[0] == signal.SIGINT and interrupts == 1:
                os.write(2, f"\n{said}; Ctrl-C again ends it at once\n".encode())
            elif interrupts == 2:
                before_end()
                os._exit(_INTERRUPTED)
        os.close(reading)

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=count, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)


class _Interrupted(BaseException):
    """Leaves what may be left at any moment.

    Not an `Exception`: nothing on the way may take it for a failure.
    """


class Preemption:
    """Notices that this process is told to end; a context manager.

    One process: SIGTERM and Ctrl-C end an `interruptible` block at once. Several processes look for
    a notice between decode chunks (`look`) and steps (`reached`), as often and in the same order on
    all: jax's distributed runtime takes SIGTERM to any of them and names the next look that none
    has had, at which all leave; a Ctrl-C is handed on to it.

    Args:
      grace_s: seconds from the notice until the process ends whatever happens; with several from
        that look on.

    Attributes:
      notice: the signal that tells the run to save and end; None: there was none.
    """

    def __init__(self, grace_s: float):
        self._grace_s = grace_s
        self._stack = contextlib.ExitStack()  # of the deadline, from the notice on
        self._inside = False
        self._interrupted = False
        self._looks = 0  # by this process, not by the run: jax counts from the processes' start
        self.notice: signal.Signals | None = None

    @property
    def word(self) -> str:
        """What to call the end that the notice has brought."""
        return "interrupted" if self.notice is signal.SIGINT else "preempted"

    def announce(self, kept: str) -> None:
        """Prints that the notice has ended the command, and what is kept of it."""
        print(f"{self.word}: {kept}; the same command goes on", flush=True)

    def __enter__(self) -> Preemption:
        # Handlers belong to the main thread; with several processes jax has its own of SIGTERM.
        self._old: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._stack.enter_context(second_interrupt_ends("interrupted: saving where it stands"))
            self._old[signal.SIGINT] = signal.signal(signal.SIGINT, self._received)
            if jax.process_count() == 1:
                self._old[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._received)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
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
        if jax.process_count() > 1 and not self.notice:
            self._looks += 1
            if multihost_utils.reached_preemption_sync_point(self._looks):
                self._notice(signal.SIGINT if self._interrupted else signal.SIGTERM)
        return self.notice is not None

    def _notice(self, number: signal.Signals) -> None:
        if not self.notice:
            self.notice = number
            what = "the checkpoint after a preemption notice (config.train.grace_s)"
            self._stack.enter_context(deadline(what, self._grace_s))

    def _received(self, number: int, _: object) -> None:
        if jax.process_count() > 1:  # a Ctrl-C
            self._interrupted = True
            os.kill(os.getpid(), signal.SIGTERM)
            return
        self._notice(signal.Signals(number))
        if self._inside:
            self._inside = False
            raise _Interrupted
