"""Problem texts and sampled traces -> prompt token ids (numpy, host).

Token in, token out: candidates are spliced into the scaffold as the ids that were sampled. Their
text is never encoded again, since most id sequences do not survive decoding and encoding.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from spiral_jax.core.groups import Stop
from spiral_jax.prompts.scaffold import (
    LEAST_FENCE,
    MOST_FENCE,
    Scaffold,
    fence_ids,
    fill,
    number_ids,
)
from spiral_jax.prompts.templates import END_THINK, THINK
from spiral_jax.prompts.tokenizer import encode_plain

# keeps the draws of orders apart from others that are made from the same six numbers
_ORDER_STREAM = 0x6F72646572


@dataclasses.dataclass(frozen=True, eq=False)
class AggregationPrompt:
    """An aggregation prompt and what happened to its candidates.

    Attributes:
      ids: int32 [P].
      removed_special: stop and special ids taken out of candidates; the stop id that ended a trace
        does not count.
      dropped: candidates left out since they were truncated.
      empty: candidates of which nothing was left, or that no fence can hold, replaced by a
        placeholder.
    """

    ids: np.ndarray
    removed_special: int
    dropped: int
    empty: int


def search_prompt(scaffold: Scaffold, problem_text: str) -> np.ndarray:
    """int32 ids [P] of the prompt that asks for a search trace."""
    return fill(scaffold.search, {"problem": encode_plain(scaffold.tokenizer, problem_text)})


def aggregation_prompt(
    scaffold: Scaffold,
    problem_text: str,
    candidates: Sequence[tuple[np.ndarray, Stop]],
    order: np.ndarray,
    fenced: bool = False,
) -> AggregationPrompt:
    """The prompt that asks for a better answer, given candidates.

    Args:
      candidates: (sampled int32 ids, stop id included; why it ended) of each trace of the subset,
        at least one.
      order: permutation of the candidates: place j shows candidate order[j].
      fenced: whether each candidate stands in a fence.

    Raises:
      ValueError: `order` is not a permutation of the candidates.
    """
    count = len(candidates)
    if not count or sorted(order) != list(range(count)):
        raise ValueError(
            f"order = {list(order)}: must be a permutation of the {count} candidates, >= 1"
        )
    shown, removed_special, empty = [], 0, 0
    for i in order:
        ids, stop = candidates[i]
        if stop == Stop.LENGTH and scaffold.settings.truncated == "drop":
            continue
        ids, removed = clean_candidate(scaffold, ids, stop)
        removed_special += removed
        if fenced and len(ids):
            ids = _in_fence(scaffold, ids)
        empty += not len(ids)
        shown.append(ids if len(ids) else scaffold.empty_ids)
    dropped = count - len(shown)
    if not shown:  # all were dropped: the prompt says so rather than listing nothing
        shown = [scaffold.empty_ids]

    listed = [
        fill(scaffold.candidate, {"index": number_ids(scaffold, index), "candidate": ids})
        for index, ids in enumerate(shown, start=1)
    ]
    values = {
        "problem": encode_plain(scaffold.tokenizer, problem_text),
        "count": number_ids(scaffold, len(shown)),
        "candidates": np.concatenate(listed),
    }
    return AggregationPrompt(fill(scaffold.aggregation, values), removed_special, dropped, empty)


def clean_candidate(scaffold: Scaffold, ids: np.ndarray, stop: Stop) -> tuple[np.ndarray, int]:
    """What an aggregation prompt shows of a trace.

    Thinking is cut, special ids are taken out (left in, a sampled <|im_start|> would forge a turn),
    and of a truncated trace the tail is kept; of every trace, with config.prompt.candidate_tail.

    Args:
      ids: sampled int32 ids; the stop id is the last one if `stop` is `Stop.STOP`.
      stop: why the trace ended. "drop" is up to the caller; here it keeps the tail.

    Returns:
      int32 ids, empty if nothing usable is left, and the number of special ids that were removed,
      without the stop id that ended the trace.
    """
    settings = scaffold.settings
    ids = np.asarray(ids, np.int32)
    if stop == Stop.STOP and np.isin(ids[-1:], scaffold.special_ids).any():
        ids = ids[:-1]
    if settings.thinking == "answer_only":
        ids = _after_thinking(scaffold, ids)

    special = np.isin(ids, scaffold.special_ids)
    ids = ids[~special]
    is_cut_off = stop == Stop.LENGTH and len(ids) > 0
    if is_cut_off:
        ids = ids[max(0, len(ids) - settings.keep_tail_tokens) :]
    if settings.candidate_tail:
        ids = ids[-settings.candidate_tail :]
    if is_cut_off and settings.truncated == "mark":
        ids = np.concatenate([scaffold.cut_off_ids, ids])
    return ids, int(special.sum())


def _in_fence(scaffold: Scaffold, ids: np.ndarray) -> np.ndarray:
    """A candidate in a fence that nothing in it closes.

    Nothing, if it has a longer run of backticks than a fence may have: then it is a loop.
    """
    text = scaffold.tokenizer.decode(
        ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    longest_run = max(map(len, re.findall("`+", text)), default=0)
    if longest_run >= MOST_FENCE:
        return ids[:0]
    opening, closing = fence_ids(scaffold, max(LEAST_FENCE, longest_run + 1))
    return np.concatenate([opening, ids, closing])


def listed_order(order: str, seed: int, id_6: Sequence[int], size: int) -> np.ndarray:
    """Permutation in which a prompt lists `size` candidates, as config.aggregation.order says.

    Args:
      order: "sampled" or "shuffled".
      seed: config.seed.
      id_6: of the group that the prompt is for, see `GroupRequests`; with the seed it decides.

    Returns:
      int [size]: place j shows candidate number order[j].
    """
    if order == "sampled":
        return np.arange(size)
    purpose, step, cursor, round, _, set = (int(number) for number in id_6)
    words = np.random.SeedSequence([seed, purpose, step, cursor, round, set, _ORDER_STREAM])
    return np.random.Generator(np.random.PCG64(words)).permutation(size)


def _after_thinking(scaffold: Scaffold, ids: np.ndarray) -> np.ndarray:
    """What follows the last </think>, everything if there was none.

    Nothing if thinking was never closed.
    """
    closed = _end_of_last(scaffold, ids, END_THINK, scaffold.end_think_id)
    rest = ids[closed:]
    reopened = _end_of_last(scaffold, rest, THINK, scaffold.think_id) > 0
    still_open = scaffold.opens_thinking and not closed
    return rest[:0] if reopened or still_open else rest


def _end_of_last(scaffold: Scaffold, ids: np.ndarray, tag: str, tag_id: int | None) -> int:
    """Length of the shortest prefix of `ids` that holds the last `tag`; 0 if there is none.

    A tag that is not a single token is looked for in the decoded text, because how it is tokenised
    depends on what follows it; by bisection over prefixes, so that the ids themselves are never
    encoded again.
    """
    if tag_id is not None:
        places = np.flatnonzero(ids == tag_id)
        return int(places[-1]) + 1 if len(places) else 0

    def occurrences(length: int) -> int:
        text = scaffold.tokenizer.decode(
            ids[:length].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text.count(tag)

    total = occurrences(len(ids))
    low, high = 0, len(ids) if total else 0
    while high - low > 1:
        middle = (low + high) // 2
        if occurrences(middle) == total:
            high = middle
        else:
            low = middle
    return high
