"""What becomes of an answer: extraction, mathematics, reward functions, classes of verdicts."""

import json
import random
import sys

import numpy as np
import pytest
from small_verifier import make_verifier, problem

from spiral_jax.core.config import ConfigError
from spiral_jax.tasks.answer import last_boxed
from spiral_jax.tasks.problem import Problem
from spiral_jax.verifier.choice import RewardChoice
from spiral_jax.verifier.rewards import (
    BrokenReference,
    Status,
    Verdict,
    exact_verdict,
    judge,
    load_reward,
    math_reward,
    reward_fingerprint,
)
from spiral_jax.verifier.settings import VerifierSettings
from spiral_jax.verifier.verifier import (
    VerifierFailure,
    check_failures,
    check_hopeless,
    count_verdicts,
)

# Extraction


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("the answer is 5", None),
        (r"\boxed{5}", "5"),
        (r"so \boxed{5}. No: \boxed{ 7 }!", " 7 "),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),  # an escaped brace has no partner
        (r"\boxed{1 \\}", r"1 \\"),  # after an escaped backslash the brace is real
        (r"\boxed {5}", "5"),
        (r"\boxed{}", ""),
        (r"\boxed 5", None),
        (r"\fbox{5}", None),
        # the final answer is unfinished: no fall-back to an earlier one
        (
            r"\boxed{5} or rather \boxed{7",
            None,
        ),
        (r"\boxed{5} or rather \boxed{\frac{7}{2}", None),
        # an earlier unfinished box is no obstacle
        (
            r"Attempt 1 ends in \boxed{5 and stops. \boxed{7}",
            "7",
        ),
        (r"\boxed{3 \boxed{4}}", "4"),  # nested: the inner one is the last
        (r"\boxed{5} } }", "5"),
        (r"{ \boxed{5}", "5"),
        (r"<think>\boxed{5}</think> The answer is 5.", None),
        (r"<think>\boxed{5}</think> \boxed{6}", "6"),
        (r"<think>\boxed{5</think> \boxed{6}</think> \boxed{7}", "7"),
        (r"<think>a</think> \boxed{5} <think>b</think>", None),
        (r"</think>\boxed{5}", "5"),
        ("\\boxed{a\nb}", "a\nb"),
    ],
)
def test_last_boxed_is_the_last_complete_box_after_thinking(text, expected):
    assert last_boxed(text) == expected


def slow_last_boxed(text):
    """The rule, character by character."""
    text = text.split("</think>")[-1]
    if "\\boxed{" not in text:
        return None
    rest = text.split("\\boxed{")[-1]
    depth, i = 1, 0
    while i < len(rest):
        if rest[i] == "\\":
            i += 1
        elif rest[i] in "{}":
            depth += 1 if rest[i] == "{" else -1
        if depth == 0:
            return rest[:i]
        i += 1
    return None


def test_last_boxed_agrees_with_a_character_scanner_on_random_texts():
    rng = random.Random(0)
    tokens = ["\\boxed{", "{", "}", "}", "\\{", "\\}", "\\\\", "</think>", "a", " ", "\n", "\\frac"]
    found = 0
    for _ in range(5000):
        text = "".join(rng.choices(tokens, k=rng.randrange(25)))
        assert last_boxed(text) == slow_last_boxed(text), text
        found += last_boxed(text) is not None
    assert 500 < found < 4500


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\\boxed{" * 200_000, None),
        ("\\boxed{" * 200_000 + "}", ""),
        ("\\boxed{" + "{" * 500_000, None),
        ("\\boxed{" + "{}" * 250_000 + "}", "{}" * 250_000),
        ("\\boxed" + " " * 1_000_000, None),
        ("</think>" * 150_000 + "\\boxed{5}", "5"),
        ("x" * 5_000_000 + "\\boxed{5}", "5"),
    ],
    ids=range(7),
)
def test_last_boxed_is_linear_on_megabytes(text, expected):
    assert last_boxed(text) == expected  # quadratic work would be 10^10 steps and more


