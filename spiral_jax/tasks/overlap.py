"""Problems that are there twice, and held-out problems that are trained on: found, counted, never
left out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import unicodedata
from collections.abc import Sequence

from spiral_jax.tasks.problem import Problem

_MATH_MARKS = re.compile(r"\$|\\[()\[\]]")  # around formulas: $x$, \(x\), \[x\]
_EXAMPLES = 3  # pairs of ids that a line shows


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Problems with the same normalised text, as pairs of ids: a problem and the first of those
    before it.

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
    """`text` up to what does not make another problem of it: case, white space, Unicode forms,
    marks of formulas.
    """
    return "".join(_MATH_MARKS.sub("", unicodedata.normalize("NFKC", text).casefold()).split())


def find_overlap(train: Sequence[Problem], held_out: Sequence[Problem]) -> Overlap:
    """Compares hashes of normalised texts: linear in the number of problems."""
    contradictions: list[tuple[str, str]] = []

    def repeats(
        problems: Sequence[Problem], seen: dict[bytes, Problem], grow: bool
    ) -> list[tuple[str, str]]:
        pairs = []
        for problem in problems:
            key = hashlib.blake2b(normalised(problem.text).encode(), digest_size=16).digest()
            first = seen.setdefault(key, problem) if grow else seen.get(key, problem)
            if first is not problem:
                pairs.append((problem.id, first.id))
                if first.answer != problem.answer:
                    contradictions.append(pairs[-1])
        return pairs

    of_train: dict[bytes, Problem] = {}
    train_repeats = repeats(train, of_train, grow=True)
    held_out_repeats = repeats(held_out, {}, grow=True)
    trained_on = repeats(held_out, of_train, grow=False)
    return Overlap(
        len(train), len(held_out), train_repeats, held_out_repeats, trained_on, contradictions
    )


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
        if pairs:
            shown = ", ".join(f"{a} = {b}" for a, b in pairs[:_EXAMPLES])
            lines.append(
                f"  {len(pairs):,} {what}: {shown}{', ...' if len(pairs) > _EXAMPLES else ''}"
            )
    if len(lines) > 1:
        lines.append("  They are used as they are; mend the files if that is not meant.")
    return "\n".join(lines)
