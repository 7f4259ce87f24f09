"""What a worker may do, whatever a model's answer makes of the mathematics library: very little.

It reads, writes, starts and learns nothing. There are two layers, since each has holes. The kernel
limits memory, time, files and processes. For the reward "math" an audit hook in the interpreter
also refuses to open files outside the installed packages, to start programs and to connect. A
reward function of the user's own is trusted code: only its memory, wall time and environment are
limited.
"""

from __future__ import annotations

import io
import os
import re
import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

# All that a worker needs of the parent's environment; keys, tokens and passwords have other names.
_PASSED_ON = (
    "PATH",
    "HOME",
    "TMPDIR",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "TZ",
    "LD_LIBRARY_PATH",
    "PYTHONPATH",
    "PYTHONHASHSEED",
    "SYSTEMROOT",
    "VIRTUAL_ENV",
)
# audit events: https://docs.python.org/3/library/audit_events.html
_REFUSED = re.compile(
    r"subprocess\.Popen|pty\.spawn|ctypes\.dlopen|socket\.(__new__|connect|bind)"
    r"|os\.(system|exec|posix_spawn|spawn|fork|forkpty|kill|killpg|putenv)"
    r"|os\.(remove|rename|rmdir|mkdir|link|symlink|chmod|chown|truncate)"
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_OTHER_FILES = 64  # descriptors


def worker_environment(
    names: Sequence[str], environment: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """A worker's environment: what Python needs, and what config.verifier.environment names."""
    kept = {name: environment[name] for name in (*_PASSED_ON, *names) if name in environment}
    # a user's module that imports jax must not take the device
    return kept | {"JAX_PLATFORMS": "cpu"}


class _Prefixed(io.TextIOBase):
    """Whole lines with a prefix, each written at once."""

    def __init__(self, stream: TextIO, prefix: str):
        self._stream, self._prefix, self._line = stream, prefix, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)  # buffer, reconfigure

    @property
    def encoding(self) -> str:
        return self._stream.encoding

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        self._stream.write("".join(f"{self._prefix}{line}\n" for line in lines))
        return len(text)

    def flush(self) -> None:
        if self._line:
            self.write("\n")
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()


def prefix_prints(prefix: str) -> None:
    """What this process's Python code prints from here on is in lines that begin with `prefix`."""
    sys.stdout, sys.stderr = _Prefixed(sys.stdout, prefix), _Prefixed(sys.stderr, prefix)


def limit_memory(memory_bytes: int) -> None:
    """Address space of this process; beyond it Python raises `MemoryError`. No core files."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_cpu(seconds: float) -> None:
    """The kernel ends this process (SIGXCPU) after so many more seconds of processor time."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(usage.ru_utime + usage.ru_stime + seconds) + 1
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if hard != resource.RLIM_INFINITY:
        soft = min(soft, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def lock_down(processes: int = 0) -> None:
    """Lets this process read installed packages from here on, and no more.

    It neither writes files nor starts programs nor connects.

    Args:
      processes: and threads, that its user may have.
    """
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))  # without effect for root
    resource.setrlimit(resource.RLIMIT_NOFILE, (_OTHER_FILES, _OTHER_FILES))
    # not all of sys.path: the user's project is there too
    packages = [entry for entry in sys.path if entry.endswith("-packages")]
    folders = (*packages, sys.prefix, sys.base_prefix)
    readable = tuple(os.path.realpath(folder) + os.sep for folder in folders)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if _REFUSED.fullmatch(event):
            raise PermissionError(f"{event}: refused in a verifier's worker")
        if event == "open":
            path, mode, flags = arguments
            writes = (flags or 0) & _WRITING or set(mode or "") & set("wax+")
            if writes or not _is_in(path, readable):
                raise PermissionError(f"open {path!r}: refused in a verifier's worker")

    sys.addaudithook(hook)


def _is_in(path: Any, folders: tuple[str, ...]) -> bool:
    """Whether a path, which may be a descriptor too, names a file in one of the folders."""
    named = isinstance(path, str | bytes)
    return named and os.path.realpath(os.fsdecode(path)).startswith(folders)
