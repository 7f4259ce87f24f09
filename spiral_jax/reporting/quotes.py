"""Which candidates an aggregation trace quotes: a cheap definition, which the page states."""

from __future__ import annotations

import re
from collections.abc import Sequence

_WORD = re.compile(r"\w+|[^\w\s]")
_BOX = re.compile(r"\\boxed\s*\{")  # every trace has it
_RUN, _SHORTEST = 8, 3  # words
DEFINITION = (
    f"An aggregation quotes a candidate if some run of {_RUN} consecutive words of it (of an "
    f"aggregation below {4 * _RUN} words: a quarter of its words, at least {_SHORTEST}) is also in "
    "the candidate, but neither in the problem nor in all candidates of its prompt. Numbers and "
    "punctuation marks are words, \\boxed is none; the percentage is the share of such runs. “Same "
    "answer”: the verifier takes both for correct, or both are wrong and their last \\boxed{} is "
    "spelt alike. Neither proves that the one was read off the other."
)


class Quoting:
    """Finds quotes among the traces of one problem; the runs of candidates are collected once."""

    def __init__(self, problem_text: str, candidates: Sequence[str]):
        """`candidates`: text of each trace, as far as aggregations are shown it."""
        self._problem = _words(problem_text)
        self._candidates = [_words(text) for text in candidates]
        self._runs_by_size: dict[tuple[int | None, int], set[tuple[str, ...]]] = {}

    def copied(self, text: str, listed: Sequence[int]) -> list[float]:
        """The share of the runs of words of `text` that each listed candidate has too.

        Runs that the problem has, or all of several candidates, are left out of both.
        """
        words = _words(text)
        size = min(_RUN, max(_SHORTEST, len(words) // 4))
        candidates = [self._runs_of(place, size) for place in listed]
        own = _runs(words, size) - self._runs_of(None, size)
        if len(candidates) > 1:
            own -= set.intersection(*candidates)
        if not own:
            return [0.0] * len(candidates)
        return [len(own & runs) / len(own) for runs in candidates]

    def _runs_of(self, place: int | None, size: int) -> set[tuple[str, ...]]:
        """The runs of a candidate; None: of the problem."""
        if (place, size) not in self._runs_by_size:
            words = self._problem if place is None else self._candidates[place]
            self._runs_by_size[place, size] = _runs(words, size)
        return self._runs_by_size[place, size]


def _words(text: str) -> list[str]:
    return _WORD.findall(_BOX.sub(" ", text))


def _runs(words: list[str], size: int) -> set[tuple[str, ...]]:
    """All runs of `size` consecutive words."""
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}
