"""The wording around problems and candidates, rendered and tokenised once.

A piece of a prompt is an array of ids, or the name of a placeholder that is filled with ids later.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from spiral_jax.core.config import ConfigError
from spiral_jax.prompts import tokenizer as tokenizers
from spiral_jax.prompts.settings import PromptSettings
from spiral_jax.prompts.templates import END_THINK, THINK, Part, render, split_template
from spiral_jax.tasks.problem import Problem

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PreTrainedTokenizerBase

EMPTY, CUT_OFF = "(empty)", "[cut off]\n"
LEAST_FENCE, MOST_FENCE = 3, 8  # backticks

Pieces = tuple[np.ndarray | str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Scaffold:
    """The constant parts of all prompts. Made by `make_scaffold`.

    Attributes:
      tokenizer: for problem texts and numbers; the constant parts are ids already.
      settings: config.prompt.
      search, aggregation, candidate: pieces of a search prompt, of an aggregation prompt, and of
        the passage in it that shows a candidate.
      special_ids: int32, ascending: special tokens and stop ids, none of which may be inside a
        candidate.
      empty_ids: int32, stands for a candidate of which nothing is left.
      cut_off_ids: int32, precedes a truncated candidate under config.prompt.truncated = "mark".
      think_id, end_think_id: ids of <think> and </think> where they are single tokens.
      opens_thinking: the prompt itself begins the answer with <think>.
      fences: whether the candidates of a problem stand in fences; None = those of no problem do.
    """

    tokenizer: PreTrainedTokenizerBase
    settings: PromptSettings
    search: Pieces
    aggregation: Pieces
    candidate: Pieces
    special_ids: np.ndarray
    empty_ids: np.ndarray
    cut_off_ids: np.ndarray
    think_id: int | None
    end_think_id: int | None
    opens_thinking: bool
    fences: Callable[[Problem], bool] | None


def make_scaffold(
    tokenizer: PreTrainedTokenizerBase,
    settings: PromptSettings,
    stop_ids: Iterable[int],
    fences: Callable[[Problem], bool] | None = None,
) -> Scaffold:
    """Tokenises the constant parts of all prompts.

    Args:
      settings: config.prompt.
      stop_ids: ids that end a trace.
      fences: see `Scaffold`.

    Raises:
      ConfigError: a template has a placeholder too many or too few, the prompts cannot be rendered
        (see `templates.render`), only one of the two opens thinking, or the tokenizer cannot treat
        the special tokens in a problem's text as plain text.
    """
    special_ids = tokenizers.special_ids(tokenizer, stop_ids)
    search = render(tokenizer, settings, "search")
    aggregation = render(tokenizer, settings, "aggregation")
    if search.opens_thinking != aggregation.opens_thinking:
        raise ConfigError(
            "config.prompt.search and config.prompt.aggregation: one ends inside <think>, the "
            "other does not; candidates of both are read by one rule. Let both or neither open it."
        )
    is_plain = settings.template == "plain"
    start = tokenizers.first_ids(tokenizer) if is_plain else np.array([], np.int32)
    return Scaffold(
        tokenizer=tokenizer,
        settings=settings,
        search=(start, *_pieces(tokenizer, search.parts)),
        aggregation=(start, *_pieces(tokenizer, aggregation.parts)),
        candidate=_pieces(tokenizer, split_template("candidate", settings.candidate)),
        special_ids=special_ids,
        empty_ids=tokenizers.encode(tokenizer, EMPTY),
        cut_off_ids=tokenizers.encode(tokenizer, CUT_OFF),
        think_id=tokenizers.single_id(tokenizer, THINK),
        end_think_id=tokenizers.single_id(tokenizer, END_THINK),
        opens_thinking=search.opens_thinking,
        fences=fences,
    )


def _pieces(tokenizer: PreTrainedTokenizerBase, parts: Sequence[Part]) -> Pieces:
    return tuple(
        part.text if part.is_placeholder else tokenizers.encode(tokenizer, part.text)
        for part in parts
    )


def fill(pieces: Pieces, values: Mapping[str, np.ndarray]) -> np.ndarray:
    """int32 ids: the pieces with `values` in the place of their names."""
    return np.concatenate([values[piece] if isinstance(piece, str) else piece for piece in pieces])


def number_ids(scaffold: Scaffold, number: int) -> np.ndarray:
    """int32 ids of a count or of a candidate's number."""
    return tokenizers.encode(scaffold.tokenizer, str(number))


def fence_ids(scaffold: Scaffold, backticks: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 ids of the line that opens a fence of so many backticks, and of the one that closes it.

    A candidate begins behind the first line, and the second begins behind the candidate.
    """
    fence = "`" * backticks
    opening, closing = f"{fence}\n", f"\n{fence}"
    return tuple(tokenizers.encode(scaffold.tokenizer, line) for line in (opening, closing))


def max_aggregation_prompt(
    scaffold: Scaffold, *, size: int, candidate_tokens: int, problem_tokens: int
) -> int:
    """Upper bound of the token count of an aggregation prompt.

    Args:
      size: candidates in it, at most.
      candidate_tokens: limit on a candidate's trace.
      problem_tokens: limit on the search prompt of its problem.
    """
    candidate_tokens = min(candidate_tokens, scaffold.settings.candidate_tail or candidate_tokens)
    shown = [candidate_tokens, len(scaffold.empty_ids)]
    if scaffold.settings.truncated == "mark":
        tail = min(candidate_tokens, scaffold.settings.keep_tail_tokens)
        shown.append(len(scaffold.cut_off_ids) + tail)
    longest = max(shown)
    if scaffold.fences is not None:
        fences = (fence_ids(scaffold, n) for n in range(LEAST_FENCE, MOST_FENCE + 1))
        longest += max(len(opening) + len(closing) for opening, closing in fences)
    numbers = [len(number_ids(scaffold, n)) for n in range(1, size + 1)]
    listed = sum(
        _length(scaffold.candidate, {"candidate": longest, "index": digits}) for digits in numbers
    )

    # the problem's own tokens: what the search prompt leaves, shared by the times it states them
    around = _length(scaffold.search, {"problem": 0})
    times = _length(scaffold.search, {"problem": 1}) - around
    problem = max(0, (problem_tokens - around) // times)
    lengths = {"problem": problem, "count": max(numbers), "candidates": listed}
    return _length(scaffold.aggregation, lengths)


def _length(pieces: Pieces, lengths: Mapping[str, int]) -> int:
    return sum(lengths[piece] if isinstance(piece, str) else len(piece) for piece in pieces)
