import os
import pathlib
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from spiral_jax.config import ConfigError
from spiral_jax.tasks.problem import Problem
from spiral_jax.verifier.extract import last_boxed
from spiral_jax.verifier.pool import Pool
from spiral_jax.verifier.rewards import (
    BrokenReference,
    Status,
    Verdict,
    exact_verdict,
    judge,
    load_reward,
    math_reward,
)
from spiral_jax.verifier.verifier import (
    CORRECT_CLASS,
    Verifier,
    VerifierFailure,
    answer_class,
    check_error_rate,
    count_verdicts,
    number_classes,
)

# A user's reward function that does what the text says. In the test's own process its import has no side effects.
REWARD_MODULE = r"""
import os, pathlib, subprocess, sys, time

ITEMS = 0

def reward(text, problem):
    global ITEMS
    ITEMS += 1
    command, _, argument = text.partition(" ")
    if command == "return":
        return eval(argument)
    if command == "raise":
        raise ValueError(argument)
    if command == "die":
        os._exit(3)
    if command == "sleep":
        time.sleep(float(argument))
        return True
    if command == "hang_once_used":
        while ITEMS > 1:
            time.sleep(0.01)
        return True
    if command == "wait_for":
        while not pathlib.Path(argument).exists():
            time.sleep(0.01)
        return True
    if command == "touch":
        pathlib.Path(argument).touch()
        return False
    if command == "hang_first_time":  # leaves its process id
        if pathlib.Path(argument).exists():
            return True
        part = pathlib.Path(argument + ".part")
        part.write_text(str(os.getpid()))
        part.rename(argument)
        time.sleep(1000)
    if command == "child":
        child = subprocess.Popen(["sleep", "1000"])
        pathlib.Path(argument).write_text(str(child.pid))
        return True
    if command == "modules":
        return not {"jax", "flax", "numpy", "pytest"} & set(sys.modules)  # pytest: the program that started it
    if command == "environment":
        return dict(os.environ).get(argument) == "seen"
    if command == "allocate":
        return len(bytearray(int(argument))) > 0
    if command == "echo":
        return text == "echo " + problem.answer and problem.metadata == {"x": [1, None]}
"""


def problem(answer="42", name="p"):
    return Problem(name, "?", answer)


@pytest.fixture
def reward_path(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("verifier_test_reward", None)
    (tmp_path / "verifier_test_reward.py").write_text(REWARD_MODULE)
    yield "verifier_test_reward:reward"
    sys.modules.pop("verifier_test_reward", None)


def statuses(verdicts):
    return [verdict.status.value for verdict in verdicts]


def alive(pid):
    """Whether a process runs; on Linux, a zombie that nobody has collected yet does not."""
    try:
        os.kill(pid, 0)
        return ") Z " not in pathlib.Path(f"/proc/{pid}/stat").read_text()
    except ProcessLookupError:
        return False
    except FileNotFoundError:  # no /proc, or it has just ended
        return not pathlib.Path("/proc/self/stat").exists()


def wait_until(condition):
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("did not happen")


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
        (r"\boxed{5} or rather \boxed{7", None),  # the final answer is unfinished: no fall-back to an earlier one
        (r"\boxed{5} or rather \boxed{\frac{7}{2}", None),
        (r"Attempt 1 ends in \boxed{5 and stops. \boxed{7}", "7"),  # an earlier unfinished box is no obstacle
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
        (True, Status.CORRECT), (1, Status.CORRECT), (np.bool_(True), Status.CORRECT), (np.int64(1), Status.CORRECT),
        (False, Status.WRONG), (0, Status.WRONG), (np.bool_(False), Status.WRONG), (None, Status.UNPARSED),
        (0.5, Status.ERROR), ("yes", Status.ERROR), ("1", Status.ERROR), (2, Status.ERROR), (-1, Status.ERROR),
        (float("nan"), Status.ERROR), ([1], Status.ERROR), (np.ones(2), Status.ERROR), ((), Status.ERROR),
    ],
)  # fmt: skip
def test_a_reward_is_true_false_1_0_or_none_and_all_else_an_error(value, expected):
    verdict = judge(lambda text, problem: value, "", problem())
    assert verdict.status is expected
    reward = {Status.CORRECT: 1.0, Status.ERROR: np.nan}.get(expected, 0.0)
    np.testing.assert_equal(verdict.reward, reward)
    assert bool(verdict.detail) == (expected is Status.ERROR)


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
def test_a_reward_that_cannot_be_loaded_is_a_config_error_before_any_worker(path, message, reward_path, tmp_path):
    (tmp_path / "verifier_test_broken.py").write_text("1 / 0")
    for load in (load_reward, lambda path: Verifier(path, workers=1, timeout_s=1.0)):
        with pytest.raises(ConfigError, match=r"config\.task\.reward") as error:
            load(path)
        assert message in str(error.value)


