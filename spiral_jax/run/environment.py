"""What a run runs on: hardware, versions and commit, one row of `starts.jsonl` each time it starts
or resumes.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import pathlib
import platform
import subprocess
from typing import Any

import jax

_PACKAGES = (
    "jax",
    "jaxlib",
    "libtpu",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "transformers",
    "math-verify",
)


def describe() -> dict[str, Any]:
    """`time` (UTC), `hardware`, `devices`, `processes`, `versions` by package; `commit`,
    `modified`: see `commit`.
    """
    devices = jax.devices()
    head, modified = commit()
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}, {platform.system()}",
        "devices": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "processes": jax.process_count(),
        "versions": {"python": platform.python_version()}
        | dict(filter(None, map(_version, _PACKAGES))),
        "commit": head,
        "modified": modified,
    }


def commit() -> tuple[str | None, bool | None]:
    """(hash of the program's commit, whether tracked files differ from it); (None, None) outside a
    git checkout.

    Those of docs/ do not count: measurements rewrite them.
    """
    folder = pathlib.Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ("git", "-C", str(folder), *arguments)
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        git(
            "ls-files", "--error-unmatch", __file__
        )  # else an installation inside a repository of something else
        changed = git(
            "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)docs"
        )
        return git("rev-parse", "HEAD"), bool(changed)
    except (OSError, subprocess.SubprocessError):
        return None, None


def _version(package: str) -> tuple[str, str] | None:
    try:
        return package, importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
