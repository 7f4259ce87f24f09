"""The verifier's child processes: order, time-outs, deaths, replacements, and what each may do."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
from small_verifier import (
    REWARD_MODULE,
    alive,
    make_verifier,
    problem,
    statuses,
    wait_until,
    worker_pids,
)

from spiral_jax.tasks.problem import Problem
from spiral_jax.verifier.pool import Pool
from spiral_jax.verifier.rewards import Status, Verdict, exact_verdict
from spiral_jax.verifier.settings import VerifierSettings
from spiral_jax.verifier.verifier import VerifierFailure

# Processes


def test_integer_answers_start_no_workers():
    items = [("\\boxed{42}", problem()), ("\\boxed{41}", problem()), ("42", problem())]
    with make_verifier("math", workers=2) as verifier:
        verdicts = verifier.verify(items)
        assert verifier.verify([]) == []
        assert worker_pids() == []
    assert verdicts == [
        Verdict(1.0, Status.CORRECT),
        Verdict(0.0, Status.WRONG),
        Verdict(0.0, Status.UNPARSED),
    ]


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
    with make_verifier("math", timeout_s=2.0) as verifier:
        verdicts = verifier.verify(items)
        pids = worker_pids()
    assert statuses(verdicts) == [
        "timeout",
        "correct",
        "correct",
        "wrong",
        "error",
        "unparsed",
        "correct",
    ]
    np.testing.assert_equal([verdict.reward for verdict in verdicts], [0, 1, 1, 0, np.nan, 0, 1])
    assert len(pids) == 1 and not alive(pids[0])


def test_verdicts_of_a_users_reward_keep_the_order_and_report_errors(reward_path, tmp_path):
    late = tmp_path / "late"
    echo = Problem("e", "?", "é\n" * 200_000, {"x": [1, None]})
    items = [(f"wait_for {late}", problem())]  # ends only after the next-to-last item
    items += [("return True", problem()), ("return 0", problem()), ("return None", problem())]
    items += [("raise boom", problem()), ("return 1.5", problem()), ("return 'yes'", problem())]
    items += [("echo " + echo.answer, echo), ("modules", problem()), (f"touch {late}", problem())]
    items += [("return 1", problem()), ("return (0.25, 'é')", problem())]
    with make_verifier(reward_path, workers=2) as verifier:
        verdicts = verifier.verify(items)
        assert len(worker_pids()) == 2
        assert statuses(verifier.verify(items[1:3])) == ["correct", "wrong"]
    expected = (
        "correct correct wrong unparsed error error error correct correct wrong correct wrong"
    )
    assert statuses(verdicts) == expected.split()
    assert (
        "ValueError: boom" in verdicts[4].detail and "verifier_test_reward.py" in verdicts[4].detail
    )
    assert (verdicts[-1].reward, verdicts[-1].answer) == (0.25, "é")
    assert "1.5" in verdicts[5].detail and "'yes'" in verdicts[6].detail
    assert np.isnan([verdict.reward for verdict in verdicts[4:7]]).all()


def test_neither_queueing_nor_imports_count_as_time(reward_path, tmp_path):
    slow_import = "\nif 'pytest' not in sys.modules:\n    time.sleep(1.5)\n"
    (tmp_path / "verifier_test_reward.py").write_text(REWARD_MODULE + slow_import)
    with make_verifier(reward_path, timeout_s=1.0) as verifier:
        verdicts = verifier.verify([("sleep 0.3", problem())] * 4)
    assert statuses(verdicts) == ["correct"] * 4


def test_a_worker_killed_from_outside_is_replaced_and_its_item_tried_again(reward_path, tmp_path):
    marker = tmp_path / "marker"

    def kill():
        wait_until(marker.exists)
        os.kill(int(marker.read_text()), signal.SIGKILL)

    with make_verifier(reward_path, timeout_s=100.0) as verifier:
        killer = threading.Thread(target=kill)
        killer.start()
        verdicts = verifier.verify(
            [("return True", problem()), (f"hang_first_time {marker}", problem())]
        )
        killer.join()
        assert statuses(verdicts) == ["correct", "correct"]
        assert worker_pids() != [int(marker.read_text())]
        os.kill(worker_pids()[0], signal.SIGKILL)  # and an idle one, between two calls
        assert statuses(verifier.verify([("return True", problem())] * 2)) == ["correct", "correct"]


def test_an_item_that_kills_its_worker_twice_is_an_error_and_the_others_are_right(reward_path):
    items = [
        ("return True", problem()),
        ("die", problem(name="train:9")),
        ("return True", problem()),
    ]
    with make_verifier(reward_path, workers=2) as verifier:
        verdicts = verifier.verify(items)
    assert statuses(verdicts) == ["correct", "error", "correct"]
    assert "exit code 3" in verdicts[1].detail and "'train:9'" in verdicts[1].detail


def test_an_item_is_tried_again_on_a_fresh_worker_though_a_used_one_is_idle(reward_path, tmp_path):
    with make_verifier(reward_path, workers=2, timeout_s=1.0) as verifier:
        # on one worker each
        both = [
            (f"wait_for {tmp_path}/met", problem()),
            (f"touch {tmp_path}/met", problem()),
        ]
        assert statuses(verifier.verify(both)) == ["correct", "wrong"]
        assert statuses(verifier.verify([("hang_once_used", problem())])) == ["correct"]


def test_a_slow_reward_of_ones_own_is_no_wrong_answer(reward_path):
    with make_verifier(reward_path, workers=2, timeout_s=0.5) as verifier:
        verdicts = verifier.verify([("sleep 1000", problem()), ("return 0.5", problem())])
    assert statuses(verdicts) == ["timeout", "wrong"]
    assert np.isnan(verdicts[0].reward) and "verifier.timeout_s = 0.5" in verdicts[0].detail


def test_what_a_reward_prints_has_its_name_in_front_of_every_line(reward_path, capfd):
    items = [("print one\ntwo", problem()), ("print three", problem()), ("return 1", problem())]
    with make_verifier(reward_path) as verifier:
        assert statuses(verifier.verify(items)) == ["correct"] * 3
    out, err = capfd.readouterr()
    lines = [f"[{reward_path}] {word}" for word in ("one", "two", "three")]
    assert out.splitlines() == lines
    assert err.splitlines() == [f"[{reward_path}] to stderr"] * 2


def test_close_leaves_no_process_not_even_one_that_a_reward_has_started(reward_path, tmp_path):
    file = tmp_path / "child"
    with pytest.raises(KeyError), make_verifier(reward_path, workers=2) as verifier:
        assert (
            statuses(verifier.verify([(f"child {file}", problem()), ("return True", problem())]))
            == ["correct"] * 2
        )
        pids = [*worker_pids(), int(file.read_text())]
        assert len(pids) == 3 and all(map(alive, pids))
        raise KeyError
    wait_until(lambda: not any(map(alive, pids)))
    verifier.close()


@pytest.mark.parametrize("command", ["return True", "sleep 1000"])
def test_no_worker_outlives_a_parent_that_is_killed(command, reward_path, tmp_path):
    program = f"""
        import time
        from spiral_jax.tasks.problem import Problem
        from spiral_jax.verifier.settings import VerifierSettings
        from spiral_jax.verifier.verifier import Verifier
        verifier = Verifier({reward_path!r}, VerifierSettings(workers=1, timeout_s=1.0))
        problem = Problem("p", "?", "")
        verifier.verify([("touch {tmp_path}/begun", problem), ({command!r}, problem)])
        time.sleep(1000)
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
    }
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], env=environment)
    wait_until((tmp_path / "begun").exists)
    (worker,) = worker_pids(parent.pid)
    parent.kill()
    parent.wait()
    wait_until(lambda: not alive(worker))