# Processes


def test_integer_answers_start_no_workers():
    items = [("\\boxed{42}", problem()), ("\\boxed{41}", problem()), ("42", problem())]
    with Verifier("math", workers=2, timeout_s=5.0) as verifier:
        verdicts = verifier.verify(items)
        assert verifier.verify([]) == []
        assert verifier.worker_pids == []
    assert verdicts == [Verdict(1.0, Status.CORRECT), Verdict(0.0, Status.WRONG), Verdict(0.0, Status.UNPARSED)]


def test_a_hanging_answer_is_a_timeout_and_those_behind_it_are_still_right():
    hang = ("\\boxed{9^{9^{9^9}}}", problem("5"))
    items = [
        hang,
        ("\\boxed{\\frac{1}{2}}", problem("0.5")),
        ("\\boxed{42}", problem()),
        ("\\boxed{5 or 3}", problem("5")),
        ("\\boxed{1}", problem("...")),  # a broken reference: our failure
        ("\\boxed{...}", problem("5")),
        ("\\boxed{72.0}", problem("72")),
    ]
    with Verifier("math", workers=1, timeout_s=2.0) as verifier:
        verdicts = verifier.verify(items)
        pids = verifier.worker_pids
    assert statuses(verdicts) == ["timeout", "correct", "correct", "wrong", "error", "unparsed", "correct"]
    np.testing.assert_equal([verdict.reward for verdict in verdicts], [0, 1, 1, 0, np.nan, 0, 1])
    assert len(pids) == 1 and not alive(pids[0])


def test_verdicts_of_a_users_reward_keep_the_order_and_report_errors(reward_path, tmp_path):
    late = tmp_path / "late"
    echo = Problem("e", "?", "é\n" * 200_000, {"x": [1, None]})
    items = [(f"wait_for {late}", problem())]  # ends only after the next-to-last item
    items += [("return True", problem()), ("return 0", problem()), ("return None", problem())]
    items += [("raise boom", problem()), ("return 0.5", problem()), ("return 'yes'", problem())]
    items += [("echo " + echo.answer, echo), ("modules", problem()), (f"touch {late}", problem())]
    items += [("return 1", problem())]
    with Verifier(reward_path, workers=2, timeout_s=20.0) as verifier:
        verdicts = verifier.verify(items)
        assert len(verifier.worker_pids) == 2
        assert statuses(verifier.verify(items[1:3])) == ["correct", "wrong"]
    assert statuses(verdicts) == [
        "correct", "correct", "wrong", "unparsed", "error", "error", "error", "correct", "correct", "wrong", "correct",
    ]  # fmt: skip
    assert "ValueError: boom" in verdicts[4].detail and "verifier_test_reward.py" in verdicts[4].detail
    assert "0.5" in verdicts[5].detail and "'yes'" in verdicts[6].detail
    assert np.isnan([verdict.reward for verdict in verdicts[4:7]]).all()


def test_neither_queueing_nor_imports_count_as_time(reward_path, tmp_path):
    slow_import = "\nif 'pytest' not in sys.modules:\n    time.sleep(1.5)\n"
    (tmp_path / "verifier_test_reward.py").write_text(REWARD_MODULE + slow_import)
    with Verifier(reward_path, workers=1, timeout_s=1.0) as verifier:
        verdicts = verifier.verify([("sleep 0.3", problem())] * 4)
    assert statuses(verdicts) == ["correct"] * 4


