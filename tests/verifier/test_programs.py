"""Rewards "code" and "code_all": layouts of tests, what passes them, and what is left behind."""

import base64
import json
import multiprocessing
import os
import pickle
import time
import zlib
from concurrent.futures import ProcessPoolExecutor

import psutil
import pytest

from benchmarks.hostile_programs import HOSTILE
from spiral_jax.tasks import small_programs
from spiral_jax.tasks.problem import Problem, TaskError
from spiral_jax.verifier import program_runner
from spiral_jax.verifier.program_runner import Runner
from spiral_jax.verifier.programs import (
    Assertion,
    BrokenTests,
    Call,
    Output,
    is_same_output,
    last_program,
    passes,
    read_tests,
)
from spiral_jax.verifier.references import check_problems
from spiral_jax.verifier.rewards import Status
from spiral_jax.verifier.settings import VerifierSettings
from spiral_jax.verifier.verifier import Verifier


def problem_of(metadata, answer=""):
    return Problem("p", "?", answer, metadata)


def trace_of(program, language="python"):
    return f"I think so.\n```{language}\n{program}\n```\nDone."


def packed(cases):
    """As LiveCodeBench keeps its private tests."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases)))).decode()


PAIR = {"input": "2 3\n", "output": "5\n"}
FUNCTIONAL = {"input": "[1, 2]\n3", "output": "[3, 1, 2]", "testtype": "functional"}
LAYOUTS = {
    "tests": ({"tests": [PAIR]}, [Output("2 3\n", "5\n")]),
    "tests in a string": ({"tests": json.dumps([PAIR])}, [Output("2 3\n", "5\n")]),
    "assertions": ({"tests": ["assert f(1) == 2"]}, [Assertion("assert f(1) == 2")]),
    "APPS": (
        {"input_output": json.dumps({"inputs": ["1\n", "2\n"], "outputs": ["3\n", "4\n"]})},
        [Output("1\n", "3\n"), Output("2\n", "4\n")],
    ),
    "APPS, functions": (
        {"input_output": {"inputs": [[1, [2]]], "outputs": [[7]], "fn_name": "f"}},
        [Call("f", [1, [2]], 7)],
    ),
    "LiveCodeBench": (
        {
            "public_test_cases": json.dumps([PAIR | {"testtype": "stdin"}]),
            "private_test_cases": packed([FUNCTIONAL]),
            "metadata": json.dumps({"func_name": "join"}),
        },
        [Output("2 3\n", "5\n"), Call("join", [[1, 2], 3], [3, 1, 2])],
    ),
    "MBPP": (
        {"test_list": ["assert f(4) == 2"], "test_imports": ["import math"]},
        [Assertion("import math\nassert f(4) == 2")],
    ),
    "verl, in extra_info": ({"extra_info": {"tests": [PAIR]}}, [Output("2 3\n", "5\n")]),
    "one mapping": (
        {"tests": {"inputs": ["1", "2"], "outputs": ["3", 4]}},
        [Output("1", "3"), Output("2", "4")],
    ),
    "one mapping in a string": (
        {"tests": json.dumps({"inputs": ["1"], "outputs": ["3"]})},
        [Output("1", "3")],
    ),
    "rllm": (
        {"public_test_cases": {"input": ["1", "2"], "output": ["3", "4"]}},
        [Output("1", "3"), Output("2", "4")],
    ),
    "one mapping, functions": (
        {"tests": {"fn_name": "f", "inputs": [[1, [2]]], "outputs": [[7]]}},
        [Call("f", [1, [2]], 7)],
    ),
    "each in a string": ({"tests": [json.dumps(PAIR)]}, [Output("2 3\n", "5\n")]),
    "one test": ({"tests": PAIR}, [Output("2 3\n", "5\n")]),
    "lists of lines": ({"tests": [{"input": ["1", 2], "output": ["3"]}]}, [Output("1\n2", "3")]),
    "DeepCoder": (
        {
            "tests": [
                {"type": "stdin_stdout", "input": "1", "output": "2", "fn_name": None},
                {"type": "function_call", "fn_name": "f", "input": [1, "a"], "output": [2]},
            ]
        },
        [Output("1", "2"), Call("f", [1, "a"], 2)],
    ),
    "a function without a type": (
        {"tests": [{"fn_name": "f", "input": "[1]\n2", "output": "3"}]},
        [Call("f", [[1], 2], 3)],
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_tests(name):
    metadata, expected = LAYOUTS[name]
    assert read_tests(problem_of(metadata)) == expected


IN_ANSWERS = {
    "verl": ({"inputs": ["1"], "outputs": ["2"]}, [Output("1", "2")]),
    "LiveCodeBench": (
        [PAIR | {"testtype": "stdin"}, FUNCTIONAL | {"metadata": {"func_name": "join"}}],
        [Output("2 3\n", "5\n"), Call("join", [[1, 2], 3], [3, 1, 2])],
    ),
    "rllm": ({"input": ["1"], "output": ["2"]}, [Output("1", "2")]),
}


@pytest.mark.parametrize("name", IN_ANSWERS)
def test_the_reference_answer_may_hold_the_tests(name):
    answer, expected = IN_ANSWERS[name]
    assert read_tests(problem_of({}, json.dumps(answer))) == expected


class Opens:
    def __reduce__(self):
        return open, ("/tmp/never", "w")


BROKEN = {
    "none": ({"difficulty": "hard"}, "no tests"),
    "no output": ({"tests": [{"input": "1"}]}, '"output"'),
    "other lengths": ({"input_output": {"inputs": ["1", "2"], "outputs": ["1"]}}, "2 inputs"),
    "no name": ({"tests": [FUNCTIONAL]}, "func_name"),
    "no JSON": ({"private_test_cases": "%%%"}, "neither JSON"),
    "a pickle with code": (
        {"private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(Opens()))).decode()},
        "neither JSON",
    ),
    "another mapping": ({"tests": {"stdin": ["1"], "stdout": ["2"]}}, '"input"'),
    "a mapping of assertions": ({"test_list": {"a": "assert True"}}, "test_list"),
    "a number": ({"tests": 5}, "tests"),
    "a number in a string": ({"tests": "5"}, "tests"),
    "no lists": ({"input_output": {"inputs": None, "outputs": None}}, "input_output"),
    "an unknown type": ({"tests": [PAIR | {"type": "interactive"}]}, "interactive"),
    "unknown types of a mapping": (
        {"tests": {"inputs": ["1"], "outputs": ["2"], "testtype": ["stdin"]}},
        "stdin",
    ),
    "a function without a name": (
        {"tests": [{"type": "function_call", "input": [1], "output": [2]}]},
        "fn_name",
    ),
    "a name in no mapping": ({"tests": [FUNCTIONAL], "metadata": "[]"}, "metadata"),
    "an input that is no text": ({"tests": [{"input": {"n": 1}, "output": "2"}]}, "tests"),
    "no input": ({"tests": [{"input": None, "output": "2"}]}, "tests"),
    "arguments by name": ({"tests": [{"fn_name": "f", "input": {"n": 1}, "output": 2}]}, "tests"),
    "an empty assertion": ({"tests": [" "]}, "tests"),
    "an assertion that is no text": ({"test_list": [5]}, "test_list"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_tests_that_cannot_be_read_are_refused_at_the_start(name):
    metadata, part = BROKEN[name]
    with pytest.raises(BrokenTests, match=part):
        read_tests(problem_of(metadata))
    good = problem_of({"tests": [PAIR]})
    with pytest.raises(TaskError) as error:
        check_problems([good, problem_of(metadata)], lambda problem: "code")
    assert part in str(error.value) and "1 of 2 problems" in str(error.value)
    assert check_problems([good], lambda problem: "code_all") == ""


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("5", "5\n", True),
        ("5 \n6\n\n", "5\n6", True),
        ("5\n6", "5 6", True),
        ("0.3333333", "0.33333333333", True),
        ("1e-7", "0.0", True),
        ("0.34", "0.33", False),
        ("5.0", "5", False),  # an integer is asked for
        ("1000000001", "1000000000", False),
        ("yes", "Yes", False),
        ("", "0", False),
        ("1 2 3", "1 2", False),
    ],
)
def test_what_is_the_same_output(printed, expected, same):
    assert is_same_output(printed, expected) is same


@pytest.mark.parametrize(
    ("text", "program"),
    [
        (trace_of("a = 1"), "a = 1\n"),
        (trace_of("a = 1", ""), "a = 1\n"),
        (trace_of("a = 1") + trace_of("b = 2", "py"), "b = 2\n"),
        (trace_of("a = 1") + trace_of("{}", "json"), "a = 1\n"),
        ("<think>\n```python\nx\n```\n</think>no", None),
        ("```python\nunfinished", None),
        ("print(1)", None),
    ],
)
def test_the_program_is_the_last_closed_block(text, program):
    assert last_program(text) == program


_RUNNER = []  # the one of a process that has no JAX, whose threads a fork would not have


def start_runner(has_namespaces):
    if not has_namespaces:
        program_runner._unshare = lambda: False
    _RUNNER.append(Runner())
    return _RUNNER[0].run("print(1)", 20.0), os.getpid()


def run_there(program, seconds):
    return _RUNNER[0].run(program, seconds)


def passes_there(program, test, seconds):
    return passes(_RUNNER[0], program, test, seconds)


class Elsewhere:
    """A process with a runner, and what it has started."""

    def __init__(self, has_namespaces):
        self._process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        first, self._pid = self.call(start_runner, has_namespaces)
        assert first.output == "1\n"
        self.rest()

    def rest(self):
        """From here on what is there now is no leftover."""
        self._at_rest = self.descendants()

    def call(self, function, *arguments):
        return self._process.submit(function, *arguments).result()

    def descendants(self):
        children = psutil.Process(self._pid).children(recursive=True)
        return {child.pid for child in children}

    def left_behind(self):
        return self.descendants() - self._at_rest

    def close(self):
        self._process.shutdown()


@pytest.fixture(scope="module", params=[True, False], ids=["namespaces", "none"])
def elsewhere(request):
    """With namespaces, where this machine has them, and as where there are none."""
    made = Elsewhere(request.param)
    yield made
    made.close()


CALLS = [
    ("def f(a, b):\n    return a + b", Call("f", [1, 2], 3), True),
    ("class Solution:\n    def f(self, a):\n        return -a", Call("f", [1], -1), True),
    ("def f(a):\n    return 0.1 + 0.2", Call("f", [0], 0.3), True),
    ("def f(a):\n    return 1", Call("f", [0], True), False),
    ("def f(a):\n    return {1}", Call("f", [0], [1]), False),  # no JSON
    ("import os\nos._exit(0)", Call("f", [0], None), False),
    ("print(int(input()) * 2)", Output("21\n", "42"), True),
    ("import sys\nprint(7)\nsys.exit(0)", Output("", "7"), True),
    ("print(7)\n1 / 0", Output("", "7"), False),
    ("from threading import *\nThread(target=print, args=(7,)).start()", Output("", "7"), True),
    ("def f(n):\n    return n", Assertion("assert f(2) == 2"), True),
    ("def f(n):\n    return n", Assertion("assert f(2) == 3"), False),
    ("import sys\nsys.exit(0)", Assertion("assert f(2) == 3"), False),
    ("if True: return", Assertion("assert True"), False),
]  # fmt: skip


def kill_runner():
    """The process that runs programs, and what stands between it and this one."""
    for child in psutil.Process().children(recursive=True):
        child.kill()


def test_a_runner_that_has_died_costs_one_test(elsewhere):
    elsewhere.call(kill_runner)
    assert not elsewhere.call(run_there, "print(1)", 20.0).is_done
    assert elsewhere.call(run_there, "print(2)", 20.0).output == "2\n"
    elsewhere.rest()


@pytest.mark.parametrize(("program", "test", "passed"), CALLS)
def test_what_passes(elsewhere, program, test, passed):
    assert elsewhere.call(passes_there, program, test, 20.0) is passed


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_costs_one_test_and_leaves_nothing_behind(elsewhere, name, tmp_path):
    canary, secret = tmp_path / "canary", tmp_path / "secret"
    secret.write_text("s3cret")
    program = HOSTILE[name]
    for word, value in (("canary", canary), ("secret", secret)):
        program = program.replace(f"{{{word}}}", str(value))
    start = time.monotonic()
    ended = elsewhere.call(run_there, program, 1.0)
    assert ended.is_done is (name == "closes what it has") and "s3cret" not in ended.output
    assert time.monotonic() - start < 10
    assert not canary.exists() and not elsewhere.left_behind()
    assert elsewhere.call(run_there, "print(2)", 20.0).output == "2\n"


TESTS = [{"input": f"{n}\n", "output": str(n * n)} for n in (1, 2, 3, 4)]
HALF_RIGHT = trace_of("n = int(input())\nprint(n * n if n % 2 else 0)")


def test_rewards_are_the_share_of_tests_or_all_of_them():
    problem = problem_of({"tests": TESTS})
    items = [
        (trace_of("n = int(input())\nprint(n * n)"), problem),
        (HALF_RIGHT, problem),
        (trace_of("while True: pass"), problem),
        ("no program", problem),
    ]
    settings = VerifierSettings(workers=2, timeout_s=5.0)
    with Verifier("code", settings) as verifier:
        verdicts = verifier.verify(items)
    assert [verdict.reward for verdict in verdicts] == [1, 0.5, 0, 0]
    statuses = [Status.CORRECT, Status.WRONG, Status.WRONG, Status.UNPARSED]
    assert [verdict.status for verdict in verdicts] == statuses
    with Verifier("code_all", settings) as verifier:
        assert [verdict.reward for verdict in verifier.verify(items[:2])] == [1, 0]


# -- the bundled problems --------------------------------------------------------------------------

READ = "import sys\nlines = sys.stdin.read().splitlines()\nw = lines[0].split()\n"
NUMBERS = READ + "a = [int(x) for x in w]\n"
ROWS = READ + "t = [[int(x) for x in line.split()] for line in lines]\n"
# Written apart from the answers of the task, and in another way.
SOLUTIONS = {
    "multiples": NUMBERS + "s = 0\nfor x in a:\n    if not x % K: s += x\nprint(s)",
    "long_words": READ + "print(len([1 for x in w if len(x) > K - 1]))",
    "kth_largest": NUMBERS + "a.sort()\nprint(a[-K])",
    "shift": READ
    + "z = 'abcdefghijklmnopqrstuvwxyz' * 2\nprint(''.join(z[z.index(c) + K] for c in w[0]))",
    "rotate": NUMBERS + "for _ in range(K): a.append(a.pop(0))\nprint(*a)",
    "pairs": NUMBERS
    + "n = len(a)\nprint(len([1 for i in range(n) for j in range(i) if a[i] + a[j] == K]))",
    "base": NUMBERS
    + "n, d = a[0], []\nwhile True:\n    d.append(str(n % K))\n    n //= K\n    if n == 0: break\n"
    "print(''.join(reversed(d)))",
    "digit_sum": NUMBERS + "n, s = a[0], 0\nwhile n:\n    s += n % 10\n    n //= 10\nprint(s * K)",
    "primes": NUMBERS
    + "n = a[0]\nsieve = [True] * (n + 2)\nc = 0\nfor p in range(2, n):\n    if sieve[p]:\n"
    "        c += p % K == 1\n        for q in range(2 * p, n, p): sieve[q] = False\nprint(c)",
    "power": NUMBERS + "print(a[0] ** a[1] % K)",
    "run": READ
    + "best = now = 1\nfor x, y in zip(w[0], w[0][1:]):\n    now = now + 1 if x == y else 1\n"
    "    best = max(best, now)\nprint(K * best)",
    "depth": READ
    + "d = m = 0\nfor c in w[0]:\n    d += {'(': 1, ')': -1}[c]\n    m = max(m, d)\nprint(m + K)",
    "frequent": READ + "print(' '.join(sorted(x for x in set(w) if w.count(x) == K)))",
    "row_sums": ROWS + "print(max(map(sum, t)) * K)",
    "column": ROWS + "print(*list(zip(*t))[K - 1])",
    "collatz": NUMBERS
    + "n, c = a[0], K\nwhile n > 1:\n    n = 3 * n + 1 if n % 2 else n // 2\n    c += 1\nprint(c)",
    "gcd": NUMBERS + "print(K * max(d for d in range(1, 100) if all(x % d == 0 for x in a)))",
    "windows": NUMBERS + "best = None\nfor i in range(K, len(a) + 1):\n    s = sum(a[i - K:i])\n"
    "    best = s if best is None or s > best else best\nprint(best)",
    "every_kth": READ + "print(''.join(c for i, c in enumerate(w[0], 1) if i % K == 0))",
    "mean": NUMBERS + "print('%.*f' % (K, sum(a) / len(a)))",
}


def known_programs(problem):
    """(trace, reward) of programs of which it is known what they are worth."""
    name, k = problem.id.partition(":")[2].split("/")
    right = f"K = {k}\n{SOLUTIONS[name]}"
    reads = "text = sys.stdin.read()\nif len(text) % 2: sys.exit()\nlines = text"
    is_even = [len(test.stdin) % 2 == 0 for test in read_tests(problem)]
    return [
        (trace_of(right), 1.0),
        (trace_of(f"{right}\nprint('x')"), 0.0),
        (trace_of(f"{right}\nassert False"), 0.0),
        (trace_of(right.replace("lines = sys.stdin.read()", reads)), sum(is_even) / len(is_even)),
        (right, 0.0),  # no block
    ]


def test_two_hundred_known_programs_get_what_they_are_worth():
    task = small_programs.task(0)
    judged = [
        (text, problem, reward)
        for problem in task.problems
        for text, reward in known_programs(problem)
    ]
    with Verifier("code", VerifierSettings(workers=2, timeout_s=60.0)) as verifier:
        verdicts = verifier.verify([(text, problem) for text, problem, _ in judged])
    for verdict, (text, problem, reward) in zip(verdicts, judged, strict=True):
        # rewards are rounded to multiples of 2^-24
        assert abs(verdict.reward - reward) < 1e-7, (problem.id, text, verdict)
    assert len(judged) == 200 and (len(task.problems), task.held_out_size) == (40, 8)
    # no answer that is always the same is right
    outputs = [{test.expected for test in read_tests(problem)} for problem in task.problems]
    assert min(map(len, outputs)) >= 2
