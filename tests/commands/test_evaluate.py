"""`python -m spiral_jax.evaluate`: results against a golden file, resume, prints, refusals."""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.image import imread
from scripted_sampler import ScriptedSampler, number_task

from configs import tiny
from spiral_jax import evaluate
from spiral_jax.core.config import ConfigError
from spiral_jax.core.groups import Role
from spiral_jax.evaluation.wave import Evaluator
from spiral_jax.model.tensor_files import WeightsError
from spiral_jax.prompts.scaffold import max_aggregation_prompt
from spiral_jax.run import evaluation_run
from spiral_jax.run.evaluation_run import model_fingerprint
from spiral_jax.run.setup import set_up_evaluation
from spiral_jax.run.start import Start
from spiral_jax.run.workdir import WorkdirError
from spiral_jax.tasks.jsonl import TaskError
from spiral_jax.verifier.choice import RewardChoice

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = pathlib.Path(__file__).parents[1] / "golden_results.json"
PICTURES = {f"{name}.png" for name in ("pass_at_k", "rsa", "tokens", "voting")}
PICTURES |= {name.replace("png", "svg") for name in PICTURES}


def script(role, cursor, k, i):
    """Search trace i of problem c is right if i < c % 4; aggregation traces differ by set."""
    if role is Role.SEARCH:
        not_right = ["\\boxed{8}", "left=1 \\boxed{9}", "left=1..."]
        return "\\boxed{7}" if i < cursor % 4 else not_right[(i + cursor) % 3]
    return "\\boxed{7}" if (k + i + cursor) % 3 else "\\boxed{8}"


def small_config():
    c = tiny.get_config()
    c.search.max_tokens, c.eval.limits = 32, (6, 12)
    c.sampling.rows = 16
    c.eval.problems, c.eval.wave, c.eval.n, c.eval.population, c.eval.set_size = 5, 2, 6, 4, 2
    c.eval.rounds, c.eval.subset_size, c.eval.subsets, c.eval.traces = 2, 3, 2, 2
    return c


def patch_in_script(patch):
    """Puts scripted traces in place of the model's: everything else of the command is real."""

    def set_up(c):
        setup, sampler = set_up_evaluation(c), ScriptedSampler(script)
        return dataclasses.replace(setup, task=number_task(), strategy=None, eval_sampler=sampler)

    patch.setattr(evaluate, "set_up_evaluation", set_up)


