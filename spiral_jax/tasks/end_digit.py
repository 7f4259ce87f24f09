r"""The second bundled task: hard to search, easy to check.

A problem gives four digits and an end digit; an answer is a*b+c of three of them, each at its own
place, that ends so:

    digits 4 7 8 9 end 3                    8*7+9 = 65 does not, 9*4+7 = 43 does

A trace has room for one try, and says itself whether it hits. An aggregation trace copies a
candidate that does, and else tries once more, in the same words, so that it can be a candidate in
turn:

    4*7+8=28+8=36, 6 for 3: no, \boxed{4*7+8}
    4*9+7=36+7=43, 3 for 3: yes, \boxed{4*9+7}

There are twelve expressions, of which 1 to 12 hit, and nothing but working one out tells which. A
problem is made from one of them, most often from the first. So one trace is right most often if it
always tries the first (42 % of problems), while a set is if its traces try different ones: four
that do as the problems do hold a hit in 71 %. Own correctness and the success of a set pull in
opposite directions here. The model leans more: it tries the first expression three times in four,
and the others, which it has practised too, equally often.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from spiral_jax.tasks.answer import last_boxed
from spiral_jax.tasks.problem import Problem, Task

_LARGEST = 9
# one pair of (digits in any order, end digit) in so many belongs to the held-out problems
_HELD_OUT_SHARE = 10
_HELD_OUT_SIZE = 4096
# problems are made from each expression so many times as often as from the one before
_PROBLEMS_LEAN = 0.7
# places (a, b, c) of the twelve expressions a*b+c, in the order of the lean
EXPRESSIONS = tuple(
    (a, b, c)
    for c in (3, 2, 1, 0)
    for a, b in itertools.combinations([i for i in range(4) if i != c], 2)
)
_EXPRESSION = re.compile(r"\s*([1-9])\s*\*\s*([1-9])\s*\+\s*([1-9])\s*")


def task(seed: int) -> Task:
    """Training and held-out problems drawn by `seed`; no digits with an end digit are in both."""
    return _task(seed, _PROBLEMS_LEAN)


def practice(seed: int) -> Task:
    """What the model practises on: the same task, made from every expression as often."""
    return _task(seed, 1.0)


def _task(seed: int, ratio: float) -> Task:
    return Task(
        train=lambda cursor: _draw(seed, "train", cursor, ratio),
        held_out=lambda index: _draw(seed, "held_out", index, ratio),
        held_out_size=_HELD_OUT_SIZE,
        fingerprint=hashlib.sha256(f"end_digit v2 seed {seed} {ratio}".encode()).hexdigest(),
        reward="spiral_jax.tasks.end_digit:reward",
        strategy="spiral_jax.tasks.end_digit:strategy",
    )


def _draw(seed: int, split: str, index: int, ratio: float) -> Problem:
    rng = np.random.default_rng([seed, ("train", "held_out").index(split), index])
    while True:
        digits = rng.integers(1, _LARGEST + 1, size=4).tolist()
        a, b, c = (digits[place] for place in _draw_expression(ratio, rng))
        end = (a * b + c) % 10
        if (_split_number(tuple(sorted(digits)), end) == 0) == (split == "held_out"):
            break
    text = f"digits {' '.join(map(str, digits))} end {end}"
    metadata = {"digits": digits, "end": end}
    return Problem(id=f"{split}:{index}", text=text, answer=f"{a}*{b}+{c}", metadata=metadata)


def _draw_expression(ratio: float, rng: np.random.Generator) -> tuple[int, int, int]:
    """Places of an expression; number i has a chance proportional to ratio**i (1: all alike)."""
    if ratio == 1:
        return EXPRESSIONS[rng.integers(len(EXPRESSIONS))]
    chance = ratio ** np.arange(len(EXPRESSIONS))
    return EXPRESSIONS[rng.choice(len(EXPRESSIONS), p=chance / chance.sum())]


@functools.cache
def _split_number(digits: tuple[int, ...], end: int) -> int:
    return hashlib.sha256(repr((digits, end)).encode()).digest()[0] % _HELD_OUT_SHARE


def reward(text: str, problem: Problem) -> bool | None:
    """Whether the last box holds three of the problem's digits as an expression that hits its end.

    None: there is no box, or an empty one.
    """
    box = last_boxed(text)
    if box is None or not box.strip():
        return None
    match = _EXPRESSION.fullmatch(box)
    return match is not None and _hits(tuple(map(int, match.groups())), problem)


def _hits(digits: tuple[int, int, int], problem: Problem) -> bool:
    """Whether a*b+c ends as asked, of digits that the problem has, each at a place of its own."""
    a, b, c = digits
    are_there = not Counter(digits) - Counter(problem.metadata["digits"])
    return are_there and (a * b + c) % 10 == problem.metadata["end"]


def strategy(text: str, problem: Problem) -> str | None:
    """The expression that a trace answers with, the smaller factor first; None if there is none."""
    match = _EXPRESSION.fullmatch(last_boxed(text) or "")
    if match is None:
        return None
    a, b, c = match.groups()
    return f"{min(a, b)}*{max(a, b)}+{c}"


def _digits(problem: Problem, places: Sequence[int]) -> tuple[int, int, int]:
    a, b, c = (problem.metadata["digits"][place] for place in places)
    return a, b, c


def try_out(problem: Problem, places: Sequence[int]) -> str:
    """A trace that works out the expression of the digits at these places without an error."""
    a, b, c = _digits(problem, places)
    value, end = a * b + c, problem.metadata["end"]
    verdict = "yes" if value % 10 == end else "no"
    worked = f"{a}*{b}+{c}={a * b}+{c}={value}"
    return f"{worked}, {value % 10} for {end}: {verdict}, \\boxed{{{a}*{b}+{c}}}"


# Demonstrations, for spiral_jax/sft.py


def tokenizer_texts(problem: Problem, rng: np.random.Generator) -> Iterator[str]:
    """Every kind of text that the task knows."""
    yield problem.text
    yield "#"
    yield try_out(problem, EXPRESSIONS[rng.integers(len(EXPRESSIONS))])


def demonstrate_search(problem: Problem, first_share: float, rng: np.random.Generator) -> str:
    """A try of the first expression with chance `first_share`, else of any other."""
    first, *others = EXPRESSIONS
    if rng.random() < first_share:
        return try_out(problem, first)
    return try_out(problem, others[rng.integers(len(others))])


def demonstrate_set(
    problem: Problem, size: int, right: float, first_share: float, rng: np.random.Generator
) -> tuple[list[str], str]:
    """Candidates, and the trace that reads them.

    Each candidate tries an expression that hits with chance `right`, else any. The reader copies
    the first that hits; without one it tries again, as `demonstrate_search` does.
    """
    hits = [places for places in EXPRESSIONS if _hits(_digits(problem, places), problem)]
    candidates = []
    for _ in range(size):
        among = hits if rng.random() < right else EXPRESSIONS
        candidates.append(try_out(problem, among[rng.integers(len(among))]))
    for text in candidates:
        if ": yes," in text:
            return candidates, text
    return candidates, demonstrate_search(problem, first_share, rng)
