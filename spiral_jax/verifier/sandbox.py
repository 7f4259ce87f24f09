"""What a worker may do: whatever a model's answer makes of the mathematics library, it reads,
writes, starts and learns nothing.

Two layers, since each has holes. The kernel limits memory, time, files and processes. For the
reward "math" an audit hook in the interpreter also refuses to open files outside the installed
packages, to start programs and to connect. A reward function of the user's own is trusted code:
only its memory, wall time and environment are limited.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Any

# All that a worker needs of the parent's environment; keys, tokens and passwords have other names.
_PASSED_ON = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "PYTHONPATH",
              "PYTHONHASHSEED", "SYSTEMROOT", "VIRTUAL_ENV")  # fmt: skip
_REFUSED = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty",
            "os.kill", "os.killpg", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink",
            "os.chmod", "os.chown", "os.truncate", "os.putenv", "socket.__new__", "socket.connect", "socket.bind",
            "ctypes.dlopen", "pty.spawn")  # fmt: skip
_OTHER_FILES = 64  # descriptors


def worker_environment(
    names: Sequence[str], environment: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """The environment of a worker: what Python needs, and the variables that
    config.verifier.environment names.
    """
    kept = {name: environment[name] for name in (*_PASSED_ON, *names) if name in environment}
    return kept | {
        "JAX_PLATFORMS": "cpu"
    }  # a user's module that imports jax must not take the device


def limit_memory(memory_bytes: int) -> None:
    """Address space of this process; beyond it Python raises `MemoryError`. No core files."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_cpu(seconds: float) -> None:
    """The kernel ends this process (SIGXCPU) after so many more seconds of processor time."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft, (_, hard) = (
        int(usage.ru_utime + usage.ru_stime + seconds) + 1,
        resource.getrlimit(resource.RLIMIT_CPU),
    )
    resource.setrlimit(
        resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard)
    )


def lock_down() -> None:
    """From here on this process neither writes files nor starts programs, and reads installed
    packages alone.
    """
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))  # without effect for root
    resource.setrlimit(resource.RLIMIT_NOFILE, (_OTHER_FILES, _OTHER_FILES))
    packages = [
        entry for entry in sys.path if entry.endswith("-packages")
    ]  # not the user's project, which is there too
    readable = tuple(
        os.path.realpath(entry) + os.sep for entry in (*packages, sys.prefix, sys.base_prefix)
    )

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _REFUSED:
            raise PermissionError(f"{event}: refused in a verifier's worker")
        if event == "open":
            path, mode, flags = arguments
            writes = (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or set(mode or "") & set(
                "wax+"
            )
            named = isinstance(path, str | bytes)
            if writes or not named or not os.path.realpath(os.fsdecode(path)).startswith(readable):
                raise PermissionError(f"open {path!r}: refused in a verifier's worker")

    sys.addaudithook(hook)
