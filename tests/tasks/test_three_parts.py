"""The third bundled task: rewards, splits, demonstrations, and the best that sets can earn."""

import itertools
import re

import numpy as np
import pytest

from configs import three_parts as config
from configs import three_parts_sft
from spiral_jax import sft
from spiral_jax.prompts.prompts import search_prompt
from spiral_jax.prompts.scaffold import make_scaffold, max_aggregation_prompt
from spiral_jax.prompts.settings import PromptSettings
from spiral_jax.tasks import three_parts
from spiral_jax.tasks.problem import Problem
from spiral_jax.tasks.tiny_tokenizer import train_tokenizer
from spiral_jax.verifier.rewards import Status, judge

PROBLEM = Problem("p", "x=4*7+5 y=6*3+8 z=1*2+1", "", {"parts": [[4, 7, 5], [6, 3, 8], [1, 2, 1]]})
TEXT = re.compile(r"x=(\d)\*(\d)\+(\d) y=(\d)\*(\d)\+(\d) z=(\d)\*(\d)\+(\d)")


def values(problem):
    """x, y and z, from the text alone."""
    numbers = [*map(int, TEXT.fullmatch(problem.text).groups())]
    return [a * b + c for a, b, c in zip(*[iter(numbers)] * 3, strict=True)]


@pytest.mark.parametrize("text, verdict", [
    ("x:33", None),
    ("\\boxed{}", None),
    ("\\boxed{33}", None),
    ("\\boxed{x:33 33}", None),
    ("\\boxed{x:33 x:33}", None),  # one guess of each part
    ("\\boxed{x:33 x:34}", None),
    ("\\boxed{w:33}", None),
    ("\\boxed{x:033}", None),
    ("\\boxed{x:\u0663\u0663}", None),
    ("\\boxed{x:33}", 0.5),
    ("\\boxed{y:26}", 0.375),
    ("\\boxed{z:3}", 0.125),
    ("\\boxed{z:03}", 0.125),
    ("\\boxed{z:4}", 0.0),
    ("\\boxed{x:34 y:26}", 0.375),
    ("\\boxed{z:3  x:33}", 0.625),
    ("\\boxed{x:33 y:26 z:3}", 1.0),
    ("\\boxed{x:33} and \\boxed{z:3}", 0.125),
])  # fmt: skip
def test_the_reward_is_the_worth_of_the_parts_that_are_right(text, verdict):
    assert three_parts.reward(text, PROBLEM) == verdict


def test_rewards_are_held_exactly_and_only_everything_is_correct():
    """Eighths are multiples of the verifier's grid, so that keep rules see no rounding."""
    for bits in itertools.product([False, True], repeat=3):
        named = {name for name, bit in zip(three_parts.PARTS, bits, strict=True) if bit}
        if named:
            verdict = judge(three_parts.reward, three_parts.put_together(PROBLEM, named), PROBLEM)
            assert verdict.reward == np.dot(bits, [0.5, 0.375, 0.125])
            assert (verdict.status is Status.CORRECT) == all(bits)


def test_problems_are_a_pure_function_of_seed_and_cursor_and_right_by_their_own_answer():
    task = three_parts.task(3)
    assert task.train(17) == three_parts.task(3).train(17) != three_parts.task(4).train(17)
    assert task.fingerprint != three_parts.task(4).fingerprint
    for index in range(50):
        problem = task.held_out(index)
        x, y, z = values(problem)
        assert problem.answer == f"x:{x} y:{y} z:{z}"
        assert three_parts.reward(f"so \\boxed{{{problem.answer}}}", problem) == 1


def test_no_three_parts_are_in_both_splits_whatever_the_seeds():
    def texts(problems):
        return {problem.text for problem in problems}

    train = texts(three_parts.task(seed).train(i) for seed in (0, 1) for i in range(1500))
    held_out = texts(three_parts.task(seed).held_out(i) for seed in (0, 2) for i in range(750))
    assert not train & held_out and len(train) > 2900 and len(held_out) > 1400
    # They are told apart by a rule, so not by luck: a tenth of the 810^3 triples are held out.
    numbers = [[(a - 1) * 90 + (b - 1) * 10 + c for a, b, c in problem.metadata["parts"]]
               for problem in map(three_parts.task(0).held_out, range(200))]  # fmt: skip
    assert {sum(triple) % 10 for triple in numbers} == {0}


def test_a_demonstrated_trace_works_out_its_part_without_an_error():
    for index, name in itertools.product(range(20), three_parts.PARTS):
        problem = three_parts.task(0).train(index)
        text = three_parts.work_out(problem, name)
        match = re.fullmatch(
            r"(\w)=(\d)\*(\d)\+(\d)=(\d+)\+(\d)=(\d+), \\boxed\{(\w):(\d+)\}", text
        )
        said, a, b, c, product, again, value, boxed, last = match.groups()
        assert f"{name}={a}*{b}+{c}" in problem.text and said == boxed == name and again == c
        assert int(product) == int(a) * int(b) and int(value) == int(product) + int(c) == int(last)
        assert three_parts.strategy(text, problem) == name
        worth = dict(zip(three_parts.PARTS, three_parts.WORTH, strict=True))[name]
        assert three_parts.reward(text, problem) == worth
    assert three_parts.strategy("\\boxed{x:33}", PROBLEM) is None


