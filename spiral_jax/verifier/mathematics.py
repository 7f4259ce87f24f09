r"""Whether two answers are the same as mathematics: math-verify, asked about what was meant.

Every call may take for ever (9^{9^{9^9}}): this belongs in a killable process. math-verify's own
time limits are off. sympy takes a second to import, so it is imported by the first call.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator
from typing import Any

from spiral_jax.verifier.notation import Notation, Unreadable, read_notation, read_reference

_ROUNDING, _PRECISION = 6, 15  # decimals and digits that math-verify compares by default
_SIGNIFICANT = 4  # digits of a small reference that are compared at least
# what a side of an equation may be made of to be a plain number: no letter, unit, degree or base
_NUMBER_COMMANDS = re.compile(
    r"\\(?:[dt]?frac|sqrt|cdot|times|div|left|right|binom|pi|infty|[,;!: ])"
)
_NO_PLAIN_NUMBER = re.compile(r"[A-Za-z\\%$_°]")
_EQUALS = re.compile(r"(?<![<>!:\\])=")
_APART = re.compile(r",|;|\\text\{\s*(?:and|or)\s*\}|\band\b|\bor\b")
_DECIMALS = re.compile(r"-?[0-9]*\.([0-9]+)")


@dataclasses.dataclass(frozen=True)
class _Value:
    """One way to read a reference: parsed, with the decimals and digits to compare it with."""

    parsed: list[Any]
    rounding: int = _ROUNDING
    precision: int = _PRECISION


def warm_up() -> None:
    """Imports and makes tables, which takes seconds."""
    _parse("1")


def is_equal(reference: str, answer: str) -> bool | None:
    """Whether an answer is what the reference says; None: it cannot be read.

    A list or set equals only one with the same elements; of a tuple the order counts. Decimals are
    compared to 6 places, and to 4 significant digits of the reference where those lie beyond
    (math-verify alone: 1e-7 = 2e-7). Of a chain a = b = c the last side counts, and sides that are
    numbers must be equal, or it is wrong. Whatever the answer does to sympy is a wrong answer.

    Raises:
      ValueError: the reference cannot be read.
    """
    expected, values = _read_reference(reference)
    try:
        given = read_notation(answer)
    except Unreadable:
        return None
    if expected.words or given.words:
        return expected.words == given.words
    try:
        readings = [parsed for latex in given.latex if (parsed := _parse(latex))]
        if not readings:
            return None
        if not _chains_hold(given.latex[0]):
            return False
        return any(_same(value, parsed) for value in values for parsed in readings)
    except Exception:
        return False


@functools.lru_cache(maxsize=4096)  # all traces of a problem have the same reference
def _read_reference(text: str) -> tuple[Notation, list[_Value]]:
    notation = read_reference(text)
    if notation.words:
        return notation, []
    values = [_with_precision(_parse(latex)) for latex in notation.latex]
    if not _chains_hold(notation.latex[0]):
        raise ValueError("its sides are not equal")
    return notation, values


def _with_precision(parsed: list[Any]) -> _Value:
    if not parsed:
        raise ValueError("nothing parsed")
    try:
        size = abs(float(parsed[0].evalf(_PRECISION)))
    except Exception:  # no real number: a set, a matrix, an equation, something with a letter in it
        size = 1.0
    # zeros behind the point: 3 for 0.00012
    zeros = max(0, math.ceil(-math.log10(size)) - 1) if 0 < size < 1 else 0
    return _Value(parsed, max(_ROUNDING, zeros + _SIGNIFICANT), _PRECISION + zeros)


def _same(value: _Value, parsed: list[Any]) -> bool:
    from math_verify import verify

    return verify(
        value.parsed,
        parsed,
        float_rounding=value.rounding,
        numeric_precision=value.precision,
        timeout_seconds=None,
    )


def _parse(latex: str) -> list[Any]:
    """math-verify's reading of what is inside a box; empty if it has none."""
    from math_verify import LatexExtractionConfig, parse

    extraction = [LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0)]
    boxed = rf"\boxed{{{latex}}}"
    return parse(boxed, extraction, fallback_mode="no_fallback", parsing_timeout=None)


def _chains_hold(latex: str) -> bool:
    """Whether the numbers of every a = b = c are one: math-verify looks at the last side alone."""
    for numbers in _numbers_of_chains(latex):
        for a, b in itertools.combinations(numbers, 2):
            if not _are_one_number(a, b):
                return False
    return True


def _numbers_of_chains(latex: str) -> Iterator[list[str]]:
    for item in _APART.split(latex):
        sides = _EQUALS.split(item)
        numbers = [side.strip() for side in sides if _is_plain_number(side)]
        if len(numbers) > 1:
            yield numbers


def _is_plain_number(side: str) -> bool:
    rest = _NUMBER_COMMANDS.sub(" ", side)
    return any(char.isdigit() for char in side) and not _NO_PLAIN_NUMBER.search(rest)


def _are_one_number(a: str, b: str) -> bool:
    """Equal, or one is the other rounded to the decimals that it has."""
    parsed_a, parsed_b = _parse(a), _parse(b)
    if not parsed_a or not parsed_b:
        return True  # not known to differ
    if _same(_with_precision(parsed_a), parsed_b):
        return True
    places = [len(found[1]) for text in (a, b) if (found := _DECIMALS.fullmatch(text))]
    if not places:
        return False
    difference = abs(complex(parsed_a[0].evalf()) - complex(parsed_b[0].evalf()))
    return difference <= 0.5000001 * 10.0 ** -min(places)
