"""Functions of the user's by name: loading them, telling their sources apart, and their errors."""

from __future__ import annotations

import errno
import functools
import hashlib
import importlib
import inspect
import os
import pathlib
import sysconfig
import traceback
from collections.abc import Callable
from typing import Any

from spiral_jax.core.config import ConfigError

_PACKAGE = str(pathlib.Path(__file__).parents[1]) + os.sep
_LIBRARIES = tuple(
    {
        os.path.join(sysconfig.get_path(name), "")
        for name in ("stdlib", "platstdlib", "purelib", "platlib")
    }
)


def load_function(field: str, path: str, allowed: str) -> Callable[..., Any]:
    """The function that config.`field` = "package.module:function" names.

    Raises:
      ConfigError: the path has another form (the message says what is `allowed`), the module cannot
        be imported, or it has no such function.
    """
    where = f"config.{field} = {path!r}"
    module_name, colon, function_name = path.partition(":")
    if not (module_name and colon and function_name):
        raise ConfigError(f"{where}: {allowed}")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        advice = "Is its folder in PYTHONPATH?"
        if isinstance(error, SystemExit):  # it parses arguments, say
            advice = 'Put what ends it under if __name__ == "__main__".'
        raise ConfigError(
            f"{where}: module {module_name!r} cannot be imported ({describe_error(error)}). "
            f"{advice}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(f"{where}: module {module_name!r} has no function {function_name!r}.")
    return function


def source_fingerprint(function: Callable) -> str:
    """SHA-256 of the file that defines a function; "" where no file is known.

    What the file imports is not in it. Of a `functools.partial` it is the file of its function.
    """
    function = inspect.unwrap(function)
    while isinstance(function, functools.partial):
        function = inspect.unwrap(function.func)
    path = _source_file(function) or _source_file(type(function))  # an object that can be called
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest() if path else ""


def _source_file(function: Callable) -> str:
    try:
        path = inspect.getsourcefile(function)
    except TypeError:  # it is written in C, or has no source of its own
        return ""
    return path if path and os.path.exists(path) else ""


def describe_error(error: BaseException) -> str:
    """An exception with the innermost frame of the user's own code."""
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((frame for frame in reversed(frames) if _is_users(frame.filename)), frames[-1])
    message = "".join(traceback.format_exception_only(error)).strip()
    line = f": {frame.line}" if frame.line else ""
    return f"{message} ({frame.filename}:{frame.lineno}, in {frame.name}{line})"


def hint_at(error: BaseException) -> str:
    """What to do about an error in a worker for want of memory or of an environment variable.

    "" about all else.
    """
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return (
            ". A worker may take config.verifier.memory_gb of address space: raise it, or let the "
            "reward take less"
        )
    frames = traceback.extract_tb(error.__traceback__)
    is_environment = bool(frames) and frames[-1].filename in (os.__file__, "<frozen os>")
    if not isinstance(error, KeyError) or not is_environment:
        return ""
    return (
        f". Workers see no variables but those that Python needs: name {error.args[0]!r} in "
        "config.verifier.environment"
    )


def _is_users(path: str) -> bool:
    return not path.startswith((*_LIBRARIES, _PACKAGE, "<"))
