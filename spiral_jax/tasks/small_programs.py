"""Forty small programming problems, made by rule: read stdin, print an answer; reward "code".

Twenty kinds of problem with two parameters each. Of eight kinds the second one is held out, so that
what is held out is like what is trained on, and is never the same.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
import random
from collections.abc import Callable
from typing import NamedTuple

from spiral_jax.tasks.finite import HELD_OUT, TRAIN, fingerprint_of, finite_task
from spiral_jax.tasks.problem import Problem, Task

TESTS = 6  # of each problem
_WORDS = "ash bay cod dew elm fir gnu hay ivy jar kit log moss nut oak pine reed sand toad yew"
_FORM = (
    "Write a Python program. {text} Put the whole program into one block that begins with "
    "```python and ends with ```."
)


class Kind(NamedTuple):
    """Problems that differ in one parameter.

    Attributes:
      text: what is asked, with {k}.
      parameters: k of its two problems.
      draw: the lines of an input.
      solve: (lines, k) -> what must be printed.
    """

    text: str
    parameters: tuple[int, int]
    draw: Callable[[random.Random], list[str]]
    solve: Callable[[list[str], int], object]


def task(seed: int) -> Task:
    """32 problems to train on, in an order that the seed draws, and 8 held out.

    `Problem.metadata` has their tests; ids are "train:KIND/k" and "held_out:KIND/k".
    """
    train, held_out = [], []
    for number, (name, kind) in enumerate(KINDS.items()):
        for variant, k in enumerate(kind.parameters):
            is_held_out = variant == 1 and number % 5 in (0, 2)
            split, problems = (HELD_OUT, held_out) if is_held_out else (TRAIN, train)
            problems.append(make_problem(f"{split}:{name}/{k}", name, kind, k))
    texts = [f"{problem.text}\n{problem.metadata}".encode() for problem in train + held_out]
    made = finite_task(train, held_out, seed, fingerprint_of(texts))
    return dataclasses.replace(made, reward="code")


def make_problem(problem_id: str, name: str, kind: Kind, k: int) -> Problem:
    """The problem, with inputs that its name and k decide."""
    rng = random.Random(f"{name}/{k}")
    tests = []
    for _ in range(TESTS):
        lines = kind.draw(rng)
        output = str(kind.solve(lines, k))
        tests.append({"input": "\n".join(lines) + "\n", "output": output})
    return Problem(problem_id, _FORM.format(text=kind.text.format(k=k)), "", {"tests": tests})


# -- inputs ----------------------------------------------------------------------------------------


def _numbers(least: int = 3, most: int = 8, low: int = -20, high: int = 60) -> Callable:
    def draw(rng: random.Random) -> list[str]:
        count = rng.randint(least, most)
        return [" ".join(str(rng.randint(low, high)) for _ in range(count))]

    return draw


def _one_number(low: int, high: int) -> Callable:
    return lambda rng: [str(rng.randint(low, high))]


def _words(rng: random.Random) -> list[str]:
    return [" ".join(rng.choices(_WORDS.split()[:9], k=rng.randint(3, 9)))]


def _letters(alphabet: str) -> Callable:
    return lambda rng: ["".join(rng.choices(alphabet, k=rng.randint(4, 14)))]


def _table(rng: random.Random) -> list[str]:
    columns = rng.randint(2, 4)
    return [_numbers(columns, columns)(rng)[0] for _ in range(rng.randint(2, 4))]


# -- answers ---------------------------------------------------------------------------------------


def _ints(line: str) -> list[int]:
    return [int(word) for word in line.split()]


def _joined(items: collections.abc.Iterable[object]) -> str:
    return " ".join(map(str, items))


def _longest_run(text: str) -> int:
    return max(len(list(run)) for _, run in itertools.groupby(text))


def _deepest(text: str) -> int:
    depths = itertools.accumulate(1 if char == "(" else -1 for char in text)
    return max(0, *depths)


def _in_base(number: int, base: int) -> str:
    digits = ""
    while number:
        number, digit = divmod(number, base)
        digits = f"{digit}{digits}"
    return digits or "0"


def _collatz(number: int) -> int:
    steps = 0
    while number != 1:
        number = number // 2 if number % 2 == 0 else 3 * number + 1
        steps += 1
    return steps


def _primes_below(limit: int) -> list[int]:
    return [n for n in range(2, limit) if all(n % d for d in range(2, math.isqrt(n) + 1))]


def _shifted(text: str, k: int) -> str:
    return "".join(chr((ord(char) - ord("a") + k) % 26 + ord("a")) for char in text)


KINDS = {
    "multiples": Kind(
        "It reads a line of integers and prints the sum of those that are divisible by {k}.",
        (3, 7),
        _numbers(),
        lambda lines, k: sum(n for n in _ints(lines[0]) if n % k == 0),
    ),
    "long_words": Kind(
        "It reads a line of words and prints how many of them have at least {k} letters.",
        (3, 4),
        lambda rng: [" ".join(rng.choices(_WORDS.split(), k=rng.randint(3, 9)))],
        lambda lines, k: sum(len(word) >= k for word in lines[0].split()),
    ),
    "kth_largest": Kind(
        "It reads a line of integers and prints the one that is number {k} when they are sorted "
        "from the largest to the smallest.",
        (2, 3),
        _numbers(),
        lambda lines, k: sorted(_ints(lines[0]), reverse=True)[k - 1],
    ),
    "shift": Kind(
        "It reads a word of lowercase letters and prints it with every letter moved {k} places "
        "on in the alphabet, from z back to a.",
        (1, 13),
        _letters("abcdefxyz"),
        lambda lines, k: _shifted(lines[0], k),
    ),
    "rotate": Kind(
        "It reads a line of integers and prints them, separated by spaces, with the first {k} "
        "moved to the end.",
        (1, 2),
        _numbers(),
        lambda lines, k: _joined(_ints(lines[0])[k:] + _ints(lines[0])[:k]),
    ),
    "pairs": Kind(
        "It reads a line of integers and prints how many pairs of positions in it have numbers "
        "whose sum is {k}.",
        (0, 5),
        _numbers(low=-5, high=8),
        lambda lines, k: sum(a + b == k for a, b in itertools.combinations(_ints(lines[0]), 2)),
    ),
    "base": Kind(
        "It reads a number that is not negative and prints it in base {k}.",
        (2, 7),
        _one_number(0, 500),
        lambda lines, k: _in_base(int(lines[0]), k),
    ),
    "digit_sum": Kind(
        "It reads a number that is not negative and prints {k} times the sum of its digits.",
        (1, 3),
        _one_number(0, 99999),
        lambda lines, k: k * sum(map(int, lines[0])),
    ),
    "primes": Kind(
        "It reads a number n and prints how many prime numbers below n leave the remainder 1 "
        "when they are divided by {k}.",
        (2, 4),
        _one_number(2, 120),
        lambda lines, k: sum(p % k == 1 for p in _primes_below(int(lines[0]))),
    ),
    "power": Kind(
        "It reads two integers a and b in one line, b not negative, and prints the remainder of "
        "a to the power b when it is divided by {k}.",
        (10, 97),
        lambda rng: [f"{rng.randint(0, 50)} {rng.randint(0, 30)}"],
        lambda lines, k: pow(*_ints(lines[0]), k),
    ),
    "run": Kind(
        "It reads a word and prints {k} times the length of the longest run of equal letters.",
        (1, 2),
        _letters("aab"),
        lambda lines, k: k * _longest_run(lines[0]),
    ),
    "depth": Kind(
        "It reads a word of ( and ) and prints how deep its brackets are nested at most, plus "
        "{k}. Every ( makes it one deeper and every ) one less, also below 0; the answer without "
        "the addition is at least 0.",
        (0, 10),
        _letters("()(("),
        lambda lines, k: _deepest(lines[0]) + k,
    ),
    "frequent": Kind(
        "It reads a line of words and prints those that stand in it exactly {k} times, in "
        "alphabetical order, separated by spaces; an empty line if there are none.",
        (1, 2),
        _words,
        lambda lines, k: _joined(
            sorted(w for w, n in collections.Counter(lines[0].split()).items() if n == k)
        ),
    ),
    "row_sums": Kind(
        "It reads several lines of integers, and prints the largest sum of a line, times {k}.",
        (1, 10),
        _table,
        lambda lines, k: k * max(sum(_ints(line)) for line in lines),
    ),
    "column": Kind(
        "It reads several lines with equally many integers, and prints those of column {k}, "
        "counted from 1, separated by spaces.",
        (1, 2),
        _table,
        lambda lines, k: _joined(_ints(line)[k - 1] for line in lines),
    ),
    "collatz": Kind(
        "It reads a positive integer. As long as it is not 1, an even number is halved, and an "
        "odd one is tripled and 1 is added. The program prints {k} plus the number of such steps.",
        (0, 1),
        _one_number(1, 60),
        lambda lines, k: k + _collatz(int(lines[0])),
    ),
    "gcd": Kind(
        "It reads a line of positive integers and prints the greatest common divisor of all of "
        "them, times {k}.",
        (1, 5),
        lambda rng: [_joined(rng.choice([2, 3, 6]) * rng.randint(1, 12) for _ in range(3))],
        lambda lines, k: k * functools.reduce(math.gcd, _ints(lines[0])),
    ),
    "windows": Kind(
        "It reads a line of at least {k} integers and prints the largest sum of {k} neighbouring "
        "ones.",
        (2, 3),
        _numbers(),
        lambda lines, k: max(
            sum(_ints(lines[0])[i : i + k]) for i in range(len(lines[0].split()) - k + 1)
        ),
    ),
    "every_kth": Kind(
        "It reads a word and prints every letter number {k}, 2 times {k}, 3 times {k} and so on, "
        "counted from 1, without spaces.",
        (2, 3),
        _letters("abcdefgh"),
        lambda lines, k: lines[0][k - 1 :: k],
    ),
    "mean": Kind(
        "It reads a line of integers and prints their mean with exactly {k} digits behind the "
        "point.",
        (1, 2),
        _numbers(low=0),
        lambda lines, k: f"{sum(_ints(lines[0])) / len(_ints(lines[0])):.{k}f}",
    ),
}
