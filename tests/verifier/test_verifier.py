"""What becomes of an answer: extraction, mathematics, counts of verdicts, and too many failures."""

import random

import numpy as np
import pytest
from small_verifier import problem

from spiral_jax.tasks.answer import last_boxed
from spiral_jax.verifier.rewards import (
    BrokenReference,
    Status,
    Verdict,
    exact_verdict,
    load_reward,
    math_reward,
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
