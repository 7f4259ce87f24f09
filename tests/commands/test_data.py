"""Problems from parquet files and data sets, what is there twice, and the paper's files."""

import datetime
import decimal
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from configs import tiny
from spiral_jax import prepare_data
from spiral_jax.core.config import ConfigError
from spiral_jax.run.setup import set_up_training
from spiral_jax.tasks import hub, jsonl, verl_parquet
from spiral_jax.tasks.load import load_task
from spiral_jax.tasks.overlap import describe, find_overlap, normalised
from spiral_jax.tasks.problem import Problem, TaskError
from spiral_jax.verifier.choice import choose_rewards
from spiral_jax.verifier.references import check_problems
from spiral_jax.verifier.settings import VerifierSettings
from spiral_jax.verifier.verifier import Verifier

ROOT = pathlib.Path(__file__).parents[2]


# ---- verl's parquet layout


def row(text="What is 1?", answer="1", index=None, source="gsm8k", system=None):
    messages = [{"role": "system", "content": system}] if system is not None else []
    return {
        "data_source": source,
        "prompt": [*messages, {"role": "user", "content": text}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {"split": "train", "index": index},
    }


def write(path, rows, **options) -> str:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return str(path)


def train_of(task, n):
    """The n training problems in the file's order: their ids end with their numbers."""
    return sorted(
        (task.train(i) for i in range(n)),
        key=lambda p: int(p.id.rpartition("/")[2].rpartition(":")[2]),
    )


def test_rows_become_problems_with_their_source_for_a_users_reward(tmp_path):
    train = write(
        tmp_path / "train.parquet",
        [row(f"What is {i}?", str(i), i) for i in range(5)],
        row_group_size=2,
    )
    held_out = write(tmp_path / "test.parquet", [row("And?", "7"), row("Or?", "\\frac{1}{2}")])
    task = verl_parquet.task(train, held_out, "", 3)
    problems = train_of(task, 5)
    assert [p.id for p in problems] == [f"train:gsm8k/{i}" for i in range(5)]
    assert [(p.text, p.answer) for p in problems] == [(f"What is {i}?", str(i)) for i in range(5)]
    assert problems[2].metadata == {
        "data_source": "gsm8k",
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "2"},
        "extra_info": {"split": "train", "index": 2},
    }
    assert [task.held_out(i).id for i in range(task.held_out_size)] == ["held_out:0", "held_out:1"]
    assert (
        task.held_out(1).answer == "\\frac{1}{2}"
        and task.report == "data: 5 training problems, 2 held-out ones"
    )
    assert [task.train(i).id for i in range(40)] == [
        verl_parquet.task(train, "", "", 3).train(i).id for i in range(40)
    ]
    assert task.fingerprint != verl_parquet.task(train, "", "", 3).fingerprint
    alone = verl_parquet.task("", held_out, "", 0)
    assert (alone.held_out_size, alone.report.split(",")[0]) == (2, "data: 0 training problems")


def test_rows_without_extra_info_have_their_number_and_numbers_become_text(tmp_path):
    rows = [
        {name: value for name, value in row(f"{i}?", i).items() if name != "extra_info"}
        for i in range(3)
    ]
    problems = train_of(verl_parquet.task(write(tmp_path / "t.parquet", rows), "", "", 0), 3)
    assert [(p.id, p.answer) for p in problems] == [
        ("train:0", "0"),
        ("train:1", "1"),
        ("train:2", "2"),
    ]


def test_a_rows_system_message_must_be_the_one_of_the_config(tmp_path):
    path = write(
        tmp_path / "t.parquet",
        [row(system="Be brief.", index=0), row("no system message", index=1)],
    )
    assert [p.text for p in train_of(verl_parquet.task(path, "", "Be brief.", 0), 2)] == [
        "What is 1?",
        "no system message",
    ]
    with pytest.raises(
        TaskError, match=r"t\.parquet, row 0 .*'Be brief.', config\.prompt\.system is ''"
    ):
        verl_parquet.task(path, "", "", 0)


def turns(*roles):
    return row() | {"prompt": [{"role": role, "content": "x"} for role in roles]}


