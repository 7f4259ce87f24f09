"""Which answers are the same answer, by mathematics or by spelling."""

import pathlib
import subprocess
import sys

import pytest

from spiral_jax.evaluation.answers import CORRECT_CLASS, answer_class, number_classes
from spiral_jax.tasks.problem import Problem
from spiral_jax.verifier.rewards import Status, Verdict
from spiral_jax.verifier.settings import VerifierSettings
from spiral_jax.verifier.verifier import Verifier

VERIFIER = VerifierSettings(workers=1, timeout_s=20.0)


def test_answer_classes_are_equal_for_equal_answers():
    def of(text, status):
        return answer_class(text, Verdict.of(status))

    assert of("\\boxed{1/2}", Status.CORRECT) == of("\\boxed{0.5}", Status.CORRECT) == CORRECT_CLASS
    assert of("a \\boxed{ 5 \n cm}", Status.WRONG) == of("b \\boxed{5 cm}", Status.WRONG)
    assert of("\\boxed{5}", Status.WRONG) != of("\\boxed{6}", Status.WRONG)
    assert of("\\boxed{correct}", Status.WRONG) != CORRECT_CLASS
    assert of("\\boxed{9^9}", Status.TIMEOUT) == of("\\boxed{9^9}", Status.WRONG)
    assert of("print(1)", Status.WRONG) == of("print(1)\n", Status.WRONG)
    assert of("print(1)", Status.WRONG) != of("print(2)", Status.WRONG)
    said = Verdict.of_reward(0.5, "5  cm")
    assert answer_class("no box here", said) == of("\\boxed{5 cm}", Status.WRONG)
    assert answer_class("no box here", Verdict.of_reward(0.5, "")) is None
    assert answer_class("no box here", Verdict.of_reward(1.0, "5")) == CORRECT_CLASS
    assert of("\\boxed{5", Status.UNPARSED) is None and of("\\boxed{5}", Status.ERROR) is None


def test_wrong_answers_that_are_equal_as_mathematics_have_one_number():
    boxes = ["1/2", "7", "0.5", "\\frac{2}{4}", "3", "03", "7.0", None, "x+1", "1+x"]
    texts = ["no answer" if box is None else f"\\boxed{{{box}}}" for box in boxes]
    problems = [
        Problem(id=name, text="?", answer=answer) for name, answer in (("a", "7"), ("b", "100"))
    ]
    with Verifier("math", VERIFIER) as verifier:
        verdicts = verifier.verify([(text, problem) for problem in problems for text in texts])
        first, second = number_classes(verifier, problems, texts * 2, verdicts)
    assert first == [1, 0, 1, 1, 2, 2, 0, None, 3, 3]
    assert second == [1, 2, 1, 1, 3, 3, 2, None, 4, 4]


class NeverAsked(Verifier):
    """Fails if it has anything to compare."""

    def judge(self, items):
        assert not items
        return []


@pytest.mark.parametrize(
    ("reward", "wrong"),
    [("math", Status.TIMEOUT), ("spiral_jax.verifier.rewards:math_reward", Status.WRONG)],
)
def test_classes_of_timeouts_and_of_a_reward_function_of_the_users_go_by_spelling(reward, wrong):
    problems = [Problem(id="a", text="?", answer="7")]
    texts = ["\\boxed{1/2}", "\\boxed{0.5}", "\\boxed{1/2}", "", "\\boxed{7}"]
    statuses = [wrong, wrong, Status.ERROR, Status.UNPARSED, Status.CORRECT]
    verdicts = [Verdict.of(status) for status in statuses]
    with NeverAsked(reward, VERIFIER) as verifier:
        assert number_classes(verifier, problems, texts, verdicts) == [[1, 2, -1, None, 0]]


def test_what_reports_read_of_this_room_does_without_jax():
    rooms = "answers, comparison, measures, results, settings, statistics, tables"
    program = (
        f"import sys; from spiral_jax.evaluation import {rooms}; assert 'jax' not in sys.modules"
    )
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
