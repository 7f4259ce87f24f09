"""Lists the commands, and says which version this is: python -m spiral_jax."""

from __future__ import annotations

import ast
import pathlib

from spiral_jax import __version__

_FOLDER = pathlib.Path(__file__).parent


def main() -> None:
    print(f"spiral_jax {__version__}, {_FOLDER}\n")
    for name, purpose in commands().items():
        print(f"    python -m spiral_jax.{name:<14}{purpose}")
    print("\nEach says more with --help.")


def commands() -> dict[str, str]:
    """What each command is for, by its name; none of them is imported."""
    return {
        file.stem: (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0]
        for file in sorted(_FOLDER.glob("[a-z]*.py"))
        if 'if __name__ == "__main__":' in file.read_text()
    }


if __name__ == "__main__":
    main()
