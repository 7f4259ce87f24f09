"""Answers made to break a verifier, with what must become of each.

A seed gives the same ones again.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from spiral_jax.tasks.problem import Problem
from spiral_jax.verifier.rewards import Status

# What an answer of a kind may become. None of them may be CORRECT unless its kind is a control.
NO = {Status.WRONG, Status.UNPARSED}
HARD = NO | {Status.TIMEOUT, Status.ERROR}  # it may outlast its time, or its worker


class AdversarialAnswer(NamedTuple):
    """An answer to a problem, and the verdicts that it may get."""

    kind: str
    text: str
    problem: Problem
    allowed: set[Status]


class Kind(NamedTuple):
    """How answers of a kind are made.

    Attributes:
      weight: how often, relative to the other kinds.
      make: (generator, canary) -> (text of an answer, reference answer).
    """

    weight: float
    allowed: set[Status]
    make: Callable[[random.Random, str], tuple[str, str]]


def answers(count: int, seed: int, canary: str) -> list[AdversarialAnswer]:
    """So many answers in random order, of the kinds below by weight.

    Args:
      canary: path of a file that must not exist afterwards: what answers with code try to create.
    """
    rng = random.Random(seed)
    weights = [kind.weight for kind in KINDS.values()]
    cases = []
    for number, name in enumerate(rng.choices(list(KINDS), weights, k=count)):
        text, reference = KINDS[name].make(rng, canary)
        problem = Problem(f"{name}:{number}", "?", reference)
        cases.append(AdversarialAnswer(name, text, problem, KINDS[name].allowed))
    return cases


def _boxed(content: str) -> str:
    return rf"The answer is \boxed{{{content}}}."


def _tower(rng: random.Random, _: str) -> tuple[str, str]:
    levels = rng.randint(4, 6)
    powers = "^{".join(str(rng.randint(7, 9)) for _ in range(levels))
    return _boxed(powers + "}" * (levels - 1)), "5"


def _bomb(rng: random.Random, _: str) -> tuple[str, str]:
    n = rng.randint(10**7, 10**9)
    bombs = [
        f"{n}!",
        rf"\binom{{{n}}}{{{n // 2}}}",
        rf"\sum_{{k=1}}^{{{n}}} \sin(k^k)",
        rf"2^{{{n}}} \mod 7",
        rf"(x+y+z+w)^{{{n % 900 + 300}}} - 1",
        rf"\int_0^1 x^{{x^{{x^{{{n % 9}}}}}}} dx",
    ]
    return _boxed(rng.choice(bombs)), "5"


def _nested(rng: random.Random, _: str) -> tuple[str, str]:
    depth = rng.choice([6, 30, 100, 300, 1200])
    pairs = [(r"\frac{1}{", "}"), (r"\sqrt{", "}"), ("(", ")"), ("{", "}"), (r"\left(", r"\right)")]
    opening, closing = rng.choice(pairs)
    return _boxed(opening * depth + "x" + closing * depth), "5"


def _megabyte(rng: random.Random, _: str) -> tuple[str, str]:
    unit = rng.choice(["1", "x+", r"\boxed{", "{", "}", r"\frac12+", "</think>", " ", "\u2028"])
    return _boxed(unit * (rng.choice([10**5, 10**6]) // len(unit))), "5"


def _long_number(rng: random.Random, _: str) -> tuple[str, str]:
    return _boxed("".join(rng.choices("0123456789", k=rng.randint(1000, 9000)))), "5"


def _digits(rng: random.Random, _: str) -> tuple[str, str]:
    # Arabic, Devanagari, full width, bold, subscript
    zero = rng.choice([0x660, 0x966, 0xFF10, 0x1D7CE, 0x2080])
    digits = "".join(chr(zero + rng.randint(0, 9)) for _ in range(rng.randint(1, 6)))
    return _boxed(digits), "5000000"


def _unterminated(rng: random.Random, _: str) -> tuple[str, str]:
    return r"\boxed{42} and then \boxed{" + "{" * rng.randint(0, 50) + "42", "42"


def _several(rng: random.Random, _: str) -> tuple[str, str]:
    numbers = [42] * rng.randint(1, 20) + [rng.randint(43, 99)]
    return " ".join(_boxed(str(n)) for n in numbers), "42"


def _code(rng: random.Random, canary: str) -> tuple[str, str]:
    snippets = [
        f"__import__('os').system('touch {canary}')",
        f"open('{canary}','w')",
        f"exec(\"open('{canary}','w')\")",
        f"().__class__.__base__.__subclasses__()[0]; open('{canary}', 'w')",
        r"\text{{}.__init__.__globals__}",
        f"lambda: open('{canary}', 'w')",
        f"sympify(\"open('{canary}','w')\")",
        rf"\input{{{canary}}}",
        rf"\write18{{touch {canary}}}",
        "import os; os.environ['HF_TOKEN']",
        "open('/etc/passwd').read()",
        r"\lstinputlisting{/etc/shadow}",
        "`cat /proc/self/environ`",
        "$(cat /etc/passwd)",
    ]
    return _boxed(rng.choice(snippets)), "5"


def _garbage(rng: random.Random, _: str) -> tuple[str, str]:
    alphabet = [
        *"\0\ud800\ufeff\n\\{}$^_&%#|<=;'\"1xe\u00e9\U0001f600",
        "\x1b[2J",
        r"\frac",
        r"\sqrt",
        r"\begin{matrix}",
        r"\\",
        r"\infty",
    ]
    return _boxed("".join(rng.choices(alphabet, k=rng.randint(1, 60)))), "5"


def _right(rng: random.Random, _: str) -> tuple[str, str]:
    n, d = rng.randint(1, 99), rng.randint(2, 99)
    spellings = [rf"\frac{{{n}}}{{{d}}}", f"{n}/{d}", rf"\dfrac{{{2 * n}}}{{{2 * d}}}"]
    return _boxed(rng.choice(spellings)), spellings[0]


def _wrong(rng: random.Random, _: str) -> tuple[str, str]:
    n, d = rng.randint(1, 99), rng.randint(2, 99)
    return _boxed(rf"\frac{{{n}}}{{{d}}}"), rf"\frac{{{n + 1}}}{{{d}}}"


def _integer(rng: random.Random, _: str) -> tuple[str, str]:
    n = rng.randint(-(10**6), 10**6)
    return _boxed(str(n)), str(n)


KINDS = {
    "power tower": Kind(0.3, HARD, _tower),
    "sympy bomb": Kind(0.3, HARD, _bomb),
    "deep nesting": Kind(3, HARD, _nested),
    "megabyte": Kind(10, HARD, _megabyte),
    "long number": Kind(3, HARD, _long_number),
    "digits of other scripts": Kind(10, NO, _digits),
    "unterminated box": Kind(13, {Status.UNPARSED}, _unterminated),
    "several boxes": Kind(13, {Status.WRONG}, _several),
    "code": Kind(10, HARD, _code),
    "garbage, NUL bytes": Kind(10, HARD, _garbage),
    "control: right": Kind(10, {Status.CORRECT}, _right),
    "control: wrong": Kind(7, {Status.WRONG}, _wrong),
    "control: integer": Kind(10, {Status.CORRECT}, _integer),
}