BAD_ROWS = {
    "no text": (row(text=" "), "needs prompt, a non-empty string"),
    "blank answer": (row(answer=""), "needs reward_model.ground_truth"),
    "no source": (row() | {"data_source": None}, "needs data_source"),
    "no messages": (row() | {"prompt": []}, r"one user message.*roles are \[\]"),
    "no prompt": (row() | {"prompt": None}, "one user message"),
    "a dialogue": (turns("user", "assistant", "user"), r"\['user', 'assistant', 'user'\]"),
    "no user": (turns("system"), r"\['system'\]"),
    "the same id": (row(index=0), r"id 'train:gsm8k/0' is that of .*row 0 \(from 0\) too"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_malformed_row_is_named_with_file_and_number(name, tmp_path):
    bad, message = BAD_ROWS[name]
    path = write(tmp_path / "t.parquet", [row(index=0), bad], row_group_size=1)
    with pytest.raises(TaskError, match=rf"t\.parquet, row 1 \(from 0\): .*{message}"):
        verl_parquet.task(path, "", "", 0)


def test_all_failing_rows_are_counted_and_listed_once(tmp_path):
    path = write(
        tmp_path / "t.parquet", [row(index=i, text=" " if i % 2 else "x") for i in range(6)]
    )
    with pytest.raises(TaskError, match=r"3 of 6 rows cannot be used") as raised:
        verl_parquet.task(path, "", "", 0)
    for number in range(6):
        assert str(raised.value).count(f"row {number} (from 0)") == number % 2


def test_of_many_failing_lines_ten_are_shown(tmp_path):
    good = [
        json.dumps({"problem": f"p{i}", "answer": "1", "id": "same" if i < 2 else i})
        for i in range(5)
    ]
    (tmp_path / "t.jsonl").write_text("\n".join([*good, *["{"] * 30]))
    with pytest.raises(
        TaskError, match=r"31 of 35 rows.*\n.*jsonl:2: id 'train:same'.*\n.*jsonl:6: not JSON"
    ) as raised:
        jsonl.task(str(tmp_path / "t.jsonl"), "", 0)
    assert len(str(raised.value).splitlines()) == 12 and str(raised.value).endswith(
        "... and 21 more"
    )


def test_a_prompt_that_is_plain_text_a_missing_column_and_files_that_are_no_parquet_are_errors(
    tmp_path,
):
    with pytest.raises(TaskError, match="row 0 .*one user message"):
        verl_parquet.task(write(tmp_path / "a.parquet", [row() | {"prompt": "What?"}]), "", "", 0)
    flat = write(tmp_path / "b.parquet", [{"problem": "What?", "answer": "1"}])
    with pytest.raises(
        TaskError, match=r"lacks the columns \['prompt', 'data_source'\].*'problem'"
    ):
        verl_parquet.task(flat, "", "", 0)
    nothing = tmp_path / "c.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row()]).slice(0, 0), nothing)
    with pytest.raises(TaskError, match=r"c\.parquet: it is empty"):
        verl_parquet.task(str(nothing), "", "", 0)
    for name, content in (("d.parquet", b""), ("e.parquet", b"PAR1 nothing of the kind PAR1")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TaskError, match=f"{name}: not a readable parquet file"):
            verl_parquet.task(str(tmp_path / name), "", "", 0)
    with pytest.raises(TaskError, match=r"config\.task\.eval_path = .*absent"):
        verl_parquet.task("", str(tmp_path / "absent.parquet"), "", 0)


def test_all_columns_reach_the_reward_but_for_what_json_has_no_form_for(tmp_path):
    when = datetime.datetime(2026, 11, 26, 12, 0)
    more = {"when": when, "price": decimal.Decimal("0.10"), "score": float("nan"), "pixels": b"x"}
    rows = [row(index=i) | more | {"reward_model": None} for i in range(2)]
    rows[1]["extra_info"] = {"split": None, "index": 1}
    path = write(tmp_path / "t.parquet", rows)
    task = verl_parquet.task(path, "", "", 0)
    first, _ = train_of(task, 2)
    assert first.answer == ""
    assert {name: first.metadata[name] for name in ("when", "price", "score")} == {
        "when": "2026-11-26 12:00:00",
        "price": "0.10",
        "score": None,
    }
    assert "pixels" not in first.metadata and "do not reach a reward: pixels" in task.report
    assert json.loads(json.dumps(first.metadata)) == first.metadata


IFEVAL = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"num_words": None}]}
# of a drawing with GSM8K's mark in it, which ends no answer here
DRAWING = {"inputs": ["4\n"], "outputs": ["####\n"]}
# source -> (reference as the file has it, an answer that earns 1, one that earns 0)
OF_SOURCES = {
    "openai/gsm8k": ("so 1,234\n#### 1,234", "\\boxed{1234}", "\\boxed{1235}"),
    "taco": (json.dumps(DRAWING), '```python\nprint("#" * int(input()))\n```', "```\n```"),
    "google/IFEval": (json.dumps(IFEVAL), "yes and no", "yes, no"),
}


