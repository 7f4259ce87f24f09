"""The bundled task and the demonstrations that made the bundled model."""

import re

import numpy as np
import pytest

from configs import tiny
from spiral_jax.model import hf
from spiral_jax.prompts.tokenizer import load_tokenizer
from spiral_jax.tasks import two_halves


def value(expression: str) -> int:
    a, b, c = map(int, re.fullmatch(r"(\d)\*(\d)\+(\d)", expression).groups())
    return a * b + c


def test_the_answer_is_the_last_digit_of_each_half():
    task = two_halves.task(0)
    for cursor in range(500):
        problem = task.train(cursor)
        left, right = re.fullmatch(r"left=(\S+) right=(\S+)", problem.text).groups()
        assert problem.answer == f"{value(left) % 10}{value(right) % 10}"


def test_no_problem_is_in_both_splits_whatever_the_seeds():
    train = {two_halves.task(seed).train(i).text for seed in (0, 1) for i in range(2000)}
    held_out = {two_halves.task(seed).held_out(i).text for seed in (0, 2) for i in range(1000)}
    assert not train & held_out


def test_problems_are_a_pure_function_of_seed_and_cursor():
    assert two_halves.task(3).train(17) == two_halves.task(3).train(17)
    assert two_halves.task(3).train(17) != two_halves.task(4).train(17)
    assert two_halves.task(3).fingerprint != two_halves.task(4).fingerprint


@pytest.mark.parametrize("side", two_halves.SIDES)
def test_a_demonstration_is_recognised_and_any_changed_digit_of_its_work_is_not(side):
    problem = two_halves.task(0).train(5)
    text = two_halves.work_out(problem, side, 7)
    assert two_halves.worked_half(problem, text) == side
    assert (
        f"boxed{{{problem.answer[0]}7}}" in text
        if side == "left"
        else f"boxed{{7{problem.answer[1]}}}" in text
    )
    worked_until = text.index(", maybe")
    for i in [i for i, char in enumerate(text[:worked_until]) if char.isdigit()]:
        changed = text[:i] + str((int(text[i]) + 1) % 10) + text[i + 1 :]
        assert two_halves.worked_half(problem, changed) is None, changed


def test_reading_out_uses_what_was_worked_and_guesses_the_rest():
    problem = two_halves.task(0).train(9)
    left, right = problem.answer
    assert (
        two_halves.read_out(problem, {"left", "right"}, 0)
        == f"left:{left}, right:{right}, \\boxed{{{left}{right}}}"
    )
    assert (
        two_halves.read_out(problem, {"right"}, 4)
        == f"maybe left:4, right:{right}, \\boxed{{4{right}}}"
    )


def test_a_trace_has_room_for_one_half_and_an_aggregation_trace_for_none():
    """Token costs under the bundled tokenizer: the claim on which the task's closed form rests."""
    c = tiny.get_config()
    tokenizer = load_tokenizer(hf.resolve_path(c.model.hf_path))
    rng = np.random.default_rng(0)

    def tokens(text):
        return len(tokenizer.encode(text, add_special_tokens=False))

    task = two_halves.task(0)
    longest_trace, shortest_half = 0, 1000
    for cursor in rng.integers(10**6, size=500):
        problem = task.train(int(cursor))
        for side in two_halves.SIDES:
            text = two_halves.work_out(problem, side, int(rng.integers(10)))
            longest_trace = max(longest_trace, tokens(text) + 1)
            shortest_half = min(shortest_half, tokens(text[: text.index(", maybe")]))
        read = tokens(two_halves.read_out(problem, set(two_halves.SIDES), 0)) + 1
        assert read <= c.aggregation.max_tokens
    assert longest_trace <= c.search.max_tokens
    assert 2 * shortest_half > c.search.max_tokens
    assert shortest_half > c.aggregation.max_tokens


@pytest.mark.parametrize("side", two_halves.SIDES)
def test_a_trace_has_the_strategy_of_the_half_it_works_on_even_if_it_errs(side):
    problem = two_halves.task(0).train(5)
    text = two_halves.work_out(problem, side, 7)
    assert two_halves.strategy(text, problem) == side
    wrong = text.replace(f"{side}:{problem.answer[two_halves.SIDES.index(side)]}", f"{side}:x")
    assert (
        two_halves.strategy(wrong, problem) is None
        and two_halves.strategy("nothing", problem) is None
    )
    first = re.search(r"=(\d+)\+", text)[1]
    erring = text.replace(f"={first}+", f"={int(first) + 1}+")
    assert (
        two_halves.strategy(erring, problem) == side
        and two_halves.worked_half(problem, erring) is None
    )
