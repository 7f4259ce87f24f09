"""The second bundled task: its reward against enumeration, its splits, its demonstrations."""

import itertools
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from configs import end_digit as config
from configs import end_digit_sft
from spiral_jax import sft
from spiral_jax.prompts.prompts import search_prompt
from spiral_jax.prompts.scaffold import make_scaffold, max_aggregation_prompt
from spiral_jax.prompts.settings import PromptSettings
from spiral_jax.tasks import end_digit
from spiral_jax.tasks.problem import Problem
from spiral_jax.tasks.tiny_tokenizer import train_tokenizer

TRY = re.compile(
    r"(\d)\*(\d)\+(\d)=(\d+)\+(\d)=(\d+), (\d) for (\d): (yes|no), \\boxed\{(\d)\*(\d)\+(\d)\}"
)


def numbers(problem):
    *digits, end = map(
        int, re.fullmatch(r"digits (\d) (\d) (\d) (\d) end (\d)", problem.text).groups()
    )
    return digits, end


def is_sound(problem, text):
    """Whether a trace is a try without any error: digits, arithmetic, verdict and box."""
    places = itertools.permutations(range(4), 3)
    return any(text == end_digit.try_out(problem, chosen) for chosen in places)


def right_ones(problem):
    """Every expression that is an answer, by going through all ordered choices of three places."""
    digits, end = numbers(problem)
    chosen = itertools.permutations(digits, 3)
    return {f"{a}*{b}+{c}" for a, b, c in chosen if str(a * b + c)[-1] == str(end)}


def test_the_reward_is_that_of_enumeration_for_every_expression_of_any_digits():
    for index in range(20):
        problem = end_digit.task(0).held_out(index)
        right, seen = right_ones(problem), 0
        for a, b, c in itertools.product(range(10), repeat=3):
            right_one = end_digit.reward(f"so \\boxed{{{a}*{b}+{c}}}", problem)
            assert right_one == (f"{a}*{b}+{c}" in right)
            seen += right_one
        assert seen == len(right) and problem.answer in right


@pytest.mark.parametrize(
    "text, verdict",
    [
        ("9*4+7", None),
        ("\\boxed{}", None),
        ("\\boxed{ }", None),
        ("\\boxed{43}", False),
        ("\\boxed{9*4+7=43}", False),
        ("\\boxed{9*4+7}", True),
        ("\\boxed{ 4 * 9 + 7 }", True),
        ("\\boxed{9*4+7} or \\boxed{8*7+9}", False),
        ("\\boxed{8*7+9} or \\boxed{9*4+7}", True),
        ("\\boxed{9*4+4+3}", False),
        ("\\boxed{__import__('os')}", False),
        ("\\boxed{4*4+7}", False),
        ("\\boxed{-9*4+7}", False),
        ("\\boxed{٩*4+7}", False),
    ],
)
def test_an_answer_is_a_box_with_one_expression(text, verdict):
    problem = Problem("p", "digits 4 7 8 9 end 3", "9*4+7", {"digits": [4, 7, 8, 9], "end": 3})
    assert end_digit.reward(text, problem) is verdict


def test_a_digit_that_is_there_twice_may_be_used_twice():
    problem = Problem("p", "digits 4 4 8 9 end 5", "4*4+9", {"digits": [4, 4, 8, 9], "end": 5})
    assert end_digit.reward("\\boxed{4*4+9}", problem) and not end_digit.reward(
        "\\boxed{8*8+1}", problem
    )


def test_no_digits_with_an_end_digit_are_in_both_splits_in_any_order_whatever_the_seeds():
    def keys(problems):
        return {(tuple(sorted(numbers(problem)[0])), numbers(problem)[1]) for problem in problems}

    train = keys(end_digit.task(seed).train(i) for seed in (0, 1) for i in range(1500))
    held_out = keys(end_digit.task(seed).held_out(i) for seed in (0, 2) for i in range(750))
    assert not train & held_out and len(train) > 1000 < 10 * len(held_out)


def hits(problems):
    """[B, 12]: whether an expression, in the order of the lean, hits a problem."""
    rows = []
    for problem in problems:
        tries = [end_digit.try_out(problem, places) for places in end_digit.EXPRESSIONS]
        rows.append([end_digit.reward(text, problem) for text in tries])
    return np.array(rows, float)


