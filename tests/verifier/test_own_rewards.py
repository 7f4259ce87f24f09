"""Reward functions of the user's: what they return, how they are found, chosen and told apart."""

import errno
import functools
import io
import json
import sys

import numpy as np
import pytest
from small_verifier import make_verifier, problem

from spiral_jax.core.config import ConfigError
from spiral_jax.core.functions import source_fingerprint
from spiral_jax.tasks.problem import Problem
from spiral_jax.verifier.choice import RewardChoice, choose_fences, choose_rewards, reward_of_source
from spiral_jax.verifier.rewards import (
    Status,
    Verdict,
    judge,
    load_reward,
    reward_fingerprint,
)
from spiral_jax.verifier.sandbox import prefix_prints

# What they return


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *[(value, Status.CORRECT) for value in (True, 1, np.bool_(True), np.int64(1))],
        *[(value, Status.WRONG) for value in (False, 0, np.bool_(False))],
        (None, Status.UNPARSED),
        *[(value, Status.ERROR) for value in (2, -1, 1.001, -1e-3, np.ones(2), 10**400)],
        *[(value, Status.ERROR) for value in (float("nan"), float("inf"), "yes", "1", [1], ())],
        *[(value, Status.ERROR) for value in ((1, 2), (0.5, "a", "b"), ("a", 0.5), (2, "a"))],
    ],
)
def test_a_reward_is_a_number_in_0_to_1_or_none_and_all_else_an_error(value, expected):
    verdict = judge(lambda text, problem: value, "", problem())
    assert verdict.status is expected
    reward = {Status.CORRECT: 1.0, Status.ERROR: np.nan}.get(expected, 0.0)
    np.testing.assert_equal(verdict.reward, reward)
    assert bool(verdict.detail) == (expected is Status.ERROR)
    assert ("allowed" in verdict.detail) == (expected is Status.ERROR)


@pytest.mark.parametrize(
    ("value", "reward", "answer", "status"),
    [
        (0.3, 0.3, None, Status.WRONG),
        (np.float32(0.7), 0.7, None, Status.WRONG),
        (0.1 + 0.2 + 0.7, 1.0, None, Status.CORRECT),  # 0.9999999999999999
        (1 + 1e-9, 1.0, None, Status.CORRECT),
        (-1e-9, 0.0, None, Status.WRONG),
        ((0.3, "x+1"), 0.3, "x+1", Status.WRONG),
        ((True, "x+1"), 1.0, "x+1", Status.CORRECT),
        ((1.0, None), 1.0, None, Status.CORRECT),
        ((None, "x+1"), 0.0, "x+1", Status.UNPARSED),
    ],
)
def test_partial_credit_is_wrong_with_a_reward_and_an_answer_may_stand_beside(
    value, reward, answer, status
):
    verdict = judge(lambda text, problem: value, "", problem())
    assert verdict.status is status and verdict.answer == answer
    assert verdict.reward == pytest.approx(reward, abs=2**-25)
    assert verdict.reward * 2**24 == int(verdict.reward * 2**24)  # sums of them are exact
    assert np.float32(verdict.reward) == verdict.reward
    assert Verdict.from_plain(json.loads(json.dumps(verdict.to_plain()))) == verdict


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "must be"),
        ("math_reward", "must be"),
        (":reward", "must be"),
        ("no_such_package.module:reward", "cannot be imported"),
        ("verifier_test_reward:no_such_function", "no function 'no_such_function'"),
        ("verifier_test_reward:ITEMS", "no function 'ITEMS'"),
        ("verifier_test_broken:reward", "ZeroDivisionError"),
        ("verifier_test_command:reward", "SystemExit"),
    ],
)
def test_a_reward_that_cannot_be_loaded_is_a_config_error_before_any_worker(
    path, message, reward_path, tmp_path
):
    (tmp_path / "verifier_test_broken.py").write_text("1 / 0")
    parses = "import argparse\nargparse.ArgumentParser().parse_args(['--no_such_flag'])"
    (tmp_path / "verifier_test_command.py").write_text(parses)
    for load in (load_reward, make_verifier):
        with pytest.raises(ConfigError, match=r"config\.task\.reward") as error:
            load(path)
        assert message in str(error.value)


