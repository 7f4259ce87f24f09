"""Tables of a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Markdown; empty without rows."""
    if not rows:
        return ""
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def escape(text: str) -> str:
    """Text for a cell of a table."""
    return text.replace("|", "\\|")
