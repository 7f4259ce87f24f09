"""One run in a directory at a time: a lock that survives kill -9 and works on shared file systems.

    WORKDIR/lock.json      {"pid": 4711, "host": "tpu-0", "since": "2026-01-31T12:00:00...", ...}

The file is made so that it must not exist (O_EXCL, which network file systems honour; not all of
them have flock), and while the run lives a thread touches it every few seconds. A lock that is
there belongs to a process that still runs, or was killed:

- on this machine, pid and start time of the process say which, at once;
- of another machine, or another container, nobody can be asked, so the file is watched for a
  minute: what nobody touches meanwhile is stale. Clocks are not compared.

A stale lock is taken over. Two processes may do that at the same moment, and one that was suspended
for minutes may wake up beside its successor: the thread notices that the lock is another's, and
ends its process. Of several processes of one run the first alone holds the lock.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from spiral_jax.core import distributed
from spiral_jax.core.errors import UserError

FILE = "lock.json"
_BEAT_S = 5.0  # between two signs of life
_SILENT_S = 60.0  # without one: network file systems show a change late, but not so late
_SETTLE_S = 0.5  # where there was a lock: what another has done at the same moment is seen then
# Network file systems remember for up to a minute that a file was not there.
_SHARED_WITHIN_S = 90.0


class LockError(UserError):
    """Another process is at work in the directory; the message says which, and what to do."""


@contextlib.contextmanager
def hold(
    directory: pathlib.Path, beat_s: float = _BEAT_S, silent_s: float = _SILENT_S
) -> Iterator[None]:
    """Holds the lock of `directory`, which exists.

    A collective where a run has several processes: the first takes the lock, all others see it.

    Args:
      beat_s: seconds between two signs of life.
      silent_s: a lock of another machine without one for so long is stale; many times `beat_s`.

    Raises:
      LockError: another run holds it; or this process does not see the lock of the first one.
      OSError: the directory cannot be written.
    """
    lock = _Lock(directory / FILE, silent_s)
    own = distributed.from_first(lock.take)
    if not distributed.is_first():
        lock.wait_for(own)
        yield
        return
    ended = threading.Event()
    threading.Thread(target=lock.beat, args=(ended, beat_s), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        lock.release()


class _Lock:
    """The lock file at `path`; `own` is what it says of this process."""

    def __init__(self, path: pathlib.Path, silent_s: float):
        self._path, self._silent_s = path, silent_s
        self._own: dict[str, Any] = {}
        self._guard = threading.Lock()  # between `release` and a beat

    def take(self) -> dict[str, Any]:
        """Makes the file, in place of a stale one too; returns its content."""
        pid = os.getpid()
        now = datetime.datetime.now(datetime.UTC)
        self._own = {
            "pid": pid,
            "host": socket.gethostname(),
            "since": now.isoformat(timespec="microseconds"),
            "process_start": _process_start(pid),
            "machine": _machine(),
        }
        was_there = False
        while not self._make():
            was_there = True
            holder = self._read()
            if holder is None:
                continue  # it was released meanwhile
            self._check_stale(holder)
            if self._remove(holder):
                left = f"{self._path}: left by {_words(holder)}, which is gone; taken over."
                print(left, flush=True)
        if was_there:
            time.sleep(_SETTLE_S)
            if (holder := self._read()) != self._own:
                raise self._held(holder or {}, "it has taken over a stale lock just now")
        return self._own

    def _make(self) -> bool:
        """Makes the file; returns whether there was none."""
        try:
            descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        try:
            with open(descriptor, "w") as file:
                file.write(json.dumps(self._own) + "\n")
        except BaseException:
            self._path.unlink(missing_ok=True)
            raise
        return True

    def _remove(self, holder: dict[str, Any]) -> bool:
        """Removes a stale lock; returns whether it was still that one.

        It is looked at once more when it has been put aside: another process may have taken it over
        between a look and a removal, however long that takes.
        """
        aside = self._path.with_name(f"{FILE}.{uuid.uuid4().hex}")
        try:
            os.rename(self._path, aside)
        except FileNotFoundError:
            return False
        try:
            was_stale = _content(aside) == holder
            if not was_stale:
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self._path)  # back, unless there is a third one by now
        finally:
            aside.unlink()
        return was_stale

    def _read(self) -> dict[str, Any] | None:
        return _content(self._path)

    def _check_stale(self, holder: dict[str, Any]) -> None:
        """Raises `LockError`: the process of a lock that is there still runs."""
        here = holder.get("host") == self._own["host"]
        if here and holder.get("machine") == self._own["machine"]:
            if _runs(holder["pid"], holder.get("process_start")):
                raise self._held(holder, "it runs on this machine")
            return
        print(
            f"{self._path}: held by {_words(holder)}. Watching it for up to {self._silent_s:g} s "
            "for a sign of life.",
            flush=True,
        )
        before = self._touched()
        end = time.monotonic() + self._silent_s
        while time.monotonic() < end:
            time.sleep(min(1.0, self._silent_s / 10))
            now = self._touched()
            if now is None:
                return
            if now != before:
                raise self._held(holder, "it has given a sign of life just now")

    def _touched(self) -> int | None:
        """When the file was touched last, by its file system's clock; None: it is not there."""
        try:
            with open(self._path, "rb") as file:  # opening asks a network's server anew
                return os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None

    def _held(self, holder: dict[str, Any], seen: str) -> LockError:
        return LockError(
            f"--workdir={self._path.parent}: {_words(holder)}, is at work there ({seen}). Two runs "
            "in one directory would mix their logs and checkpoints: wait for it, end it, or give "
            f"another --workdir. If there is no such process, delete {self._path}."
        )

    def wait_for(self, own: dict[str, Any]) -> None:
        """Returns when this process, which is not the first, sees the first one's lock.

        Raises:
          LockError: not within a minute and a half.
        """
        end = time.monotonic() + _SHARED_WITHIN_S
        while self._read() != own:
            if time.monotonic() > end:
                raise LockError(
                    f"--workdir={self._path.parent}: process 0 has made {FILE} there, this host "
                    f"does not see it after {_SHARED_WITHIN_S:g} s. All hosts write their part of "
                    "the checkpoints: give a directory of a file system that they share."
                )
            time.sleep(0.2)

    def beat(self, ended: threading.Event, beat_s: float) -> None:
        """Touches the file until `ended`; ends the process if the lock has become another's."""
        while not ended.wait(beat_s):
            # A file system that does not answer now may do so later; the run's own files say it.
            with self._guard, contextlib.suppress(OSError):
                if ended.is_set():
                    return
                holder = self._read()
                if holder is None:  # deleted by hand
                    self._make()
                elif holder == self._own:
                    os.utime(self._path)
                else:
                    text = f"error: {self._held(holder, 'it has taken the lock over')}"
                    print(text, file=sys.stderr, flush=True)
                    os._exit(1)

    def release(self) -> None:
        """Removes the file, if it is this process's."""
        with self._guard, contextlib.suppress(OSError):
            if self._read() == self._own:
                self._path.unlink()