# Several of them


def of_source(source, name="p"):
    return Problem(name, "?", "7", {"data_source": source})


CHOICE = RewardChoice("", {"sums": "math", "own": "verifier_test_reward:reward"})


def test_the_data_source_of_a_problem_chooses_its_reward(reward_path):
    items = [
        ("\\boxed{7}", of_source("sums")),
        ("return (0.25, 'x')", of_source("own")),
        ("\\boxed{7.0}", of_source("sums")),
        ("return True", of_source("own")),
        ("return True", of_source("sums")),
    ]
    with make_verifier(CHOICE) as verifier:
        verdicts = verifier.verify(items)
        assert [verifier.compares_answers(problem) for _, problem in items[:2]] == [True, False]
    assert [verdict.reward for verdict in verdicts] == [1.0, 0.25, 1.0, 1.0, 0.0]
    assert [verdict.status.value for verdict in verdicts][-1] == "unparsed"


def test_a_source_without_a_reward_and_a_reward_without_a_source_are_refused():
    sums, own, other = (of_source(source) for source in ("sums", "own", "other"))
    CHOICE.check([sums, own], training=True)
    CHOICE.check([sums], training=False)  # an evaluation may have fewer
    with pytest.raises(ConfigError, match=r"config\.task\.rewards: \['own'\].*\['sums'\]"):
        CHOICE.check([sums], training=True)
    unknown = r"3 of 5 problems have no reward.*'other' \(2\), 'None' \(1\)\."
    with pytest.raises(ConfigError, match=unknown):
        CHOICE.check([sums, own, problem(), other, other], training=True)
    RewardChoice("math", CHOICE.by_source).check([sums, own, other, problem()], training=True)
    RewardChoice("math").check([problem()], training=True)


# data_source of the files that verl's own scripts and their users write
KNOWN = {
    "math": (
        *("openai/gsm8k", "lighteval/MATH", "DigitalLearningGmbH/MATH-lighteval"),
        *("HuggingFaceH4/MATH-500", "math_dapo", "aime2024", "aime_2025", "numina_amc_aime"),
        *("numina_cn_k12", "simplelr/gsm8k", "math"),
    ),
    "code": ("apps", "taco", "codecontests", "codeforces", "livecodebench", "mbpp"),
    "instructions": ("google/IFEval", "ifeval"),
    # of pictures, of searches, and what only begins or ends like one that is known
    "": ("hiyouga/geometry3k", "searchR1_nq", "math_proofs", "my_math", "apps_ui", "None"),
}


@pytest.mark.parametrize("reward", KNOWN)
def test_public_sources_are_known_by_name(reward):
    assert {name: reward_of_source(name) for name in KNOWN[reward]} == dict.fromkeys(
        KNOWN[reward], reward
    )


@pytest.mark.parametrize("source", [["gsm8k", "main"], {"name": "gsm8k"}, 5, None])
def test_a_data_source_that_is_no_text_has_no_reward_of_its_own(source):
    problems = [of_source(source)]
    named = choose_rewards("e:f", {}, problems)
    named.check(problems, training=True)
    assert named.of(problems[0]) == "e:f"
    with pytest.raises(ConfigError, match="1 of 1 problems have no reward"):
        choose_rewards("", {}, problems).check(problems, training=True)


def test_the_table_yields_to_the_config_and_a_named_reward_judges_all_others():
    problems = [of_source(name) for name in ("openai/gsm8k", "taco", "own")]
    own = {"taco": "a:b", "own": "c:d"}
    choice = choose_rewards("", own, problems)
    assert [choice.of(problem) for problem in problems] == ["math", "a:b", "c:d"]
    assert "reward math: 1 problems of 'openai/gsm8k' (1)" in choice.describe(problems)
    named = choose_rewards("e:f", {"own": "c:d"}, problems)
    assert [named.of(problem) for problem in problems] == ["e:f", "e:f", "c:d"]


