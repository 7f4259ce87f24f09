"""Faults of drills: a run kills itself at a named point, for tests of what survives.

    SPIRAL_FAULT=update:3 python -m spiral_jax.train ...        # SIGKILL at the third "update"
    SPIRAL_FAULT=search:1:TERM python -m spiral_jax.train ...   # SIGTERM: a preemption notice
    SPIRAL_FAULT=search:1:INT python -m spiral_jax.train ...    # SIGINT: a Ctrl-C

A run passes the points again and again; passes are counted, never timed. Without the variable a
point is one comparison. With it, points count from the first decode chunk on that this process has
finished, so that each kill costs work that has to be done again.
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
    "aggregation": "a search group has ended and its subsets are drawn, their groups not started",
    "verifier": "a child process has been handed an answer",
    "update": "the train step has been started and its result has not been read",
    "checkpoint": "a checkpoint is being written (odd passes), or not yet committed (even passes)",
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
    """Asks for a fault as the variable does; "" = for none.

    Raises:
      ValueError: `text` is no fault.
    """
    global _fault
    parts = re.fullmatch(rf"({'|'.join(POINTS)}):([1-9][0-9]*)(?::(TERM|INT))?", text)
    if text and not parts:
        raise ValueError(
            f"{VARIABLE}={text!r}: must be POINT:COUNT, POINT:COUNT:TERM or POINT:COUNT:INT, "
            f"POINT one of {list(POINTS)}."
        )
    _fault = None
    if parts:
        number = signal.Signals[f"SIG{parts[3] or 'KILL'}"]
        _fault = _Fault(parts[1], int(parts[2]), number)


arm(os.environ.get(VARIABLE, ""))


def chunk_decoded() -> None:
    """Says that a decode chunk has ended."""
    if _fault is not None:
        _fault.chunks += 1


def passed(point: str) -> None:
    """Says that the run is at `point`, one of `POINTS`; kills the process if a fault is due."""
    if _fault is None or _fault.point != point or not _fault.chunks:
        return
    _fault.left -= 1
    if _fault.left == 0:
        text = f"fault: {_fault.signal.name} at {point!r} after {_fault.chunks} decode chunks"
        print(text, file=sys.stderr, flush=True)
        os.kill(os.getpid(), _fault.signal)
