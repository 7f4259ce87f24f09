"""The commands of a study, one or several at once, and how all of them are stopped."""

from __future__ import annotations

import concurrent.futures
import os
import queue
import subprocess
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import IO

from spiral_jax.core.config import ConfigError

_ASKED_EVERY = 1.0  # seconds


class Processes:
    """Runs commands, `at_once` of them side by side.

    Each runs on its share of the cores, where the system can pin it.
    A small model does not keep several cores busy: two runs with a core each are through sooner
    than one after the other with both.

    Raises:
      ConfigError: fewer than one, or more than there are cores.
    """

    def __init__(self, at_once: int):
        self._pinned = hasattr(os, "sched_getaffinity")
        self._cores = list(range(os.cpu_count() or 1))
        if self._pinned:
            self._cores = sorted(os.sched_getaffinity(0))
        if not 1 <= at_once <= len(self._cores):
            most = len(self._cores)
            raise ConfigError(
                f"--at_once={at_once}: must be from 1 to {most}, the cores that there are."
            )
        self.at_once = at_once
        self._guard = threading.Lock()
        self._running: set[subprocess.Popen] = set()
        self._stopped = False

    def each(self, jobs: Iterable[Callable[[], None]]) -> None:
        """Calls every job, begun in their order, `at_once` at a time.

        If one raises, or the study is told to stop, the commands that run are told to end, no other
        begins, and it raises once they have ended.
        """
        shares: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
        for i in range(self.at_once):
            shares.put(self._cores[i :: self.at_once])

        def pin_thread() -> None:  # its commands inherit it
            if self._pinned:
                os.sched_setaffinity(0, shares.get())

        with concurrent.futures.ThreadPoolExecutor(self.at_once, initializer=pin_thread) as pool:
            futures = [pool.submit(job) for job in jobs]
            try:
                for future in concurrent.futures.as_completed(futures):
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self._stop()
                raise

    def run(
        self,
        command: Sequence[str],
        output: IO[bytes],
        environment: Mapping[str, str],
        pass_fds: Sequence[int],
        ends: Callable[[], bool] | None = None,
    ) -> int:
        """One command to its end; what it prints goes to `output`. Returns its exit status.

        Args:
          ends: asked every second whether to tell the command to end.
        """
        with self._guard:
            if self._stopped:
                raise concurrent.futures.CancelledError
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=pass_fds,
                start_new_session=True,  # a terminal's Ctrl-C reaches them through the study alone
            )
            self._running.add(process)
        try:
            code = _wait(process, ends)
        except BaseException:  # of a caller outside `each`: the study was told to stop
            process.terminate()
            process.wait()
            raise
        finally:
            with self._guard:
                self._running.remove(process)
        if self._stopped:  # the command was told to end too, so its exit status says nothing of it
            raise concurrent.futures.CancelledError
        return code

    def kill(self) -> None:
        """Kills the commands that run; what they have saved stays."""
        for process in tuple(self._running):  # no lock: its holder may be the thread that waits
            process.kill()

    def _stop(self) -> None:
        with self._guard:
            self._stopped = True
            for process in self._running:
                process.terminate()


def _wait(process: subprocess.Popen, ends: Callable[[], bool] | None) -> int:
    """The exit status of a process, which gets a SIGTERM once `ends` says so."""
    while ends:
        try:
            return process.wait(_ASKED_EVERY)
        except subprocess.TimeoutExpired:
            if ends():
                process.terminate()
                break
    return process.wait()