@pytest.mark.parametrize(
    ("at_import", "message"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("os._exit(5)", "exit code 5"),
        ("os.environ['NOT_SET_HERE']", "config.verifier.environment"),
        ("time.sleep(1000)", "not ready after 2 s"),
    ],
)
def test_a_worker_that_cannot_start_is_a_clear_error_and_not_a_hang(
    at_import, message, reward_path, tmp_path
):
    path = pathlib.Path(tmp_path, "verifier_test_reward.py")
    path.write_text(f"{REWARD_MODULE}\nif 'pytest' not in sys.modules:\n    {at_import}\n")
    patience_s = 2.0 if "sleep" in at_import else 60.0
    pool = Pool(reward_path, VerifierSettings(workers=2, timeout_s=5.0), patience_s)
    with pytest.raises(
        VerifierFailure, match=r"config\.task\.reward = 'verifier_test_reward:reward'"
    ) as error:
        pool.run([("return True", problem())] * 2)
    assert message in str(error.value)
    assert worker_pids() == []


# What a worker may do


def test_a_worker_sees_no_variable_of_the_parent_but_those_that_are_named(reward_path, monkeypatch):
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "JUDGE_KEY"):
        monkeypatch.setenv(name, "seen")
    items = [
        (f"environment {name}", problem())
        for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "JUDGE_KEY")
    ]
    for environment, expected in (
        ((), ["wrong"] * 3),
        (("JUDGE_KEY", "NOT_SET"), ["wrong", "wrong", "correct"]),
    ):
        with make_verifier(reward_path, environment=environment) as verifier:
            assert statuses(verifier.verify(items)) == expected


def test_an_answer_that_takes_more_memory_than_a_worker_has_is_its_own_failure_alone(reward_path):
    items = [(f"allocate {size}", problem()) for size in (10**6, 2 * 10**9, 10**6)]
    with make_verifier(reward_path, memory_gb=1.0) as verifier:
        assert statuses(verifier.verify(items[:1])) == ["correct"]
        before = worker_pids()
        verdicts = verifier.verify(items)
        assert worker_pids() == before  # the worker lives on
    assert (
        statuses(verdicts) == ["correct", "error", "correct"]
        and "MemoryError" in verdicts[1].detail
    )


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
    "climb": lambda: open(os.path.join(sys.prefix, *[".."] * 5, "etc", "passwd")).read(),
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
    code = [
        sys.executable,
        "-P",
        "-c",
        f"import sys; sys.path[:] = {sys.path!r}\n" + LOCKED,
        str(tmp_path),
    ]
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
