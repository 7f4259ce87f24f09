"""Text of a trace -> its final answer."""

from __future__ import annotations

import re

_END_THINK = "</think>"
_BOX = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is text, not structure


def after_thinking(text: str) -> str:
    """What follows the last </think>; all of it where there is none."""
    return text.rpartition(_END_THINK)[2]


def last_boxed(text: str) -> str | None:
    r"""What is inside the last \boxed{...}, or None. Linear in the length of `text`.

    The last `\boxed{` after the final `</think>` (after the beginning, where there is none) decides
    alone. If its braces do not close, the final answer is unfinished and the result is None: an
    earlier box is what the trace thought before, or a candidate that it quotes. Of nested boxes the
    inner one is the last.
    """
    text, start = after_thinking(text), None
    for box in _BOX.finditer(text):
        start = box.end()
    if start is None:
        return None
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return text[start : brace.start()]
    return None