def test_a_worker_killed_from_outside_is_replaced_and_its_item_tried_again(reward_path, tmp_path):
    marker = tmp_path / "marker"

    def kill():
        wait_until(marker.exists)
        os.kill(int(marker.read_text()), signal.SIGKILL)

    with Verifier(reward_path, workers=1, timeout_s=100.0) as verifier:
        killer = threading.Thread(target=kill)
        killer.start()
        verdicts = verifier.verify([("return True", problem()), (f"hang_first_time {marker}", problem())])
        killer.join()
        assert statuses(verdicts) == ["correct", "correct"]
        assert verifier.worker_pids != [int(marker.read_text())]
        os.kill(verifier.worker_pids[0], signal.SIGKILL)  # and an idle one, between two calls
        assert statuses(verifier.verify([("return True", problem())] * 2)) == ["correct", "correct"]


def test_an_item_that_kills_its_worker_twice_is_an_error_and_the_others_are_right(reward_path):
    items = [("return True", problem()), ("die", problem(name="train:9")), ("return True", problem())]
    with Verifier(reward_path, workers=2, timeout_s=20.0) as verifier:
        verdicts = verifier.verify(items)
    assert statuses(verdicts) == ["correct", "error", "correct"]
    assert "exit code 3" in verdicts[1].detail and "'train:9'" in verdicts[1].detail


def test_an_item_is_tried_again_on_a_fresh_worker_though_a_used_one_is_idle(reward_path, tmp_path):
    with Verifier(reward_path, workers=2, timeout_s=1.0) as verifier:
        both = [(f"wait_for {tmp_path}/met", problem()), (f"touch {tmp_path}/met", problem())]  # on one worker each
        assert statuses(verifier.verify(both)) == ["correct", "wrong"]
        assert statuses(verifier.verify([("hang_once_used", problem())])) == ["correct"]


def test_close_leaves_no_process_not_even_one_that_a_reward_has_started(reward_path, tmp_path):
    file = tmp_path / "child"
    with pytest.raises(KeyError), Verifier(reward_path, workers=2, timeout_s=20.0) as verifier:
        assert statuses(verifier.verify([(f"child {file}", problem()), ("return True", problem())])) == ["correct"] * 2
        pids = [*verifier.worker_pids, int(file.read_text())]
        assert len(pids) == 3 and all(map(alive, pids))
        raise KeyError
    wait_until(lambda: not any(map(alive, pids)))
    verifier.close()


