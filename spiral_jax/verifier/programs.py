r"""Rewards "code" and "code_all": programs in Python, run on the tests of their problem.

The program is the last fenced block of a trace. "code" is the share of tests that it passes,
"code_all" is 1 if it passes all of them, else 0. A problem's tests are in its columns, in one of
these layouts, all of which may also be JSON in a string:

    tests               [{"input", "output"}, ...], or assertions in Python; of functions with
                        "fn_name" (DeepCoder)
    input_output        {"inputs": [..], "outputs": [..], "fn_name"?} (APPS, TACO)
    public_test_cases, private_test_cases
                        [{"input", "output", "testtype"}, ...] (LiveCodeBench), the private ones
                        packed or not; for functions, metadata has func_name, of the problem or of
                        each test
    test_list           assertions, behind test_imports or test_setup_code (MBPP)

All but the last may also have each other's form, or be one test, or {"input": [..], "output":
[..]} (rllm); and the reference answer may stand for them, as in verl's files. An input or output
may be a list of lines. What has another layout is refused.

What a program must print is compared line by line, without space at the ends of lines, and numbers
with a point or an exponent up to 1e-6. Expected outputs stay in the worker: a program never sees
them. Assertions it does see, and one that changes what `==` means will pass them: prefer outputs.
"""

from __future__ import annotations

import base64
import json
import math
import pickletools
import re
import secrets
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from spiral_jax.tasks.answer import after_thinking
from spiral_jax.tasks.problem import Problem
from spiral_jax.verifier.program_runner import Runner

