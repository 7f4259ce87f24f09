"""Tasks: problems are a function of the cursor, splits never meet, bad data are named by place."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import reasoning_gym

from spiral_jax.core import config
from spiral_jax.tasks import jsonl, reasoning_gym_task, two_halves
from spiral_jax.tasks.load import TASKS, TaskRow, check_task, load_task
from spiral_jax.tasks.problem import Problem, TaskError

NAN = float("nan")


def write(path, rows) -> str:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return str(path)


@pytest.fixture
def train_path(tmp_path):
    return write(
        tmp_path / "train.jsonl", [{"problem": f"What is {i}?", "answer": i} for i in range(7)]
    )


@pytest.fixture
def eval_path(tmp_path):
    return write(
        tmp_path / "eval.jsonl", [{"question": f"And {i}?", "answer": str(i)} for i in range(3)]
    )


def test_every_epoch_is_a_permutation_and_epochs_and_seeds_differ(train_path):
    task = jsonl.task(train_path, "", 3)
    epochs = [[task.train(epoch * 7 + i).answer for i in range(7)] for epoch in range(20)]
    assert all(sorted(epoch) == [str(i) for i in range(7)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 15  # 7! = 5040 orders
    other = jsonl.task(train_path, "", 4)
    assert [other.train(i).answer for i in range(35)] != sum(epochs[:5], [])


def test_train_is_a_pure_function_of_the_cursor(train_path):
    once, again = jsonl.task(train_path, "", 3), jsonl.task(train_path, "", 3)
    expected = [once.train(i) for i in range(40)]
    for i in np.random.default_rng(0).permutation(40):  # also across epochs, out of order
        assert again.train(int(i)) == expected[i]


def test_a_negative_cursor_is_an_error(train_path):
    with pytest.raises(IndexError, match="-1"):
        jsonl.task(train_path, "", 0).train(-1)


def test_held_out_is_the_second_file_in_order_and_ids_never_meet(train_path, eval_path):
    task = jsonl.task(train_path, eval_path, 0)
    held_out = [task.held_out(i) for i in range(task.held_out_size)]
    assert [p.text for p in held_out] == ["And 0?", "And 1?", "And 2?"]
    ids = [p.id for p in held_out] + [task.train(i).id for i in range(7)]
    assert len(set(ids)) == 10
    assert jsonl.task(train_path, "", 0).held_out_size == 0


def test_gsm8k_layout(tmp_path):
    rows = [
        {"question": "Ann sells 48 clips.", "answer": "She sold 48/2 = <<48/2=24>>24.\n#### 72"},
        {"question": "How many?", "answer": "#### 5 is not the last\n####  -1,234,567 "},
    ]
    task = jsonl.task(write(tmp_path / "t.jsonl", rows), "", 0)
    assert {task.train(0).answer, task.train(1).answer} == {"72", "-1234567"}


def test_answers_keep_their_text_and_numbers_become_text(tmp_path):
    answers = ["\\frac{1}{2}", " 1,000 ", 0, -3, 2.5, "x", "0", 0.00001, 1e22]
    task = jsonl.task(
        write(tmp_path / "t.jsonl", [{"problem": "?", "answer": a} for a in answers]), "", 0
    )
    found = {task.train(i).id: task.train(i).answer for i in range(len(answers))}
    assert [found[f"train:{n}"] for n in range(1, 10)] == [
        "\\frac{1}{2}",
        "1,000",
        "0",
        "-3",
        "2.5",
        "x",
        "0",
        "0.00001",
        "1" + 22 * "0",
    ]


def test_blank_lines_a_byte_order_mark_crlf_and_a_line_separator_in_a_text_are_fine(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"problem": "a", "answer": 1}\r\n\r\n'
        b'{"problem": "b\xe2\x80\xa8c", "answer": 2, "id": "own"}'
    )
    task = jsonl.task(str(path), "", 0)
    problems = sorted((task.train(i) for i in range(2)), key=lambda p: p.answer)
    assert [(p.id, p.text) for p in problems] == [("train:1", "a"), ("train:own", "b\u2028c")]


def test_fingerprint_follows_the_bytes_of_both_files(tmp_path, train_path, eval_path):
    prints = [jsonl.task(train_path, eval_path, seed).fingerprint for seed in (0, 1)]
    assert prints[0] == prints[1]
    prints += [
        jsonl.task(train_path, "", 0).fingerprint,
        jsonl.task(eval_path, train_path, 0).fingerprint,
    ]
    with open(eval_path, "a") as file:
        file.write("\n")
    prints.append(jsonl.task(train_path, eval_path, 0).fingerprint)
    assert len(set(prints)) == 4


def test_all_other_fields_reach_the_reward_and_answers_may_be_several_or_none(tmp_path):
    rows = [
        {"problem": "a", "answer": 1, "id": "x", "tests": ["f(1) == 2"], "level": 3, "nan": NAN},
        {"question": "b", "answer": ["1/2", 0.5], "meta": {"a": [None, True]}},
        {"problem": "c", "question": "kept", "answer": None},
        {"problem": "d"},
    ]
    path = write(tmp_path / "t.jsonl", rows)
    task = jsonl.task(path, path, 0)
    a, b, c, d = (task.held_out(i) for i in range(4))
    assert a.metadata == {"tests": ["f(1) == 2"], "level": 3, "nan": None}
    assert (b.answer, b.answers, b.metadata) == (
        ["1/2", "0.5"],
        ["1/2", "0.5"],
        {"meta": {"a": [None, True]}},
    )
    assert (c.answer, c.metadata) == ("", {"question": "kept"})
    assert (d.answer, d.answers, d.metadata) == ("", [""], {})
    assert len(task.problems) == 8


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"problem": "a", "answer": ', r"t\.jsonl:2: not JSON"),
        ("[1, 2]", r"t\.jsonl:2: a list"),
        ('{"problem": "a", "answer": "  "}', r"t\.jsonl:2: needs \"answer\""),
        ('{"problem": "a", "answer": "work, then\\n####"}', r"t\.jsonl:2: needs \"answer\""),
        (
            '{"problem": "a", "answer": {}}',
            r"t\.jsonl:2: needs \"answer\".*\['answer', 'problem'\]",
        ),
        ('{"problem": "a", "answer": true}', r"t\.jsonl:2: needs \"answer\""),
        ('{"problem": "a", "answer": NaN}', r"t\.jsonl:2: needs \"answer\""),
        ('{"problem": "a", "answer": []}', r"t\.jsonl:2: needs \"answer\""),
        ('{"problem": "a", "answer": [1, null]}', r"t\.jsonl:2: needs \"answer\""),
        ('{"problem": "a", "answer": [[1]]}', r"t\.jsonl:2: needs \"answer\""),
        (
            '{"prompt": "a", "answer": 1}',
            r"t\.jsonl:2: needs \"problem\" or \"question\".*\['answer', 'prompt'\]",
        ),
        ('{"problem": " ", "answer": 1}', r"t\.jsonl:2: needs \"problem\""),
        (
            '{"problem": "a", "answer": 1, "id": "x"}\n{"problem": "b", "answer": 1, "id": "x"}',
            r":3: id .*t\.jsonl:2 too",
        ),
        (
            '{"problem": "\\ud800", "answer": 1}',
            r"t\.jsonl:2: holds what is no Unicode",
        ),
    ],
)
def test_a_bad_line_is_named_with_its_place_and_keys(tmp_path, line, message):
    path = write(tmp_path / "t.jsonl", [{"problem": "fine", "answer": 1}, line])
    with pytest.raises(TaskError, match=message):
        jsonl.task(path, "", 0)


def test_a_line_that_is_not_utf8_a_missing_file_and_an_empty_one_are_errors(tmp_path, train_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"problem": "\xff", "answer": 1}\n')
    with pytest.raises(TaskError, match=r"t\.jsonl:1: not JSON in UTF-8"):
        jsonl.task(str(path), "", 0)
    with pytest.raises(TaskError, match=r"config\.task\.eval_path.*absent\.jsonl"):
        jsonl.task(train_path, str(tmp_path / "absent.jsonl"), 0)
    path.write_bytes(b"\n \n")
    with pytest.raises(TaskError, match="empty"):
        jsonl.task(str(path), "", 0)


def test_reasoning_gym_train_and_held_out_share_no_text():
    task = reasoning_gym_task.task("chain_sum", 0)
    train = {task.train(i).text for i in range(400)}
    held_out = {task.held_out(i).text for i in range(400)}
    assert len(train) > 350 and len(held_out) > 350  # short sums repeat within a split
    assert not train & held_out


def test_reasoning_gym_splits_stay_apart_where_texts_repeat_all_the_time():
    task = reasoning_gym_task.task("coin_flip", 0)
    train = [task.train(i).text for i in range(600)]
    held_out = [task.held_out(i).text for i in range(600)]
    # so disjoint seeds alone would not do
    assert len(set(train)) < 600 and len(set(held_out)) < 600
    assert not set(train) & set(held_out)


def test_reasoning_gym_seeds_of_the_splits_never_overlap():
    task = reasoning_gym_task.task("chain_sum", 5)
    half = []
    for problem_of in (task.train, task.held_out):
        draws = [problem_of(i).metadata for i in [*range(50), 1023, 1024, 2**24 - 1]]
        half.append([d["dataset_seed"] + d["index"] for d in draws])
        assert all(0 <= seed < 2**32 for seed in half[-1])  # what numpy's generators accept
    start = int(np.random.SeedSequence(5).generate_state(1)[0]) * 1024
    assert all((seed - start) % 2**32 < 2**31 for seed in half[0])
    assert all((seed - start) % 2**32 >= 2**31 for seed in half[1])


def test_reasoning_gym_problems_are_a_pure_function_of_seed_and_cursor():
    def problems(seed, order):
        # draws its templates when the data set is made
        task = reasoning_gym_task.task("gsm_symbolic", seed)
        return {i: task.train(i) for i in order}

    forwards, backwards = problems(1, range(30)), problems(1, reversed(range(30)))
    assert forwards == backwards
    assert {p.text for p in forwards.values()}.isdisjoint(
        p.text for p in problems(2, range(30)).values()
    )
    assert len({p.id for p in forwards.values()}) == 30
    prints = [
        reasoning_gym_task.task(g, s).fingerprint
        for g, s in (("gcd", 0), ("gcd", 1), ("lcm", 0), ("gcd", 0))
    ]
    assert len(set(prints)) == 3 and prints[0] == prints[3]


def test_reasoning_gym_metadata_survives_json_and_scores_in_a_process_with_other_string_hashes():
    problem = reasoning_gym_task.task("countdown", 0).train(3)
    plain = json.dumps([problem.id, problem.text, problem.answer, dict(problem.metadata)])
    script = (
        "import json, sys\n"
        "from spiral_jax.tasks.problem import Problem\n"
        "from spiral_jax.tasks.reasoning_gym_task import reward\n"
        "problem = Problem(*json.loads(sys.argv[1]))\n"
        "print(reward(f'so \\\\boxed{{{problem.answer}}}', problem))\n"
        "print(reward('\\\\boxed{1}', problem))\n"
    )
    env = {**os.environ, "PYTHONHASHSEED": "12345"}
    command = [sys.executable, "-c", script, plain]
    root = pathlib.Path(__file__).parents[2]
    out = subprocess.run(command, capture_output=True, text=True, env=env, cwd=root, check=True)
    assert out.stdout.split() == ["True", "False"]


@pytest.mark.parametrize(
    "generator", ["chain_sum", "gsm_symbolic", "prime_factorization", "pool_matrix", "sudoku"]
)
def test_reasoning_gym_reward_is_true_for_the_reference_and_false_for_another(generator):
    task = reasoning_gym_task.task(generator, 0)
    for i in range(5):
        problem = task.held_out(i)
        assert (
            reasoning_gym_task.reward(f"\\boxed{{7}} no: \\boxed{{{problem.answer}}}", problem)
            is True
        )
        assert (
            reasoning_gym_task.reward(
                f"\\boxed{{{problem.answer}}} no: \\boxed{{-12345.5}}", problem
            )
            is False
        )


def gyms_own(problem):
    """The package's data set of a problem with default settings, and its entry there."""
    made = problem.metadata
    dataset = reasoning_gym.create_dataset(made["generator"], seed=made["dataset_seed"], size=1024)
    return dataset, dataset[made["index"]]