def test_each_source_of_a_file_is_judged_by_its_own_reward(tmp_path):
    rows = [
        row(source=source, index=i, answer=answer)
        for i, (source, (answer, _, _)) in enumerate(OF_SOURCES.items())
    ]
    problems = train_of(verl_parquet.task(write(tmp_path / "t.parquet", rows), "", "", 0), 3)
    choice = choose_rewards("", {}, problems)
    assert check_problems(problems, choice.of) == ""
    answers = list(OF_SOURCES.values())
    items = [
        (answers[i][1 + wrong], problem)
        for wrong in (False, True)
        for i, problem in enumerate(problems)
    ]
    with Verifier(choice, VerifierSettings(workers=1, timeout_s=60.0)) as verifier:
        assert [verdict.reward for verdict in verifier.verify(items)] == [1, 1, 1, 0, 0, 0]


def test_a_reference_may_be_columns_of_its_own(tmp_path):
    path = write(tmp_path / "t.parquet", [row(answer=DRAWING)])
    (problem,) = train_of(verl_parquet.task(path, "", "", 0), 1)
    assert json.loads(problem.answer) == DRAWING


def test_sources_without_a_reward_are_counted_and_listed_unless_one_is_named(tmp_path):
    rows = [row(source=source, index=i) for i, source in enumerate(["x", "gsm8k", "x", "y"])]
    c = tiny.get_config()
    c.task.name, c.eval.problems = "parquet", 0
    c.task.train_path = write(tmp_path / "t.parquet", rows)
    with pytest.raises(ConfigError, match=r"3 of 4 problems .* 'x' \(2\), 'y' \(1\)\."):
        set_up_training(c)
    c.task.reward = "math"
    assert set_up_training(c).reward.names == ["math"]


def test_a_run_on_a_mixture_shows_programs_and_texts_in_fences(tmp_path):
    rows = [
        row(source=source, index=i, answer=answer)
        for i, (source, (answer, _, _)) in enumerate(OF_SOURCES.items())
    ]
    c = tiny.get_config()
    c.task.name, c.eval.problems = "parquet", 0
    c.task.train_path = write(tmp_path / "t.parquet", rows)
    c.batch.aggregation_lengths, c.batch.aggregation_groups = (), 0  # derived: with room for fences
    setup = set_up_training(c)
    fenced = {p.metadata["data_source"]: setup.scaffold.fences(p) for p in setup.task.problems}
    assert fenced == {"openai/gsm8k": False, "taco": True, "google/IFEval": True}


def test_problems_that_ask_for_another_form_than_a_box_are_said(tmp_path):
    asks = [
        'Sum? Output the final answer after "####".',
        "The last line is of the form Answer: $Answer (without quotes).",
        'After "####", or in \\boxed{}.',
        "Sum?",
    ]
    path = write(tmp_path / "t.parquet", [row(text, index=i) for i, text in enumerate(asks)])
    problems = train_of(verl_parquet.task(path, "", "", 0), 4)
    assert check_problems(problems, lambda problem: "math").startswith("2 problems such as train:")


# ---- data sets of the Hugging Face Hub


class Rows(list):
    """What `datasets.load_dataset` returns, as far as it is used."""

    column_names = property(lambda self: list(self[0]))


@pytest.fixture
def shelf(monkeypatch):
    """(dataset, subset, split) -> rows of a `datasets` package without a network."""
    kept = {}

    def load_dataset(name, subset, split):
        if (name, subset, split) not in kept:
            raise FileNotFoundError(f"Dataset '{name}' doesn't exist\n on the Hub")
        return Rows(kept[name, subset, split])

    package = types.ModuleType("datasets")
    package.load_dataset = load_dataset
    package.exceptions = types.SimpleNamespace(
        DatasetsError=type("DatasetsError", (Exception,), {})
    )
    monkeypatch.setitem(sys.modules, "datasets", package)
    return kept