# Mathematics, without processes


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("no box, 42", "42", Status.UNPARSED),
        ("\\boxed{ }", "42", Status.UNPARSED),
        ("\\boxed{}", "", Status.UNPARSED),
        ("\\boxed{42} \\boxed{42", "42", Status.UNPARSED),
        ("\\boxed{ 42 }", " 42", Status.CORRECT),
        ("\\boxed{042}", "42", Status.CORRECT),
        ("\\boxed{-0}", "0", Status.CORRECT),
        ("\\boxed{43}", "42", Status.WRONG),
        ("\\boxed{-42}", "42", Status.WRONG),
        ("\\boxed{999999999999999999}", "999999999999999998", Status.WRONG),
        ("\\boxed{5 or 3}", "5 or 3", Status.CORRECT),
        ("\\boxed{42.0}", "42", None),
        ("\\boxed{+42}", "42", None),
        ("\\boxed{٤٢}", "42", None),  # digits of another script
        ("\\boxed{" + "1" * 19 + "}", "1", None),
        ("\\boxed{1,000}", "1000", None),
        ("\\boxed{42}", "x", None),
    ],
)
def test_exact_verdict_decides_only_what_needs_no_mathematics(text, answer, expected):
    verdict = exact_verdict(text, problem(answer))
    assert (None if verdict is None else verdict.status) == expected


EQUAL = """
1/2 | 0.5
1/2 | \\frac{1}{2}
\\frac{1}{2} | \\dfrac12
1000 | 1,000
1000 | 1{,}000
1000 | 1\\,000
1234567 | 1 234 567
72 | 72.0
72 | \\$72.00
72 | 72\\text{ dollars}
72 | **72**
72 | 72.
72 | x = 72
72 | \\boxed{72}
5 | 2+3
1/3 | 0.333333
\\sqrt{8} | 2\\sqrt{2}
x^2-1 | (x-1)(x+1)
\\{1,2,3\\} | \\{3,2,1\\}
1331 and 1728 | 1728, 1331
(1,2) | (1, 2)
\\text{Yes} | yes
0.0000001 | 10^{-7}
-3 | −3
"""
UNEQUAL = """
5 | 5 or 3
3 | 5 or 3
5 | 5, 3
5 | 5; 3
5 | \\{5, 3\\}
5 | x=5 or x=3
5 | 5 \\text{ or } 3
5 | 5\\text{ cm or }3\\text{ cm}
5 | 5 \\pm 3
8 | 5 3
8 | 5 \\quad 3
0 | 1\\,000
1331 and 1728 | 1728
1331 and 1728 | 1331
1728 | 1331 and 1728
\\{1,2,3\\} | \\{1,2\\}
\\{1,2\\} | \\{1,2,3\\}
(1,2) | (2,1)
(1,2) | [1,2]
1/3 | 0.33
\\sqrt{2} | 1.414
3 | 3.000001
0 | 0.0000001
0.0000001 | 0.0000002
\\frac{1}{10000000} | 0.0000002
10^{-20} | 10^{-22}
72 | 73.0
A | B
\\text{yes} | \\text{no}
42 | forty two
"""


@pytest.mark.parametrize(
    ("answer", "box", "expected"),
    [(*line.split(" | "), True) for line in EQUAL.strip().splitlines()]
    + [(*line.split(" | "), False) for line in UNEQUAL.strip().splitlines()],
)
def test_math_reward_is_equality_of_mathematical_objects(answer, box, expected):
    load_reward("math")
    assert math_reward(f"it is \\boxed{{0}}, no, \\boxed{{{box}}}.", problem(answer)) is expected


@pytest.mark.parametrize("box", ["", "...", "\\frac{1}{", "-", "\\approx", "\\undefinedmacro{"])
def test_math_reward_of_an_unreadable_box_is_none_even_after_a_readable_one(box):
    text = f"\\boxed{{42}} or \\boxed{{{box}}}"
    assert math_reward(text, problem("42")) is None


