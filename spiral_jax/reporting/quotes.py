"""Which candidates an aggregation trace quotes: a cheap definition on words and verdicts, stated on the page."""

from __future__ import annotations

import dataclasses
import re

_WORD = re.compile(r"\w+|[^\w\s]")
_RUN, _SHORTEST = 8, 3
DEFINITION = (
    f"An aggregation quotes a candidate if some run of {_RUN} consecutive words of it (of an aggregation below "
    f"{4 * _RUN} words: a quarter of its words, at least {_SHORTEST}) is also in the candidate and not in the problem. "
    "Numbers and punctuation marks are words; the percentage is the share of such runs. “Same answer”: the verifier "
    "takes both for correct, or both are wrong and their last \\boxed{} is spelt alike. Neither proves that "
    "the one was read off the other."
)


@dataclasses.dataclass(frozen=True)
class Quote:
    """What an aggregation has of a candidate: the share of its runs of words, and whether the final answer."""

    copied: float
    same_answer: bool

    def __bool__(self) -> bool:
        return self.same_answer or self.copied > 0


class Quoting:
    """Finds quotes among the traces of one problem; the candidates' runs of words are collected once."""

    def __init__(self, problem_text: str, candidates: list[str]):
        """`candidates`: text of each search trace, as far as aggregations are shown it."""
        self._problem = _words(problem_text)
        self._candidates = [_words(text) for text in candidates]
        self._runs: dict[tuple[int, int], set[tuple[str, ...]]] = {}

    def copied(self, text: str, trace: int) -> float:
        """The share of the runs of `text`, those of the problem left out, that candidate `trace` has too."""
        words = _words(text)
        size = min(_RUN, max(_SHORTEST, len(words) // 4))
        own = _runs(words, size) - self._of(-1, size)
        return len(own & self._of(trace, size)) / len(own) if own else 0.0

    def _of(self, trace: int, size: int) -> set[tuple[str, ...]]:
        """The runs of a candidate; -1: of the problem."""
        if (trace, size) not in self._runs:
            words = self._problem if trace < 0 else self._candidates[trace]
            self._runs[trace, size] = _runs(words, size)
        return self._runs[trace, size]


def _words(text: str) -> list[str]:
    return _WORD.findall(text)


def _runs(words: list[str], size: int) -> set[tuple[str, ...]]:
    return set(zip(*(words[i:] for i in range(size)), strict=False))
