"""The machine that a number was measured on, the state of the code, and what a run has left behind."""

from __future__ import annotations

import contextlib
import os
import pathlib
import platform
import subprocess
import time

_ROOT = pathlib.Path(__file__).parent.parent


def machine() -> str:
    return f"{os.cpu_count()} CPU cores, {platform.machine()}, {platform.system()}, Python {platform.python_version()}"


def commit() -> str:
    """Short hash of the checked-out commit, "+" behind it if files differ from it."""
    git = lambda *words: subprocess.run(["git", *words], capture_output=True, text=True).stdout.strip()  # noqa: E731
    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")


def workers_left(wait_s: float = 10.0) -> int:
    """Verifier's child processes that outlive the runs of this tree, which have all ended; Linux alone, else 0."""
    for _ in range(int(wait_s / 0.2)):
        commands = []
        for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # ended meanwhile
                commands.append(path.read_bytes())
        left = sum(b"pool.serve()" in command and str(_ROOT).encode() in command for command in commands)
        if not left:
            break
        time.sleep(0.2)
    return left
