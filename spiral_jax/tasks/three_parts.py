r"""The third bundled task: partial answers that compose, and rewards that are fractions.

A problem has three parts, each of the form a*b+c; an answer names the values of some of them:

    x=4*7+5 y=6*3+8 z=2*9+1                 x is worth 4/8, y 3/8, z 1/8

The reward is the worth of the parts that are named with their right value; a wrong one takes
nothing away. A trace has room to work out one part; an aggregation trace puts together what its
candidates name, in words that a candidate may have too, so that it can be one in turn:

    y=6*3+8=18+8=26, \boxed{y:26}
    x=4*7+5=28+5=33, \boxed{x:33}
    -> \boxed{x:33 y:26}

What a trace earns by itself and what it is worth to a set are partly the same here: x earns most
and is what a set misses most, as the bundled model works on z eight times in ten. But a trace alone
earns most if it always works on x, 0.5, and a set needs all three. If a trace works on part j,
whose worth is w_j, with chance p_j, then a perfect reader of S independent traces earns

    sum_j w_j (1 - (1 - p_j)^S)              0.426 at S = 4 as the model starts, 0.841 at best

(`expected_score`, `best_shares`). A part has a value of one or two digits, which is hardly guessed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence

import numpy as np

from spiral_jax.tasks.answer import last_boxed
from spiral_jax.tasks.problem import Problem, Task

PARTS = ("x", "y", "z")
WORTH = (4 / 8, 3 / 8, 1 / 8)  # of each part; sums of them are exact in any float
_FACTORS, _ADDENDS = 9, 10  # a and b are 1..9, c is 0..9
_VALUES = _FACTORS * _FACTORS * _ADDENDS
_HELD_OUT_SHARE = 10  # one triple of parts in ten belongs to the held-out problems
_HELD_OUT_SIZE = 4096
_NAMED = re.compile(r"([xyz]):([0-9]{1,2})")
_WORKED = re.compile(r"^([xyz])=(\d)\*(\d)\+(\d)=(\d+)\+(\d)=(\d+), ")


def task(seed: int) -> Task:
    """Training and held-out problems drawn by `seed`; no three parts are in both."""
    return Task(
        train=lambda cursor: _draw(seed, "train", cursor),
        held_out=lambda index: _draw(seed, "held_out", index),
        held_out_size=_HELD_OUT_SIZE,
        fingerprint=hashlib.sha256(f"three_parts v1 seed {seed}".encode()).hexdigest(),
        reward="spiral_jax.tasks.three_parts:reward",
        strategy="spiral_jax.tasks.three_parts:strategy",
    )


practice = task  # what the model practises on


def _draw(seed: int, split: str, index: int) -> Problem:
    rng = np.random.default_rng([seed, ("train", "held_out").index(split), index])
    while True:
        numbers = rng.integers(_VALUES, size=len(PARTS)).tolist()
        if (sum(numbers) % _HELD_OUT_SHARE == 0) == (split == "held_out"):
            break
    parts = [_part(number) for number in numbers]
    text = " ".join(f"{name}={a}*{b}+{c}" for name, (a, b, c) in zip(PARTS, parts, strict=True))
    metadata = {"parts": [list(part) for part in parts]}
    everything = {name: a * b + c for name, (a, b, c) in zip(PARTS, parts, strict=True)}
    return Problem(id=f"{split}:{index}", text=text, answer=_list(everything), metadata=metadata)


def _part(number: int) -> tuple[int, int, int]:
    ab, c = divmod(number, _ADDENDS)
    a, b = divmod(ab, _FACTORS)
    return a + 1, b + 1, c


def _value(problem: Problem, name: str) -> int:
    a, b, c = problem.metadata["parts"][PARTS.index(name)]
    return a * b + c


def reward(text: str, problem: Problem) -> float | None:
    """The worth of the parts that the last box names with their right value.

    None: there is no box, or it is no list of parts, each named once, such as `x:33 z:19`.
    """
    box = last_boxed(text)
    if box is None or not box.strip():
        return None
    named = [_NAMED.fullmatch(word) for word in box.split()]
    names = [match[1] for match in named if match]
    if len(names) < len(named) or len(set(names)) < len(names):
        return None
    right = {match[1] for match in named if int(match[2]) == _value(problem, match[1])}
    return sum(worth for name, worth in zip(PARTS, WORTH, strict=True) if name in right)


def strategy(text: str, problem: Problem) -> str | None:
    """The part that a trace works out, rightly or not; None if it works out none."""
    match = _WORKED.match(text)
    return match[1] if match else None


# What is possible


def expected_score(shares: Sequence[float], set_size: int) -> float:
    """What a perfect reader of a set earns whose traces are independent.

    Args:
      shares: the chance that a trace works out each of `PARTS`, without an error.
    """
    missed = (1 - np.asarray(shares, np.float64)) ** set_size
    return float(np.dot(WORTH, 1 - missed))


def best_shares(set_size: int) -> np.ndarray:
    """The shares with the highest `expected_score`: float64, one for each of `PARTS`.

    Where the sum of shares is 1, the gradient w_j S (1 - p_j)^(S-1) is the same at every part, so
    1 - p_j is proportional to w_j^(-1/(S-1)). At set sizes of 3 and more all of them are positive.

    Raises:
      ValueError: a smaller set, at which the best search leaves out a part.
    """
    if set_size < 3:
        raise ValueError(
            f"set_size = {set_size}: must be >= 3, where the best search has all parts"
        )
    missed = np.array(WORTH) ** (-1 / (set_size - 1))
    return 1 - missed * (len(PARTS) - 1) / missed.sum()


# Demonstrations, for spiral_jax/sft.py


def work_out(problem: Problem, name: str) -> str:
    """A search trace that works out one part without an error."""
    a, b, c = problem.metadata["parts"][PARTS.index(name)]
    value = a * b + c
    return f"{name}={a}*{b}+{c}={a * b}+{c}={value}, {_box({name: value})}"


def put_together(problem: Problem, names: set[str]) -> str:
    """The aggregation trace of a perfect reader whose candidates name these parts."""
    return _box({name: _value(problem, name) for name in PARTS if name in names})


def _box(values: dict[str, int]) -> str:
    return f"\\boxed{{{_list(values)}}}"


def _list(values: dict[str, int]) -> str:
    return " ".join(f"{name}:{value}" for name, value in values.items())


def tokenizer_texts(problem: Problem, rng: np.random.Generator) -> Iterator[str]:
    """Every kind of text that the task knows."""
    yield problem.text
    yield "#"
    yield work_out(problem, PARTS[rng.integers(len(PARTS))])
    yield put_together(problem, _some_parts(rng))


def demonstrate_search(problem: Problem, shares: Sequence[float], rng: np.random.Generator) -> str:
    """A trace that works on each part with its share."""
    return work_out(problem, PARTS[rng.choice(len(PARTS), p=shares)])


def demonstrate_set(
    problem: Problem,
    size: int,
    mixes: Sequence[Sequence[float]],
    aggregated: float,
    rng: np.random.Generator,
) -> tuple[list[str], str]:
    """Candidates, and the trace that reads them.

    With chance `aggregated` all candidates are aggregations, of some parts each; else each works
    out one part, with the shares of one of `mixes`.
    """
    if rng.random() < aggregated:
        named = [_some_parts(rng) for _ in range(size)]
        candidates = [put_together(problem, names) for names in named]
    else:
        shares = mixes[rng.integers(len(mixes))]
        candidates = [demonstrate_search(problem, shares, rng) for _ in range(size)]
        named = [{strategy(text, problem)} for text in candidates]
    return candidates, put_together(problem, set().union(*named))


def _some_parts(rng: np.random.Generator) -> set[str]:
    """Any set of parts but the empty one."""
    bits = int(rng.integers(1, 2 ** len(PARTS)))
    return {name for i, name in enumerate(PARTS) if bits >> i & 1}
