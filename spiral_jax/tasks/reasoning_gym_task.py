"""A generator of reasoning-gym (0.1.25) -> `Task`, and its 0/1 reward.

The generators make item i of a data set with seed s from Random(s + i). Training draws come from
one half of the 32-bit seeds and held-out draws from the other. That keeps the draws apart but not
the texts: a generator with few distinct problems repeats itself. So a text's own hash decides which
split it belongs to, and a draw of the wrong split is replaced by another: no text is ever in both.
"""

from __future__ import annotations

import copy
import difflib
import functools
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import reasoning_gym
from reasoning_gym.factory import DATASETS

from spiral_jax.tasks.answer import last_boxed
from spiral_jax.tasks.problem import Problem, Task, TaskError

# Generators of 0.1.25 whose items also depend on Python's string hashes or on the global `random`
# state: another process would make other problems from the same seed (found by comparing processes;
# `_entry_of` catches the rest).
NOT_REPRODUCIBLE = frozenset(
    {
        "codeio",
        "isomorphic_strings",
        "knight_swap",
        "list_functions",
        "polynomial_multiplication",
        "ransom_note",
        "word_ladder",
    }
)
_SPLITS = ("train", "held_out")
_HELD_OUT_SHARE = 4  # one text in four belongs to the held-out split
_HELD_OUT_SIZE = 4096
_DATASET_SIZE = 1024  # items of one data set: some generators build them all at once
_TRIES = 128  # of each split's 2**31 seeds each try has 2**24; (3/4)**128 = 1e-16
_INDEX_RANGE = 2**31 // _TRIES
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_CORRECT = 1.0 - 1e-9  # scorers give partial credit, e.g. by length; only a full score is correct


def task(generator: str, seed: int, args: Mapping[str, Any] | None = None) -> Task:
    """Problems of `generator`, without end (they repeat after 2**24).

    Args:
      generator: a name in `reasoning_gym.factory.DATASETS`, e.g. "chain_sum".
      seed: >= 0; which problems.
      args: settings of the generator that differ from its defaults, JSON types, e.g.
        {"max_numbers": 4}.

    Raises:
      TaskError: the generator is unknown, not reproducible, or refuses its settings.
    """
    if generator not in DATASETS:
        near = difflib.get_close_matches(generator, DATASETS, n=3, cutoff=0.4) or sorted(DATASETS)
        raise TaskError(
            f"config.task.generator = {generator!r}: not in reasoning-gym. "
            f"Nearest: {', '.join(near)}."
        )
    if generator in NOT_REPRODUCIBLE:
        raise TaskError(
            f"config.task.generator = {generator!r}: its problems are not a function of the seed "
            "alone, so that no run could be resumed or verified in another process. Take another "
            "generator."
        )
    args = dict(args or {})
    if own := sorted({"seed", "size"} & args.keys()):
        raise TaskError(
            f"config.task.generator_args = {args}: {own[0]} is set by this program. "
            "Set config.task.seed."
        )
    settings = json.dumps(args, sort_keys=True)
    try:
        _dataset(generator, settings, 0)
    except Exception as error:  # "composite" asserts that it was given data sets
        if args:
            what = f"config.task.generator_args = {args}: {generator} refuses them"
        else:
            what = f"config.task.generator = {generator!r}: has no usable default settings"
        raise TaskError(f"{what} ({error}).") from error
    version = importlib.metadata.version("reasoning-gym")
    source = f"reasoning_gym {version} v1 {generator} {settings} seed {seed}"
    return Task(
        train=lambda cursor: _draw(generator, settings, seed, "train", cursor),
        held_out=lambda index: _draw(generator, settings, seed, "held_out", index),
        held_out_size=_HELD_OUT_SIZE,
        fingerprint=hashlib.sha256(source.encode()).hexdigest(),
        reward="spiral_jax.tasks.reasoning_gym_task:reward",
    )


def reward(text: str, problem: Problem) -> bool | None:
    r"""Whether the last \boxed{} of `text` gets the full score of the generator's own scorer.

    None: there is no box, or an empty one. Of `\text{word}` the word counts. Partial credit and a
    scorer that raises on the answer are both False. Some scorers evaluate the answer as Python or
    sympy code: run this in a child process.

    Raises:
      TaskError: the problem cannot be made again from its metadata (our failure, not the model's).
    """
    answer = (last_boxed(text) or "").strip()
    if not answer:
        return None
    if worded := _TEXT.fullmatch(answer):
        answer = worded[1].strip()
    entry = _entry_of(problem)
    made = problem.metadata
    dataset = _dataset(made["generator"], made["settings"], made["dataset_seed"])
    try:
        return bool(dataset.score_answer(answer, entry) >= _CORRECT)
    except Exception:  # e.g. prime_factorization calls int() on the answer
        return False


def _draw(generator: str, settings: str, seed: int, split: str, index: int) -> Problem:
    if index < 0:
        raise IndexError(f"index = {index}: must be >= 0")
    start = int(np.random.SeedSequence(seed).generate_state(1)[0])
    for attempt in range(_TRIES):
        number = _SPLITS.index(split) * 2**31 + attempt * _INDEX_RANGE + index % _INDEX_RANGE
        block, item = divmod(number, _DATASET_SIZE)
        # a multiple of the size, so that seed + item stays below 2**32
        dataset_seed = (start + block) * _DATASET_SIZE % 2**32
        entry = _entry(generator, settings, dataset_seed, item)
        text, answer = entry["question"], entry["answer"]
        if _is_held_out(text) == (split == "held_out"):
            return Problem(
                id=f"{split}:{index}",
                text=text,
                answer="" if answer is None else str(answer),  # None: many answers are right
                metadata={
                    "generator": generator,
                    "settings": settings,
                    "dataset_seed": dataset_seed,
                    "index": item,
                },
            )
    raise TaskError(
        f"config.task.generator = {generator!r}: no {split} problem in {_TRIES} draws; it has too "
        "few distinct ones."
    )


def _is_held_out(text: str) -> bool:
    return hashlib.sha256(text.encode()).digest()[0] % _HELD_OUT_SHARE == 0


def _entry_of(problem: Problem) -> dict[str, Any]:
    """The generator's own record of a problem, made again: it holds types that JSON has not."""
    made = problem.metadata
    entry = _entry(made["generator"], made["settings"], made["dataset_seed"], made["index"])
    if entry["question"] != problem.text:
        raise TaskError(
            f"problem {problem.id!r}: reasoning-gym's {made['generator']!r} made another text from "
            "the same seed in this process. The generator is not reproducible; take another one."
        )
    return copy.deepcopy(entry)  # scorers may change what they are given


@functools.lru_cache(maxsize=64)
def _dataset(
    generator: str, settings: str, dataset_seed: int
) -> reasoning_gym.dataset.ProceduralDataset:
    """`settings`: the generator's, as JSON."""
    return reasoning_gym.create_dataset(
        generator, seed=dataset_seed, size=_DATASET_SIZE, **json.loads(settings)
    )


# one problem has many traces to score, and some generators take 0.2 s an item
@functools.lru_cache(maxsize=64)
def _entry(generator: str, settings: str, dataset_seed: int, item: int) -> dict[str, Any]:
    return _dataset(generator, settings, dataset_seed)[item]
