"""Which candidates an aggregation trace quotes: a cheap definition on words and verdicts, stated on
the page.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_WORD = re.compile(r"\w+|[^\w\s]")
_BOX = re.compile(r"\\boxed\s*\{")  # every trace has it
_RUN, _SHORTEST = 8, 3
DEFINITION = (
    f"An aggregation quotes a candidate if some run of {_RUN} consecutive words of it (of an aggregation below "
    f"{4 * _RUN} words: a quarter of its words, at least {_SHORTEST}) is also in the candidate, but neither in the "
    "problem nor in all candidates of its prompt. Numbers and punctuation marks are words, \\boxed is none; the "
    "percentage is the share of such runs. “Same answer”: the verifier takes both for correct, or both are wrong and "
    "their last \\boxed{} is spelt alike. Neither proves that the one was read off the other."
)


class Quoting:
    """Finds quotes among the traces of one problem; the candidates' runs of words are collected
    once.
    """

    def __init__(self, problem_text: str, candidates: Sequence[str]):
        """`candidates`: text of each search trace, as far as aggregations are shown it."""
        self._problem = _words(problem_text)
        self._candidates = [_words(text) for text in candidates]
        self._runs: dict[tuple[int, int], set[tuple[str, ...]]] = {}

    def copied(self, text: str, listed: Sequence[int]) -> list[float]:
        """For each candidate that the prompt lists: the share of the runs of `text` that it has
        too.

        Runs that the problem has, or all of several candidates, are left out of both.
        """
        words = _words(text)
        size = min(_RUN, max(_SHORTEST, len(words) // 4))
        own = _runs(words, size) - self._of(-1, size)
        if len(listed) > 1:
            own -= set.intersection(*(self._of(trace, size) for trace in listed))
        return [len(own & self._of(trace, size)) / len(own) if own else 0.0 for trace in listed]

    def _of(self, trace: int, size: int) -> set[tuple[str, ...]]:
        """The runs of a candidate; -1: of the problem."""
        if (trace, size) not in self._runs:
            words = self._problem if trace < 0 else self._candidates[trace]
            self._runs[trace, size] = _runs(words, size)
        return self._runs[trace, size]


def _words(text: str) -> list[str]:
    return _WORD.findall(_BOX.sub(" ", text))


def _runs(words: list[str], size: int) -> set[tuple[str, ...]]:
    return set(zip(*(words[i:] for i in range(size)), strict=False))