def test_reasoning_gym_partial_credit_and_a_raising_scorer_are_wrong_and_no_box_is_none():
    problem = reasoning_gym_task.task("letter_jumble", 0).train(0)
    dataset, entry = gyms_own(problem)
    partly = problem.answer.split()[0] + " xx" * (len(problem.answer.split()) - 1)
    assert 0 < dataset.score_answer(partly, entry) < 1
    assert reasoning_gym_task.reward(f"\\boxed{{{partly}}}", problem) is False

    problem = reasoning_gym_task.task("prime_factorization", 0).train(0)
    dataset, entry = gyms_own(problem)
    with pytest.raises(ValueError):
        dataset.score_answer("The answer is 139", entry)
    assert reasoning_gym_task.reward("\\boxed{The answer is 139}", problem) is False
    assert reasoning_gym_task.reward(f"It is {problem.answer}.", problem) is None


def test_reasoning_gym_reward_reads_the_box_without_its_space_and_text_command():
    problem = reasoning_gym_task.task("coin_flip", 0).train(0)
    for box in (
        problem.answer,
        f" {problem.answer}\n",
        f"\\text{{{problem.answer}}}",
        f" \\text{{ {problem.answer} }}",
    ):
        assert reasoning_gym_task.reward(f"\\boxed{{{box}}}", problem) is True
    assert reasoning_gym_task.reward(f"\\boxed{{{problem.answer}x}}", problem) is False
    assert reasoning_gym_task.reward("\\boxed{ }", problem) is None


