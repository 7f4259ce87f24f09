"""Evaluations in a study's directory whose run was trained anew since."""

import json
from types import SimpleNamespace

import pytest
from small_studies import a_study, make_study

from spiral_jax.run.checkpoint import CheckpointError
from spiral_jax.studies import history, runner
from spiral_jax.studies.processes import Processes

DIGESTS = {"grpo": "a", "marginal_mean": "b"}  # of what lies in the runs' directories now


def digest(name):
    """Stands for `trained_digest`."""
    return next(digest for arm, digest in DIGESTS.items() if f"/{arm}/" in name)


@pytest.fixture
def study_runner(tmp_path, monkeypatch):
    """Runs no command: notes its name, and leaves results."""
    study = a_study(equal_operations=True)
    directory = make_study(tmp_path, study)
    calls = []

    def run_command(self, name, seed, stage, *arguments, ends=None):
        calls.append((name, seed, stage))
        (workdir,) = (flag for flag in arguments if flag.startswith("--workdir="))
        evaluation = tmp_path / workdir.removeprefix("--workdir=")
        evaluation.mkdir(parents=True)
        (evaluation / "results.json").write_text("{}")
        return 0

    monkeypatch.setattr(runner.Runner, "_run_command", run_command)
    monkeypatch.setattr(runner, "find_trained", lambda workdir, step: SimpleNamespace(step=3))
    monkeypatch.setattr(history, "trained_digest", digest)
    made = runner.Runner(study, directory, {}, None, "", {}, Processes(1), study.runs)
    return made, calls


def stamp(evaluation, **names):
    """Writes the journal of an evaluation that notes what it was made of."""
    evaluation.mkdir(parents=True, exist_ok=True)
    (evaluation / "waves.jsonl").write_text(json.dumps({"step": 0, "model": "m"} | names) + "\n")


@pytest.mark.parametrize(
    ("names", "again"), [({}, False), ({"init_from": "a"}, False), ({"init_from": "z"}, True)]
)
def test_a_run_is_evaluated_again_if_its_evaluation_is_of_other_weights(study_runner, names, again):
    made, calls = study_runner
    evaluation = made.directory.evaluation("grpo", 0, 3)
    stamp(evaluation, **names)
    for _ in range(2):
        made.run_arm("grpo", 0, "1/1")
    assert calls == [("grpo", 0, "evaluate")] * again
    kept = [path for path in evaluation.parent.iterdir() if path != evaluation]
    assert len(kept) == again and all((path / "results.json").exists() for path in kept)
    assert made.directory.evaluated_steps("grpo", 0) == {3}


def test_an_evaluation_that_was_stopped_does_not_go_on_with_other_weights(study_runner):
    made, calls = study_runner
    evaluation = made.directory.evaluation("grpo", 0, 3)
    (evaluation / "results.json").unlink()
    stamp(evaluation, init_from="z")
    made.run_arm("grpo", 0, "1/1")
    assert calls == [("grpo", 0, "evaluate")] and not (evaluation / "waves.jsonl").exists()


def test_a_pair_is_evaluated_again_if_its_searcher_was_trained_anew(study_runner):
    made, calls = study_runner
    (pair,) = (pair for pair in made.study.pairs if pair.searcher == "marginal_mean")
    made.run_pair(pair, "pair 1/1")
    evaluation = made.directory.evaluation("marginal_mean+base", 0, 0)
    for digest, times in (("b", 1), ("z", 2)):
        stamp(evaluation, searcher=digest)
        made.run_pair(pair, "pair 1/1")
        assert calls == [("marginal_mean+base", 0, "evaluate")] * times


def test_a_reading_is_made_again_if_its_run_was_trained_anew(study_runner):
    made, calls = study_runner
    log = made.directory.run("marginal_mean", 0) / "metrics.jsonl"
    rows = [json.loads(line) | {"tflop/update": 3.0} for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))  # spends more than grpo
    evaluation = made.directory.evaluation("marginal_mean@equal_operations", 0, 2)
    for digest, times in (("b", 0), ("z", 1)):
        stamp(evaluation, init_from=digest)
        (evaluation / "results.json").write_text("{}")
        for reading in made.readings_of(0):
            reading()
        assert calls == [("marginal_mean@equal_operations", 0, "evaluate")] * times


def test_what_cannot_be_compared_any_more_is_taken_as_it_is(study_runner, monkeypatch):
    def gone(name):
        raise CheckpointError("no such checkpoint")

    monkeypatch.setattr(history, "trained_digest", gone)
    made, calls = study_runner
    stamp(made.directory.evaluation("grpo", 0, 3), init_from="z")
    made.run_arm("grpo", 0, "1/1")
    assert calls == []
