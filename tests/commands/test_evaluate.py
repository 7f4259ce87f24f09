"""`python -m spiral_jax.evaluate`: resume, results.json against a golden file, what it prints,
refusals.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.image import imread
from scripted_sampler import ScriptedSampler, number_task

from configs import tiny
from spiral_jax import evaluate
from spiral_jax.core.config import ConfigError, for_evaluation
from spiral_jax.core.groups import Role
from spiral_jax.run.setup import set_up
from spiral_jax.run.workdir import WorkdirError
from spiral_jax.tasks import jsonl

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = pathlib.Path(__file__).parents[1] / "golden_results.json"
PICTURES = {"pass_at_k.png", "rsa.png", "tokens.png", "voting.png"}


def script(role, cursor, k, i):
    """Search trace i of problem c is right if i < c % 4, else one of two wrong answers or none;
    aggregation by set.
    """
    if role is Role.SEARCH:
        return (
            "\\boxed{7}"
            if i < cursor % 4
            else ["\\boxed{8}", "left=1 \\boxed{9}", "left=1..."][(i + cursor) % 3]
        )
    return "\\boxed{7}" if (k + i + cursor) % 3 else "\\boxed{8}"


def small_config():
    c = tiny.get_config()
    c.search.max_tokens, c.eval.limits = 32, (6, 12)
    c.sampling.classes = ((4, 8, 16, 32), (4, 4, 124, 12))
    c.eval.problems, c.eval.wave, c.eval.n, c.eval.population, c.eval.set_size = 5, 2, 6, 4, 2
    c.eval.rounds, c.eval.subset_size, c.eval.subsets, c.eval.traces = 2, 3, 2, 2
    return c


@pytest.fixture
def scripted(monkeypatch):
    """The command with scripted traces in place of the model's: everything else is real."""

    def fake(c, training):
        setup = set_up(c, training)
        return dataclasses.replace(setup, task=number_task(), eval_sampler=ScriptedSampler(script))

    monkeypatch.setattr(evaluate, "set_up", fake)


def test_results_are_those_of_the_golden_file(scripted, tmp_path, capsys):
    """Layout and numbers are an interface: when they change on purpose, raise `results.VERSION` (if a field goes or
    means something else) and copy this run's results.json over the golden file."""
    evaluate.evaluate(small_config(), str(tmp_path / "run"))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.json",
        "waves.jsonl",
        "results.json",
    } | PICTURES
    found, golden = (
        json.loads(path.read_text()) for path in (tmp_path / "run" / "results.json", GOLDEN)
    )
    assert_equal(found, golden, "results")
    assert found["version"] == 1
    printed = capsys.readouterr().out
    parts = [
        "5 problems",
        "pass@6",
        "maj@4",
        "aggregated pass@1 (n=6, S=3, M=2)",
        "population 4, set 2",
        "rescue",
    ]
    parts += ["wave 3 of 3", "--- search prompt", "--- aggregation trace, reward"]
    for part in [*parts, str(tmp_path / "run" / "results.json")]:
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


@pytest.mark.parametrize("torn", [False, True])
def test_a_stopped_evaluation_goes_on_and_ends_with_the_same_results(
    torn, scripted, monkeypatch, tmp_path
):
    monkeypatch.setattr(evaluate, "plot_evaluation", lambda results, directory: [])
    evaluate.evaluate(small_config(), str(tmp_path / "whole"))
    asked, real = [], evaluate.evaluate_wave

    def stopping(actor, weights, problems, index_B, **policies):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(index_B.tolist())
        return real(actor, weights, problems, index_B, **policies)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "evaluate_wave", stopping)
        with pytest.raises(KeyboardInterrupt):
            evaluate.evaluate(small_config(), str(tmp_path / "stopped"))
    assert not (tmp_path / "stopped" / "results.json").exists()
    if torn:  # a kill in the middle of a write
        journal = tmp_path / "stopped" / "waves.jsonl"
        journal.write_bytes(journal.read_bytes()[:-40])

    def counting(actor, weights, problems, index_B, **policies):
        asked.append(index_B.tolist())
        return real(actor, weights, problems, index_B, **policies)

    monkeypatch.setattr(evaluate, "evaluate_wave", counting)
    evaluate.evaluate(small_config(), str(tmp_path / "stopped"))
    assert asked == ([[0, 1], [2, 3], [2, 3], [4]] if torn else [[0, 1], [2, 3], [4]])
    assert (tmp_path / "stopped" / "results.json").read_bytes() == (
        tmp_path / "whole" / "results.json"
    ).read_bytes()
    evaluate.evaluate(small_config(), str(tmp_path / "stopped"))
    assert len(asked) == (4 if torn else 3)  # a finished evaluation samples nothing