def test_reasoning_gym_problem_that_cannot_be_made_again_is_our_error():
    problem = reasoning_gym_task.task("gcd", 0).train(0)
    other = Problem(problem.id, problem.text + "!", problem.answer, problem.metadata)
    with pytest.raises(TaskError, match="not reproducible"):
        reasoning_gym_task.reward("\\boxed{1}", other)


@pytest.mark.parametrize(
    ("generator", "message"),
    [
        ("chain_sums", "Nearest: .*chain_sum"),
        ("word_ladder", "not a function of the seed"),
        ("composite", "default"),
    ],
)
def test_reasoning_gym_generators_that_cannot_be_used_are_named(generator, message):
    with pytest.raises(TaskError, match=f"config.task.generator = '{generator}'.*{message}"):
        reasoning_gym_task.task(generator, 0)


SMALL = {
    "min_numbers": 3,
    "max_numbers": 3,
    "max_value": 9,
    "min_target": 1,
    "max_target": 50,
    "operators": ["+", "*"],
}


def test_a_generators_own_settings_make_its_problems_and_travel_with_them():
    task = reasoning_gym_task.task("countdown", 0, SMALL)
    for i in range(20):
        problem = task.train(i)
        numbers = [int(n) for n in re.findall(r"\d+", problem.text.partition("Final")[0])]
        assert (
            len(numbers) == 4 and max(numbers) <= 50 and re.fullmatch(r"[\d+*() ]+", problem.answer)
        )
        plain = Problem(
            problem.id, problem.text, problem.answer, json.loads(json.dumps(dict(problem.metadata)))
        )
        assert reasoning_gym_task.reward(f"\\boxed{{{problem.answer}}}", plain) is True
        assert reasoning_gym_task.reward("\\boxed{1}", plain) is False
    assert task.fingerprint != reasoning_gym_task.task("countdown", 0).fingerprint


