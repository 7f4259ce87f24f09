"""Runs programs that a model has written, one after the other, in a process made for nothing else.

    worker -> runner -> a fork for each test, in which the program is executed

This is no security boundary: whoever must be safe from a hostile program gives it a machine of its
own. It is made so that whatever a policy tries by chance or for reward costs one test, and leaves
nothing behind. Where Linux allows namespaces, to root or to users, the runner has its own of
processes and of the network: a program reaches nobody, and after each test all that it has started
is killed at once, whatever it has forked, renamed or detached. Elsewhere what descends from it is
found and killed, and the network is refused by Python alone. In either case the kernel limits
memory, processor time, files and processes, the environment is empty, and an audit hook refuses to
write files, to read others than installed packages, to start programs and to connect.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from typing import NamedTuple

from spiral_jax.verifier import sandbox

MOST_OUTPUT = 1_000_000  # bytes; who prints more has failed
_PROCESSES = 32  # and threads, of a program
# Loaded once, before the runner becomes a user who may not be able to read where Python lies.
_LOADED = (
    "abc array base64 bisect calendar cmath collections copy dataclasses datetime decimal enum "
    "fractions functools hashlib heapq io itertools json keyword locale math numbers operator "
    "pprint queue random re statistics string struct textwrap threading time timeit traceback "
    "types typing unicodedata uuid zlib"
)
_NOBODY = 65534
_WAIT_S = 0.005  # between two looks at whether a program has ended
# <linux/sched.h>, <linux/prctl.h>
_NEW_NAMESPACES = 0x10000000 | 0x20000000 | 0x40000000 | 0x08000000  # user, pid, net, ipc
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


class Ended(NamedTuple):
    """How a program has ended.

    Attributes:
      is_done: it came to its end, or called exit with 0, in its time, and did not print too much.
      output: what it printed.
      value: what the function that was called returned, as JSON; None where none was called, or it
        returned something that JSON does not know.
    """

    is_done: bool
    output: str
    value: str | None


class Runner:
    """The process that runs programs; it ends with its parent. Started when first needed."""

    def __init__(self) -> None:
        self._connection: Connection | None = None

    def run(
        self, program: str, seconds: float, stdin: str = "", call: tuple[str, list] | None = None
    ) -> Ended:
        """Executes a program as its own main module.

        Args:
          seconds: that it may take, of the clock and of one processor.
          call: name of a function, or of a method of its class `Solution`, that is called when the
            program is through, and its arguments.
        """
        if self._connection is None:
            self._connection = _start_runner()
        try:
            self._connection.send_bytes(json.dumps([program, seconds, stdin, call]).encode())
            return Ended(*json.loads(self._connection.recv_bytes()))
        except (EOFError, OSError):  # a program has killed the runner: the next one gets another
            self._connection.close()
            self._connection = None
            with contextlib.suppress(ChildProcessError):
                os.waitpid(-1, os.WNOHANG)
            return Ended(False, "", None)


def _start_runner() -> Connection:
    """Forks the runner; the end of its connection."""
    ours, theirs = Pipe()
    parent = os.getpid()
    sys.stdout.flush()
    if os.fork():
        theirs.close()
        return ours
    try:
        ours.close()
        signal.setitimer(signal.ITIMER_REAL, 0)
        _end_with(parent)
        for name in _LOADED.split():
            importlib.import_module(name)
        _become_nobody()
        if _unshare():
            _serve_as_first(theirs)
        else:
            _prctl(_PR_SET_CHILD_SUBREAPER, 1)
            _serve(theirs, _kill_descendants)
    finally:
        os._exit(0)


def _serve_as_first(connection: Connection) -> None:
    """The first process of a namespace serves: whatever is left when it ends is killed with it."""
    if first := os.fork():
        connection.close()
        os.waitpid(first, 0)
        return
    try:
        _end_with(outside=None)
        _serve(connection, _kill_everybody)
    finally:
        os._exit(0)


def _serve(connection: Connection, kill_all: Callable[[], None]) -> None:
    with contextlib.suppress(EOFError, OSError):  # the other side has closed: done
        while True:
            program, seconds, stdin, call = json.loads(connection.recv_bytes())
            try:
                ended = _run(program, seconds, stdin, call)
            finally:
                kill_all()
            connection.send_bytes(json.dumps(ended).encode())


def _run(program: str, seconds: float, stdin: str, call: list | None) -> Ended:
    read_end, write_end = os.pipe()
    value_read, value_write = os.pipe()
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            os.close(read_end)
            os.close(value_read)
            _execute(program, seconds, stdin, call, write_end, value_write)
        os._exit(1)
    os.close(write_end)
    os.close(value_write)
    try:
        output, is_done = _watch(child, read_end, time.monotonic() + seconds)
        value = _available(value_read) if is_done and call else b""
    finally:
        os.close(read_end)
        os.close(value_read)
    return Ended(is_done, output.decode(errors="replace"), value.decode() or None)


def _watch(child: int, read_end: int, deadline: float) -> tuple[bytes, bool]:
    """What a child prints, and whether it ended well; stops waiting when it cannot any more.

    Others may hold its output open after its end, so its end is what is waited for.
    """
    output = bytearray()
    while len(output) <= MOST_OUTPUT and time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        output += _available(read_end)
        if ended:
            is_done = os.waitstatus_to_exitcode(status) == 0 and len(output) <= MOST_OUTPUT
            return bytes(output), is_done
        select.select([read_end], [], [], _WAIT_S)
    return bytes(output[:MOST_OUTPUT]), False


def _available(descriptor: int) -> bytes:
    """What can be read without waiting, up to a little more than is allowed."""
    found = bytearray()
    while len(found) <= MOST_OUTPUT and select.select([descriptor], [], [], 0)[0]:
        part = os.read(descriptor, 65536)
        if not part:
            break
        found += part
    return bytes(found)


# -- the program's own process ---------------------------------------------------------------------


def _execute(
    program: str, seconds: float, stdin: str, call: list | None, stdout: int, value_write: int
) -> None:
    """Never returns."""
    _end_with(outside=None)
    os.setsid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(_file_of(stdin), 0)
    os.dup2(stdout, 1)
    os.dup2(nowhere, 2)
    os.dup2(value_write, 3)
    os.closerange(4, 1024)
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0)), encoding="utf-8")
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w")), encoding="utf-8")
    sys.stderr = io.TextIOWrapper(io.BufferedWriter(io.FileIO(2, "w")), encoding="utf-8")
    os.environ.clear()
    sys.argv = ["program"]
    sandbox.limit_cpu(seconds)
    sandbox.lock_down(processes=_PROCESSES)

    module = {"__name__": "__main__", "__builtins__": __builtins__}
    exit_code = 1
    try:
        exec(compile(program, "program.py", "exec"), module)
        if call is not None:
            name, arguments = call
            os.write(3, json.dumps(_function(module, name)(*arguments)).encode())
        exit_code = 0
    except SystemExit as ended:
        exit_code = 0 if ended.code in (None, 0) and call is None else 1
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
        os._exit(exit_code)


def _function(module: dict, name: str) -> Callable:
    if "Solution" in module and hasattr(module["Solution"], name):
        return getattr(module["Solution"](), name)
    return module[name]


def _file_of(text: str) -> int:
    """A descriptor from which the text is read."""
    descriptor = os.memfd_create("stdin")
    with open(descriptor, "wb", closefd=False) as file:
        file.write(text.encode())
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


# -- what the runner may do, and what is left when a program has ended -----------------------------


def _become_nobody() -> None:
    """Root's files and limits are no program's."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    os.chdir("/")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _unshare() -> bool:
    """Gives this process's children namespaces of their own, if the kernel allows it."""
    with contextlib.suppress(OSError, AttributeError):
        return ctypes.CDLL(None, use_errno=True).unshare(_NEW_NAMESPACES) == 0
    return False


def _end_with(outside: int | None) -> None:
    """The kernel kills this process when its parent ends; at once if that has happened."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if outside is not None and os.getppid() != outside:
        os._exit(1)


def _prctl(option: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _kill_everybody() -> None:
    """All processes of the namespace but this one, the first."""
    if os.getpid() != 1:
        raise RuntimeError("not the first process of a namespace: others would be killed")
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


def _kill_descendants() -> None:
    """All that descend from this process: orphans come back to it."""
    while True:
        for pid in _descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _descendants(ancestor: int) -> list[int]:
    """From /proc; none where there is no such thing."""
    parents = {}
    for name in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else []):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as file:
            parents[int(name)] = int(file.read().rpartition(")")[2].split()[1])
    found, newest = [], [ancestor]
    while newest:
        newest = [pid for pid, parent in parents.items() if parent in newest]
        found += newest
    return found
