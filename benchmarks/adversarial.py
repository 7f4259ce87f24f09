"""Answers made to break a verifier, with what must become of each; a seed gives the same ones
again.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from spiral_jax.tasks.problem import Problem
from spiral_jax.verifier.rewards import Status

# What an answer of a kind may become. None of them may be CORRECT unless its kind is a control.
NO = {Status.WRONG, Status.UNPARSED}
HARD = NO | {Status.TIMEOUT, Status.ERROR}  # it may outlast its time, or its worker
Case = tuple[str, str, Problem, set[Status]]  # kind, text, problem, allowed


def answers(count: int, seed: int, canary: str) -> list[Case]:
    """`count` cases in random order, of the kinds below by weight.

    Args:
      canary: path of a file that must not exist afterwards: what answers with code try to create.
    """
    rng = random.Random(seed)
    kinds, weights = list(KINDS), [weight for weight, _, _ in KINDS.values()]
    cases = []
    for number, kind in enumerate(rng.choices(kinds, weights, k=count)):
        _, allowed, make = KINDS[kind]
        text, reference = make(rng, canary)
        cases.append((kind, text, Problem(f"{kind}:{number}", "?", reference), allowed))
    return cases


def _boxed(content: str) -> str:
    return rf"The answer is \boxed{{{content}}}."


def _tower(rng: random.Random, _: str) -> tuple[str, str]:
    levels = rng.randint(4, 6)
    return _boxed(
        "^{".join(str(rng.randint(7, 9)) for _ in range(levels)) + "}" * (levels - 1)
    ), "5"


def _bomb(rng: random.Random, _: str) -> tuple[str, str]:
    n = rng.randint(10**7, 10**9)
    bombs = [f"{n}!", rf"\binom{{{n}}}{{{n // 2}}}", rf"\sum_{{k=1}}^{{{n}}} \sin(k^k)", rf"2^{{{n}}} \mod 7",
             rf"(x+y+z+w)^{{{n % 900 + 300}}} - 1", rf"\int_0^1 x^{{x^{{x^{{{n % 9}}}}}}} dx"]  # fmt: skip
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
    zero = rng.choice(
        [0x660, 0x966, 0xFF10, 0x1D7CE, 0x2080]
    )  # Arabic, Devanagari, full width, bold, subscript
    return _boxed(
        "".join(chr(zero + rng.randint(0, 9)) for _ in range(rng.randint(1, 6)))
    ), "5000000"


def _unterminated(rng: random.Random, _: str) -> tuple[str, str]:
    return r"\boxed{42} and then \boxed{" + "{" * rng.randint(0, 50) + "42", "42"


def _several(rng: random.Random, _: str) -> tuple[str, str]:
    return " ".join(_boxed(str(n)) for n in [42] * rng.randint(1, 20) + [rng.randint(43, 99)]), "42"


def _code(rng: random.Random, canary: str) -> tuple[str, str]:
    code = rng.choice([
        f"__import__('os').system('touch {canary}')", f"open('{canary}','w')", f"exec(\"open('{canary}','w')\")",
        f"().__class__.__base__.__subclasses__()[0]; open('{canary}', 'w')", r"\text{{}.__init__.__globals__}",
        f"lambda: open('{canary}', 'w')", f"sympify(\"open('{canary}','w')\")", rf"\input{{{canary}}}",
        rf"\write18{{touch {canary}}}", "import os; os.environ['HF_TOKEN']", "open('/etc/passwd').read()",
        r"\lstinputlisting{/etc/shadow}", "`cat /proc/self/environ`", "$(cat /etc/passwd)",
    ])  # fmt: skip
    return _boxed(code), "5"


def _garbage(rng: random.Random, _: str) -> tuple[str, str]:
    alphabet = [*"\0\ud800\ufeff\n\\{}$^_&%#|<=;'\"1xe\u00e9\U0001f600", "\x1b[2J", r"\frac", r"\sqrt",
                r"\begin{matrix}", r"\\", r"\infty"]  # fmt: skip
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


# kind: (weight, what it may become, how one is made)
KINDS: dict[str, tuple[float, set[Status], Callable[[random.Random, str], tuple[str, str]]]] = {
    "power tower": (0.3, HARD, _tower),
    "sympy bomb": (0.3, HARD, _bomb),
    "deep nesting": (3, HARD, _nested),
    "megabyte": (10, HARD, _megabyte),
    "long number": (3, HARD, _long_number),
    "digits of other scripts": (10, NO, _digits),
    "unterminated box": (13, {Status.UNPARSED}, _unterminated),
    "several boxes": (13, {Status.WRONG}, _several),
    "code": (10, HARD, _code),
    "garbage, NUL bytes": (10, HARD, _garbage),
    "control: right": (10, {Status.CORRECT}, _right),
    "control: wrong": (7, {Status.WRONG}, _wrong),
    "control: integer": (10, {Status.CORRECT}, _integer),
}
