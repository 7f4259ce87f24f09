"""Wording with placeholders -> the texts around them, through a chat template or as they are."""

from __future__ import annotations

import difflib
import inspect
import re
import string
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2

from spiral_jax.core.config import ConfigError
from spiral_jax.prompts.settings import PromptSettings

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PreTrainedTokenizerBase

THINK, END_THINK = "<think>", "</think>"
# field of config.prompt -> its placeholders and whether it must have them
_PLACEHOLDERS = {
    "search": {"problem": True},
    "aggregation": {"problem": True, "count": False, "candidates": True},
    "candidate": {"index": False, "candidate": True},
}
# around names; private use: no template knows them, and no tokenizer sees them
_OPEN, _CLOSE = "\ue000", "\ue001"


class Part(NamedTuple):
    """A literal text, or the name of a placeholder."""

    text: str
    is_placeholder: bool


class Rendered(NamedTuple):
    """A whole prompt, and whether the answer to it begins inside <think>."""

    parts: list[Part]
    opens_thinking: bool


def split_template(field: str, template: str) -> list[Part]:
    """The parts of a template, in order.

    Raises:
      ConfigError: a placeholder of config.prompt.`field` is missing, unknown or malformed.
    """
    allowed = _PLACEHOLDERS[field]
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(
            f"config.prompt.{field}: {error}. Write braces of the text as {{{{ and }}}}."
        ) from error
    parts: list[Part] = []
    for literal, name, spec, conversion in parsed:
        if literal and parts and not parts[-1].is_placeholder:
            # {{ and }} end a literal of the parser, but not the text that is tokenised
            parts[-1] = Part(parts[-1].text + literal, False)
        elif literal:
            parts.append(Part(literal, False))
        if name is None:
            continue
        if name not in allowed or spec or conversion:
            names = ", ".join(f"{{{name}}}" for name in allowed)
            raise ConfigError(
                f"config.prompt.{field} has the placeholder {{{name}}}: allowed are {names}, "
                "without format or conversion. Write braces of the text as {{ and }}."
            )
        parts.append(Part(name, True))
    for name, required in allowed.items():
        if required and Part(name, True) not in parts:
            raise ConfigError(f"config.prompt.{field} lacks {{{name}}}.")
    return parts


def render(tokenizer: PreTrainedTokenizerBase, settings: PromptSettings, field: str) -> Rendered:
    """A whole prompt of the kind `field` ("search" or "aggregation").

    Raises:
      ConfigError: a placeholder is wrong; or the chat template is missing, refuses or alters the
        messages, or does not read an entry of config.prompt.template_kwargs.
    """
    parts = split_template(field, getattr(settings, field))
    last = parts[-1]
    if settings.template == "plain":
        return Rendered(parts, _opens_thinking("" if last.is_placeholder else last.text))

    marked = [f"{_OPEN}{part.text}{_CLOSE}" if part.is_placeholder else part.text for part in parts]
    rendered = _through_chat_template(tokenizer, settings, field, "".join(marked))
    pieces = re.split(f"{_OPEN}(.*?){_CLOSE}", rendered)  # texts and names in turn
    names = [part.text for part in parts if part.is_placeholder]
    if pieces[1::2] != names:
        raise ConfigError(
            f"config.prompt.{field}: the chat template changes the message: its placeholders were "
            f"{names} and became {pieces[1::2]}."
        )

    # what the message itself says at its end about <think> opens nothing
    answer = pieces[-1] if last.is_placeholder else pieces[-1].removeprefix(last.text.rstrip())
    whole = [Part(piece, bool(i % 2)) for i, piece in enumerate(pieces) if piece]
    return Rendered(whole, _opens_thinking(answer))


def _opens_thinking(text: str) -> bool:
    return text.rfind(THINK) > text.rfind(END_THINK)


def _through_chat_template(
    tokenizer: PreTrainedTokenizerBase, settings: PromptSettings, field: str, message: str
) -> str:
    """The text of a user's turn behind the system message, up to where the answer begins."""
    if not tokenizer.chat_template:
        raise ConfigError(
            f"config.prompt.template = 'chat': the tokenizer in {tokenizer.name_or_path} has no "
            "chat template. For a base model set prompt.template=plain; else add "
            "chat_template.jinja, e.g. from the instruct version of the model."
        )
    turns = [{"role": "system", "content": settings.system}] if settings.system else []
    turns.append({"role": "user", "content": message})
    try:
        _check_variables(tokenizer, settings.template_kwargs)
        rendered = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, **settings.template_kwargs
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise ConfigError(
            f"config.prompt.{field}: the chat template refuses the prompt ({error}). It was given "
            f"prompt.system = {settings.system!r}, prompt.template_kwargs = "
            f"{settings.template_kwargs}."
        ) from error
    if settings.system.strip() not in rendered:
        raise ConfigError(
            f"config.prompt.system = {settings.system!r}: the chat template leaves it out or "
            'changes it. Set it to "" and write its words into prompt.search and '
            "prompt.aggregation."
        )
    return rendered


def _check_variables(tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any]) -> None:
    """Refuses an entry of config.prompt.template_kwargs that the template never reads.

    It would be ignored without a word.
    """
    words = set(re.findall(r"[A-Za-z_]\w*", tokenizer.get_chat_template()))
    reserved = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters}
    for name in variables:
        if name not in words or name in reserved:
            near = difflib.get_close_matches(name, sorted(words - reserved), n=1)
            raise ConfigError(
                f"config.prompt.template_kwargs has {name!r}: not a variable of the chat template."
                + (f" Did you mean {near[0]!r}?" if near else "")
            )