def test_two_splits_become_a_task_and_the_columns_are_the_configs(shelf):
    shelf["org/set", None, "train[:4]"] = [{"q": f"{i}?", "a": i, "more": None} for i in range(4)]
    shelf["org/set", None, "test"] = [
        {"q": "x?", "a": "1", "id": "own"},
        {"q": "y?", "a": 0.5, "id": None},
    ]
    task = hub.task("org/set", "", "train[:4]", "test", "q", "a", 2)
    assert [(p.id, p.text, p.answer) for p in train_of(task, 4)] == [
        (f"train:{i}", f"{i}?", str(i)) for i in range(4)
    ]
    assert [problem.metadata for problem in train_of(task, 4)] == [{"more": None}] * 4
    without = hub.task("org/set", "", "train[:4]", "test", "q", "", 2)
    assert without.train(0).answer == "" and "a" in without.train(0).metadata
    assert [(task.held_out(i).id, task.held_out(i).answer) for i in range(2)] == [
        ("held_out:own", "1"),
        ("held_out:1", "0.5"),
    ]
    again = hub.task("org/set", "", "train[:4]", "test", "q", "a", 2)
    assert again.fingerprint == task.fingerprint and [again.train(i) for i in range(9)] == [
        task.train(i) for i in range(9)
    ]
    shelf["org/set", None, "train[:4]"][0]["more"] = 1  # what a reward may read counts too
    assert hub.task("org/set", "", "train[:4]", "test", "q", "a", 2).fingerprint != task.fingerprint
    shelf["org/set", None, "train[:4]"][0]["more"] = None
    shelf["org/set", None, "test"][1]["a"] = 0.25
    assert hub.task("org/set", "", "train[:4]", "test", "q", "a", 2).fingerprint != task.fingerprint
    assert hub.task("org/set", "", "", "test", "q", "a", 2).held_out_size == 2


def test_what_a_data_set_lacks_is_named(shelf, monkeypatch):
    with pytest.raises(
        TaskError,
        match=r"config\.task\.dataset = 'org/no' .*'main'.*doesn't exist on the Hub.*jsonl",
    ):
        hub.task("org/no", "main", "train", "", "q", "a", 0)
    shelf["d", "main", "train"] = [{"q": "1?", "a": "1"}, {"q": "2?", "a": " "}]
    with pytest.raises(TaskError, match=r"config\.task\.answer_column = 'answer': .*\['q', 'a'\]"):
        hub.task("d", "main", "train", "", "q", "answer", 0)
    with pytest.raises(TaskError, match=r"d, train, row 1 \(from 0\): needs a, "):
        hub.task("d", "main", "train", "", "q", "a", 0)
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(
        TaskError, match=r"needs the package datasets.*pip install \"\.\[datasets\]"
    ):
        hub.task("d", "main", "train", "", "q", "a", 0)


def test_the_real_package_reads_a_local_directory_without_a_network(tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason='optional: pip install ".[datasets]"')
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text(
        '{"problem": "1?", "answer": 1}\n{"problem": "2?", "answer": 2}\n'
    )
    (tmp_path / "set" / "test.jsonl").write_text('{"problem": "3?", "answer": 3}\n')
    script = (
        "import sys; from spiral_jax.tasks import hub\n"
        "task = hub.task(sys.argv[1], '', 'train', 'test', 'problem', 'answer', 0)\n"
        "print(sorted(task.train(i).text for i in range(2)), task.held_out(0).answer)\n"
        "absent = (sys.argv[1] + '-no', 'train'), ('org/no-such-set', 'train')\n"
        "for name, split in ((sys.argv[1], 'absent'), *absent):\n"
        "    try: hub.task(name, '', split, '', 'problem', 'answer', 0)\n"
        "    except hub.TaskError as error: print(f'refused: {error}'.replace(chr(10), ' '))\n"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", script, str(tmp_path / "set")]
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=300)
    lines = done.stdout.splitlines()
    assert lines[0] == "['1?', '2?'] 3", done.stderr[-3000:]
    assert len(lines) == 4 and all(
        line.startswith("refused: config.task.dataset = ") for line in lines[1:]
    )


# ---- what is there twice


def test_what_makes_another_problem_stays_and_what_does_not_goes():
    same = ["Find $x^2$ .", "find \\(x^2\\).", "FIND\n\\[x^2\\]\u00a0.", "Ｆｉｎｄ x^2."]
    assert len({normalised(text) for text in same}) == 1
    assert len({normalised(text) for text in ("3+4", "3-4", "34", "3.4", "{3}4", "\\frac34")}) == 6