@pytest.mark.parametrize(
    "args, message",
    [
        ({"max_number": 3}, "countdown refuses .*max_number"),
        ({"min_numbers": 1}, "countdown refuses .*greater than 1"),
        ({"seed": 3}, "seed is set.*config.task.seed"),
    ],
)
def test_settings_that_a_generator_does_not_take_are_named(args, message):
    with pytest.raises(TaskError, match=f"config.task.generator_args = .*{message}"):
        reasoning_gym_task.task("countdown", 0, args)


def test_a_generator_with_a_single_problem_says_so():
    task = reasoning_gym_task.task("count_bits", 0, {"min_n": 5, "max_n": 5})
    made = []
    for problem_of in (task.train, task.held_out):
        try:
            made.append(problem_of(0))
        except TaskError as error:
            assert "too few distinct" in str(error)
    assert len(made) == 1  # it belongs to one split, whichever


# ---- from the configuration


def load(c):
    return load_task(c.task, c.seed, c.prompt.system)


def test_load_task_hands_each_task_its_fields(train_path, eval_path):
    c = config.defaults()
    c.seed, c.task.seed, c.task.train_path, c.task.eval_path = 8, 9, train_path, eval_path
    c.task.generator, c.task.generator_args = "lcm", {"max_numbers": 3}

    def same(task, expected):
        assert task.fingerprint == expected.fingerprint and task.reward == expected.reward
        assert [task.train(i) for i in range(20)] == [expected.train(i) for i in range(20)]
        assert task.held_out(1) == expected.held_out(1)

    c.task.name = "jsonl"
    same(load(c), jsonl.task(train_path, eval_path, 8))
    c.task.name = "two_halves"
    same(load(c), two_halves.task(9))
    c.task.name = "reasoning_gym"
    same(load(c), reasoning_gym_task.task("lcm", 9, {"max_numbers": 3}))
    c.task.seed = -1
    with pytest.raises(config.ConfigError, match="config.task.seed = -1"):
        load(c)
    c.task.seed, c.task.name = 0, "gsm8k"
    with pytest.raises(config.ConfigError, match="config.task.name = 'gsm8k'.*jsonl"):
        load(c)