def _content(path: pathlib.Path) -> dict[str, Any] | None:
    """What a lock file says; {} if it is empty or damaged; None if it is not there."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    is_lock = isinstance(content, dict) and isinstance(content.get("pid"), int)
    return content if is_lock else {}


def _words(holder: dict[str, Any]) -> str:
    if "pid" not in holder:
        return "a process that is not named"
    since = str(holder.get("since")).partition(".")[0]
    return f"process {holder['pid']} on {holder.get('host')}, since {since} UTC"


def _machine() -> str:
    """Tells machines, boots and containers apart whose host names are the same; "" without /proc.

    Process ids can be compared only where it is equal.
    """
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _runs(pid: int, process_start: str | None) -> bool:
    """Whether a process of this machine runs, and is the one that began then."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is another user's
    now = _process_start(pid)
    return now is None or now == process_start


def _process_start(pid: int) -> str | None:
    """When a process of this machine began; "" if it has ended; None: that cannot be known."""
    path = pathlib.Path(f"/proc/{pid}/stat")
    if path.parent.parent.joinpath("self").exists():
        try:
            fields = path.read_text().rpartition(")")[2].split()  # its name may hold anything
        except OSError:
            return None
        return "" if fields[0] in "ZX" else fields[19]
    command = ["ps", "-p", str(pid), "-o", "lstart="]  # where there is no /proc
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