@pytest.mark.parametrize("answer", ["", "...", "\\frac{1}{"])
def test_math_reward_of_a_broken_reference_names_the_problem(answer):
    with pytest.raises(BrokenReference, match="'train:7'"):
        math_reward("\\boxed{5}", problem(answer, name="train:7"))


# Reward functions


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *[(value, Status.CORRECT) for value in (True, 1, np.bool_(True), np.int64(1))],
        *[(value, Status.WRONG) for value in (False, 0, np.bool_(False))],
        (None, Status.UNPARSED),
        *[(value, Status.ERROR) for value in (2, -1, 1.001, -1e-3, np.ones(2))],
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
    ],
)
def test_a_reward_that_cannot_be_loaded_is_a_config_error_before_any_worker(
    path, message, reward_path, tmp_path
):
    (tmp_path / "verifier_test_broken.py").write_text("1 / 0")
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
    with pytest.raises(ConfigError, match=r"no reward for the data_source \['None', 'other'\]"):
        CHOICE.check([sums, own, other, problem()], training=True)
    RewardChoice("math", CHOICE.by_source).check([sums, own, other, problem()], training=True)
    RewardChoice("math").check([problem()], training=True)


# What is made of verdicts


def test_the_five_counters_add_up():
    verdicts = [Verdict.of(status) for status in Status for _ in range(len(status.value))]
    assert count_verdicts(verdicts) == {
        "correct": 7,
        "wrong": 5,
        "unparsed": 8,
        "timeout": 7,
        "error": 5,
    }
    assert count_verdicts([]) == {"correct": 0, "wrong": 0, "unparsed": 0, "timeout": 0, "error": 0}


def limits(errors, timeouts=0.0):
    return VerifierSettings(1, 5.0, max_error_rate=errors, max_timeout_rate=timeouts)


def test_a_reward_of_ones_own_that_is_slow_stops_the_run_with_the_limit_and_the_count():
    slow = [Verdict.of_slow_reward(5.0)] * 384
    assert all(verdict.status is Status.TIMEOUT and np.isnan(verdict.reward) for verdict in slow)
    with pytest.raises(VerifierFailure) as error:
        check_failures(slow, limits(1.0))
    assert "384 of 384 answers took over verifier.timeout_s = 5;" in str(error.value)
    assert "config.verifier.max_timeout_rate" in str(error.value)
    few = slow[:1] + [Verdict.of(Status.WRONG)] * 9
    check_failures(few, limits(0.0, 0.1))
    with pytest.raises(VerifierFailure):
        check_failures(few, limits(0.0, 0.09))


def test_what_fails_from_the_start_ends_before_a_batch_is_full():
    broken, fine = Verdict.of(Status.ERROR, "boom"), Verdict.of(Status.WRONG)
    check_hopeless([broken] * 31, limits(0.0))  # too few to tell
    check_hopeless([broken] * 20 + [fine] * 20, limits(0.0))
    for failing in (broken, Verdict.of_slow_reward(5.0)):
        with pytest.raises(VerifierFailure, match="30 of 40"):
            check_hopeless([failing] * 30 + [fine] * 10, limits(0.0))
        check_hopeless([failing] * 30 + [fine] * 10, limits(0.75, 0.75))


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


def test_too_many_errors_stop_the_run_with_their_share_count_and_cause():
    verdicts = [Verdict.of(Status.CORRECT)] * 17 + [
        Verdict.of(Status.ERROR, "KeyError: 'a' (my.py:7)")
    ] * 2
    verdicts += [Verdict.of(Status.ERROR, "other")]
    check_failures(verdicts, limits(0.15))  # at the limit, not above
    check_failures([], limits(0.0))
    check_failures([Verdict.of(Status.TIMEOUT), Verdict.of(Status.UNPARSED)], limits(0.0))
    with pytest.raises(VerifierFailure) as error:
        check_failures(verdicts, limits(0.149))
    for part in (
        "3 of 20",
        "15.0%",
        "config.verifier.max_error_rate",
        "2x",
        "my.py:7",
        "config.task.reward",
    ):
        assert part in str(error.value)
