"""Problem texts and sampled traces -> prompt token ids (numpy, host).

Token in, token out: the wording around problems and candidates is rendered (`templates`) and
tokenised once, candidates are spliced in as the ids that were sampled. Their text is never encoded
again, since most id sequences
do not survive decoding and encoding.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from ml_collections import ConfigDict

from spiral_jax.core.config import ConfigError
from spiral_jax.core.groups import Purpose, Stop
from spiral_jax.prompts.templates import END_THINK, THINK, render, split_template

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PreTrainedTokenizerBase

EMPTY, CUT_OFF = "(empty)", "[cut off]\n"
_ORDER_STREAM = (
    0x6F72646572  # keeps these draws apart from others that are made from the same six numbers
)


@dataclasses.dataclass(frozen=True, eq=False)
class Scaffold:
    """The constant parts of all prompts, and how candidates are cleaned. Made by `make_scaffold`.

    Attributes:
      tokenizer: for problem texts and numbers; the constant parts are ids already.
      search, aggregation, candidate: int32 id arrays, with the placeholders' names between them.
      special_ids: int32, ascending: special tokens and stop ids, none of which may be inside a
      candidate.
      empty_ids: int32, stands for a candidate of which nothing is left.
      cut_off_ids: int32, precedes a truncated candidate under config.prompt.truncated = "mark".
      think_id, end_think_id: ids of <think> and </think> where they are single tokens.
      opens_thinking: the prompt itself begins the answer with <think>.
      truncated, keep_tail_tokens, thinking: fields of config.prompt.
    """

    tokenizer: PreTrainedTokenizerBase
    search: tuple[np.ndarray | str, ...]
    aggregation: tuple[np.ndarray | str, ...]
    candidate: tuple[np.ndarray | str, ...]
    special_ids: np.ndarray
    empty_ids: np.ndarray
    cut_off_ids: np.ndarray
    think_id: int | None
    end_think_id: int | None
    opens_thinking: bool
    truncated: str
    keep_tail_tokens: int
    thinking: str


@dataclasses.dataclass(frozen=True, eq=False)
class AggregationPrompt:
    """An aggregation prompt and what happened to its candidates.

    Attributes:
      ids: int32 [P].
      removed_special: stop and special ids taken out of candidates; the stop id that ended a trace
      does not count.
      dropped: candidates left out since they were truncated.
      empty: candidates of which nothing was left, replaced by a placeholder.
    """

    ids: np.ndarray
    removed_special: int
    dropped: int
    empty: int


def load_tokenizer(path: str | os.PathLike) -> PreTrainedTokenizerBase:
    """The tokenizer of a local checkpoint directory. Raises `ConfigError` if it cannot be loaded."""
    field = f"config.model.hf_path = {str(path)!r}"
    if not pathlib.Path(path).is_dir():
        raise ConfigError(f"{field}: not a directory.")
    from transformers import (
        AutoTokenizer,
    )  # takes seconds to import: now, after the checks before it

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{field}: its tokenizer cannot be loaded ({error}).") from error


def stop_ids(
    tokenizer: PreTrainedTokenizerBase, path: str | os.PathLike, more: Sequence[str | int] = ()
) -> tuple[int, ...]:
    """Ids that end a trace: `eos_token_id` of generation_config.json (a number or a list), the
    tokenizer's, and `more`.

    Args:
      path: generation_config.json or the directory that may hold it.
      more: config.prompt.stop: texts of single tokens, or ids.

    Raises:
      ConfigError: there is no stop id, generation_config.json is damaged, or an entry of `more` is
      not a single id.
    """
    file = pathlib.Path(path)
    file = file / "generation_config.json" if file.is_dir() else file
    try:
        named = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
        named = [int(i) for i in (named if isinstance(named, list) else [named]) if i is not None]
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{file}: its eos_token_id must be an id or a list of ids ({error})."
        ) from error
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = dict.fromkeys([*named, *own, *(_stop_id(tokenizer, stop) for stop in more)])
    if not ids:
        raise ConfigError(f"{path}: neither generation_config.json nor the tokenizer has an eos_token_id, so that no "
                          "trace would ever stop. Name the token that ends answers in config.prompt.stop.")  # fmt: skip
    return tuple(ids)


def _stop_id(tokenizer: PreTrainedTokenizerBase, stop: str | int) -> int:
    if isinstance(stop, str):
        found = _single_id(tokenizer, stop)
    else:
        found = stop if stop in tokenizer.get_vocab().values() else None
    if found is None:
        raise ConfigError(f"config.prompt.stop has {stop!r}: must be the text of one token, or an id, of the tokenizer "
                          f"in {tokenizer.name_or_path}. A text of several tokens ends no trace.")  # fmt: skip
    return found


def make_scaffold(
    tokenizer: PreTrainedTokenizerBase, prompt: ConfigDict, stop_ids: Iterable[int]
) -> Scaffold:
    """Tokenises the constant parts of all prompts.

    Args:
      prompt: config.prompt.
      stop_ids: ids that end a trace.

    Raises:
      ConfigError: a template has a placeholder too many or too few, the prompts cannot be rendered
        (see `templates.render`), only one of the two opens thinking, or the tokenizer cannot treat
        the special tokens in a problem's text as plain text.
    """
    special = _special_ids(tokenizer, stop_ids)
    search, opens_thinking = render(tokenizer, prompt, "search")
    aggregation, opens_too = render(tokenizer, prompt, "aggregation")
    if opens_thinking != opens_too:
        raise ConfigError("config.prompt.search and config.prompt.aggregation: one ends inside <think>, the other does "
                          "not; candidates of both are read by one rule. Let both or neither open it.")  # fmt: skip
    candidate = split_template("candidate", prompt.candidate)
    start = _first_ids(tokenizer) if prompt.template == "plain" else _ids(tokenizer, "")
    return Scaffold(
        tokenizer=tokenizer,
        search=(start, *_pieces(tokenizer, search)),
        aggregation=(start, *_pieces(tokenizer, aggregation)),
        candidate=_pieces(tokenizer, candidate),
        special_ids=special,
        empty_ids=_ids(tokenizer, EMPTY),
        cut_off_ids=_ids(tokenizer, CUT_OFF),
        think_id=_single_id(tokenizer, THINK),
        end_think_id=_single_id(tokenizer, END_THINK),
        opens_thinking=opens_thinking,
        truncated=prompt.truncated,
        keep_tail_tokens=prompt.keep_tail_tokens,
        thinking=prompt.thinking,
    )


def search_prompt(scaffold: Scaffold, problem_text: str) -> np.ndarray:
    """int32 ids [P] of the prompt that asks for a search trace."""
    return _fill(scaffold.search, {"problem": _problem_ids(scaffold, problem_text)})


def aggregation_prompt(
    scaffold: Scaffold,
    problem_text: str,
    candidates: Sequence[tuple[np.ndarray, Stop]],
    order: np.ndarray,
) -> AggregationPrompt:
    """The prompt that asks for a better answer, given candidates.

    Args:
      candidates: (sampled int32 ids, stop id included; why it ended) of each trace of the subset,
      at least one.
      order: permutation of the candidates: place j shows candidate order[j].

    Raises:
      ValueError: `order` is not a permutation of the candidates.
    """
    if not len(candidates) or sorted(order) != list(range(len(candidates))):
        raise ValueError(
            f"order = {list(order)}: must be a permutation of the {len(candidates)} candidates, >= 1"
        )
    shown, removed, empty = [], 0, 0
    for i in order:
        ids, stop = candidates[i]
        if stop == Stop.LENGTH and scaffold.truncated == "drop":
            continue
        ids, count = clean_candidate(scaffold, ids, stop)
        removed += count
        empty += not len(ids)
        shown.append(ids if len(ids) else scaffold.empty_ids)
    dropped = len(candidates) - len(shown)
    shown = shown or [
        scaffold.empty_ids
    ]  # all were dropped: the prompt says so rather than listing nothing
    listed = [
        _fill(scaffold.candidate, {"index": _number_ids(scaffold, j), "candidate": ids})
        for j, ids in enumerate(shown, start=1)
    ]
    values = {
        "problem": _problem_ids(scaffold, problem_text),
        "count": _number_ids(scaffold, len(shown)),
        "candidates": np.concatenate(listed),
    }
    return AggregationPrompt(_fill(scaffold.aggregation, values), removed, dropped, empty)


def clean_candidate(scaffold: Scaffold, ids: np.ndarray, stop: Stop) -> tuple[np.ndarray, int]:
    """What an aggregation prompt shows of a trace: thinking cut, special ids out, a truncated one
    reduced to its tail.

    Args:
      ids: sampled int32 ids; the stop id is the last one if `stop` is `Stop.STOP`.
      stop: why the trace ended. "drop" is up to the caller; here it keeps the tail.

    Returns:
      int32 ids, empty if nothing usable is left, and the number of special ids that were removed
      (without the stop id that ended the trace): left in, a sampled <|im_start|> would forge a
      turn.
    """
    ids = np.asarray(ids, np.int32)
    if stop == Stop.STOP and np.isin(ids[-1:], scaffold.special_ids).any():
        ids = ids[:-1]
    if scaffold.thinking == "answer_only":
        ids = _after_thinking(scaffold, ids)
    special = np.isin(ids, scaffold.special_ids)
    ids = ids[~special]
    if stop == Stop.LENGTH and len(ids):
        ids = ids[max(0, len(ids) - scaffold.keep_tail_tokens) :]
        if scaffold.truncated == "mark":
            ids = np.concatenate([scaffold.cut_off_ids, ids])
    return ids, int(special.sum())


def candidate_order(
    seed: int, purpose: Purpose, step: int, cursor: int, round: int, set: int, size: int
) -> np.ndarray:
    """Permutation of `size` candidates, a pure function of the arguments; int [size]."""
    words = [seed, int(purpose), step, cursor, round, set, _ORDER_STREAM]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words))).permutation(size)


def listed_order(
    c: ConfigDict, purpose: Purpose, step: int, cursor: int, round: int, set: int, size: int
) -> np.ndarray:
    """Permutation in which a prompt lists the candidates of a set, as config.aggregation.order
    says; int [size].
    """
    if c.aggregation.order == "sampled":
        return np.arange(size)
    return candidate_order(c.seed, purpose, step, cursor, round, set, size)


def max_aggregation_prompt(scaffold: Scaffold, c: ConfigDict) -> int:
    """Upper bound of the token count of an aggregation prompt over search traces.

    Holds for problems whose search prompt has at most config.prompt.max_problem_tokens.
    """
    size, limit = c.aggregation.subset_size, c.search.max_tokens
    shown = [limit, len(scaffold.empty_ids)]
    if scaffold.truncated == "mark":
        shown.append(len(scaffold.cut_off_ids) + min(limit, scaffold.keep_tail_tokens))
    numbers = [len(_number_ids(scaffold, n)) for n in range(1, size + 1)]
    listed = sum(
        _length(scaffold.candidate, {"candidate": max(shown), "index": digits})
        for digits in numbers
    )
    around = _length(scaffold.search, {"problem": 0})
    times = (
        _length(scaffold.search, {"problem": 1}) - around
    )  # how often the search prompt states the problem
    problem = max(0, (c.prompt.max_problem_tokens - around) // times)
    return _length(
        scaffold.aggregation, {"problem": problem, "count": max(numbers), "candidates": listed}
    )


def _length(pieces: tuple[np.ndarray | str, ...], lengths: dict[str, int]) -> int:
    return sum(lengths[piece] if isinstance(piece, str) else len(piece) for piece in pieces)


def _fill(pieces: tuple[np.ndarray | str, ...], values: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([values[piece] if isinstance(piece, str) else piece for piece in pieces])


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    return np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)


def _pieces(
    tokenizer: PreTrainedTokenizerBase, parts: Sequence[tuple[str, bool]]
) -> tuple[np.ndarray | str, ...]:
    """(text or placeholder's name, whether it is the latter) -> ids of the texts, names as they
    are.
    """
    return tuple(part if is_slot else _ids(tokenizer, part) for part, is_slot in parts)


def _first_ids(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The BOS id if the tokenizer begins texts with one, else nothing; some have a BOS that they
    never use.
    """
    first = tokenizer("")["input_ids"][:1]
    return np.array(first if first == [tokenizer.bos_token_id] else [], np.int32)


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """As `_ids`, but the strings of special tokens are text like any other."""
    return np.array(
        tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"], np.int32
    )


def _problem_ids(scaffold: Scaffold, text: str) -> np.ndarray:
    return _plain_ids(scaffold.tokenizer, text)


def _number_ids(scaffold: Scaffold, number: int) -> np.ndarray:
    return _ids(scaffold.tokenizer, str(number))


def _single_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int | None:
    ids = _ids(tokenizer, token)
    return int(ids[0]) if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else None


def _special_ids(tokenizer: PreTrainedTokenizerBase, stop_ids: Iterable[int]) -> np.ndarray:
    added = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    special = {*tokenizer.all_special_ids, *added}
    for token in tokenizer.convert_ids_to_tokens(sorted(special)):
        if not (special - {tokenizer.unk_token_id}).isdisjoint(
            _plain_ids(tokenizer, token).tolist()
        ):
            raise ConfigError(
                f"config.model.hf_path: its tokenizer turns the text {token!r} into a special id even when told not "
                "to, so that a problem could forge a turn. Use the fast version of the tokenizer (tokenizer.json)."
            )
    return np.array(sorted({*special, *stop_ids}), np.int32)


def _after_thinking(scaffold: Scaffold, ids: np.ndarray) -> np.ndarray:
    """What follows the last </think>; nothing if thinking was never closed; everything if there was
    none.
    """
    closed = _end_of_last(scaffold, ids, END_THINK, scaffold.end_think_id)
    rest = ids[closed:]
    unclosed = _end_of_last(scaffold, rest, THINK, scaffold.think_id) > 0 or (
        scaffold.opens_thinking and not closed
    )
    return rest[:0] if unclosed else rest


def _end_of_last(scaffold: Scaffold, ids: np.ndarray, tag: str, tag_id: int | None) -> int:
    """Length of the shortest prefix of `ids` that holds the last occurrence of `tag`; 0 if there is
    none.

    A tag that is not a single token is found in the decoded text, because how it is tokenised
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
        low, high = (low, middle) if occurrences(middle) == total else (middle, high)
    return high