@pytest.fixture
def scripted(monkeypatch):
    patch_in_script(monkeypatch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a scripted evaluation, and what it printed."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch_in_script(patch)
        evaluate.evaluate(small_config(), str(workdir))
    return workdir, out.getvalue()


@pytest.fixture
def begun(finished, tmp_path):
    """A copy of that directory."""
    shutil.copytree(finished[0], tmp_path / "run")
    return str(tmp_path / "run")


def test_results_are_those_of_the_golden_file(finished):
    """Layout and numbers are an interface.

    When they change on purpose, raise `results.VERSION` (if a field goes or means something else)
    and copy this run's results.json over the golden file.
    """
    workdir, _ = finished
    results = json.loads((workdir / "results.json").read_text())
    assert_equal(results, json.loads(GOLDEN.read_text()), "results")
    assert results["version"] == 1


def test_an_evaluation_prints_its_waves_examples_and_table(finished):
    workdir, printed = finished
    files = {"config.json", "waves.jsonl", "results.json"} | PICTURES
    assert {path.name for path in workdir.iterdir()} == files
    for part in (
        "5 problems",
        "pass@6",
        "maj@4",
        "aggregated pass@1 (n=6, S=3, M=2)",
        "population 4, set 2",
        "rescue",
        "wave 3 of 3",
        "--- search prompt",
        "--- aggregation trace",
        "--- verdict on that aggregation trace: ",
        str(workdir / "results.json"),
    ):
        assert part in printed, part
    assert "nan" not in printed.lower() and "None" not in printed


def assert_equal(found, golden, where):
    """The same keys in the same order, the same values; floats to a relative 1e-9."""
    if isinstance(golden, dict):
        assert list(found) == list(golden), where
        for key in golden:
            assert_equal(found[key], golden[key], f"{where}.{key}")
    elif isinstance(golden, list):
        assert len(found) == len(golden), where
        for i, pair in enumerate(zip(found, golden, strict=True)):
            assert_equal(*pair, f"{where}[{i}]")
    elif isinstance(golden, float):
        assert found == pytest.approx(golden, rel=1e-9, abs=1e-12), where
    else:
        assert found == golden, where


@pytest.mark.parametrize(("told", "torn"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_a_stopped_evaluation_goes_on_and_ends_with_the_same_results(
    told, torn, finished, scripted, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(evaluate, "plot_evaluation", lambda results, directory: [])
    waves, most, real = [], 2, Evaluator.wave

    def counted(evaluator, policy, asked, **rest):
        if len(waves) == most:
            os.kill(os.getpid(), told)
            time.sleep(60)  # is left at once
        waves.append([each.cursor for each in asked])
        return real(evaluator, policy, asked, **rest)

    monkeypatch.setattr(Evaluator, "wave", counted)
    assert evaluate.evaluate(small_config(), str(tmp_path / "stopped")) is told
    word = "interrupted" if told is signal.SIGINT else "preempted"
    assert f"{word}: 2 of 3 waves are kept; the same command goes on" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "stopped").iterdir()} == {
        "config.json",
        "waves.jsonl",
    }
    if torn:  # a kill in the middle of a write
        journal = tmp_path / "stopped" / "waves.jsonl"
        journal.write_bytes(journal.read_bytes()[:-40])

    most = None
    assert evaluate.evaluate(small_config(), str(tmp_path / "stopped")) is None
    assert waves == ([[0, 1], [2, 3], [2, 3], [4]] if torn else [[0, 1], [2, 3], [4]])
    expected = (finished[0] / "results.json").read_bytes()
    assert (tmp_path / "stopped" / "results.json").read_bytes() == expected
    evaluate.evaluate(small_config(), str(tmp_path / "stopped"))
    assert len(waves) == (4 if torn else 3)  # a finished evaluation samples nothing


def test_an_evaluation_whose_start_fails_leaves_nothing(scripted, monkeypatch, tmp_path):
    def broken(start):
        raise WeightsError("half of the file is missing")

    monkeypatch.setattr(Start, "load_policy", broken)
    with pytest.raises(WeightsError):
        evaluate.evaluate(small_config(), str(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


def test_another_config_in_the_same_workdir_is_refused_with_the_difference(scripted, begun):
    other = small_config()
    other.eval.rounds = 1
    with pytest.raises(WorkdirError, match="eval.rounds: 2 -> 1"):
        evaluate.evaluate(other, begun)


def test_another_source_of_the_reward_is_refused_and_an_old_journal_is_not(
    scripted, monkeypatch, begun
):
    for source in ("a" * 64, "b" * 64):
        monkeypatch.setattr(RewardChoice, "fingerprint", lambda choice, source=source: source)
        evaluate.evaluate(small_config(), begun)  # the journal says nothing of a reward
    fresh = str(pathlib.Path(begun).with_name("fresh"))
    evaluate.evaluate(small_config(), fresh)
    monkeypatch.setattr(RewardChoice, "fingerprint", lambda choice: "c" * 64)
    with pytest.raises(WorkdirError, match="wave 0 .* other reward"):
        evaluate.evaluate(small_config(), fresh)


def test_other_weights_or_data_under_the_same_names_are_refused(scripted, monkeypatch, begun):
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "model_fingerprint", lambda directories: "f" * 64)
        with pytest.raises(WorkdirError, match="wave 0 .* other model"):
            evaluate.evaluate(small_config(), begun)

    def set_up(c):
        task = dataclasses.replace(number_task(), fingerprint="others")
        return dataclasses.replace(set_up_evaluation(c), task=task)

    monkeypatch.setattr(evaluate, "set_up_evaluation", set_up)
    with pytest.raises(WorkdirError, match="wave 0 .* other data"):
        evaluate.evaluate(small_config(), begun)


@pytest.mark.parametrize("field", ["init_from", "searcher"])
def test_an_evaluation_does_not_go_on_with_what_another_training_left_at_the_same_place(
    scripted, monkeypatch, tmp_path, field
):
    set_up = evaluate.set_up_evaluation

    def with_trained(c):
        setup = set_up(c)
        named = dataclasses.replace(setup.evaluation, **{field: "runs/tiny@40"})
        return dataclasses.replace(setup, evaluation=named)

    monkeypatch.setattr(evaluate, "set_up_evaluation", with_trained)
    monkeypatch.setattr(evaluate, "plot_evaluation", lambda results, directory: [])
    monkeypatch.setattr(Start, "load_policy", lambda start: {})
    for digest in ("a" * 64, "a" * 64):
        monkeypatch.setattr(evaluation_run, "trained_digest", lambda name, digest=digest: digest)
        evaluate.evaluate(small_config(), str(tmp_path / "run"))
    monkeypatch.setattr(evaluation_run, "trained_digest", lambda name: "b" * 64)
    with pytest.raises(WorkdirError, match=f"wave 0 .* other {field}"):
        evaluate.evaluate(small_config(), str(tmp_path / "run"))
    journal = tmp_path / "run" / "waves.jsonl"  # of an earlier version, which did not note it
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    for row in rows:
        del row[field]
    journal.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate.evaluate(small_config(), str(tmp_path / "run"))


def test_the_fingerprint_of_weights_shows_what_changed_inside_a_file(tmp_path):
    content = np.random.default_rng(0).bytes(3_000_000)
    (tmp_path / "model.safetensors").write_bytes(content)
    before = model_fingerprint([tmp_path])
    assert before == model_fingerprint([tmp_path])
    (tmp_path / "model.safetensors").write_bytes(np.random.default_rng(1).bytes(3_000_000))
    assert model_fingerprint([tmp_path]) != before
    (tmp_path / "model.safetensors").write_bytes(content[:-1])
    assert model_fingerprint([tmp_path]) != before


def assert_pictures(workdir):
    for name in PICTURES:
        if name.endswith(".svg"):
            assert ElementTree.parse(workdir / name).getroot().tag.endswith("}svg")
            continue
        pixels = imread(workdir / name)
        assert min(pixels.shape[:2]) >= 600 and pixels.std() > 0.05


def test_pictures_have_something_on_them(finished):
    assert_pictures(finished[0])


def test_pictures_without_limits_have_something_on_them(scripted, tmp_path):
    c = small_config()
    c.eval.limits = ()
    evaluate.evaluate(c, str(tmp_path / "run"))
    assert_pictures(tmp_path / "run")


def test_set_up_sizes_prompts_for_the_largest_sets():
    c, room = tiny.get_config(), {}
    for size in (4, 8):
        c.eval.set_size = size
        setup = set_up_evaluation(c)
        longest = max_aggregation_prompt(
            setup.scaffold,
            size=size,
            candidate_tokens=c.search.max_tokens,
            problem_tokens=c.prompt.max_problem_tokens,
        )
        room[size] = setup.eval_sampler.schedule.prompts[-1]
        assert longest - 1 <= room[size]
    assert room[4] < room[8]


def test_set_up_needs_no_training_data(tmp_path):
    held_out = tmp_path / "test.jsonl"
    held_out.write_text('{"problem": "left=1", "answer": "7"}\n')
    c = tiny.get_config()
    c.task.name, c.task.eval_path, c.eval.problems = "jsonl", str(held_out), 1
    c.task.train_path = "/no/such/file"
    setup = set_up_evaluation(c)
    assert setup.task.held_out(0).answer == "7"
    c.eval.problems = 2
    with pytest.raises(ConfigError, match="the task has 1 held-out problems"):
        set_up_evaluation(c)
    held_out.write_text("")
    with pytest.raises(TaskError, match="test.jsonl: it is empty"):
        set_up_evaluation(c)


def test_without_a_trained_adapter_none_is_part_of_what_is_evaluated():
    c = tiny.get_config()
    c.model.lora_rank, c.model.param_dtype = 4, "bfloat16"
    setup = set_up_evaluation(c)
    assert setup.model.lora_rank == 0 and setup.model.param_dtype == "bfloat16"


def command(*arguments):
    program = [sys.executable, "-m", "spiral_jax.evaluate"]
    return subprocess.run(
        [*program, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600
    )


@pytest.mark.slow
def test_the_bundled_model_is_evaluated_and_compared_as_a_user_would(tmp_path):
    done = command(
        "--config=configs/tiny.py",
        "--config.sampling.rows=16",
        "--config.eval.problems=4",
        "--config.eval.wave=2",
        "--config.eval.n=4",
        "--config.eval.subsets=1",
        "--config.eval.traces=1",
        "--config.eval.population=4",
        "--config.eval.set_size=4",
        "--config.eval.rounds=1",
        f"--workdir={tmp_path / 'a'}",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert results["measures"]["pass_at_k"][3]["count"] == 4
    assert results["counts"]["search"]["unparsed"] == 0
    paths = [str(tmp_path / "a" / "results.json")] * 2
    compared = command("--compare", *paths, f"--workdir={tmp_path / 'c'}")
    assert compared.returncode == 0, compared.stderr[-3000:]
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"comparison.json"} | PICTURES
