"""Chromium, for benchmarks that look at pages."""

from __future__ import annotations

import shutil


def find_chromium() -> str | None:
    """The installed browser; None: playwright's own."""
    paths = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    return next(filter(None, paths), None)
