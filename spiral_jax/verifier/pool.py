"""Items (text, problem) -> verdicts, in child processes that can be killed.

A worker is a bare Python process that imports the reward function and nothing else: neither jax nor
the program that started it (multiprocessing's "spawn" would import the main module again, and with
it jax). It takes one item at a time over a socket, and ends when the other side closes, so it never
outlives its parent.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe, wait

from spiral_jax.core import faults
from spiral_jax.core.errors import UserError
from spiral_jax.core.functions import hint_at
from spiral_jax.tasks.problem import Problem
from spiral_jax.verifier import sandbox
from spiral_jax.verifier.rewards import MATH, Status, Verdict, is_users, judge, load_reward
from spiral_jax.verifier.settings import VerifierSettings

Item = tuple[str, Problem]

_TRIES = 2  # an item that kills its worker, or outlasts its time, gets one more, on a fresh worker
_COMMAND = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from spiral_jax.verifier import pool; pool.serve()"
)
_OWN_TIMERS = (-signal.SIGALRM, -signal.SIGXCPU)  # exit codes of a worker that has ended itself


class VerifierFailure(UserError):
    """Rewards cannot be trusted or had; the message says what to look at."""


@dataclasses.dataclass
class _Worker:
    process: subprocess.Popen
    connection: Connection
    deadline: float  # time.monotonic() when its start, or its item, has taken too long
    ready: bool = False
    fresh: bool = True  # has not been handed an item yet
    item: int | None = None  # index of the item it is at


class Pool:
    """Workers with one reward function. They start when first needed, and stay until `close`.

    Args:
      reward: as config.task.reward; must have been loadable here.
      settings: how many workers there are at most, and what each may take.
      start_timeout_s: seconds until a worker must be ready.
    """

    def __init__(self, reward: str, settings: VerifierSettings, start_timeout_s: float = 60.0):
        self._reward = reward
        self._settings = settings
        self._start_timeout_s = start_timeout_s
        self._workers: list[_Worker] = []
        self._timeout = Verdict.of(Status.TIMEOUT)
        if is_users(reward):
            self._timeout = Verdict.of_slow_reward(settings.timeout_s)

    def longest_s(self, items: int) -> float:
        """Seconds that `run` takes at most for so many items.

        It takes so long if all of them hang and every worker starts slowly.
        """
        a_try = self._settings.timeout_s + self._start_timeout_s
        tries_in_turn = _TRIES * math.ceil(items / self._settings.workers)
        return self._start_timeout_s + tries_in_turn * a_try

    def run(self, items: Sequence[Item]) -> list[Verdict]:
        """Verdicts of `items`, in their order.

        A worker that takes too long is killed and replaced, one that died is replaced, and the item
        is tried once more on a fresh worker: a second time-out is `Status.TIMEOUT`, with reward NaN
        if the reward function is the user's; a second death is `Status.ERROR`.

        Raises:
          VerifierFailure: a worker cannot start. All workers have ended then, as after any other
            exception.
        """
        try:
            batch = _Batch(items, self._timeout)
            while batch.unfinished:
                while len(self._workers) < min(self._settings.workers, batch.unfinished):
                    self._start()
                for worker in self._workers:
                    if worker.ready and worker.item is None:
                        self._hand(worker, batch)
                self._collect(batch)
            return batch.verdicts
        except BaseException:  # a worker that is left at an item would answer into the next batch
            self.close()
            raise

    def close(self) -> None:
        """Kills all workers, and what they have started."""
        while self._workers:
            self._kill(self._workers[-1])

    def _start(self) -> None:
        ours, theirs = Pipe()
        arguments = [
            json.dumps([os.path.abspath(entry) for entry in sys.path]),
            str(theirs.fileno()),
            self._reward,
            str(self._settings.timeout_s),
            str(int(self._settings.memory_gb * 1e9)),
        ]
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", _COMMAND, *arguments],
                stdin=subprocess.DEVNULL,
                env=sandbox.worker_environment(self._settings.environment),
                pass_fds=[theirs.fileno()],
                # out of Ctrl-C's reach, and killable with all that it starts
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._workers.append(_Worker(process, ours, time.monotonic() + self._start_timeout_s))

    def _kill(self, worker: _Worker) -> int:
        """Ends a worker for good; returns its exit code."""
        self._workers.remove(worker)
        # the errors of a group that is gone; on macOS, of a zombie
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(worker.process.pid, signal.SIGKILL)
        worker.connection.close()
        return worker.process.wait()

    def _hand(self, worker: _Worker, batch: _Batch) -> None:
        item = batch.next(worker.fresh)
        if item is None:
            return
        with contextlib.suppress(OSError):  # it died while idle: `_collect` will see that
            worker.connection.send(batch.items[item])
        worker.item, worker.fresh = item, False
        worker.deadline = time.monotonic() + self._settings.timeout_s
        faults.passed("verifier")

    def _collect(self, batch: _Batch) -> None:
        """Waits until a worker has something to say or is out of time; deals with all of these."""
        active = [worker for worker in self._workers if not worker.ready or worker.item is not None]
        first = min(worker.deadline for worker in active)
        wait([worker.connection for worker in active], max(0.0, first - time.monotonic()))
        for worker in active:
            late = time.monotonic() >= worker.deadline
            if worker.connection.poll():
                try:
                    message = worker.connection.recv()
                except (EOFError, OSError):
                    self._failed(worker, batch, Status.ERROR)
                else:
                    self._received(worker, batch, message)
            elif late:
                self._failed(worker, batch, Status.TIMEOUT)

    def _received(self, worker: _Worker, batch: _Batch, message: Sequence) -> None:
        if worker.ready:
            batch.finish(worker.item, Verdict.from_plain(message))
            worker.item = None
        elif message[0] == "ready":
            worker.ready = True
        else:
            raise VerifierFailure(
                f"config.task.reward = {self._reward!r}: a worker cannot start.\n{message[1]}"
            )

    def _failed(self, worker: _Worker, batch: _Batch, status: Status) -> None:
        exit_code = self._kill(worker)
        if not worker.ready:
            reason = f"ended with exit code {exit_code}"
            if status is Status.TIMEOUT:
                reason = f"was not ready after {self._start_timeout_s:g} s"
            raise VerifierFailure(
                f"config.task.reward = {self._reward!r}: a worker {reason} while it imported the "
                "reward function. Import the module by hand in a new Python process to see why."
            )
        if exit_code in _OWN_TIMERS:  # they come first where this process was held up
            status = Status.TIMEOUT
        batch.fail(worker.item, status, f"worker died with exit code {exit_code}")
        self._start()  # for each item to be retried there is a worker that has not been handed one


class _Batch:
    """Which items are waiting, to be retried, and done; `timeout`: of items that took too long."""

    def __init__(self, items: Sequence[Item], timeout: Verdict):
        self.items = items
        self._timeout = timeout
        self.verdicts: list[Verdict | None] = [None] * len(items)
        self.unfinished = len(items)
        self._waiting = collections.deque(range(len(items)))
        self._retries: collections.deque[int] = collections.deque()
        self._failures: collections.Counter[tuple[int, Status]] = collections.Counter()

    def next(self, fresh: bool) -> int | None:
        """The item for an idle worker; those to be retried only for a fresh one, and first."""
        if fresh and self._retries:
            return self._retries.popleft()
        return self._waiting.popleft() if self._waiting else None

    def finish(self, item: int, verdict: Verdict) -> None:
        self.verdicts[item] = verdict
        self.unfinished -= 1

    def fail(self, item: int, status: Status, detail: str) -> None:
        self._failures[item, status] += 1
        if self._failures[item, status] < _TRIES:
            self._retries.append(item)
        elif status is Status.TIMEOUT:
            self.finish(item, self._timeout)
        else:
            problem = self.items[item][1]
            self.finish(item, Verdict.of(status, f"{detail} at problem {problem.id!r}"))


def serve() -> None:
    """A worker's whole life; its arguments are those of `Pool._start`."""
    _, descriptor, path, timeout, memory_bytes = sys.argv[1:]
    connection, timeout_s = Connection(int(descriptor)), float(timeout)
    os.set_inheritable(connection.fileno(), False)
    sandbox.limit_memory(int(memory_bytes))
    try:
        if is_users(path):
            sandbox.prefix_prints(f"[{path}] ")
        reward = load_reward(path, timeout_s)
        if path == MATH:
            sandbox.lock_down()
    except BaseException as error:
        cause = error.__cause__ or error
        connection.send(("failed", traceback.format_exc() + hint_at(cause)))
        return
    with contextlib.suppress(EOFError, OSError):  # the other side has closed: done
        connection.send(("ready", ""))
        while True:
            text, problem = connection.recv()
            # the kernel ends a worker that hangs without a parent
            signal.setitimer(signal.ITIMER_REAL, 2 * timeout_s)
            if path == MATH:  # a user's own may use many cores at once
                sandbox.limit_cpu(2 * timeout_s)
            verdict = judge(reward, text, problem)
            sys.stdout.flush()
            sys.stderr.flush()
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send(verdict.to_plain())
