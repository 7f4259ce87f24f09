"""The machine and the commit that a number was measured on."""

from __future__ import annotations

import os
import platform
import subprocess


def machine() -> str:
    return f"{os.cpu_count()} CPU cores, {platform.machine()}, {platform.system()}, Python {platform.python_version()}"


def commit() -> str:
    return subprocess.run(
        ["git", "describe", "--always", "--dirty"], check=True, capture_output=True, text=True
    ).stdout.strip()