@pytest.mark.parametrize(
    ("fence", "reward", "fenced"),
    [
        ("auto", "", [False, True, True]),  # by data_source
        ("auto", "math", None),
        ("auto", "code_all", [True, True, True]),
        ("always", "math", [True, True, True]),
        ("never", "code", None),
    ],
)
def test_candidates_stand_in_fences_where_programs_or_texts_are_judged(fence, reward, fenced):
    problems = [of_source(name) for name in ("gsm8k", "taco", "ifeval")]
    fences = choose_fences(fence, choose_rewards(reward, {}, problems))
    assert (fences and [fences(problem) for problem in problems]) == fenced


# Their errors and their sources

NESTED = """
import json, os

def reward(text, problem):
    return helper(text)

def helper(text):
    if text == "json":
        return json.loads("{")
    if text == "variable":
        return os.environ["NOT_SET_HERE"]
    return {}[text]
"""


@pytest.mark.parametrize(
    ("text", "error", "line", "hinted"),
    [
        ("json", "JSONDecodeError", 'return json.loads("{")', False),
        ("variable", "KeyError: 'NOT_SET_HERE'", 'os.environ["NOT_SET_HERE"]', True),
        ("key", "KeyError: 'key'", "return {}[text]", False),
    ],
)
def test_an_error_shows_the_users_own_innermost_line(
    text, error, line, hinted, tmp_path, monkeypatch
):
    (tmp_path / "nested_reward.py").write_text(NESTED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "nested_reward", raising=False)
    verdict = judge(load_reward("nested_reward:reward"), text, problem())
    assert verdict.status is Status.ERROR
    for part in (error, line, "nested_reward.py:", "in helper"):
        assert part in verdict.detail
    assert ("config.verifier.environment" in verdict.detail) == hinted


def test_a_rewards_fingerprint_is_that_of_its_source(tmp_path, monkeypatch):
    path = tmp_path / "printed_reward.py"
    monkeypatch.syspath_prepend(tmp_path)
    prints = []
    for source in (NESTED, NESTED, NESTED.replace("{}[text]", "True")):
        path.write_text(source)
        monkeypatch.delitem(sys.modules, "printed_reward", raising=False)
        prints.append(reward_fingerprint("printed_reward:reward"))
    assert prints[0] == prints[1] != prints[2] and len(prints[0]) == 64
    assert (
        reward_fingerprint("math") == reward_fingerprint("spiral_jax.tasks.end_digit:reward") == ""
    )


def test_a_partial_has_the_fingerprint_of_its_function_and_what_has_no_source_none():
    own, cut = source_fingerprint(of_source), functools.partial(of_source, "sums")
    assert own == source_fingerprint(cut) == source_fingerprint(functools.partial(cut, name="p"))
    assert len(own) == 64 and own != source_fingerprint(judge)
    assert source_fingerprint(len) == source_fingerprint(functools.partial(len)) == ""


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOMEM, "no memory")])
def test_an_error_for_want_of_memory_names_the_field(error):
    def reward(text, problem):
        raise error

    assert "config.verifier.memory_gb" in judge(reward, "", problem()).detail


def test_a_reward_finds_all_of_its_stdout_though_lines_have_a_prefix(monkeypatch):
    written = {name: io.BytesIO() for name in ("stdout", "stderr")}
    for name, file in written.items():
        monkeypatch.setattr(sys, name, io.TextIOWrapper(file, encoding="latin-1"))
    prefix_prints("[mine] ")
    sys.stdout.reconfigure(line_buffering=True)
    print("one", end="\n")
    sys.stdout.buffer.write(b"raw\n")
    sys.stderr.writelines(["two\n"])
    sys.stderr.flush()
    assert written["stdout"].getvalue() == b"[mine] one\nraw\n"
    assert written["stderr"].getvalue() == b"[mine] two\n"
    assert sys.stdout.encoding == "latin-1"