@pytest.mark.parametrize(
    ("fields", "missing"),
    [
        ({"name": "jsonl"}, "train_path"),
        ({"name": "jsonl", "train_path": "t"}, "eval_path"),
        ({"name": "parquet"}, "train_path"),
        ({"name": "parquet", "train_path": "t"}, "eval_path"),
        ({"name": "hf"}, "dataset"),
        ({"name": "hf", "dataset": "d", "split_train": ""}, "split_train"),
        ({"name": "hf", "dataset": "d", "split_eval": ""}, "split_eval"),
        ({"name": "reasoning_gym"}, "generator"),
    ],
)
def test_what_a_task_reads_must_be_named(fields, missing):
    task = config.defaults().task
    task.update(fields)
    refusal = f"config.task.{missing} = '': must be"
    with pytest.raises(config.ConfigError, match=refusal):
        check_task(task, training=True, evaluated=True)
    of_training, of_evaluation = ("train_path", "split_train"), ("eval_path", "split_eval")
    if missing in of_evaluation:  # training alone does without, and the message says so
        with pytest.raises(config.ConfigError, match="eval.problems = 0"):
            check_task(task, training=True, evaluated=True)
        check_task(task, training=True, evaluated=False)
    if missing in of_training:
        task.update({"eval_path": "e"})
        check_task(task, training=False, evaluated=True)
    else:
        task.update({"train_path": "", "split_train": ""})
        with pytest.raises(config.ConfigError, match=refusal):
            check_task(task, training=False, evaluated=True)


@pytest.mark.parametrize("name", ["two_halves", "end_digit", "three_parts"])
def test_a_task_that_is_made_needs_no_field(name):
    task = config.defaults().task
    task.name = name
    check_task(task, training=True, evaluated=True)


def test_an_unknown_task_is_an_error_that_lists_all():
    task = config.defaults().task
    task.name = "gsm8k"
    with pytest.raises(config.ConfigError, match="config.task.name = 'gsm8k'") as error:
        check_task(task, training=True, evaluated=True)
    assert all(name in str(error.value) for name in TASKS)


def test_a_new_task_is_a_file_and_a_row(tmp_path, monkeypatch):
    (tmp_path / "countable.py").write_text(
        "from spiral_jax.tasks.problem import Problem, Task\n"
        "def task(seed, source):\n"
        "    def problem_at(i):\n"
        "        return Problem(f'train:{i}', f'{source} {seed + i}?', str(seed + i))\n"
        "    return Task(problem_at, problem_at, 8, f'countable {seed}')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    row = TaskRow("countable", ("task.seed", "task.dataset"), needs={"dataset": "a word"})
    monkeypatch.setitem(TASKS, "countable", row)
    c = config.defaults()
    c.task.name, c.task.seed = "countable", 30
    with pytest.raises(config.ConfigError, match="config.task.dataset = '': must be a word"):
        check_task(c.task, training=True, evaluated=True)
    c.task.dataset = "What is"
    check_task(c.task, training=True, evaluated=True)
    assert load(c).train(3) == Problem("train:3", "What is 33?", "33")
