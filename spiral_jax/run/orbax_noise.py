"""What orbax, asyncio and TensorStore print of an error that we report ourselves: nothing.

A full disk gave more than 400 lines a save, a damaged checkpoint 60.
"""

from __future__ import annotations

import functools
import logging
import pathlib
import re
import sys
import traceback
from typing import Any

_HALF = 120  # characters of the beginning and of the end of a reason
_ANNOTATION = re.compile(r" \[[\w ]+='")  # TensorStore's, behind its reasons


@functools.cache
def silence() -> None:
    """Drops orbax's log, and what its abandoned coroutines raise where nobody can catch it."""
    logging.getLogger("absl").addFilter(_is_not_of_orbax)
    logging.getLogger("asyncio").addFilter(_is_not_of_tensorstore)
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not _is_left_by_orbax(unraisable):
            before(unraisable)

    sys.unraisablehook = hook


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in pathlib.Path(record.pathname).parts


def _is_not_of_tensorstore(record: logging.LogRecord) -> bool:
    """Whether it is no error of a write that asyncio found nobody to tell of."""
    error = record.exc_info[1] if record.exc_info else None
    return "OCDBT database" not in str(error)  # TensorStore's format of a checkpoint


def _is_left_by_orbax(unraisable: Any) -> bool:
    """Of a coroutine of orbax, or of one that comes back when its event loop has ended."""
    frames = traceback.extract_tb(unraisable.exc_traceback)
    parts = {part for frame in frames for part in pathlib.Path(frame.filename).parts}
    return "orbax" in parts or str(unraisable.exc_value) == "Event loop is closed"


def in_short(error: Exception) -> str:
    """Kind and reason of an error in a part of a line; TensorStore's go on for pages."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = " ".join(str(cause).partition("See full TensorStore details")[0].split())
    text = _ANNOTATION.split(text)[0]
    if len(text) > 2 * _HALF:
        text = f"{text[:_HALF]} ... {text[-_HALF:]}"  # what failed, and why at the end
    return f"{type(cause).__name__}: {text}"
