"""Pieces of the reports that benchmarks write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def paragraph(text: str) -> str:
    """The text on one line, whatever its line breaks and indentation."""
    return " ".join(text.split())


def table_lines(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A table: a cell is whatever `str` makes of it."""
    lines = [_line(heads), _line(["---"] * len(heads))]
    return lines + [_line(row) for row in rows]


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
