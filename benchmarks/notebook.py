"""Runs the cells of a notebook in its folder, without Jupyter, and writes what they print and plot.

    python -m benchmarks.notebook docs/one_step.ipynb [--check]     (--check: writes nothing)

Cells share one namespace. What a cell prints is its output, and so is every figure of matplotlib
that is open when it ends, as a PNG with few colours.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import os
import pathlib
from typing import Any

import matplotlib
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_DPI, _COLOURS = 90, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebook", type=pathlib.Path)
    parser.add_argument("--check", action="store_true", help="write nothing")
    given = parser.parse_args()
    path = given.notebook.resolve()
    notebook = json.loads(path.read_text())
    with contextlib.chdir(path.parent):
        run_cells(notebook)
    if not given.check:
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


def run_cells(notebook: dict[str, Any]) -> None:
    """Runs the code cells of a notebook's JSON and puts their outputs into it."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(code, start=1):
        printed = io.StringIO()
        source = "".join(cell["source"])
        with contextlib.redirect_stdout(printed):
            exec(compile(source, f"cell {number}", "exec"), namespace)
        cell["execution_count"] = number
        cell["outputs"] = [*_stream(printed.getvalue()), *map(_picture, plt.get_fignums())]
        plt.close("all")


def _stream(text: str) -> list[dict[str, Any]]:
    lines = text.splitlines(keepends=True)
    return [{"name": "stdout", "output_type": "stream", "text": lines}] if text else []


def _picture(number: int) -> dict[str, Any]:
    drawn, small = io.BytesIO(), io.BytesIO()
    figure = plt.figure(number)
    figure.savefig(drawn, dpi=_DPI, bbox_inches="tight", facecolor="white")
    Image.open(drawn).convert("RGB").quantize(_COLOURS).save(small, "PNG", optimize=True)
    size = list(figure.get_size_inches() * _DPI)
    alt = f"<Figure of {size[0]:.0f} x {size[1]:.0f} pixels>"
    png = base64.b64encode(small.getvalue()).decode()
    return {
        "data": {"image/png": png, "text/plain": [alt]},
        "metadata": {},
        "output_type": "display_data",
    }


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
