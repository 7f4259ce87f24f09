r"""Reward "instructions": the share of a problem's instructions that an answer follows.

They are checked by rule, none by another model. A problem's columns are those of IFEval (arXiv
2311.07911): instruction_id_list, such as ["length_constraints:number_words"], and kwargs, a list of
{argument: value} or None for each; both may also stand in its reference answer, a JSON object.
`CHECKS` has all instructions but the one that asks for a language, which needs a classifier. What a
trace thinks, up to its last </think>, is no part of the answer.

Names, arguments and meanings are IFEval's. Words are runs of letters, digits, _ and '; sentences
end at . ! or ? before space or the end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from spiral_jax.tasks.answer import after_thinking
from spiral_jax.tasks.problem import Problem

_WORD = re.compile(r"[\w']+")
_SENTENCE_END = re.compile(r"[.!?]+(?=\s|\Z)")
_PLACEHOLDER = re.compile(r"\[[^\[\]]+\]")
_BULLET = re.compile(r"^\s*(?:\*[^*].*|-\s*\S.*)$", re.MULTILINE)
_HIGHLIGHT = re.compile(r"\*\*[^*\n]+\*\*|\*[^*\n]+\*")
_TITLE = re.compile(r"<<[^\n]+?>>")
_DIVIDER = re.compile(r"\s?\*\*\*\s?")
_CAPITALS = re.compile(r"[A-Z]+")
_FENCED = re.compile(r"\A\s*```(?:json|JSON|Json)?\s*(.*?)\s*```\s*\Z", re.DOTALL)
_CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


class BrokenInstructions(ValueError):
    """A problem's instructions cannot be checked."""


def instructions_reward(text: str, problem: Problem) -> float:
    """The share of instructions that are followed; an empty answer follows none.

    Raises:
      BrokenInstructions: there are none, or one is unknown or lacks an argument.
    """
    answer = after_thinking(text).strip()
    asked = list(read_instructions(problem))
    if not answer:
        return 0.0
    return sum(bool(check(answer, **arguments)) for check, arguments in asked) / len(asked)


def check_instructions(problem: Problem) -> None:
    """Whether the instructions of a problem can be checked. Raises `BrokenInstructions`."""
    for check, arguments in read_instructions(problem):
        try:
            check("An answer.", **arguments)
        except (TypeError, ValueError, AttributeError) as error:
            raise BrokenInstructions(f"{check.__name__} of {arguments}: {error}") from error


def read_instructions(
    problem: Problem,
) -> Iterator[tuple[Callable[..., bool], dict[str, Any]]]:
    """The check of each instruction, and its arguments. Raises `BrokenInstructions`."""
    columns = {**_read_answer(problem), **problem.columns}
    names = columns.get("instruction_id_list")
    given = columns.get("kwargs")
    given = [None] * len(names or []) if given is None else given
    if not names or len(given) != len(names):
        raise BrokenInstructions(
            "needs the column instruction_id_list, and kwargs with as many entries "
            f"(columns: {sorted(columns)})"
        )
    for name, arguments in zip(names, given, strict=True):
        if name not in CHECKS:
            raise BrokenInstructions(f"{name}: unknown; known are {', '.join(CHECKS)}")
        check, needed = CHECKS[name]
        # data sets give every argument that any instruction has, most of them as None
        known = {key: value for key, value in (arguments or {}).items() if value is not None}
        if missing := [key for key in needed if key not in known]:
            raise BrokenInstructions(f"{name}: its kwargs lack {', '.join(missing)}")
        yield check, {key: known[key] for key in needed}


def _read_answer(problem: Problem) -> dict[str, Any]:
    """The reference answer, if it is a JSON object; else {}."""
    try:
        read = json.loads(problem.answers[0])
    except ValueError:
        return {}
    return read if isinstance(read, dict) else {}


def _holds(count: int, relation: str, bound: int) -> bool:
    if relation not in ("less than", "at least"):
        raise BrokenInstructions(f'relation must be "less than" or "at least", not {relation!r}')
    return count < int(bound) if relation == "less than" else count >= int(bound)


def words(text: str) -> list[str]:
    return _WORD.findall(text)


def sentences(text: str) -> int:
    ends = list(_SENTENCE_END.finditer(text))
    return len(ends) + bool(text[ends[-1].end() if ends else 0 :].strip())


def _times(word: str, text: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE))


def has_keywords(text: str, keywords: Sequence[str]) -> bool:
    return all(_times(word, text) for word in keywords)


def has_no(text: str, forbidden_words: Sequence[str]) -> bool:
    return not any(_times(word, text) for word in forbidden_words)


