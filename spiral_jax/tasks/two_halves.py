"""The bundled task: two small sums, and a trace that has room for one of them.

A problem asks for the last digits of `left` and `right`, each of the form a*b+c:

    left=4*7+5 right=6*3+8                        answer 36: 4*7+5 = 33, 6*3+8 = 26

A trace works out one half and has to guess the other; an aggregation trace reads what its
candidates worked out:

    left=4*7+5=28+5=33, so left:3, maybe right:8, \\boxed{38}
    right=6*3+8=18+8=26, so right:6, maybe left:1, \\boxed{16}
    -> left:3, right:6, \\boxed{36}

A set whose traces all work on the same half cannot be aggregated, so search has to cover both:
single traces gain nothing from it (their guess is right one time in ten either way), only the
aggregated answer does. If a trace takes the left half with probability p, a set of S traces is
complete with probability 1 - p^S - (1-p)^S. At S = 4 that is 0.344 for p = 0.9, which is how the
bundled model starts, and 0.875 at best.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence

import numpy as np

from spiral_jax.tasks.problem import Problem, Task

SIDES = ("left", "right")
_FACTORS, _ADDENDS = 9, 10  # a and b are 1..9, c is 0..9
_HALVES = _FACTORS * _FACTORS * _ADDENDS
_HELD_OUT_SHARE = 10  # one pair of halves in ten belongs to the held-out problems
_HELD_OUT_SIZE = 4096
_WORKED = re.compile(r"^(left|right)=(\d)\*(\d)\+(\d)=(\d+)\+(\d)=(\d+), so \1:(\d),")


def task(seed: int) -> Task:
    """Training and held-out problems drawn by `seed`; no pair of halves is in both."""
    return Task(
        train=lambda cursor: _draw(seed, "train", cursor),
        held_out=lambda index: _draw(seed, "held_out", index),
        held_out_size=_HELD_OUT_SIZE,
        fingerprint=hashlib.sha256(f"two_halves v1 seed {seed}".encode()).hexdigest(),
        strategy="spiral_jax.tasks.two_halves:strategy",
    )


practice = task  # what the model practises on


def _draw(seed: int, split: str, index: int) -> Problem:
    rng = np.random.default_rng([seed, ("train", "held_out").index(split), index])
    while True:
        left, right = rng.integers(_HALVES, size=2)
        if ((left + right) % _HELD_OUT_SHARE == 0) == (split == "held_out"):
            break
    halves = [_half(int(left)), _half(int(right))]
    text = " ".join(f"{side}={a}*{b}+{c}" for side, (a, b, c) in zip(SIDES, halves, strict=True))
    answer = "".join(str((a * b + c) % 10) for a, b, c in halves)
    metadata = {"halves": [list(half) for half in halves]}
    return Problem(id=f"{split}:{index}", text=text, answer=answer, metadata=metadata)


def _half(number: int) -> tuple[int, int, int]:
    ab, c = divmod(number, _ADDENDS)
    a, b = divmod(ab, _FACTORS)
    return a + 1, b + 1, c


def work_out(problem: Problem, side: str, guess: int) -> str:
    """A search trace that works out one half rightly and guesses digit `guess` for the other."""
    a, b, c = problem.metadata["halves"][SIDES.index(side)]
    digit = (a * b + c) % 10
    other = SIDES[1 - SIDES.index(side)]
    answer = f"{digit}{guess}" if side == "left" else f"{guess}{digit}"
    worked = f"{side}={a}*{b}+{c}={a * b}+{c}={a * b + c}, so {side}:{digit}"
    return f"{worked}, maybe {other}:{guess}, \\boxed{{{answer}}}"


def read_out(problem: Problem, worked: set[str], guess: int) -> str:
    """The aggregation trace of a perfect reader whose candidates worked out the halves `worked`."""
    said, answer = "", ""
    for side, right in zip(SIDES, problem.answer, strict=True):
        digit = right if side in worked else str(guess)
        said += f"{side}:{digit}, " if side in worked else f"maybe {side}:{digit}, "
        answer += digit
    return f"{said}\\boxed{{{answer}}}"


# Demonstrations, for spiral_jax/sft.py


def tokenizer_texts(problem: Problem, rng: np.random.Generator) -> Iterator[str]:
    """Every kind of text that the task knows."""
    side = SIDES[rng.integers(2)]
    yield problem.text
    yield "#"
    yield work_out(problem, side, int(rng.integers(10)))
    yield read_out(problem, {side}, int(rng.integers(10)))
    yield read_out(problem, set(SIDES), 0)


def demonstrate_search(problem: Problem, left_share: float, rng: np.random.Generator) -> str:
    """A trace that works on the left half with chance `left_share`."""
    side = SIDES[int(rng.random() >= left_share)]
    return work_out(problem, side, int(rng.integers(10)))


def demonstrate_set(
    problem: Problem, size: int, left_shares: Sequence[float], rng: np.random.Generator
) -> tuple[list[str], str]:
    """Candidates, and the trace that reads them.

    Each candidate works on the left half with the same chance, one of `left_shares`.
    """
    left_share = rng.choice(left_shares)
    candidates = [demonstrate_search(problem, left_share, rng) for _ in range(size)]
    worked = {worked_half(problem, text) for text in candidates}
    return candidates, read_out(problem, worked, int(rng.integers(10)))


# What a trace did


def strategy(text: str, problem: Problem) -> str | None:
    """The half that a trace works on, rightly or not; None if neither."""
    match = _WORKED.match(text)
    return match[1] if match else None


def worked_half(problem: Problem, text: str) -> str | None:
    """The half that a trace worked out without an error: "left", "right", or None."""
    match = _WORKED.match(text)
    if match is None:
        return None
    side = match[1]
    a, b, c = problem.metadata["halves"][SIDES.index(side)]
    said = [int(group) for group in match.groups()[1:]]
    return side if said == [a, b, c, a * b, c, a * b + c, (a * b + c) % 10] else None
