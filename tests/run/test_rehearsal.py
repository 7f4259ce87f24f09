"""What a dry run, and a start, say of a run before it begins."""

import json
import re

import pytest

from configs import tiny
from spiral_jax.core.config import ConfigError
from spiral_jax.run.rehearsal import prompt_lengths, rehearse
from spiral_jax.run.setup import set_up_training
from spiral_jax.verifier.pool import VerifierFailure

REWARD = """
import os

def half(text, problem):
    return 0.5 if text == problem.answer else 0.0

def never_empty(text, problem):
    return text.split()[0] == problem.answer

def reads_the_environment(text, problem):
    return os.environ["JUDGE_KEY"] == text

def generous(text, problem):
    return True
"""


@pytest.fixture
def make_setup(tmp_path, monkeypatch):
    """(problem texts, name of a reward of the above or "math") -> the setup of a run on them."""
    (tmp_path / "rewards_of_a_dry_run.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(texts, reward="math"):
        path = tmp_path / "own.jsonl"
        rows = [{"problem": text, "answer": "7"} for text in texts]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        c = tiny.get_config()
        c.task.name, c.task.train_path, c.eval.problems = "jsonl", str(path), 0
        c.task.reward = reward if reward == "math" else f"rewards_of_a_dry_run:{reward}"
        return set_up_training(c)

    return make


def test_lengths_are_those_of_the_rendered_prompts_and_too_long_problems_are_counted(make_setup):
    texts = [f"{'1' * n}=" for n in range(1, 22)]
    setup = make_setup(texts)
    rendered = [
        setup.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True
        )["input_ids"]
        for text in texts
    ]
    lengths = sorted(map(len, rendered))
    said = prompt_lengths(setup)
    numbers = [int(number) for number in re.findall(r"(?:median|up to|longest) (\d+)", said)]
    # of 21: the 11th, the 19th (0.9 * 21 = 18.9), the 21st (20.8) and the last
    assert numbers == [lengths[i] for i in (10, 18, 20, 20)]
    too_long = sum(length > setup.c.prompt.max_problem_tokens for length in lengths)
    assert 0 < too_long < 21 and f"note: {too_long} of these 21" in said


def test_a_start_at_which_all_problems_are_too_long_is_refused(make_setup):
    with pytest.raises(ConfigError, match=r"max_problem_tokens = 16: all training .* 22 tokens"):
        make_setup(["1" * 18 + "=", "1" * 19 + "="])


@pytest.mark.parametrize(
    "reward, expected",
    [
        ("math", r"that in a box earns 1 \(correct\)"),
        ("half", r"its reference answer earns 0\.5 .*\nnote: the reference answer '7' does not"),
        ("generous", r"\nnote: an empty trace earns the full reward"),
    ],
)
def test_the_reward_is_tried_on_a_reference_answer_and_on_nothing(make_setup, reward, expected):
    said = rehearse(make_setup(["1+6="], reward))
    assert re.search(expected, said)
    assert ("note:" in said) == (reward != "math")


@pytest.mark.parametrize(
    "reward, expected",
    [
        ("never_empty", r"fails on an empty trace of problem 'train:1': IndexError"),
        ("reads_the_environment", r"KeyError.*'JUDGE_KEY' in config\.verifier\.environment"),
    ],
)
def test_a_reward_that_fails_ends_the_dry_run_and_says_at_what(make_setup, reward, expected):
    with pytest.raises(VerifierFailure, match=expected):
        rehearse(make_setup(["1+6="], reward))


def test_memory_and_tokens_of_a_step(make_setup):
    said = rehearse(make_setup(["1+6="]))
    # 832,896 parameters in float32: trained, and Adam's two moments of each
    state = float(re.search(r"([\d.]+) MiB weights that are trained", said)[1])
    assert state == pytest.approx(3 * 4 * 832_896 / 2**20, abs=0.1)
    # N = 8 traces of 26 tokens, K M = 16 of 12; B = 16 problems, four times as many are tried
    assert "16 problems, 6,400 sampled tokens" in said and "up to 64, 25,600 tokens" in said
