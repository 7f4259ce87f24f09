"""Where numbers come from: hardware, versions and commit, noted each time a run starts."""

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
    """A row of starts.jsonl, but for its step.

    `time` (UTC), `hardware`, `devices`, `processes`, `versions` by package; `commit` and
    `modified`, see `commit`.
    """
    devices = jax.devices()
    head, modified = commit()
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}, {platform.system()}",
        "devices": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "processes": jax.process_count(),
        "versions": {"python": platform.python_version()} | _versions(),
        "commit": head,
        "modified": modified,
    }


def commit() -> tuple[str | None, bool | None]:
    """(hash of the program's commit, whether tracked files differ from it).

    Those of docs/ do not count: measurements rewrite them. (None, None) outside a git checkout.
    """
    try:
        # Fails where the program is installed inside a repository of something else.
        _git("ls-files", "--error-unmatch", __file__)
        changed = _git(
            "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)docs"
        )
        return _git("rev-parse", "HEAD"), bool(changed)
    except (OSError, subprocess.SubprocessError):
        return None, None


def _git(*arguments: str) -> str:
    command = ("git", "-C", str(pathlib.Path(__file__).parent), *arguments)
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def _versions() -> dict[str, str]:
    """Of those packages that are installed."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