def test_problems_lean_to_the_first_expressions_and_those_of_practice_to_none():
    B = 3000
    chance = 0.7 ** np.arange(12)
    chance /= chance.sum()
    tasks = end_digit.task(0), end_digit.practice(0)
    hit_BxE, even_BxE = (hits([task.train(i) for i in range(B)]) for task in tasks)
    leaning, even = hit_BxE.mean(axis=0), even_BxE.mean(axis=0)
    assert tasks[0].fingerprint != tasks[1].fingerprint
    assert np.ptp(even) < 0.06  # six standard errors of sqrt(0.23 * 0.77 / B)
    # beside what it was made from, a problem is hit by chance, by equally many expressions of
    # either task
    by_chance = (even.mean() - 1 / 12) / (11 / 12)
    np.testing.assert_allclose(leaning, chance + (1 - chance) * by_chance, atol=0.06)
    assert leaning[0] == max(leaning)
    # as the module says: what a trace gains that always tries the first, and a set of four that
    # lean as the problems do
    assert leaning[0] == pytest.approx(0.42, abs=0.03)  # three standard errors
    assert np.mean(1 - (1 - hit_BxE @ chance) ** 4) == pytest.approx(0.71, abs=0.03)


def test_problems_are_a_pure_function_of_seed_and_cursor():
    assert end_digit.task(3).train(17) == end_digit.task(3).train(17) != end_digit.task(4).train(17)
    assert end_digit.task(3).fingerprint != end_digit.task(4).fingerprint


def test_a_demonstrated_try_is_without_error_and_right_if_it_says_so():
    said = set()
    for index, places in enumerate(end_digit.EXPRESSIONS):
        problem = end_digit.task(0).train(index)
        text = end_digit.try_out(problem, places)
        match = TRY.fullmatch(text)
        assert match, text
        a, b, c, product, again, value, last, end, verdict, *box = match.groups()
        digits, asked = numbers(problem)
        assert not Counter(map(int, (a, b, c))) - Counter(digits) and box == [a, b, c]
        assert int(product) == int(a) * int(b) and int(value) == int(product) + int(c)
        assert (again, last, int(end)) == (c, value[-1], asked)
        assert (verdict == "yes") == (last == end) == end_digit.reward(text, problem)
        assert end_digit.strategy(text, problem) == f"{min(a, b)}*{max(a, b)}+{c}"
        said.add(verdict)
    assert said == {"yes", "no"}


def test_search_leans_and_the_reader_copies_the_first_candidate_that_hits_or_tries_itself():
    rng, problem = np.random.default_rng(0), end_digit.task(0).train(0)
    first = end_digit.try_out(problem, end_digit.EXPRESSIONS[0])
    tried = Counter(end_digit.demonstrate_search(problem, 0.8, rng) for _ in range(2000))
    assert tried.pop(first) / 2000 == pytest.approx(0.8, abs=0.04)  # 4.5 standard errors
    assert len(tried) == 11 and max(tried.values()) < 70  # 36 each; 5.5 standard errors
    copied = 0
    for cursor in range(300):
        problem = end_digit.task(0).train(cursor)
        shown, read = end_digit.demonstrate_set(problem, 4, 0.1, 0.8, rng)
        hits = [text for text in shown if end_digit.reward(text, problem)]
        assert len(shown) == 4 and all(is_sound(problem, text) for text in (*shown, read))
        if hits:
            assert read == hits[0]
        copied += bool(hits)
    assert 150 < copied < 290


def test_a_trace_has_room_for_one_try_and_a_prompt_for_four_of_the_longest(tmp_path):
    c, made = config.get_config(), end_digit_sft.get_config()
    texts = sft.tokenizer_texts(end_digit, made.task_seed, made.seed)
    tokenizer = train_tokenizer(texts, made.model.vocab_size, tmp_path)
    settings = PromptSettings.from_config(c.prompt)
    scaffold = make_scaffold(tokenizer, settings, (tokenizer.eos_token_id,))
    tokens = set()
    for cursor in range(200):
        problem = end_digit.task(0).train(cursor)
        assert len(search_prompt(scaffold, problem.text)) <= c.prompt.max_problem_tokens
        text = end_digit.try_out(problem, end_digit.EXPRESSIONS[cursor % 12])
        tokens.add(len(tokenizer.encode(text, add_special_tokens=False)) + 1)
    # the box and the end of a try are 10
    assert max(tokens) <= c.search.max_tokens < 2 * min(tokens) - 10
    longest = max_aggregation_prompt(
        scaffold,
        size=c.aggregation.subset_size,
        candidate_tokens=c.search.max_tokens,
        problem_tokens=c.prompt.max_problem_tokens,
    )
    assert longest <= c.batch.aggregation_lengths[-1][0]


def test_a_model_of_a_task_without_demonstrations_is_refused(monkeypatch, tmp_path):
    c = end_digit_sft.get_config()
    with c.unlocked():
        c.task = "jsonl"
    monkeypatch.setattr(sft.flags, "FLAGS", SimpleNamespace(config=c, out=str(tmp_path)))
    with pytest.raises(SystemExit, match="config.task = 'jsonl'.*two_halves and end_digit"):
        sft.main(["sft"])
