"""Wording with placeholders -> the texts around them, through the tokenizer's chat template or as
they are.
"""

from __future__ import annotations

import difflib
import inspect
import re
import string
from typing import TYPE_CHECKING

import jinja2
from ml_collections import ConfigDict

from spiral_jax.core.config import ConfigError

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PreTrainedTokenizerBase

THINK, END_THINK = "<think>", "</think>"
# field of config.prompt -> its placeholders and whether it must have them
_PLACEHOLDERS = {
    "search": {"problem": True},
    "aggregation": {"problem": True, "count": False, "candidates": True},
    "candidate": {"index": False, "candidate": True},
}
_OPEN, _CLOSE = (
    "\ue000",
    "\ue001",
)  # around names; private use: no template knows them, and no tokenizer sees them


def split_template(field: str, template: str) -> list[tuple[str, bool]]:
    """(literal text or placeholder's name, whether it is the latter) in order.

    Raises:
      ConfigError: a placeholder of config.prompt.`field` is missing, unknown or malformed.
    """
    allowed = _PLACEHOLDERS[field]
    names = ", ".join(f"{{{name}}}" for name in allowed)
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(
            f"config.prompt.{field}: {error}. Write braces of the text as {{{{ and }}}}."
        ) from error
    parts: list[tuple[str, bool]] = []
    for literal, name, spec, conversion in parsed:
        if (
            literal and parts and not parts[-1][1]
        ):  # {{ and }} end a literal, but not the text that is tokenised
            parts[-1] = (parts[-1][0] + literal, False)
        elif literal:
            parts.append((literal, False))
        if name is None:
            continue
        if name not in allowed or spec or conversion:
            raise ConfigError(f"config.prompt.{field} has the placeholder {{{name}}}: allowed are {names}, without "
                              "format or conversion. Write braces of the text as {{ and }}.")  # fmt: skip
        parts.append((name, True))
    for name, required in allowed.items():
        if required and (name, True) not in parts:
            raise ConfigError(f"config.prompt.{field} lacks {{{name}}}.")
    return parts


def render(
    tokenizer: PreTrainedTokenizerBase, prompt: ConfigDict, field: str
) -> tuple[list[tuple[str, bool]], bool]:
    """A whole prompt of the kind `field` ("search" or "aggregation"), by config.prompt.template.

    Returns:
      (text or placeholder's name, whether it is the latter) in order, and whether the answer begins
      inside <think>.

    Raises:
      ConfigError: a placeholder is wrong; or the chat template is missing, refuses or alters the
        messages, or does not read an entry of config.prompt.template_kwargs.
    """
    parts = split_template(field, prompt[field])
    if prompt.template == "plain":
        last, is_slot = parts[-1]
        return parts, _opens_thinking("" if is_slot else last)
    message = "".join(f"{_OPEN}{part}{_CLOSE}" if is_slot else part for part, is_slot in parts)
    pieces = re.split(
        f"{_OPEN}(.*?){_CLOSE}", _through_chat_template(tokenizer, prompt, field, message)
    )
    names = [part for part, is_slot in parts if is_slot]
    if pieces[1::2] != names:
        raise ConfigError(f"config.prompt.{field}: the chat template changes the message: its placeholders were "
                          f"{names} and became {pieces[1::2]}.")  # fmt: skip
    own, is_slot = parts[-1]  # what the message says itself about <think> opens nothing
    answer = pieces[-1] if is_slot else pieces[-1].removeprefix(own.rstrip())
    return [(piece, bool(j % 2)) for j, piece in enumerate(pieces) if piece], _opens_thinking(
        answer
    )


def _opens_thinking(text: str) -> bool:
    return text.rfind(THINK) > text.rfind(END_THINK)


def _through_chat_template(
    tokenizer: PreTrainedTokenizerBase, prompt: ConfigDict, field: str, message: str
) -> str:
    """The text of a user's turn behind the system message, up to where the answer begins."""
    if not tokenizer.chat_template:
        raise ConfigError(f"config.prompt.template = 'chat': the tokenizer in {tokenizer.name_or_path} has no chat "
                          "template. For a base model set prompt.template=plain; else add chat_template.jinja, e.g. "
                          "from the instruct version of the model.")  # fmt: skip
    turns = [{"role": "system", "content": prompt.system}] if prompt.system else []
    turns.append({"role": "user", "content": message})
    try:
        variables = _template_variables(tokenizer, prompt)
        rendered = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, **variables
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"config.prompt.{field}: the chat template refuses the prompt ({error}). It was given "
                          f"prompt.system = {prompt.system!r}, prompt.template_kwargs = "
                          f"{prompt.template_kwargs.to_dict()}.") from error  # fmt: skip
    if prompt.system.strip() not in rendered:
        raise ConfigError(f"config.prompt.system = {prompt.system!r}: the chat template leaves it out or changes it. "
                          'Set it to "" and write its words into prompt.search and prompt.aggregation.')  # fmt: skip
    return rendered


def _template_variables(tokenizer: PreTrainedTokenizerBase, prompt: ConfigDict) -> dict:
    """config.prompt.template_kwargs; an entry that the template never reads would be ignored
    without a word.
    """
    source = tokenizer.get_chat_template()
    words = set(re.findall(r"[A-Za-z_]\w*", source))
    reserved = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters}
    variables = prompt.template_kwargs.to_dict()
    for name in variables:
        if name not in words or name in reserved:
            near = difflib.get_close_matches(name, sorted(words - reserved), n=1)
            raise ConfigError(f"config.prompt.template_kwargs has {name!r}: not a variable of the chat template."
                              + (f" Did you mean {near[0]!r}?" if near else ""))  # fmt: skip
    return variables