_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[ \t]*\n(.*?)^[ \t]*```[ \t]*$", re.M | re.S)
_PYTHON = ("", "python", "python3", "py")
_TEXTS = ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_AROUND_TEXT = ("PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP")
_CLOSE = 1e-6  # relative, or absolute below 1
_FOR_TESTS = 0.9  # share of an answer's time that its tests may take
# what data sets call the types of tests
_OF_STDIN, _OF_FUNCTIONS = ("stdin", "stdin_stdout"), ("functional", "function_call")


class Output(NamedTuple):
    """A program that reads stdin, and what it must print."""

    stdin: str
    expected: str


class Call(NamedTuple):
    """A function, its arguments, and what it must return."""

    name: str
    arguments: list
    expected: Any


class Assertion(NamedTuple):
    """Python behind the program that must not fail."""

    code: str


Test = Output | Call | Assertion


class BrokenTests(ValueError):
    """A problem's tests cannot be read."""


def make_code_reward(timeout_s: float, needs_all: bool) -> Callable[[str, Problem], float | None]:
    """A reward function; its programs run in a process of their own, started with the first one.

    Tests that are not reached in their share of `timeout_s` are failed.
    """
    runner = Runner()

    def reward(text: str, problem: Problem) -> float | None:
        program = last_program(text)
        if program is None:
            return None
        tests, end = read_tests(problem), time.monotonic() + _FOR_TESTS * timeout_s
        passed = 0
        for test in tests:
            left = end - time.monotonic()
            if left > 0 and passes(runner, program, test, left):
                passed += 1
            elif needs_all:
                return 0.0
        return passed / len(tests)

    return reward


def last_program(text: str) -> str | None:
    """The last fenced block of Python, or of no language, behind the last </think>."""
    blocks = _FENCE.findall(after_thinking(text))
    programs = [program for language, program in blocks if language.lower() in _PYTHON]
    return programs[-1] if programs else None


def passes(runner: Runner, program: str, test: Test, seconds: float) -> bool:
    """Whether a program passes a test in so many seconds."""
    if isinstance(test, Output):
        ended = runner.run(program, seconds, test.stdin)
        return ended.is_done and is_same_output(ended.output, test.expected)
    if isinstance(test, Call):
        ended = runner.run(program, seconds, call=(test.name, test.arguments))
        return ended.value is not None and _is_same_value(json.loads(ended.value), test.expected)
    word = secrets.token_hex(16)  # printed last: who leaves before has not passed
    ended = runner.run(f"{program}\n{test.code}\nprint({word!r})\n", seconds)
    return ended.is_done and ended.output.rstrip().endswith(word)


def is_same_output(printed: str, expected: str) -> bool:
    """Whether two outputs are the same up to space at the ends of lines and rounding."""
    if _lines(printed) == _lines(expected):
        return True
    words, others = printed.split(), expected.split()
    return len(words) == len(others) and all(map(_is_same_word, words, others))


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _is_same_word(word: str, other: str) -> bool:
    if word == other:
        return True
    try:
        is_real = not other.lstrip("+-").isdigit()
        return is_real and _is_close(float(word), float(other))
    except ValueError:
        return False


def _is_close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=_CLOSE, abs_tol=_CLOSE)


def _is_same_value(value: Any, expected: Any) -> bool:
    if isinstance(expected, bool) or isinstance(value, bool):
        return value is expected
    if isinstance(expected, float) and isinstance(value, int | float):
        return _is_close(value, expected)
    if isinstance(expected, list) and isinstance(value, list):
        return len(value) == len(expected) and all(map(_is_same_value, value, expected))
    return value == expected


# -- tests of a problem ----------------------------------------------------------------------------


def read_tests(problem: Problem) -> list[Test]:
    """All tests of a problem, in order.

    Raises:
      BrokenTests: it has none, or one of them cannot be read.
    """
    columns = problem.columns
    tests = list(_read_columns(columns)) or list(_read_answer(problem))
    if not tests:
        raise BrokenTests(
            "no tests; they must be in a column tests, input_output, public_test_cases, "
            f"private_test_cases or test_list (columns: {sorted(columns)})"
        )
    return tests


def _read_columns(columns: Mapping[str, Any]) -> Iterator[Test]:
    for name in ("tests", "public_test_cases", "private_test_cases", "input_output"):
        yield from _read_cases(name, columns.get(name) or [], columns)
    before = columns.get("test_imports") or columns.get("test_setup_code") or ""
    if isinstance(before, list):
        before = "\n".join(before)
    for code in _listed("test_list", _plain("test_list", columns.get("test_list") or [])):
        yield _read_assertion("test_list", code, before)


def _read_answer(problem: Problem) -> Iterator[Test]:
    """Tests in the place of the reference answer."""
    answer = problem.answer
    if isinstance(answer, str) and answer.lstrip()[:1] in ("{", "["):
        yield from _read_cases("the reference answer", answer, problem.columns)


def _read_cases(name: str, value: Any, columns: Mapping[str, Any]) -> Iterator[Test]:
    """Of a list of tests, of one test, or of a mapping to a list of inputs and one of outputs."""
    cases = _plain(name, value)
    for case in _split(name, cases) if isinstance(cases, Mapping) else _listed(name, cases):
        yield _read_case(name, case, columns)


def _listed(name: str, value: Any) -> list:
    if not isinstance(value, list):
        raise BrokenTests(f"{name}: must be a list of tests, not {_short(value)}")
    return value


def _split(name: str, cases: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """{"inputs": [..], "outputs": [..], "fn_name"?} as a mapping for each test."""
    for names in (("inputs", "outputs"), ("input", "output")):
        inputs, outputs = map(cases.get, names)
        if not isinstance(inputs, list) or not isinstance(outputs, list):
            continue
        if len(inputs) != len(outputs):
            raise BrokenTests(f"{name} has {len(inputs)} inputs and {len(outputs)} outputs")
        pairs = zip(inputs, outputs, strict=True)
        return [{**cases, "input": given, "output": expected} for given, expected in pairs]
    return [cases]


def _read_case(name: str, case: Any, columns: Mapping[str, Any]) -> Test:
    if isinstance(case, str) and case.lstrip().startswith("{"):
        case = _plain(name, case)
    if isinstance(case, str):
        return _read_assertion(name, case)
    if not isinstance(case, Mapping) or not {"input", "output"} <= case.keys():
        raise BrokenTests(
            f'{name}: a test must have "input" and "output", or several lists of "inputs" and '
            f'"outputs", not {_short(case)}'
        )
    given, expected = case["input"], case["output"]
    function = _function(name, case, columns)
    if not function:
        return Output(_text(name, given), _text(name, expected))
    if isinstance(given, list):
        # some files have each result in a list of its own
        is_wrapped = isinstance(expected, list) and len(expected) == 1
        return Call(function, given, expected[0] if is_wrapped else expected)
    if expected is None:
        raise BrokenTests(f"{name}: a test has no output: {_short(case)}")
    arguments = [_plain(name, line) for line in _text(name, given).splitlines() if line.strip()]
    return Call(function, arguments, _plain(name, expected))


def _function(name: str, case: Mapping[str, Any], columns: Mapping[str, Any]) -> str:
    """The function that a test calls; "" where a program reads stdin."""
    kind = case.get("testtype") or case.get("type")
    if kind and kind not in (*_OF_STDIN, *_OF_FUNCTIONS):
        known = ", ".join((*_OF_STDIN, *_OF_FUNCTIONS))
        raise BrokenTests(f"{name}: a test is of the type {kind!r}; known are {known}")
    if case.get("fn_name") or kind not in _OF_FUNCTIONS:
        return case.get("fn_name") or ""
    about = _plain("metadata", case.get("metadata") or columns.get("metadata") or {})
    if not isinstance(about, Mapping) or not about.get("func_name"):
        raise BrokenTests(
            f"{name}: a test of a function needs fn_name, or func_name in the column metadata"
        )
    return about["func_name"]


def _read_assertion(name: str, code: Any, before: str = "") -> Assertion:
    if not isinstance(code, str) or not code.strip():
        raise BrokenTests(f"{name}: an assertion must be a line of Python, not {_short(code)}")
    return Assertion(f"{before}\n{code}" if before else code)


def _text(name: str, value: Any) -> str:
    """What a program reads or prints: a text, a number, or a list of these, one a line."""
    lines = value if isinstance(value, list) else [value]
    if not all(isinstance(line, str | int | float) for line in lines):
        raise BrokenTests(
            f"{name}: an input or output must be a text, a number or a list of lines, not "
            f"{_short(value)}"
        )
    return "\n".join(map(str, lines))


def _plain(name: str, value: Any) -> Any:
    """What JSON in a string says; other values as they are. LiveCodeBench packs some of them."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        pass
    try:
        return json.loads(_pickled_text(zlib.decompress(base64.b64decode(value, validate=True))))
    except (ValueError, zlib.error) as error:
        raise BrokenTests(f"{name}: neither JSON nor LiveCodeBench's packing of it") from error


def _pickled_text(pickled: bytes) -> str:
    """The string that a pickle holds; it is read and not executed, since others could run code.

    Raises:
      ValueError: it holds something else.
    """
    texts = []
    for operation, argument, _ in pickletools.genops(pickled):
        if operation.name in _TEXTS:
            texts.append(argument)
        elif operation.name not in _AROUND_TEXT:
            raise ValueError(f"a pickle with {operation.name}: only a string is allowed")
    if len(texts) != 1:
        raise ValueError(f"a pickle with {len(texts)} strings: only one is allowed")
    return texts[0]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
