"""The tokenizer of a checkpoint: how it is loaded, which ids end a trace, texts -> ids."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from spiral_jax.core.config import ConfigError

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(path: str | os.PathLike) -> PreTrainedTokenizerBase:
    """The tokenizer of a local checkpoint directory. Raises `ConfigError` if there is none."""
    field = f"config.model.hf_path = {str(path)!r}"
    if not pathlib.Path(path).is_dir():
        raise ConfigError(f"{field}: not a directory.")
    # else it says that without PyTorch there are no models, of which we use none
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer  # takes seconds: not before what can be checked without

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{field}: its tokenizer cannot be loaded ({error}).") from error


def stop_ids(
    tokenizer: PreTrainedTokenizerBase, path: str | os.PathLike, more: Sequence[str | int] = ()
) -> tuple[int, ...]:
    """Ids that end a trace: those of the checkpoint's files, the tokenizer's, and `more`.

    Args:
      path: the directory that may hold generation_config.json and config.json. `eos_token_id` of
        the second counts where the first has none, as in transformers.
      more: config.prompt.stop: texts of single tokens, or ids.

    Raises:
      ConfigError: there is no stop id, a file's are damaged, or an entry of `more` is not a single
        id.
    """
    path = pathlib.Path(path)
    ids = _named_stop_ids(path / "generation_config.json") or _named_stop_ids(path / "config.json")
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    ids += [_stop_id(tokenizer, stop) for stop in more]
    if not ids:
        raise ConfigError(
            f"{path}: neither generation_config.json nor the tokenizer has an eos_token_id, so "
            "that no trace would ever stop. Name the token that ends answers in config.prompt.stop."
        )
    return tuple(dict.fromkeys(ids))


def _named_stop_ids(file: pathlib.Path) -> list[int]:
    """`eos_token_id` of a file, a number or a list; none where there is no such file."""
    if not file.is_file():
        return []
    try:
        named = json.loads(file.read_text()).get("eos_token_id")
        named = named if isinstance(named, list) else [named]
        return [int(i) for i in named if i is not None]
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{file}: its eos_token_id must be an id or a list of ids ({error})."
        ) from error


def _stop_id(tokenizer: PreTrainedTokenizerBase, stop: str | int) -> int:
    if isinstance(stop, str):
        id = single_id(tokenizer, stop)
    else:
        id = stop if stop in tokenizer.get_vocab().values() else None
    if id is None:
        raise ConfigError(
            f"config.prompt.stop has {stop!r}: must be the text of one token, or an id, of the "
            f"tokenizer in {tokenizer.name_or_path}. A text of several tokens ends no trace."
        )
    return id


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """int32 ids of a text, in which the strings of special tokens are special ids."""
    return np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)


def encode_plain(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """int32 ids of a text, in which the strings of special tokens are text like any other."""
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
    return np.array(encoded["input_ids"], np.int32)


def single_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int | None:
    """The id of a text that is one token; None: it is several, or unknown."""
    ids = encode(tokenizer, token)
    return int(ids[0]) if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else None


def first_ids(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The BOS id if the tokenizer begins texts with it, else nothing: some never use theirs."""
    first = tokenizer("")["input_ids"][:1]
    return np.array(first if first == [tokenizer.bos_token_id] else [], np.int32)


def special_ids(tokenizer: PreTrainedTokenizerBase, stop_ids: Iterable[int]) -> np.ndarray:
    """int32, ascending: the tokenizer's special tokens, and `stop_ids`.

    Raises:
      ConfigError: the tokenizer cannot treat special tokens in a problem's text as plain text.
    """
    added = [id for id, token in tokenizer.added_tokens_decoder.items() if token.special]
    special = {*tokenizer.all_special_ids, *added}
    forbidden = special - {tokenizer.unk_token_id}
    for token in tokenizer.convert_ids_to_tokens(sorted(special)):
        if not forbidden.isdisjoint(encode_plain(tokenizer, token).tolist()):
            raise ConfigError(
                f"config.model.hf_path: its tokenizer turns the text {token!r} into a special id "
                "even when told not to, so that a problem could forge a turn. Use the fast version "
                "of the tokenizer (tokenizer.json)."
            )
    return np.array(sorted({*special, *stop_ids}), np.int32)
