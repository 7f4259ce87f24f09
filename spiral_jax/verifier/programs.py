r"""Rewards "code" and "code_all": programs in Python, run on the tests of their problem.

The program is the last fenced block of a trace. "code" is the share of tests that it passes,
"code_all" is 1 if it passes all of them, else 0. A problem's tests are in its columns, in one of
these layouts, all of which may also be JSON in a string:

    tests               [{"input", "output"}, ...], or assertions in Python
    input_output        {"inputs": [..], "outputs": [..], "fn_name"?} (APPS, TACO); as the reference
                        answer too, as verl's files have it
    public_test_cases, private_test_cases
                        [{"input", "output", "testtype"}, ...] (LiveCodeBench), the private ones
                        packed or not; for functions, metadata has func_name, of the problem or of
                        each test; as the reference answer too
    test_list           assertions, behind test_imports or test_setup_code (MBPP)

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
    for name in ("tests", "public_test_cases", "private_test_cases"):
        for case in _plain(name, columns.get(name) or []):
            yield _read_case(name, case, columns)
    if columns.get("input_output"):
        yield from _read_pairs(_plain("input_output", columns["input_output"]))
    before = columns.get("test_imports") or columns.get("test_setup_code") or ""
    if isinstance(before, list):
        before = "\n".join(before)
    for code in _plain("test_list", columns.get("test_list") or []):
        yield Assertion(f"{before}\n{code}")


def _read_answer(problem: Problem) -> Iterator[Test]:
    """Tests in the place of the reference answer."""
    name, answer = "the reference answer", problem.answer
    if not isinstance(answer, str) or answer.lstrip()[:1] not in ("{", "["):
        return
    tests = _plain(name, answer)
    if isinstance(tests, Mapping):
        yield from _read_pairs(tests)
    else:
        for case in tests:
            yield _read_case(name, case, problem.columns)


def _read_case(name: str, case: Any, columns: Mapping[str, Any]) -> Test:
    if isinstance(case, str):
        return Assertion(case)
    if not isinstance(case, Mapping) or "input" not in case or case.get("output") is None:
        raise BrokenTests(f'{name}: a test must have "input" and "output", not {_short(case)}')
    if case.get("testtype") != "functional":
        return Output(str(case["input"]), str(case["output"]))
    about = _plain("metadata", case.get("metadata") or columns.get("metadata") or {})
    function = about.get("func_name")
    if not function:
        raise BrokenTests(f"{name}: a functional test needs func_name in the column metadata")
    arguments = [_plain(name, line) for line in str(case["input"]).splitlines() if line.strip()]
    return Call(function, arguments, _plain(name, case["output"]))


def _read_pairs(pairs: Any) -> Iterator[Test]:
    """APPS's and TACO's {"inputs", "outputs", "fn_name"?}."""
    if not isinstance(pairs, Mapping) or not {"inputs", "outputs"} <= pairs.keys():
        raise BrokenTests(f'input_output must have "inputs" and "outputs", not {_short(pairs)}')
    inputs, outputs, name = pairs["inputs"], pairs["outputs"], pairs.get("fn_name")
    if len(inputs) != len(outputs):
        raise BrokenTests(f"input_output has {len(inputs)} inputs and {len(outputs)} outputs")
    for given, expected in zip(inputs, outputs, strict=True):
        if name:
            # some files have each result in a list of its own
            is_wrapped = isinstance(expected, list) and len(expected) == 1
            yield Call(name, given, expected[0] if is_wrapped else expected)
        else:
            yield Output(_text(given), _text(expected))


def _text(lines: Any) -> str:
    return "\n".join(map(str, lines)) if isinstance(lines, list) else str(lines)


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