def test_repeats_and_overlap_are_those_of_a_comparison_of_all_pairs():
    rng = np.random.default_rng(0)

    def random_text():
        return f"{' ' * rng.integers(3)}{'Pp'[rng.integers(2)]}{rng.integers(12)}"

    for _ in range(30):
        texts = [[random_text() for _ in range(rng.integers(12))] for _ in range(2)]
        train, held_out = (
            [Problem(f"{split}:{i}", text, str(rng.integers(2))) for i, text in enumerate(part)]
            for split, part in zip(("train", "held_out"), texts, strict=True)
        )

        def first(problem, among):
            twins = [p for p in among if p.text.strip().lower() == problem.text.strip().lower()]
            return [(problem.id, twins[0].id)] if twins else []

        found = find_overlap(train, held_out)
        for problems, repeats in ((train, found.train_repeats), (held_out, found.held_out_repeats)):
            assert repeats == sum((first(p, problems[:i]) for i, p in enumerate(problems)), [])
        assert found.trained_on == sum((first(p, train) for p in held_out), [])
        answers = {p.id: p.answer for p in train + held_out}
        pairs = found.train_repeats + found.held_out_repeats + found.trained_on
        assert found.contradictions == [
            pair for pair in pairs if answers[pair[0]] != answers[pair[1]]
        ]


def test_the_report_counts_all_and_shows_some():
    train = [Problem(f"train:{i}", "x" if i < 6 else f"x{i}", str(i == 3)) for i in range(1006)]
    held_out = [Problem("held_out:0", "X ", "False"), Problem("held_out:1", "new", "1")]
    lines = describe(find_overlap(train, held_out)).splitlines()
    assert lines[0] == "data: 1,006 training problems, 2 held-out ones"
    repeats, trained_on, contradictions, advice = lines[1:]
    assert repeats.startswith("  5 training problems repeat")
    assert repeats.endswith(": train:1 = train:0, train:2 = train:0, train:3 = train:0, ...")
    assert "1 held-out problems are also trained on: held_out:0 = train:0" in trained_on
    assert "1 of these have another reference answer" in contradictions
    assert contradictions.endswith(": train:3 = train:0") and "as they are" in advice


def test_duplicates_are_used_and_reported_when_a_run_starts(tmp_path):
    lines = [json.dumps({"problem": text, "answer": 1}) + "\n" for text in ("a?", "A ?", "b?")]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    (tmp_path / "test.jsonl").write_text(lines[2])
    c = tiny.get_config()
    c.task.name, c.task.train_path, c.task.eval_path = (
        "jsonl",
        str(tmp_path / "train.jsonl"),
        str(tmp_path / "test.jsonl"),
    )
    task = load(c)
    assert sorted(task.train(i).text for i in range(3)) == ["A ?", "a?", "b?"]
    assert "1 training problems repeat an earlier one: train:2 = train:1" in task.report
    assert "1 held-out problems are also trained on: held_out:1 = train:3" in task.report


# ---- from the configuration


def load(c):
    return load_task(c.task, c.seed, c.prompt.system)


def test_load_task_hands_each_format_its_fields(tmp_path, shelf):
    c = tiny.get_config()
    c.task.name, c.seed, c.prompt.system = "parquet", 5, "Be brief."
    c.task.train_path = write(
        tmp_path / "t.parquet", [row(f"{i}?", "1", i, system="Be brief.") for i in range(6)]
    )
    expected = verl_parquet.task(c.task.train_path, "", "Be brief.", 5)
    assert [load(c).train(i) for i in range(6)] == [expected.train(i) for i in range(6)]
    shelf["org/set", "main", "part"] = [{"q": f"{i}?", "r": i} for i in range(6)]
    shelf["org/set", "main", "rest"] = [{"q": "x?", "r": 1}]
    c.task.update(
        {
            "name": "hf",
            "dataset": "org/set",
            "subset": "main",
            "split_train": "part",
            "split_eval": "rest",
            "problem_column": "q",
            "answer_column": "r",
        }
    )
    expected = hub.task("org/set", "main", "part", "rest", "q", "r", 5)
    assert [load(c).train(i) for i in range(6)] == [expected.train(i) for i in range(6)]
    assert load(c).fingerprint == expected.fingerprint and load(c).held_out(0).text == "x?"


# ---- launch/prepare_data.sh