def has_keyword_times(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _holds(_times(keyword, text), relation, frequency)


def has_letter_times(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _holds(text.lower().count(letter.lower()), let_relation, let_frequency)


def has_words(text: str, num_words: int, relation: str) -> bool:
    return _holds(len(words(text)), relation, num_words)


def has_sentences(text: str, num_sentences: int, relation: str) -> bool:
    return _holds(sentences(text), relation, num_sentences)


def has_paragraphs(text: str, num_paragraphs: int) -> bool:
    parts = _DIVIDER.split(text)
    inner = parts[1:-1]
    ends = [part for part in (parts[0], parts[-1]) if part.strip()] if len(parts) > 1 else parts
    return all(part.strip() for part in inner) and len(inner) + len(ends) == int(num_paragraphs)


def has_nth_paragraph(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = [part.strip() for part in re.split(r"\n\n", text) if part.strip()]
    n = int(nth_paragraph)
    if len(parts) != int(num_paragraphs) or not 1 <= n <= len(parts):
        return False
    found = words(parts[n - 1])
    return bool(found) and found[0].lower() == first_word.lower()


def has_placeholders(text: str, num_placeholders: int) -> bool:
    return len(_PLACEHOLDER.findall(text)) >= int(num_placeholders)


def has_postscript(text: str, postscript_marker: str) -> bool:
    letters = [re.escape(char) for char in postscript_marker if char.isalnum()]
    return re.search(r"\.?\s?".join(letters), text, re.IGNORECASE) is not None


def has_bullets(text: str, num_bullets: int) -> bool:
    return len(_BULLET.findall(text)) == int(num_bullets)


def has_highlights(text: str, num_highlights: int) -> bool:
    marked = [part for part in _HIGHLIGHT.findall(text) if part.strip("* ")]
    return len(marked) >= int(num_highlights)


def has_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"\s?{re.escape(section_spliter)}\s?\d+", text)) >= int(num_sections)


def is_json(text: str) -> bool:
    fenced = _FENCED.match(text)
    try:
        json.loads(fenced.group(1) if fenced else text)
    except ValueError:
        return False
    return True


def has_title(text: str) -> bool:
    return any(title.strip("<> ") for title in _TITLE.findall(text))


def is_constrained(text: str) -> bool:
    return any(answer in text for answer in _CONSTRAINED)


def has_two_answers(text: str) -> bool:
    parts = text.split("******")
    answers = [part.strip() for part in parts if part.strip()]
    return len(answers) == 2 and answers[0] != answers[1] and len(parts) <= 4


def repeats_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.lower().startswith(prompt_to_repeat.strip().lower())


def ends_with(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def is_quoted(text: str) -> bool:
    return len(text) > 1 and text[0] == text[-1] == '"'


def is_lower(text: str) -> bool:
    return text == text.lower()


def is_upper(text: str) -> bool:
    return text == text.upper()


def has_capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    count = sum(_CAPITALS.fullmatch(word) is not None for word in words(text))
    return _holds(count, capital_relation, capital_frequency)


def has_no_comma(text: str) -> bool:
    return "," not in text


# name -> (check, the arguments that it needs)
CHECKS: dict[str, tuple[Callable[..., bool], tuple[str, ...]]] = {
    "keywords:existence": (has_keywords, ("keywords",)),
    "keywords:frequency": (has_keyword_times, ("keyword", "frequency", "relation")),
    "keywords:forbidden_words": (has_no, ("forbidden_words",)),
    "keywords:letter_frequency": (has_letter_times, ("letter", "let_frequency", "let_relation")),
    "length_constraints:number_words": (has_words, ("num_words", "relation")),
    "length_constraints:number_sentences": (has_sentences, ("num_sentences", "relation")),
    "length_constraints:number_paragraphs": (has_paragraphs, ("num_paragraphs",)),
    "length_constraints:nth_paragraph_first_word": (
        has_nth_paragraph,
        ("num_paragraphs", "nth_paragraph", "first_word"),
    ),
    "detectable_content:number_placeholders": (has_placeholders, ("num_placeholders",)),
    "detectable_content:postscript": (has_postscript, ("postscript_marker",)),
    "detectable_format:number_bullet_lists": (has_bullets, ("num_bullets",)),
    "detectable_format:number_highlighted_sections": (has_highlights, ("num_highlights",)),
    "detectable_format:multiple_sections": (has_sections, ("section_spliter", "num_sections")),
    "detectable_format:json_format": (is_json, ()),
    "detectable_format:title": (has_title, ()),
    "detectable_format:constrained_response": (is_constrained, ()),
    "combination:two_responses": (has_two_answers, ()),
    "combination:repeat_prompt": (repeats_prompt, ("prompt_to_repeat",)),
    "startend:end_checker": (ends_with, ("end_phrase",)),
    "startend:quotation": (is_quoted, ()),
    "change_case:english_lowercase": (is_lower, ()),
    "change_case:english_capital": (is_upper, ()),
    "change_case:capital_word_frequency": (
        has_capital_words,
        ("capital_frequency", "capital_relation"),
    ),
    "punctuation:no_comma": (has_no_comma, ()),
}
