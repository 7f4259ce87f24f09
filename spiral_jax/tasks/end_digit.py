r"""The second bundled task: hard to search, easy to check. Also what its model practises before any
RL.

A problem gives four digits and an end digit; an answer is a*b+c of three of them, each at its own
place, that ends so:

    digits 4 7 8 9 end 3                    8*7+9 = 65 does not, 9*4+7 = 43 does

A trace has room for one try, and says itself whether it hits; an aggregation trace copies a
candidate that does, and else tries once more, in the same words, so that it can be a candidate in
turn:

    4*7+8=28+8=36, 6 for 3: no, \boxed{4*7+8}
    4*9+7=36+7=43, 3 for 3: yes, \boxed{4*9+7}

Twelve expressions, of which 1 to 12 hit; nothing but working one out tells which. A problem is made
from one of them, the first most often, so that one trace is right most often if it always tries the
first (42 % of problems), while a set
is if its traces try different ones: four that do as the problems do hold a hit in 71 %. Own
correctness and the success of a set pull in opposite directions here. The model leans more: it
tries the first expression three times in four, and the others, which it has practised too, equally
often.
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
_HELD_OUT_SHARE = (
    10  # one pair of (digits in any order, end digit) in ten belongs to the held-out problems
)
_HELD_OUT_SIZE = 4096
_PROBLEMS_LEAN = (
    0.7  # problems are made from each expression so many times as often as from the one before
)
# places (a, b, c) of the twelve expressions a*b+c, in the order of the lean
EXPRESSIONS = tuple(
    (a, b, c)
    for c in (3, 2, 1, 0)
    for a, b in itertools.combinations([i for i in range(4) if i != c], 2)
)
_EXPRESSION = re.compile(r"\s*([1-9])\s*\*\s*([1-9])\s*\+\s*([1-9])\s*")
_TRY = re.compile(
    r"(\d)\*(\d)\+(\d)=(\d+)\+(\d)=(\d+), (\d) for (\d): (yes|no), \\boxed\{(\d)\*(\d)\+(\d)\}"
)


def task(seed: int) -> Task:
    """The task with training and held-out problems drawn by `seed`; no digits with an end digit are
    in both.
    """
    return _task(seed, _PROBLEMS_LEAN)


def practice(seed: int) -> Task:
    """What the model practises on: the same, made from every expression as often."""
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
        a, b, c = (digits[place] for place in _leaning(ratio, rng))
        end = (a * b + c) % 10
        if (_split_number(tuple(sorted(digits)), end) == 0) == (split == "held_out"):
            break
    text = f"digits {' '.join(map(str, digits))} end {end}"
    metadata = {"digits": digits, "end": end}
    return Problem(id=f"{split}:{index}", text=text, answer=f"{a}*{b}+{c}", metadata=metadata)


def _leaning(ratio: float, rng: np.random.Generator) -> tuple[int, int, int]:
    """Places of an expression; that at place i of the lean has a chance proportional to ratio**i
    (1: all alike).
    """
    if ratio == 1:
        return EXPRESSIONS[rng.integers(len(EXPRESSIONS))]
    chance = ratio ** np.arange(len(EXPRESSIONS))
    return EXPRESSIONS[rng.choice(len(EXPRESSIONS), p=chance / chance.sum())]


@functools.cache
def _split_number(digits: tuple[int, ...], end: int) -> int:
    return hashlib.sha256(repr((digits, end)).encode()).digest()[0] % _HELD_OUT_SHARE


def reward(text: str, problem: Problem) -> bool | None:
    """Whether the last box holds an expression of three of the problem's digits that ends in its
    end digit.
    """
    box = last_boxed(text)
    if box is None or not box.strip():
        return None
    found = _EXPRESSION.fullmatch(box)
    return found is not None and _hits(tuple(map(int, found.groups())), problem)


def _hits(digits: tuple[int, int, int], problem: Problem) -> bool:
    a, b, c = digits
    return _are_there(digits, problem) and (a * b + c) % 10 == problem.metadata["end"]


def _are_there(digits: Sequence[int], problem: Problem) -> bool:
    """Whether the problem has these digits, each at a place of its own."""
    return not Counter(digits) - Counter(problem.metadata["digits"])


def strategy(text: str, problem: Problem) -> str | None:
    """The expression that a trace answers with, the smaller factor first; None if there is none."""
    found = _EXPRESSION.fullmatch(last_boxed(text) or "")
    if found is None:
        return None
    a, b, c = found.groups()
    return f"{min(a, b)}*{max(a, b)}+{c}"


def right_share(problem: Problem) -> float:
    """Share of the twelve expressions that hit: the chance of a trace that leans to none."""
    return float(np.mean([_hits(_digits(problem, places), problem) for places in EXPRESSIONS]))


def _digits(problem: Problem, places: Sequence[int]) -> tuple[int, int, int]:
    a, b, c = (problem.metadata["digits"][place] for place in places)
    return a, b, c


def try_out(problem: Problem, places: Sequence[int]) -> str:
    """A trace that works out the expression of the digits at these places without an error."""
    a, b, c = _digits(problem, places)
    value, end = a * b + c, problem.metadata["end"]
    verdict = "yes" if value % 10 == end else "no"
    return f"{a}*{b}+{c}={a * b}+{c}={value}, {value % 10} for {end}: {verdict}, \\boxed{{{a}*{b}+{c}}}"


def is_sound(problem: Problem, text: str) -> bool:
    """Whether a trace is a try without any error: digits of the problem, arithmetic, verdict and
    box.
    """
    found = _TRY.fullmatch(text)
    if found is None:
        return False
    a, b, c = map(int, found.groups()[:3])
    if not _are_there((a, b, c), problem):
        return False
    value, end = a * b + c, problem.metadata["end"]
    said = (a * b, c, value, value % 10, end, "yes" if value % 10 == end else "no", a, b, c)
    return tuple(int(g) if g.isdigit() else g for g in found.groups()[3:]) == said


# Demonstrations, for spiral_jax/sft.py


def tokenizer_texts(problem: Problem, rng: np.random.Generator) -> Iterator[str]:
    """Every kind of text that the task knows."""
    yield problem.text
    yield "#"
    yield try_out(problem, EXPRESSIONS[rng.integers(len(EXPRESSIONS))])


def demonstrate_search(problem: Problem, first_share: float, rng: np.random.Generator) -> str:
    """A try of the first expression with chance `first_share`, else of any other."""
    first, *others = EXPRESSIONS
    return try_out(
        problem, first if rng.random() < first_share else others[rng.integers(len(others))]
    )


def demonstrate_set(
    problem: Problem, size: int, right: float, first_share: float, rng: np.random.Generator
) -> tuple[list[str], str]:
    """Candidates, each tried evenly among those that hit with chance `right` and else among all,
    and what reads them.

    The reader copies the first that hits; without one it tries again, as `demonstrate_search` does.
    """
    hits = [places for places in EXPRESSIONS if _hits(_digits(problem, places), problem)]
    shown = []
    for _ in range(size):
        among = hits if rng.random() < right else EXPRESSIONS
        shown.append(try_out(problem, among[rng.integers(len(among))]))
    found = next((text for text in shown if ": yes," in text), None)
    return shown, found or demonstrate_search(problem, first_share, rng)
