r"""How people write answers -> LaTeX that math-verify reads as they meant it, or a refusal.

math-verify reads LaTeX, where neighbouring letters are multiplied: to it `pi/2` is p i / 2, `1e-05`
is e - 5 and `18 dollars` a product of eight letters, all without a word. Here such notation becomes
LaTeX, words become words, and what could be read in two ways is refused as a reference. No sympy
and no jax: all references of a data set are read like this when it is loaded.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata

# letters of words in any script; π and ϕ, ² and ½, ⁿ, ℝ and ① are mathematics
_LETTER = (
    r"[^\W\d_Α-Ωα-ωϑϕϖϱϵ"
    r"ª²³¹º¼-¾\u2070-\u218f\u2460-\u24ff\uff10-\uff5a\U0001d400-\U0001d7ff]"
)
_GAP = r"(?:\s|~|\\[ ,;:!]|\\q?quad)+"
_SPACED_NUMBERS = re.compile(rf"[-+]?[0-9]+(?:{_GAP}[0-9]+)+(?:\.[0-9]+)?")
_UNDERSCORED = re.compile(r"[-+]?[0-9]{1,3}(?:_[0-9]{3})+(?:\.[0-9]+)?")
_POINTS_AND_COMMA = re.compile(r"[-+]?[0-9]{1,3}(?:\.[0-9]{3})+,[0-9]+")
_TWO_WITH_COMMA = re.compile(r"[-+]?[0-9]+,(?![0-9]{3}\Z)[0-9]+")  # but 1,234 is 1234

_TEXT_COMMANDS = r"\\(?:text(?:bf|it|rm|normal)?|mbox|mathrm)"
_ALL_TEXT = re.compile(rf"{_TEXT_COMMANDS}\s*\{{([^{{}}\\]*)\}}")
_LAST_TEXT = re.compile(rf"(.*[^\s{{(,])\s*{_TEXT_COMMANDS}\s*\{{([^{{}}\\]*)\}}", re.DOTALL)
_UNIT_AT_END = re.compile(r"\\text\{[^{}]*\}\Z")
_UPRIGHT_LETTER = re.compile(r"\\mathrm\s*\{\s*([A-Za-z])\s*\}")  # \mathrm{e} is e
_DOLLARS = re.compile(r"\$([^$]+)\$")

_SYMBOLS = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "√": " sqrt ",
    "π": r"\pi ", "∞": r"\infty ", "≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ", "°": r"^\circ ",
    "½": " 1/2", "⅓": " 1/3", "⅔": " 2/3", "¼": " 1/4", "¾": " 3/4", "²": "^2", "³": "^3",
    "**": "^", "€": "", "£": "", "¥": "", "\u00a0": " ", "\u202f": " ",
}  # fmt: skip
_COMMAND = re.compile(r"\\[A-Za-z(\[]")
_SYMBOL = re.compile("|".join(map(re.escape, _SYMBOLS)))

_DATE = re.compile(r"\b[0-9]{4}-[0-9]{2}-[0-9]{2}\b|\b[0-9]{1,2}/[0-9]{1,2}/[0-9]{4}\b")
_HEXADECIMAL = re.compile(r"\b0[xX][0-9a-fA-F]+")
_E_NOTATION = re.compile(
    r"(?<![\w.\\])([0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE]([-+]?[0-9]+)(?![\w.]|\^)", re.ASCII
)
_POWER_OF_TEN = re.compile(
    r"(?<![\w.\\^}/])(?<!/ )([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(?:\\times|\\cdot|\*)\s*"
    r"10\s*\^\s*(?:\{\s*)?(-?[0-9]+)(?:\s*\})?(?![\w.!^])",
    re.ASCII,
)
_TIMES_TEN = re.compile(r"(?<=[0-9])\s*x\s*(?=10\s*\^)")
_NEGATIVE_POWER = re.compile(r"\^\s*(-[0-9]+)")
_MIXED = re.compile(r"(?<![\w.\\^/{])([0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)(?![0-9/.])", re.ASCII)
_FRACTION_TIMES = re.compile(r"(?<![\w.\\^/])([0-9]+)\s*/\s*([0-9]+)\s+(?=[A-Za-z\\(])", re.ASCII)
_FRACTION_OR_DIVISOR = re.compile(
    r"(?<![\w.\\^/])([0-9]+)\s*/\s*([0-9]+)(?=[A-Za-z(]|\\pi|\\sqrt)", re.ASCII
)

_FUNCTIONS = {
    "asin": r"\arcsin ",
    "acos": r"\arccos ",
    "atan": r"\arctan ",
    "lcm": r"\operatorname{lcm}",
}
for _name in (
    *("sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh"),
    *("tanh", "ln", "log", "exp", "max", "min", "gcd"),
):
    _FUNCTIONS[_name] = rf"\{_name} "
_LETTER_NAMES = {}
for _name in (
    *("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"),
    *("lambda", "pi", "rho", "sigma", "tau", "phi", "chi", "psi", "omega"),  # xi may be x i
):
    _LETTER_NAMES[_name] = rf"\{_name} "
_CONSTANTS = _LETTER_NAMES | dict.fromkeys(("infinity", "inf", "oo"), r"\infty ")
_NAME = re.compile(
    rf"([a-z]?)({'|'.join(sorted(_FUNCTIONS | _LETTER_NAMES, key=len, reverse=True))})([a-z]?)"
)
_ARGUMENT = re.compile(r"\s*[({\[|\\\w^]", re.ASCII)  # what follows a function's name
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_UNITS = (
    *("mm", "cm", "dm", "km", "in", "ft", "yd", "mg", "kg", "oz", "lb", "lbs", "ml", "sec", "secs"),
    *("min", "mins", "hr", "hrs", "mph", "kph", "kmh", "rad", "deg", "usd", "eur"),
)
_SHORT_UNIT = rf"(?:{'|'.join(_UNITS)}|[msgh])(?:\^?\{{?[23]\}}?)?"
_WITH_SHORT_UNIT = re.compile(
    rf"(.*[0-9)}}])(?:\s*(?:{'|'.join(_UNITS)})(?:\^?\{{?[23]\}}?)?"
    rf"|\s+{_SHORT_UNIT}\s*/\s*{_SHORT_UNIT}|\s+[ms]\^\{{?[23]\}}?)\s*",
    re.IGNORECASE,
)
_NO_PRODUCTS = ("is", "of", "at", "to", "by", "no", "if", "on", "as", "it", "be", "in")
_UNIT_WORDS = re.compile(rf"{_LETTER}(?:{_LETTER}|[\s./'-])*(?:\^?[23])?\s*")
_VALUE_END = re.compile(r"(?:[0-9)}!%]|\\pi)\s*\Z")
_LETTERS = re.compile(
    rf"{_TEXT_COMMANDS}\s*\{{[^{{}}]*\}}"
    r"|\\(?:operatorname|math[a-z]+|begin|end)\*?\s*\{[^{}]*\}|\\+[A-Za-z]+|\\."
    rf"|{_LETTER}+"
)
_RUN = re.compile(rf"{_LETTER}+")
_WORDS = re.compile(rf"{_LETTER}(?:{_LETTER}|[\s,'-])*")
# signs that math-verify has no rule for, where they stand: about 3, an open end, signs alone
_UNKNOWN = re.compile(
    r"[#?@&`]|\.\.|\A\s*≈|(?<![0-9])~|\A[^\w∅(){}\[\]]+\Z"
    rf"|(?!{_LETTER})[^\x00-\x7f\sΑ-Ωα-ωϑϕϖϱϵℂℕℚℝℤℵ∅±∓∕∖∗∘∙∩∪≁-≧≪≫≲≳≺-≿⊆⊇⊕⊗⊞-⊡⋄⋅⋆]"
)
_LIST_OF_WORDS = re.compile(r"\s*(?:,\s*(?:and|or)?|\band\b|\bor\b)\s*")
# math-verify takes these for units: of `\pi r^2 h` it would read \pi r^2
_LAST_LETTERS = re.compile(r"(?<=[0-9}\s])(?![mgs]\Z)([A-Za-z]{1,3})\Z")


class Unreadable(ValueError):
    """Cannot be read in one way only; the message says why."""


@dataclasses.dataclass(frozen=True)
class Notation:
    """What an answer says.

    Attributes:
      latex: for math-verify, each one way to read it; () where it is words. There are two ways
        where a comma may be the decimal point or not: `3,5`; and of 3/4x.
      words: those of an answer without mathematics, folded; several of a list.
      unclear: why it is no reference; "" = it is one.
    """

    latex: tuple[str, ...] = ()
    words: frozenset[str] = frozenset()
    unclear: str = ""


def read_reference(text: str) -> Notation:
    """A reference, which must be clear.

    Raises:
      Unreadable: see `read_notation`; or 3/4x.
    """
    notation = read_notation(text)
    if notation.unclear:
        raise Unreadable(notation.unclear)
    return notation


def read_notation(text: str) -> Notation:
    r"""What is inside a box, or a reference.

    E-notation is a number (3e-2 is 0.03), `2 1/2` a mixed one, a number before words has a unit,
    which is dropped, and words alone, or all inside \text, are compared as words.

    Raises:
      Unreadable: a date, words amid mathematics, signs that nothing is known of.
    """
    text = unicodedata.normalize("NFC", _UPRIGHT_LETTER.sub(r"\1", text)).strip()
    is_text = _ALL_TEXT.fullmatch(text)
    try:
        return _read(_bare(text))
    except Unreadable:
        if not is_text:
            raise
        return Notation(words=frozenset([_fold(is_text[1])]))


def _fold(words: str) -> str:
    return " ".join(words.casefold().split())


def _read(text: str) -> Notation:
    for pattern, what in ((_DATE, "a date"), (_HEXADECIMAL, "a hexadecimal number")):
        if pattern.search(text):
            raise Unreadable(f"{what} is no mathematics")
    if _SPACED_NUMBERS.fullmatch(text):
        return Notation((re.sub(_GAP, ",", text),))
    if _UNDERSCORED.fullmatch(text):
        return Notation((text.replace("_", ""),))
    if _POINTS_AND_COMMA.fullmatch(text):
        return Notation((text.replace(".", "").replace(",", "."),))
    if is_ambiguous(text):
        return Notation((text, text.replace(",", ".")))
    if _WORDS.fullmatch(text) and _has_words(text):
        parts = map(_fold, _LIST_OF_WORDS.split(text.casefold()))
        return Notation(words=frozenset(part for part in parts if part))

    is_latex = _COMMAND.search(text) is not None
    text = _SYMBOL.sub(lambda found: _SYMBOLS[found[0]], text)
    if not is_latex and (unknown := _UNKNOWN.search(text)):
        raise Unreadable(f"{unknown[0].strip()!r} is no sign of mathematics that can be read")
    if unit := _WITH_SHORT_UNIT.fullmatch(text):
        text = unit[1]
    text = _numbers(text)
    if not _FRACTION_OR_DIVISOR.search(text):
        return Notation((_to_latex(text, is_latex),))
    as_factor = _FRACTION_OR_DIVISOR.sub(r"\\frac{\1}{\2} ", text)
    both = _to_latex(as_factor, is_latex), _to_latex(text, is_latex)
    return Notation(both, unclear="1/2x may be (1/2)x and may be 1/(2x)")


def _to_latex(text: str, is_latex: bool) -> str:
    return _LAST_LETTERS.sub(r"{\1}", _roots(_letters(text.strip(), is_latex)).strip())


def is_ambiguous(text: str) -> bool:
    """Whether this is `3,5`, which may be 3.5 and may be 3 and 5."""
    return _TWO_WITH_COMMA.fullmatch(text.strip()) is not None


def _bare(text: str) -> str:
    r"""Without what surrounds an answer: space, `**`, `$`, a full stop, a unit in \text."""
    if text.startswith("**") and text.endswith("**"):
        text = text.strip("*")
    text = text.removesuffix(".").strip()
    if inside := _DOLLARS.fullmatch(text):
        text = inside[1].strip()
    if (inside := _ALL_TEXT.fullmatch(text)) and len(inside[1].strip()) > 1:
        return inside[1].strip()
    if (last := _LAST_TEXT.fullmatch(text)) and last[2].split()[:1] and _is_scale(last[2]):
        return f"{last[1]} {last[2].strip()}"
    return (_UNIT_AT_END.sub("", text) or text).strip()


def _is_scale(words: str) -> bool:
    return words.split()[0].casefold() in _SCALES


def _numbers(text: str) -> str:
    """Numbers with exponents as plain ones, mixed numbers and fractions before a factor as LaTeX.

    To math-verify 6.02 times 10^23 is not 602 with 21 zeros.
    """
    text = _TIMES_TEN.sub(r" \\times ", text)
    text = _E_NOTATION.sub(_expand, text)
    text = _POWER_OF_TEN.sub(_expand, text)
    text = _NEGATIVE_POWER.sub(r"^{\1}", text)
    text = _MIXED.sub(_mixed_number, text)
    return _FRACTION_TIMES.sub(r"\\frac{\1}{\2} ", text)


def _expand(found: re.Match) -> str:
    """1.5e-3 -> 0.0015; far exponents as powers of ten."""
    digits, _, decimals = found[1].partition(".")
    exponent = int(found[2])
    if abs(exponent) > 40:
        return rf"({found[1].rstrip('.')}\cdot 10^{{{exponent}}})"
    point = len(digits) + exponent
    digits += decimals
    if point <= 0:
        return f"0.{'0' * -point}{digits}"
    digits = digits.ljust(point, "0")
    whole = digits[:point].lstrip("0") or "0"
    return f"{whole}.{digits[point:]}" if digits[point:] else whole


def _mixed_number(found: re.Match) -> str:
    whole, above, below = found.groups()
    if int(above) >= int(below):
        raise Unreadable(f"{found[0]} is no mixed number")
    return rf"({whole}+\frac{{{above}}}{{{below}}})"


def _letters(text: str, is_latex: bool) -> str:
    """Names of functions and constants as commands; a number without its unit.

    Other words of a text without LaTeX are refused; of one with LaTeX they are products.
    """
    done, end = "", 0
    for found in _LETTERS.finditer(text):
        done += text[end : found.start()]
        end = found.end()
        word = found[0]
        is_single = len(word) == 1 and word.isascii()
        if word.startswith("\\") or is_single or word in ("and", "or"):
            done += word
        elif named := _named(word, text[end:]):
            done += named
        elif word == "in" and re.fullmatch(r"\s*[A-Za-z]\s*", done):
            done += r"\in "
        elif (is_latex and word.isascii()) or (_is_product(word) and not _is_counted(done, word)):
            done += word
        elif _VALUE_END.search(done) and done[-1:].isspace() | (word.casefold() in _SCALES):
            return _without_unit(done, text[found.start() :])
        else:
            raise Unreadable(f"{word!r} is a word amid mathematics")
    return done + text[end:]


def _named(word: str, rest: str) -> str:
    """The command that a name stands for, with a letter beside it: 2pi, sinx, xsin(x)."""
    if word in ("sqrt", "cbrt", "abs"):
        return f" {word} "  # for `_roots`
    found = _NAME.fullmatch(word)
    if word in _FUNCTIONS | _CONSTANTS:
        before, name, after = "", word, ""
    elif found:
        before, name, after = found.groups()
    else:
        return ""
    if name in _CONSTANTS:
        return f"{before}{_CONSTANTS[name]}{after}"
    if name in ("max", "min") and not re.match(r"\s*[({]", rest):
        return ""
    return f"{before}{_FUNCTIONS[name]}{after}" if after or _ARGUMENT.match(rest) else ""


def _is_product(word: str) -> bool:
    """Whether letters are factors or points: ab, xyz, AB, but not odd or cup."""
    if not word.isascii():
        return False
    if word.isupper():
        return len(word) <= 4
    if len(word) > 3 or not word.islower() or len(set(word)) < len(word) or word in _NO_PRODUCTS:
        return False
    return len(word) == 2 or [ord(char) - ord(word[0]) for char in word] == [0, 1, 2]


def _is_counted(before: str, word: str) -> bool:
    """Whether a value stands before it and a space: 12 men, 18 USD."""
    is_long = len(word) > 2 or word.isupper()
    return is_long and before[-1:].isspace() and _VALUE_END.search(before) is not None


def _without_unit(value: str, words: str) -> str:
    """`18 dollars` -> 18, `1.5 million people` -> 1.5 times 10^6."""
    if not _UNIT_WORDS.fullmatch(words):
        raise Unreadable(f"{words!r} are words amid mathematics")
    first, *_ = words.split()
    power = _SCALES.get(first.casefold())
    return value.strip() if power is None else rf"{value.strip()}\cdot 10^{{{power}}}"


def _has_words(text: str) -> bool:
    """Whether some run of letters is neither a name nor a product."""
    return any(
        (len(run) > 1 or not run.isascii())
        and run not in ("and", "or")
        and run not in _FUNCTIONS | _CONSTANTS
        and (run.isupper() or not _is_product(run))
        and not _NAME.fullmatch(run)
        for run in _RUN.findall(text)
    )


def _roots(text: str) -> str:
    """` sqrt (x)`, ` sqrt 2`, ` cbrt (x)` and ` abs (x)` as LaTeX."""
    while found := re.search(r" (sqrt|cbrt|abs)  ?", text):
        opened = text[found.end() :].lstrip()
        inside, rest = _group(opened)
        around = {"sqrt": r"\sqrt{%s}", "cbrt": r"\sqrt[3]{%s}", "abs": r"\left|%s\right|"}
        text = text[: found.start()] + around[found[1]] % inside + rest
    return text


def _group(text: str) -> tuple[str, str]:
    """What a function without LaTeX is of, and the rest: a bracket, a number or a letter."""
    if not text.startswith("("):
        found = re.match(r"[0-9]+(?:\.[0-9]+)?|\\?[A-Za-z]+", text)
        if not found:
            raise Unreadable("a root of nothing")
        return found[0], text[found.end() :]
    depth = 0
    for i, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return text[1:i], text[i + 1 :]
    raise Unreadable("a bracket that does not close")