def test_demonstrations_lean_and_the_reader_puts_together_all_that_candidates_name():
    rng, problem = np.random.default_rng(0), three_parts.task(0).train(0)
    shares = np.array([0.1, 0.1, 0.8])
    texts = [three_parts.demonstrate_search(problem, shares, rng) for _ in range(2000)]
    seen = [np.mean([text.startswith(name) for text in texts]) for name in three_parts.PARTS]
    np.testing.assert_allclose(seen, shares, atol=0.04)  # 4.5 standard errors

    of_aggregations = 0
    for cursor in range(300):
        problem = three_parts.task(0).train(cursor)
        shown, read = three_parts.demonstrate_set(problem, 4, (shares, (1, 0, 0)), 0.25, rng)
        named = set(re.findall(r"([xyz]):\d+", " ".join(shown)))
        assert len(shown) == 4 and set(re.findall(r"([xyz]):\d+", read)) == named
        everything = dict(zip(three_parts.PARTS, values(problem), strict=True))
        words = [f"{name}:{everything[name]}" for name in three_parts.PARTS if name in named]
        assert read == f"\\boxed{{{' '.join(words)}}}"
        of_aggregations += all(text.startswith("\\boxed") for text in shown)
    assert 40 < of_aggregations < 120  # 75 expected; 4.5 standard errors


@pytest.mark.parametrize("shares", [(0.1, 0.1, 0.8), (0.5, 0.3, 0.2), (0.0, 1.0, 0.0)])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_expected_score_is_that_of_every_set_of_independent_traces(shares, size):
    expected = 0.0
    for parts in itertools.product(range(3), repeat=size):
        chance = np.prod([shares[part] for part in parts])
        expected += chance * sum([0.5, 0.375, 0.125][part] for part in set(parts))
    assert three_parts.expected_score(shares, size) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("size", [3, 4, 8])
def test_no_shares_on_a_grid_are_better_than_the_best(size):
    best = three_parts.best_shares(size)
    assert best.sum() == pytest.approx(1) and (best > 0).all()
    highest = three_parts.expected_score(best, size)
    grid = np.linspace(0, 1, 101)
    scores = [
        three_parts.expected_score((x, y, 1 - x - y), size)
        for x, y in itertools.product(grid, grid)
        if x + y <= 1
    ]
    # the grid's own best is at most half a step of 0.01 away, where the score is flat
    assert highest - 1e-3 < max(scores) <= highest + 1e-12
    if size == 4:  # as the module says
        assert highest == pytest.approx(0.841, abs=5e-4)
        assert three_parts.expected_score((0.1, 0.1, 0.8), 4) == pytest.approx(0.426, abs=5e-4)


def test_at_smaller_sets_the_best_search_is_refused():
    with pytest.raises(ValueError, match="set_size = 2.*>= 3"):
        three_parts.best_shares(2)


def test_a_trace_has_room_for_one_part_an_aggregation_for_none_and_a_prompt_for_four(tmp_path):
    c, made = config.get_config(), three_parts_sft.get_config()
    texts = sft.tokenizer_texts(three_parts, made.task_seed, made.seed)
    tokenizer = train_tokenizer(texts, made.model.vocab_size, tmp_path)
    settings = PromptSettings.from_config(c.prompt)
    scaffold = make_scaffold(tokenizer, settings, (tokenizer.eos_token_id,))

    def tokens(text):
        return len(tokenizer.encode(text, add_special_tokens=False)) + 1  # its end

    worked, boxes, read = set(), set(), set()
    for cursor in range(200):
        problem = three_parts.task(0).train(cursor)
        assert len(search_prompt(scaffold, problem.text)) <= c.prompt.max_problem_tokens
        text = three_parts.work_out(problem, three_parts.PARTS[cursor % 3])
        worked.add(tokens(text))
        boxes.add(tokens(text.split(", ")[1]))
        read.add(tokens(three_parts.put_together(problem, set(three_parts.PARTS))))
    assert max(worked) <= c.search.max_tokens < 2 * min(worked) - max(boxes)
    assert max(read) <= c.aggregation.max_tokens < min(worked)
    longest = max_aggregation_prompt(
        scaffold,
        size=c.aggregation.subset_size,
        candidate_tokens=c.search.max_tokens,
        problem_tokens=c.prompt.max_problem_tokens,
    )
    assert longest <= c.batch.aggregation_lengths[-1][0]
