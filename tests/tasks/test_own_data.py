"""Data and tasks of the user's: references as they are meant, and mistakes that are named."""

import json

import pytest

from spiral_jax.core import config
from spiral_jax.tasks import jsonl
from spiral_jax.tasks.load import load_task
from spiral_jax.tasks.problem import Problem, TaskError


def parse(*rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    return jsonl.parse("\n".join(lines).encode(), "t.jsonl", "train")


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("48/2 = <<48/2=24>>24.\n#### 72", "72"),
        ("#### 72\n\n", "72"),
        ("so\r\n  ####-1,234,567.50 ", "-1234567.50"),
        ("so\n#### (1,2)", "(1,2)"),
        ("so\n#### 1,2,3", "1,2,3"),
        ("[a] so\n#### 7", "7"),
        # headings and comments, of solutions and rubrics
        ("#### Solution\nThe answer is 3", "#### Solution\nThe answer is 3"),
        ("a #### b", "a #### b"),
        ("so\n##### 7", "so\n##### 7"),
        ('{"tests": "a\\n#### b"}', '{"tests": "a\\n#### b"}'),
    ],
)
def test_gsm8ks_mark_counts_at_the_beginning_of_the_last_line_alone(answer, reference):
    assert parse({"question": "?", "answer": answer})[0].answer == reference


@pytest.mark.parametrize("depth", [600, 3_000, 100_000])
def test_a_line_that_is_nested_too_deep_is_named(depth):
    row = '{"problem": "b", "answer": 2, "x": ' + "[" * depth + "]" * depth + "}"
    with pytest.raises(TaskError, match=r"1 of 2 rows.*\n.*t\.jsonl:2: "):
        parse({"problem": "a", "answer": 1}, row)


@pytest.mark.parametrize("answer", [42, None, 1.5, [42], ["1", None], [], {"value": "42"}])
def test_an_answer_that_is_no_text_is_refused_where_the_problem_is_made(answer):
    with pytest.raises(TaskError) as error:
        Problem("train:7", "What is 6*7?", answer)
    for part in ("train:7", "answer", repr(answer), "string"):
        assert part in str(error.value)


OWN_TASKS = """
import os
from spiral_jax.tasks.problem import TaskError

def raises(seed):
    return open("/no/such/file")

def takes_no_seed():
    pass

def lacks_a_variable(seed):
    return os.environ["NOT_SET_HERE"]

def says_it_itself(seed):
    raise TaskError("data/mine.csv: is empty.")
"""


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("raises", "FileNotFoundError"),
        ("takes_no_seed", "TypeError"),
        ("lacks_a_variable", "NOT_SET_HERE"),
    ],
)
def test_a_task_function_that_fails_is_named_with_its_error(name, part, tmp_path, monkeypatch):
    with pytest.raises(config.ConfigError, match=f"config.task.name = 'own_tasks:{name}'") as error:
        load_own(name, tmp_path, monkeypatch)
    assert part in str(error.value) and "task.seed" in str(error.value)
    assert "config.verifier" not in str(error.value)  # no worker calls it


def test_a_task_functions_own_message_stays_as_it_is(tmp_path, monkeypatch):
    with pytest.raises(TaskError, match=r"^data/mine\.csv: is empty\.$"):
        load_own("says_it_itself", tmp_path, monkeypatch)


def load_own(name, folder, monkeypatch):
    (folder / "own_tasks.py").write_text(OWN_TASKS)
    monkeypatch.syspath_prepend(folder)
    c = config.defaults()
    c.task.name = f"own_tasks:{name}"
    return load_task(c.task, c.seed, c.prompt.system)
