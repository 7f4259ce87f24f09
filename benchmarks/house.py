"""What a reader meets in a checkout: files at the root, arrows between rooms, lines by kind.

    python -m benchmarks.house [CHECKOUT ...]        # a column for each; without any, for this one

Only files that git knows count. A file at the root of `spiral_jax/` is a room of its own.
"""

from __future__ import annotations

import argparse
import ast
import pathlib
import subprocess
from collections.abc import Iterator

from benchmarks.markdown import table_lines
from spiral_jax.objective.estimators import ESTIMATORS

PACKAGE = "spiral_jax"


class Checkout:
    """The Python files of a checkout, as text and as syntax trees, by path."""

    def __init__(self, root: pathlib.Path):
        self.root = root
        listed = subprocess.run(
            ["git", "ls-files", "*.py"], cwd=root, capture_output=True, text=True, check=True
        )
        self.text = {name: (root / name).read_text() for name in listed.stdout.split()}
        self.package = {n: text for n, text in self.text.items() if n.startswith(f"{PACKAGE}/")}
        self.tests = {n: text for n, text in self.text.items() if n.startswith("tests/")}
        self.trees = {name: ast.parse(text) for name, text in self.package.items()}

    def rows(self) -> dict[str, object]:
        """What is counted -> how many."""
        at_root = [name for name in self.package if name.count("/") == 1]
        rooms = {name.split("/")[1] for name in self.package if name.count("/") > 1}
        arrows = {pair for name in self.package for pair in self.arrows(name)}
        parameters = {name: self.config_parameters(name) for name in self.package}
        return {
            "files at the root of `spiral_jax/`": len(at_root),
            "rooms (folders)": len(rooms),
            "arrows between rooms": len(arrows),
            "of these between two folders": sum({a, b} <= rooms for a, b in arrows),
            "parameters of type ConfigDict": sum(parameters.values()),
            "files with such parameters": sum(map(bool, parameters.values())),
            "files that name an estimator": sum(map(self.names_estimator, self.package)),
            "`fmt: skip`, all files": self.lines_with("fmt: skip"),
            "`noqa`, all files": self.lines_with("# noqa"),
            "lines over 100 columns": sum(len(line) > 100 for line in self.lines(self.text)),
            "lines of `train.py`": len(self.package[f"{PACKAGE}/train.py"].splitlines()),
            "lines of `spiral_jax/`": sum(1 for _ in self.lines(self.package)),
            "characters of `spiral_jax/`": sum(map(len, self.package.values())),
            "lines of `tests/`": sum(1 for _ in self.lines(self.tests)),
        }

    @staticmethod
    def lines(files: dict[str, str]) -> Iterator[str]:
        for text in files.values():
            yield from text.splitlines()

    def lines_with(self, mark: str) -> int:
        own = str(pathlib.Path(__file__).relative_to(pathlib.Path(__file__).parents[1]))
        others = {name: text for name, text in self.text.items() if name != own}
        return sum(mark in line for line in self.lines(others))

    def arrows(self, name: str) -> Iterator[tuple[str, str]]:
        """(importing room, imported room) of a file's imports."""
        here = self.room(name.removesuffix(".py").replace("/", "."))
        for node in ast.walk(self.trees[name]):
            imported: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module:
                imported = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            for module in imported:
                if module.startswith(f"{PACKAGE}.") and self.room(module) != here:
                    yield here, self.room(module)

    @staticmethod
    def room(module: str) -> str:
        return module.split(".")[1]

    def config_parameters(self, name: str) -> int:
        """Function parameters of a file whose annotation is ConfigDict."""
        functions = (
            node.args
            for node in ast.walk(self.trees[name])
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        )
        given = [
            argument
            for arguments in functions
            for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
        ]
        return sum(
            argument.annotation is not None and "ConfigDict" in ast.unparse(argument.annotation)
            for argument in given
        )

    def names_estimator(self, name: str) -> bool:
        """Whether a string of the file is an estimator's name; docstrings are longer."""
        return any(
            isinstance(node, ast.Constant) and node.value in ESTIMATORS
            for node in ast.walk(self.trees[name])
            if isinstance(getattr(node, "value", None), str)
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkouts", nargs="*", default=[pathlib.Path(".")], type=pathlib.Path)
    checkouts = [Checkout(root) for root in parser.parse_args().checkouts]
    columns = [checkout.rows() for checkout in checkouts]
    heads = ["", *(str(checkout.root) for checkout in checkouts)]
    table = [[what, *(f"{column[what]:,}" for column in columns)] for what in columns[0]]
    print("\n".join(table_lines(heads, table)))


if __name__ == "__main__":
    main()
