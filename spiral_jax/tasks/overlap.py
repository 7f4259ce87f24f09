"""Problems that are there twice, or held out and trained on: counted and shown, never left out."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import unicodedata
from collections.abc import Sequence

from spiral_jax.tasks.problem import Problem

_MATH_MARKS = re.compile(r"\$|\\[()\[\]]")  # around formulas: $x$, \(x\), \[x\]
_EXAMPLES = 3  # pairs of ids that a line shows

Pair = tuple[Problem, Problem]


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Problems with the same normalised text, as pairs of ids.

    Of repeats a pair is a problem and the first of those before it.

    Attributes:
      train, held_out: numbers of problems.
      train_repeats, held_out_repeats: within a split.
      trained_on: (held-out problem, training problem).
      contradictions: those of all these pairs whose reference answers are spelt differently.
    """

    train: int
    held_out: int
    train_repeats: list[tuple[str, str]]
    held_out_repeats: list[tuple[str, str]]
    trained_on: list[tuple[str, str]]
    contradictions: list[tuple[str, str]]


def normalised(text: str) -> str:
    """`text` without what does not tell problems apart.

    That is case, white space, Unicode's forms of a character, and the marks around formulas.
    """
    return "".join(_MATH_MARKS.sub("", unicodedata.normalize("NFKC", text).casefold()).split())


def find_overlap(train: Sequence[Problem], held_out: Sequence[Problem]) -> Overlap:
    """Compares hashes of normalised texts: linear in the number of problems."""
    train_first, held_out_first = _first_by_text(train), _first_by_text(held_out)
    train_repeats = _twins(train, train_first)
    held_out_repeats = _twins(held_out, held_out_first)
    trained_on = _twins(held_out, train_first)
    pairs = [*train_repeats, *held_out_repeats, *trained_on]
    return Overlap(
        train=len(train),
        held_out=len(held_out),
        train_repeats=_ids(train_repeats),
        held_out_repeats=_ids(held_out_repeats),
        trained_on=_ids(trained_on),
        contradictions=_ids([(a, b) for a, b in pairs if a.answer != b.answer]),
    )


def _first_by_text(problems: Sequence[Problem]) -> dict[bytes, Problem]:
    """The first problem of each text."""
    first: dict[bytes, Problem] = {}
    for problem in problems:
        first.setdefault(_key(problem), problem)
    return first


def _twins(problems: Sequence[Problem], first: dict[bytes, Problem]) -> list[Pair]:
    """Each problem that has the text of another one in `first`, with that one."""
    pairs = [(problem, first.get(_key(problem), problem)) for problem in problems]
    return [(problem, other) for problem, other in pairs if other is not problem]


def _ids(pairs: Sequence[Pair]) -> list[tuple[str, str]]:
    return [(problem.id, other.id) for problem, other in pairs]


def _key(problem: Problem) -> bytes:
    return hashlib.blake2b(normalised(problem.text).encode(), digest_size=16).digest()


def describe(overlap: Overlap) -> str:
    """Lines for the terminal: the sizes, then what was found, with examples."""
    lines = [f"data: {overlap.train:,} training problems, {overlap.held_out:,} held-out ones"]
    kinds = (
        ("training problems repeat an earlier one", overlap.train_repeats),
        ("held-out problems repeat an earlier one", overlap.held_out_repeats),
        ("held-out problems are also trained on", overlap.trained_on),
        ("of these have another reference answer than their twin", overlap.contradictions),
    )
    for what, pairs in kinds:
        shown = [f"{a} = {b}" for a, b in pairs[:_EXAMPLES]]
        if len(pairs) > _EXAMPLES:
            shown.append("...")
        if pairs:
            lines.append(f"  {len(pairs):,} {what}: {', '.join(shown)}")
    if len(lines) > 1:
        lines.append("  They are used as they are; mend the files if that is not meant.")
    return "\n".join(lines)