@pytest.fixture
def paper(shelf):
    """All of the paper's sets, small: one AIME problem is trained on."""
    for name, source in prepare_data.SETS.items():
        rows = [{"problem": f"{name} {i}: $x$?", "answer": i} for i in range(3)]
        shelf[source.dataset, None, source.split] = rows
    shelf["MathArena/aime_2025", None, "train"].append(
        {"problem": "POLARIS_53k 2: x?", "answer": 7}
    )
    return shelf


def test_the_papers_sets_become_files_that_the_jsonl_task_reads_with_a_report(
    paper, tmp_path, capsys
):
    assert prepare_data.prepare(dict.fromkeys(prepare_data.SETS, ""), tmp_path / "data")
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "data" / "report.json").read_text())
    assert report["files"].keys() == prepare_data.SETS.keys()
    for name, entry in report["files"].items():
        content = (tmp_path / "data" / entry["file"]).read_bytes()
        assert (
            entry["sha256"] == hashlib.sha256(content).hexdigest() and entry["sha256"][:16] in out
        )
        assert entry["problems"] == len(content.splitlines()) == (4 if name == "aime_2025" else 3)
    assert report["overlaps"]["aime_2025"]["trained_on"] == [["aime_2025:3", "polaris_53k:2"]]
    assert report["overlaps"]["aime_2025"]["contradictions"] == [["aime_2025:3", "polaris_53k:2"]]
    assert report["overlaps"]["beyond_aime"]["trained_on"] == []
    assert "1 held-out problems are also trained on: aime_2025:3 = polaris_53k:2" in out
    files = [str(tmp_path / "data" / f"{name}.jsonl") for name in ("polaris_53k", "aime_2025")]
    task = jsonl.task(*files, 0)
    assert (
        task.held_out(3) == Problem("held_out:3", "POLARIS_53k 2: x?", "7")
        and "also trained on" in task.report
    )


def test_what_cannot_be_fetched_is_said_and_the_rest_is_made_and_kept(paper, tmp_path, capsys):
    del paper["MathArena/aime_2026", None, "train"]
    wanted = {"aime_2026": "", "beyond_aime": ""}
    assert not prepare_data.prepare(wanted, tmp_path)
    assert (
        "aime_2026: error: config.task.dataset = 'MathArena/aime_2026'" in capsys.readouterr().out
    )
    assert {path.name for path in tmp_path.iterdir()} == {"beyond_aime.jsonl", "report.json"}
    (tmp_path / "beyond_aime.jsonl").write_text('{"id": "mine", "problem": "?", "answer": "1"}\n')
    paper["DIR", None, "train"] = [{"problem": "by hand", "answer": 3}]
    assert prepare_data.prepare({"aime_2026": "DIR", "beyond_aime": ""}, tmp_path)
    entries = json.loads((tmp_path / "report.json").read_text())["files"]
    assert (
        entries["beyond_aime"]["from"] == "kept as it was"
        and entries["beyond_aime"]["problems"] == 1
    )
    assert json.loads((tmp_path / "aime_2026.jsonl").read_text()) == {
        "id": "0",
        "problem": "by hand",
        "answer": "3",
    }


def test_a_malformed_row_leaves_no_file(paper, tmp_path, capsys):
    paper["MathArena/aime_2025", None, "train"][1]["answer"] = None
    assert not prepare_data.prepare({"aime_2025": ""}, tmp_path)
    assert "aime_2025:1 has no answer" in capsys.readouterr().out
    assert not (tmp_path / "aime_2025.jsonl").exists()


def test_an_unknown_set_is_an_error_that_lists_the_known_ones(tmp_path):
    words = [
        sys.executable,
        "-m",
        "spiral_jax.prepare_data",
        f"--out={tmp_path / 'data'}",
        "aime_2024",
    ]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (
        done.returncode != 0
        and "beyond_aime" in done.stdout + done.stderr
        and not (tmp_path / "data").exists()
    )


@pytest.mark.parametrize("out", ["file", "file/data"])
def test_an_out_that_can_be_no_directory_is_an_error_of_one_line(
    out, tmp_path, capsys, monkeypatch
):
    (tmp_path / "file").write_text("kept")
    monkeypatch.setattr(sys, "argv", ["prepare_data", f"--out={tmp_path / out}"])
    with pytest.raises(SystemExit) as ended:
        prepare_data.main()
    assert ended.value.code not in (0, None)
    assert f"--out={tmp_path / out}" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "kept"
