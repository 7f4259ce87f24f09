"""Where a drill kills the process: named points that a run passes again and again, counted, never
timed.

    SPIRAL_FAULT=update:3 python -m spiral_jax.train ...      # SIGKILL when "update" is passed for the third time
    SPIRAL_FAULT=search:1:TERM python -m spiral_jax.train ... # SIGTERM: a preemption notice

Without the variable a point is one comparison. With it, points count from the first decode chunk on
that this process has finished, so that each kill costs work that has to be done again.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import sys

VARIABLE = "SPIRAL_FAULT"
POINTS = {  # name: what a run is doing there
    "search": "search traces are being decoded",
    "aggregation": "a search group has ended and its subsets are drawn; their aggregation groups have not started",
    "verifier": "a child process has been handed an answer",
    "update": "the train step has been started and its result has not been read",
    "checkpoint": "a checkpoint is being written (odd passes), or is written but not committed (even passes)",
    "epoch": "the first problem of a new epoch of the data has been fetched",
}


@dataclasses.dataclass
class _Fault:
    point: str
    left: int  # passes until the signal
    signal: signal.Signals
    chunks: int = 0  # decoded by this process


_fault: _Fault | None = None


def arm(text: str) -> None:
    """Asks for a fault as the variable does; "" = for none. Raises `ValueError` where `text` is no
    fault.
    """
    global _fault
    parts = re.fullmatch(rf"({'|'.join(POINTS)}):([1-9][0-9]*)(:TERM)?", text)
    if text and not parts:
        raise ValueError(
            f"{VARIABLE}={text!r}: must be POINT:COUNT or POINT:COUNT:TERM, POINT one of {list(POINTS)}."
        )
    _fault = parts and _Fault(
        parts[1], int(parts[2]), signal.SIGTERM if parts[3] else signal.SIGKILL
    )


arm(os.environ.get(VARIABLE, ""))


def chunk_decoded() -> None:
    """Says that a decode chunk has ended."""
    if _fault is not None:
        _fault.chunks += 1


def passed(point: str) -> None:
    """Says that the run is at `point`, one of `POINTS`; kills the process if that is what was asked
    for.
    """
    if _fault is None or _fault.point != point or not _fault.chunks:
        return
    _fault.left -= 1
    if _fault.left == 0:
        text = f"fault: {_fault.signal.name} at {point!r} after {_fault.chunks} decode chunks"
        print(text, file=sys.stderr, flush=True)
        os.kill(os.getpid(), _fault.signal)
