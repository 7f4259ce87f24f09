"""The machine and the state of the code that a number was measured on."""

from __future__ import annotations

import os
import platform

from spiral_jax.run import environment


def machine() -> str:
    return f"{os.cpu_count()} CPU cores, {platform.machine()}, {platform.system()}, Python {platform.python_version()}"


def commit() -> str:
    """Short hash of the checked-out commit, "+" behind it if files differ from it; "unknown"
    outside a checkout.
    """
    head, modified = environment.commit()
    return f"{head[:7]}{'+' if modified else ''}" if head else "unknown"
