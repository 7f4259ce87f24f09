"""Every field of the configuration as a page, from the comments of `spiral_jax/core/config.py`.

    python -m benchmarks.config_page --out=docs/config.md

A test holds the page to the file.
"""

from __future__ import annotations

import ast
import inspect
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

from absl import app, flags
from ml_collections import ConfigDict

from benchmarks.markdown import table_lines
from spiral_jax.core import config

OUT = flags.DEFINE_string("out", "docs/config.md", "the page")

_INTRODUCTION = """\
# Every field of the configuration

Made from the comments of [core/config.py](../spiral_jax/core/config.py) by
`python -m benchmarks.config_page`. A file in `configs/` starts from these defaults and sets what
differs; on the command line `--config.ROOM.FIELD=VALUE` sets a field. (paper): the value of arXiv
2606.23595.
"""
_LONGEST_VALUE = 60  # characters; prompts are longer


class Field(NamedTuple):
    """A field, or a room of fields (value None)."""

    name: str
    value: object
    meaning: str


def main(argv: list[str]) -> None:
    pathlib.Path(OUT.value).write_text(page())


def page() -> str:
    """The page, in Markdown."""
    lines = [_INTRODUCTION]
    rows: list[tuple[str, str, str]] = []

    def end_table() -> None:
        if rows:
            lines.extend([*table_lines(("field", "default", "meaning"), rows), ""])
            rows.clear()

    for field in fields():
        if isinstance(field.value, ConfigDict) and "." not in field.name:
            end_table()
            lines.append(f"## {field.name}\n")
            if field.meaning:
                lines.append(f"{field.meaning}.\n")
        else:
            rows.append((f"`{field.name}`", _value(field.value), field.meaning.replace("|", "\\|")))
    end_table()
    return "\n".join(lines)


def fields() -> Iterator[Field]:
    """Every assignment of `defaults`, in order, with the comment above it or behind it."""
    source = inspect.getsource(config.defaults)
    defaults, lines = config.defaults(), source.split("\n")
    for node in ast.parse(source).body[0].body:
        name = _assigned(node)
        if not name:
            continue
        value = defaults
        for part in name.split("."):
            value = value[part]
        meaning = _above(lines, node.lineno - 1) + _behind(lines[node.lineno - 1])
        yield Field(name, value, " ".join(meaning))


def _assigned(node: ast.stmt) -> str:
    """ "room.field" of `c.room.field = ...`; "" of other statements."""
    if not isinstance(node, ast.Assign) or len(node.targets) != 1:
        return ""
    target = ast.unparse(node.targets[0])
    return target.removeprefix("c.") if target.startswith("c.") else ""


def _above(lines: list[str], line: int) -> list[str]:
    found: list[str] = []
    while line and lines[line - 1].lstrip().startswith("#"):
        line -= 1
        found.insert(0, lines[line].strip().removeprefix("#").strip())
    return found


def _behind(line: str) -> list[str]:
    """The comment at the end of a line; values have no # behind two spaces."""
    comment = re.search(r"  # (.*)$", line)
    return [comment.group(1)] if comment else []


def _value(value: object) -> str:
    if isinstance(value, ConfigDict):
        value = value.to_dict()
    text = repr(value)
    if len(text) > _LONGEST_VALUE:
        text = text[: _LONGEST_VALUE - 3] + "..."
    return f"`{text}`".replace("|", "\\|")


if __name__ == "__main__":
    app.run(main)