@pytest.mark.parametrize("command", ["return True", "sleep 1000"])
def test_no_worker_outlives_a_parent_that_is_killed(command, reward_path, tmp_path):
    program = f"""
        import threading, time
        from spiral_jax.tasks.problem import Problem
        from spiral_jax.verifier.verifier import Verifier
        verifier = Verifier({reward_path!r}, workers=1, timeout_s=1.0)
        items = [("touch {tmp_path}/begun", Problem("p", "?", "")), ({command!r}, Problem("p", "?", ""))]
        threading.Thread(target=verifier.verify, args=(items,)).start()
        while not verifier.worker_pids:
            time.sleep(0.01)
        print(verifier.worker_pids[0], flush=True)
        time.sleep(1000)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], env=environment, stdout=subprocess.PIPE)
    worker = int(parent.stdout.readline())
    wait_until((tmp_path / "begun").exists)
    assert alive(worker)
    parent.kill()
    parent.communicate()
    wait_until(lambda: not alive(worker))


@pytest.mark.parametrize(
    ("at_import", "message"),
    [("1 / 0", "ZeroDivisionError"), ("os._exit(5)", "exit code 5"), ("time.sleep(1000)", "not ready after 2 s")],
)
def test_a_worker_that_cannot_start_is_a_clear_error_and_not_a_hang(at_import, message, reward_path, tmp_path):
    path = pathlib.Path(tmp_path, "verifier_test_reward.py")
    path.write_text(f"{REWARD_MODULE}\nif 'pytest' not in sys.modules:\n    {at_import}\n")
    pool = Pool(reward_path, workers=2, timeout_s=5.0, start_timeout_s=2.0 if "sleep" in at_import else 60.0)
    with pytest.raises(VerifierFailure, match=r"config\.task\.reward = 'verifier_test_reward:reward'") as error:
        pool.run([("return True", problem())] * 2)
    assert message in str(error.value)
    assert pool.pids == []


# What is made of verdicts


def test_the_five_counters_add_up():
    verdicts = [Verdict.of(status) for status in Status for _ in range(len(status.value))]
    assert count_verdicts(verdicts) == {"correct": 7, "wrong": 5, "unparsed": 8, "timeout": 7, "error": 5}
    assert count_verdicts([]) == {"correct": 0, "wrong": 0, "unparsed": 0, "timeout": 0, "error": 0}


def test_too_many_errors_stop_the_run_with_their_share_count_and_cause():
    verdicts = [Verdict.of(Status.CORRECT)] * 17 + [Verdict.of(Status.ERROR, "KeyError: 'a' (my.py:7)")] * 2
    verdicts += [Verdict.of(Status.ERROR, "other")]
    check_error_rate(verdicts, 0.15)  # at the limit, not above
    check_error_rate([], 0.0)
    check_error_rate([Verdict.of(Status.TIMEOUT), Verdict.of(Status.UNPARSED)], 0.0)
    with pytest.raises(VerifierFailure) as error:
        check_error_rate(verdicts, 0.149)
    for part in ("3 of 20", "15.0%", "config.verifier.max_error_rate", "2x", "my.py:7", "config.task.reward"):
        assert part in str(error.value)


def test_answer_classes_are_equal_for_equal_answers():
    def of(text, status):
        return answer_class(text, Verdict.of(status))

    assert of("\\boxed{1/2}", Status.CORRECT) == of("\\boxed{0.5}", Status.CORRECT) == CORRECT_CLASS
    assert of("a \\boxed{ 5 \n cm}", Status.WRONG) == of("b \\boxed{5 cm}", Status.WRONG)
    assert of("\\boxed{5}", Status.WRONG) != of("\\boxed{6}", Status.WRONG)
    assert of("\\boxed{correct}", Status.WRONG) != CORRECT_CLASS
    assert of("\\boxed{9^9}", Status.TIMEOUT) == of("\\boxed{9^9}", Status.WRONG)
    assert of("print(1)", Status.WRONG) == of("print(1)\n", Status.WRONG) != of("print(2)", Status.WRONG)
    assert of("\\boxed{5", Status.UNPARSED) is None and of("\\boxed{5}", Status.ERROR) is None


def test_wrong_answers_that_are_equal_as_mathematics_have_one_number():
    boxes = ["1/2", "7", "0.5", "\\frac{2}{4}", "3", "03", "7.0", None, "x+1", "1+x"]
    texts = ["no answer" if box is None else f"\\boxed{{{box}}}" for box in boxes]
    problems = [Problem(id=name, text="?", answer=answer) for name, answer in (("a", "7"), ("b", "100"))]
    with Verifier("math", workers=1, timeout_s=20.0) as verifier:
        verdicts = verifier.verify([(text, problem) for problem in problems for text in texts])
        first, second = number_classes(verifier, problems, texts * 2, verdicts)
    assert first == [1, 0, 1, 1, 2, 2, 0, None, 3, 3]
    assert second == [1, 2, 1, 1, 3, 3, 2, None, 4, 4]


def test_classes_of_timeouts_and_of_a_reward_function_of_the_users_go_by_spelling():
    problems = [Problem(id="a", text="?", answer="7")]
    texts = ["\\boxed{1/2}", "\\boxed{0.5}", "\\boxed{1/2}", "", "\\boxed{7}"]
    statuses = [Status.WRONG, Status.WRONG, Status.ERROR, Status.UNPARSED, Status.CORRECT]
    for reward, wrong in (("math", Status.TIMEOUT), ("spiral_jax.verifier.rewards:math_reward", Status.WRONG)):
        verdicts = [Verdict.of(wrong if status is Status.WRONG else status) for status in statuses]
        with Verifier(reward, workers=1, timeout_s=20.0) as verifier:
            assert number_classes(verifier, problems, texts, verdicts) == [[1, 2, -1, None, 0]]
            assert not verifier.worker_pids  # nothing was compared


# What a worker may do


def test_a_worker_sees_no_variable_of_the_parent_but_those_that_are_named(reward_path, monkeypatch):
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "JUDGE_KEY"):
        monkeypatch.setenv(name, "seen")
    items = [(f"environment {name}", problem()) for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "JUDGE_KEY")]
    for environment, expected in (((), ["wrong"] * 3), (("JUDGE_KEY", "NOT_SET"), ["wrong", "wrong", "correct"])):
        with Verifier(reward_path, workers=1, timeout_s=20.0, environment=environment) as verifier:
            assert statuses(verifier.verify(items)) == expected


def test_an_answer_that_takes_more_memory_than_a_worker_has_is_its_own_failure_alone(reward_path):
    items = [(f"allocate {size}", problem()) for size in (10**6, 2 * 10**9, 10**6)]
    with Verifier(reward_path, workers=1, timeout_s=20.0, memory_gb=1.0) as verifier:
        verdicts = verifier.verify(items)
        assert verifier.replaced_workers == 0
    assert statuses(verdicts) == ["correct", "error", "correct"] and "MemoryError" in verdicts[1].detail


LOCKED = r"""
import os, pathlib, subprocess, sys, traceback
from spiral_jax.verifier import sandbox
folder = pathlib.Path(sys.argv[1])
sandbox.lock_down()
import json.tool  # installed packages may still be read
attempts = {
    "read": lambda: open(folder / "secret").read(),
    "read_bytes": lambda: open(os.fsencode(folder / "secret")).read(),
    "read_low": lambda: os.open(folder / "secret", os.O_RDONLY),
    "read_etc": lambda: open("/etc/passwd").read(),
    "climb": lambda: open(os.path.join(sys.prefix, "..", "..", "..", "..", "..", "etc", "passwd")).read(),
    "write": lambda: open(folder / "new", "w"),
    "write_package": lambda: open(os.path.join(sys.prefix, "new"), "w"),
    "remove": lambda: os.remove(folder / "secret"),
    "system": lambda: os.system("touch " + str(folder / "new")),
    "program": lambda: subprocess.run(["touch", str(folder / "new")]),
    "fork": lambda: os.fork(),
    "exec": lambda: os.execv("/bin/true", ["true"]),
    "kill": lambda: os.kill(os.getppid(), 0),
    "connect": lambda: __import__("socket").create_connection(("127.0.0.1", 9)),
}
for name, attempt in attempts.items():
    try:
        attempt()
    except PermissionError:
        continue
    print("allowed:", name)
"""


def test_a_locked_worker_reads_packages_alone_and_writes_starts_and_connects_nothing(tmp_path):
    (tmp_path / "secret").write_text("x")
    code = [sys.executable, "-P", "-c", f"import sys; sys.path[:] = {sys.path!r}\n" + LOCKED, str(tmp_path)]
    done = subprocess.run(code, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


def test_a_box_of_a_megabyte_or_of_21_brackets_is_no_answer_unless_it_is_the_reference():
    for depth, expected in ((20, None), (21, Status.UNPARSED)):
        nested = "(" * depth + "x" + ")" * depth
        verdict = exact_verdict(f"\\boxed{{{nested} + {nested}}}", problem())
        assert (verdict and verdict.status) == expected
        assert exact_verdict(f"\\boxed{{{nested}}}", problem(nested)).status is Status.CORRECT
    long = "1" * 10**6
    assert exact_verdict(f"\\boxed{{{long}}}", problem()).status is Status.UNPARSED
    assert exact_verdict(f"\\boxed{{{long}}}", problem(long)).status is Status.CORRECT
    assert exact_verdict("\\boxed{" + "1" * 10_000 + "}", problem()) is None
