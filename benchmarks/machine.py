"""The machine and the state of the code that a number was measured on."""

from __future__ import annotations

import os
import pathlib
import platform
import re

from spiral_jax.run import provenance


def machine() -> str:
    """Number and kind of cores, system, Python's version."""
    cores = f"{os.cpu_count()} CPU cores, {platform.machine()}"
    return f"{cores}, {platform.system()}, Python {platform.python_version()}"


def commit() -> str:
    """Short hash of the checked-out commit, with a "+" if files differ from it.

    "unknown" outside a checkout.
    """
    head, modified = provenance.commit()
    return f"{head[:7]}{'+' if modified else ''}" if head else "unknown"


def memory(field: str) -> float:
    """GB of `field` of this process."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+)", status)[1]) * 1024 / 1e9