def test_another_config_in_the_same_workdir_is_refused_with_the_difference(scripted, tmp_path):
    evaluate.evaluate(small_config(), str(tmp_path / "run"))
    other = small_config()
    other.eval.rounds = 1
    with pytest.raises(WorkdirError, match="eval.rounds: 2 -> 1"):
        evaluate.evaluate(other, str(tmp_path / "run"))


def test_other_weights_or_data_under_the_same_names_are_refused(scripted, monkeypatch, tmp_path):
    evaluate.evaluate(small_config(), str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "model_fingerprint", lambda directories: "f" * 64)
        with pytest.raises(WorkdirError, match="wave 0 was evaluated with other model"):
            evaluate.evaluate(small_config(), str(tmp_path / "run"))
    changed = dataclasses.replace(number_task(), fingerprint="others")
    monkeypatch.setattr(
        evaluate,
        "set_up",
        lambda c, training: dataclasses.replace(set_up(c, training), task=changed),
    )
    with pytest.raises(WorkdirError, match="with other data"):
        evaluate.evaluate(small_config(), str(tmp_path / "run"))


def test_the_fingerprint_of_weights_shows_what_changed_inside_a_file(tmp_path):
    content = np.random.default_rng(0).bytes(3_000_000)
    (tmp_path / "model.safetensors").write_bytes(content)
    before = evaluate.model_fingerprint([tmp_path])
    assert before == evaluate.model_fingerprint([tmp_path])
    (tmp_path / "model.safetensors").write_bytes(np.random.default_rng(1).bytes(3_000_000))
    assert evaluate.model_fingerprint([tmp_path]) != before
    (tmp_path / "model.safetensors").write_bytes(content[:-1])
    assert evaluate.model_fingerprint([tmp_path]) != before


@pytest.mark.parametrize("limits", [(), (6, 12)])
def test_pictures_have_something_on_them(limits, scripted, tmp_path):
    c = small_config()
    c.eval.limits = limits
    evaluate.evaluate(c, str(tmp_path / "run"))
    for name in PICTURES:
        pixels = imread(tmp_path / "run" / name)
        assert min(pixels.shape[:2]) >= 600 and pixels.std() > 0.05


def test_set_up_sizes_prompts_for_the_largest_sets_and_needs_no_training_data(tmp_path):
    c = tiny.get_config()
    c.eval.set_size = 8
    with pytest.raises(
        ConfigError, match="config.sampling.classes.*aggregation prompts may have up to"
    ):
        set_up(for_evaluation(c), training=False)
    held_out = tmp_path / "test.jsonl"
    held_out.write_text('{"problem": "left=1", "answer": "7"}\n')
    c = tiny.get_config()
    c.task.name, c.task.eval_path, c.eval.problems = "jsonl", str(held_out), 1
    c.task.train_path = "/no/such/file"
    setup = set_up(for_evaluation(c), training=False)
    assert setup.task.held_out(0).answer == "7"
    c.eval.problems = 2
    with pytest.raises(ConfigError, match="the task has 1 held-out problems"):
        set_up(for_evaluation(c), training=False)
    held_out.write_text("")
    with pytest.raises(jsonl.TaskError, match="test.jsonl: it is empty"):
        set_up(for_evaluation(c), training=False)


def test_without_a_trained_adapter_none_is_part_of_what_is_evaluated():
    c = tiny.get_config()
    c.model.lora_rank, c.model.param_dtype = 4, "bfloat16"
    setup = set_up(for_evaluation(c), training=False)
    assert setup.model.lora_rank == 0 and setup.model.param_dtype == "bfloat16"


def command(*arguments):
    return subprocess.run([sys.executable, "-m", "spiral_jax.evaluate", *arguments], cwd=ROOT, capture_output=True,
                          text=True, timeout=600)  # fmt: skip


@pytest.mark.slow
def test_the_bundled_model_is_evaluated_and_compared_as_a_user_would(tmp_path):
    sizes = [
        "problems=4",
        "wave=2",
        "n=4",
        "subsets=1",
        "traces=1",
        "population=4",
        "set_size=4",
        "rounds=1",
    ]
    flags = ["--config=configs/tiny.py", "--config.sampling.classes=((2, 8, 16, 26), (8, 4, 124, 12))",
             *(f"--config.eval.{size}" for size in sizes)]  # fmt: skip
    done = command(*flags, f"--workdir={tmp_path / 'a'}")
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert (
        results["measures"]["pass_at_k"][3]["count"] == 4
        and results["counts"]["search"]["unparsed"] == 0
    )
    paths = [str(tmp_path / "a" / "results.json")] * 2
    compared = command("--compare", *paths, f"--workdir={tmp_path / 'c'}")
    assert compared.returncode == 0, compared.stderr[-3000:]
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"comparison.json"} | PICTURES
