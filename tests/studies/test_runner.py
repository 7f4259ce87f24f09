"""A study whose commands train and evaluate nothing: order, resume, failures, lock, report."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import stat
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import study_small
from matplotlib.image import imread
from small_studies import STEP

from spiral_jax import study as command
from spiral_jax.core.config import ConfigError, to_plain
from spiral_jax.evaluation.results import ResultsError, describe_sampling
from spiral_jax.run.workdir import WorkdirError
from spiral_jax.studies import runner, sweep
from spiral_jax.studies.design import Claim, load_study
from spiral_jax.studies.directory import StudyDirectory
from spiral_jax.studies.gather import gather
from spiral_jax.studies.processes import Processes
from spiral_jax.studies.rungs import GIVEN_UP
from spiral_jax.studies.text import list_failures, markdown, write_study

ROOT = pathlib.Path(__file__).parents[2]
FILE = "tests/study_small.py"
GOLDEN = ROOT / "tests" / "golden_results.json"
PYTHON = sys.executable
FAKE = r'''#!{python} -S
"""Stands for the Python that runs spiral_jax.train and spiral_jax.evaluate."""
import json, os, pathlib, signal, sys, time

if "STUBBORN" in os.environ:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if sys.argv[1] == "-c":
    print(json.dumps({
        "hardware": "a machine",
        "devices": os.environ.get("DEVICES", "1 x cpu (cpu)"),
        "versions": {"python": "3", "jax": "0"},
        "commit": "0123456789abcdef",
        "modified": True,
    }))
    sys.exit()

flags = dict(argument.split("=", 1) for argument in sys.argv[3:])
command, workdir = sys.argv[2].split(".")[1], pathlib.Path(flags["--workdir"])
calls = pathlib.Path(os.environ["CALLS"])
cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
with calls.open("a") as file:
    share = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION")
    file.write(json.dumps([command, flags | {"cores": cores, "memory": share}]) + "\n")

deadline, others = time.monotonic() + 60, int(os.environ.get("MEET", "0"))
while command == "train" and calls.read_text().count('["train"') < others:
    assert time.monotonic() < deadline, "nobody came"
    time.sleep(0.01)
time.sleep(float(os.environ.get("SLEEP", "0")))
if os.environ.get("FAIL", "nothing") in str(workdir):
    print("a stack trace\nerror: only 0 of 16 problems have a non-zero advantage")
    sys.exit(1)

workdir.mkdir(parents=True, exist_ok=True)
if command == "train":
    row = json.loads(os.environ["STEP"])
    row["tflop/update"] = 2.0 if "grpo" in str(workdir) else 3.0
    rows = [row | {"step": step} for step in range(int(os.environ.get("STEPS", "3")))]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    time.sleep(float(os.environ.get("LINGER", "0")))
else:
    results = json.loads(pathlib.Path(os.environ["GOLDEN"]).read_text())
    results["settings"] |= json.loads(os.environ["SETTINGS"])
    seed = int(flags["--config.seed"])
    for b, record in enumerate(results["records"]):
        strategies = [("left", "right", None)[(b + n) % 3] for n in range(6)]
        record["search"]["strategy"] = strategies
        for i in range(len(record["aggregation"]["answer"])):
            if "marginal_mean" in str(workdir) and (b + i + seed) % 5:
                record["aggregation"]["answer"][i] = 0
    (workdir / "results.json").write_text(json.dumps(results))
'''


class Call(NamedTuple):
    """A command that the study has called, and its flags."""

    command: str
    flags: dict

    @property
    def arm(self):
        return self.flags["--config"].partition(":")[2]


class Calls:
    """The commands that were called."""

    def __init__(self, path):
        self.path = path

    def take(self):
        """Those since the last time."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.path.unlink(missing_ok=True)
        return [Call(*json.loads(line)) for line in lines]

    def take_commands(self):
        return [call.command for call in self.take()]


def trained(workdir, step):
    """Stands for `find_trained`: a checkpoint after every step."""
    if not (workdir / "metrics.jsonl").exists():
        raise WorkdirError("no run")
    return SimpleNamespace(step=len((workdir / "metrics.jsonl").read_text().splitlines()))


def put_in_place(patch, folder):
    """Puts `FAKE` in Python's place; returns its calls."""
    script = folder / "python"
    script.write_text(FAKE.replace("{python}", PYTHON))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    settings = describe_sampling(load_study(FILE).evaluation)
    patch.setattr(sys, "executable", str(script))
    patch.setattr(runner, "find_trained", trained)
    patch.setenv("CALLS", str(folder / "calls"))
    patch.setenv("GOLDEN", str(GOLDEN))
    patch.setenv("STEP", json.dumps(STEP))
    patch.setenv("SETTINGS", json.dumps(settings))
    return Calls(folder / "calls")


@pytest.fixture
def fake(monkeypatch, tmp_path):
    return put_in_place(monkeypatch, tmp_path)


def run(path, at_once=1, **changes):
    path.mkdir(exist_ok=True)
    directory = StudyDirectory(path)
    study = dataclasses.replace(load_study(FILE), **changes)
    runner.run_study(study, directory, Processes(at_once), study.runs)
    return directory


class Finished(NamedTuple):
    directory: StudyDirectory
    calls: list


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study that has run to its end; tests only read it."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        calls = put_in_place(patch, folder)
        return Finished(run(folder / "w"), calls.take())


@pytest.fixture
def copy(finished, tmp_path):
    """The directory of a study that has run to its end; a test may change it."""
    return StudyDirectory(pathlib.Path(shutil.copytree(finished.directory.path, tmp_path / "w")))


def test_every_run_is_an_ordinary_command_seed_by_seed(finished):
    short = [(call.command, call.arm, call.flags["--config.seed"]) for call in finished.calls]
    assert short == [
        ("evaluate", "evaluation", "0"),
        *[("train", "marginal_mean", "0"), ("evaluate", "evaluation", "0")],
        *[("train", "grpo", "0"), ("evaluate", "evaluation", "0")],
        *[("evaluate", "evaluation", "0"), ("evaluate", "evaluation", "0")],  # the pairs of `cross`
        *[("train", "marginal_mean", "1"), ("evaluate", "evaluation", "1")],
    ]


cores = getattr(os, "sched_getaffinity", lambda _: [0])(0)
needs_two_cores = pytest.mark.skipif(len(cores) < 2, reason="one core")


@needs_two_cores
def test_runs_side_by_side_are_the_same_runs_each_on_cores_of_its_own(
    fake, finished, tmp_path, monkeypatch
):
    monkeypatch.setenv("MEET", "2")  # the first training goes on only once the second has begun too
    directory = run(tmp_path / "w", at_once=2)
    calls = fake.take()

    def comparable(call, path):
        flags = json.dumps(call.flags | {"cores": 0}, sort_keys=True)
        return call.command, flags.replace(str(path), "")

    alone = sorted(comparable(call, finished.directory.path) for call in finished.calls)
    assert sorted(comparable(call, directory.path) for call in calls) == alone
    shares = {tuple(call.flags["cores"]) for call in calls}
    assert len(shares) == 2 and not set.intersection(*map(set, shares))
    rows = directory.journal.read()
    assert [row["step"] for row in rows] == list(range(len(calls)))
    assert {row["at_once"] for row in rows} == {2}


@pytest.mark.parametrize("at_once", [0, -1, 10_000])
def test_side_by_side_is_at_most_a_core_each(at_once):
    with pytest.raises(ConfigError, match=rf"--at_once={at_once}: .*from 1 to \d+"):
        Processes(at_once)


def test_chosen_arms_and_seeds_run_alone_and_the_rest_later(fake, tmp_path):
    study, directory = load_study(FILE), StudyDirectory(tmp_path / "w")
    directory.path.mkdir()
    arm, seed = "grpo", 0
    runner.run_study(study, directory, Processes(1), study.chosen([arm], [str(seed)]))
    assert {call.arm for call in fake.take()} == {arm, "evaluation"}
    assert [run["arm"] for run in gather(study, directory)["runs"] if run["state"] == "done"] == [
        arm
    ]
    runner.run_study(study, directory, Processes(1), study.chosen([], []))
    assert arm not in {call.arm for call in fake.take()}
    with pytest.raises(ConfigError, match="--arms=nobody: .*has no nobody.*It has base"):
        study.chosen(["nobody"], [])
    with pytest.raises(ConfigError, match="--seeds=7: .*has no 7"):
        study.chosen([], ["7"])


@needs_two_cores
def test_a_tpu_is_not_shared(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("DEVICES", "4 x TPU v5 lite (tpu)")
    with pytest.raises(ConfigError, match=r"--at_once=2: .*TPU v5 lite"):
        run(tmp_path / "w", at_once=2)
    assert fake.take() == []
    run(tmp_path / "w")


@needs_two_cores
def test_runs_that_share_a_gpu_leave_each_other_its_memory(fake, tmp_path, monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.setenv("DEVICES", "1 x NVIDIA H100 80GB HBM3 (gpu)")
    run(tmp_path / "two", at_once=2)
    assert all(0.3 < float(call.flags["memory"]) <= 0.5 for call in fake.take())
    run(tmp_path / "one")
    assert {call.flags["memory"] for call in fake.take()} == {None}


def test_an_evaluation_starts_from_what_its_run_has_trained_and_the_base_from_nothing(finished):
    directory, calls = finished
    evaluations = [
        call.flags
        for call in calls
        if call.command == "evaluate" and "+" not in call.flags["--workdir"]
    ]
    trained = [directory.run("marginal_mean", 0), directory.run("grpo", 0)]
    trained.append(directory.run("marginal_mean", 1))
    started_from = [flags.get("--config.model.init_from") for flags in evaluations]
    assert started_from == [None, *(f"{path}@3" for path in trained)]
    assert not any("--config.eval.searcher" in flags for flags in evaluations)


def test_a_pair_is_the_search_of_one_arm_under_the_aggregator_of_the_other(finished):
    directory, calls = finished
    pairs = [call.flags for call in calls if "+" in call.flags["--workdir"]]
    trained = f"{directory.run('marginal_mean', 0)}@3"
    searchers = [flags["--config.eval.searcher"] for flags in pairs]
    readers = [flags.get("--config.model.init_from") for flags in pairs]
    assert searchers == ["base", trained] and readers == [trained, None]
    seeds = {
        (row["searcher"], row["reader"]): row["measures"]["aggregated"]["seeds"]
        for row in gather(load_study(FILE), directory)["cross"]
    }
    assert seeds == {
        ("base", "base"): 1,
        ("base", "marginal_mean"): 1,
        ("marginal_mean", "base"): 1,
        ("marginal_mean", "marginal_mean"): 2,
    }


def test_a_pair_waits_until_both_of_its_runs_have_ended(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("FAIL", "marginal_mean/seed_0")
    run(tmp_path / "w")
    assert not any("--config.eval.searcher" in call.flags for call in fake.take())


def test_what_is_done_is_not_done_again(fake, copy):
    run(copy.path)
    assert fake.take() == []


def test_a_failed_run_ends_no_other_is_reported_and_tried_again(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("FAIL", "runs/grpo")
    directory, study = run(tmp_path / "w"), load_study(FILE)
    assert fake.take_commands().count("evaluate") == 5
    found = gather(study, directory)
    rows = {(row["arm"], row["seed"]): row for row in found["runs"]}
    assert rows["grpo", 0]["state"] == "failed" and "only 0 of 16" in rows["grpo", 0]["error"]
    assert rows["grpo", 0]["error"].startswith("train:")
    assert (rows["marginal_mean", 1]["state"], rows["marginal_mean", 1]["error"]) == ("done", "")
    assert [claim["verdict"] for claim in found["claims"]][:2] == ["open", "open"]
    text = markdown(study, found, [])
    assert "3 of 4 runs are done" in text and "only 0 of 16 problems" in text
    assert "not done: grpo seed 0" in list_failures(found)
    monkeypatch.delenv("FAIL")
    run(tmp_path / "w")
    assert fake.take_commands() == ["train", "evaluate"]
    assert {row["state"] for row in gather(study, directory)["runs"]} == {"done"}


def test_a_run_that_fails_after_a_checkpoint_is_evaluated_and_still_called_failed(
    fake, copy, monkeypatch
):
    metrics = copy.run("grpo", 0) / "metrics.jsonl"
    steps = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(steps[:2]))
    shutil.rmtree(copy.path / "evaluations" / "grpo")
    monkeypatch.setenv("FAIL", "runs/grpo")
    run(copy.path)
    (row,) = [row for row in gather(load_study(FILE), copy)["runs"] if row["arm"] == "grpo"]
    assert row["state"] == "failed" and row["error"].startswith("train:")
    assert row["steps"] == 2 and "measures" in row


def test_a_run_that_was_told_to_stop_is_not_evaluated_and_goes_on(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("STEPS", "2")  # of the three that its configuration asks for
    directory = run(tmp_path / "w")
    assert fake.take_commands() == ["evaluate", "train", "train", "train"]  # base alone; no pair
    states = {row["state"] for row in gather(load_study(FILE), directory)["runs"]}
    assert states == {"done", "not finished"}
    monkeypatch.delenv("STEPS")
    run(tmp_path / "w")
    run_and_evaluation, pairs = ["train", "evaluate"], ["evaluate"] * 2
    assert fake.take_commands() == run_and_evaluation * 2 + pairs + run_and_evaluation


def test_the_report_says_everything_and_its_pictures_are_plotted(finished, tmp_path):
    study, out = load_study(FILE), tmp_path / "out" / "report"
    found = gather(study, finished.directory)
    text = write_study(study, found, out)
    assert json.loads(out.with_suffix(".json").read_text()) == json.loads(json.dumps(found))
    for part in (
        study.title,
        study.question,
        "a machine",
        "| best possible | ",
        "at most 1 - 2 * 2^-4 = 87.5 %",
        "| marginal_mean | 2 | ",
        "**holds**",
        "## Runs",
        "4 of 4 runs are done",
    ):
        assert part in text, part
    assert "nan" not in text.lower() and "None" not in text
    for name in ("arms", "mixed", "pass_at_k", "rsa", "training"):
        picture = imread(tmp_path / "out" / f"report_{name}.png")
        assert picture.std() > 0.02 and f"report_{name}.png" in text


def test_a_study_reads_its_runs_a_second_time_where_all_had_spent_the_same(fake, copy):
    """Three steps of GRPO cost 9, two of marginal_mean 8: those are read, and nothing twice."""
    study = dataclasses.replace(load_study(FILE), equal_operations=True)
    before = gather(study, copy)  # nothing was read yet
    assert before["operations"]["missing"] == [
        f"marginal_mean seed {seed}: not evaluated at step 2" for seed in (0, 1)
    ]
    assert list(before["operations"]["arms"]) == ["base", "grpo"]
    assert "not done: at equal operations, marginal_mean seed 0" in str(list_failures(before))
    assert "Not read: marginal_mean seed 0: not evaluated" in markdown(study, before, [])

    run(copy.path, equal_operations=True)
    calls = fake.take()
    read = [f"{copy.run('marginal_mean', seed)}@2" for seed in (0, 1)]
    assert [call.flags["--config.model.init_from"] for call in calls] == read
    run(copy.path, equal_operations=True)
    assert fake.take() == []

    whole, found = gather(study, copy), gather(study, copy)["operations"]
    assert found["budget"] == {"tflop": 9.0, "arm": "grpo", "seed": 0} and not found["missing"]
    places = {(row["arm"], row["seed"]): (row["step"], row["tflop"]) for row in found["runs"]}
    of_others = {("marginal_mean", seed): (2, 8.0) for seed in (0, 1)}
    assert places == of_others | {("grpo", 0): (3, 9.0)}
    # what stands here for an evaluation measures the same at every step
    measures = {arm: row["measures"] for arm, row in before["arms"].items()}
    assert found["arms"] == measures and found["gaps"] == before["gaps"]
    for name in ("arms", "gaps", "claims", "unrecorded"):  # of the runs' ends
        assert whole[name] == before[name]
    text = markdown(study, whole, [])
    assert "**9.000 TFLOP**" in text and "| marginal_mean | 2 | 2.0 | 8.000 | 88.9 | " in text
    copy.journal.path.unlink()
    unrecorded = gather(study, copy)["unrecorded"]
    assert "marginal_mean@equal_operations seed 1: evaluate" in unrecorded


def test_a_reading_that_fails_is_reported_and_tried_again(fake, copy, monkeypatch):
    monkeypatch.setenv("FAIL", "marginal_mean@equal_operations/seed_0")
    run(copy.path, equal_operations=True)
    study = dataclasses.replace(load_study(FILE), equal_operations=True)
    found = gather(study, copy)
    (line,) = found["operations"]["missing"]
    assert line.startswith("marginal_mean seed 0: evaluate: error: only 0 of 16")
    assert {row["state"] for row in found["runs"]} == {"done"}
    fake.take()
    monkeypatch.delenv("FAIL")
    run(copy.path, equal_operations=True)
    assert fake.take_commands() == ["evaluate"]


def test_arms_may_be_added_and_none_goes_unsaid(copy):
    study = load_study(FILE)
    listed = study.listed[1:3]
    less = dataclasses.replace(study, listed=listed, claims=(), cross=(), strategies=0)
    (copy.path / "runs" / "rloo" / "seed_0").mkdir(parents=True)
    found = gather(less, copy)
    assert found["unnamed"] == ["rloo/seed_0"] and "rloo/seed_0" in markdown(less, found, [])
    assert less.plain().keys() == {"measures", "claims", "baseline", "strategies"}


def test_a_run_and_an_evaluation_are_held_to_their_configurations(copy):
    study = load_study(FILE)
    config = copy.run("marginal_mean", 1) / "config.json"
    c = study_small.get_config("marginal_mean")
    c.seed = 1
    config.write_text(json.dumps(to_plain(c) | {"config_digest": ""}))
    gather(study, copy)
    evaluation = dataclasses.replace(study.evaluation, n=16)
    with pytest.raises(ResultsError, match=r"(?s)results.json.*eval\.n: 8 -> 16.*evaluate again"):
        gather(dataclasses.replace(study, evaluation=evaluation), copy)
    c.optimizer.lr = 0.5
    config.write_text(json.dumps(to_plain(c) | {"config_digest": ""}))
    with pytest.raises(WorkdirError, match=r"(?s)seed_1.*optimizer\.lr: 0\.5 -> 0\.0003.*restore"):
        gather(study, copy)


def test_a_sweep_tries_what_optuna_proposes_and_goes_on_where_it_was_stopped(fake, copy):
    study = load_study(FILE)

    def interrupted(study, arm, gives_up):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # killed while its first arm is trained
        sweep.sweep(study, copy, 2, Processes(1), interrupted)
    (first,) = sweep.proposed(copy)
    swept = runner.run_study(study, copy, Processes(1), study.runs, 3)
    trained = [call.arm for call in fake.take() if call.command == "train"]
    assert trained[0] == first and len(trained) == 3 and tuple(trained) == swept.proposed
    assert set(trained) < {"N5", "N7", "N9", "N11"}  # those that fit
    again = runner.run_study(study, copy, Processes(1), study.runs, 4)
    assert again.proposed[:3] == swept.proposed and set(again.proposed) == {"N5", "N7", "N9", "N11"}
    more = runner.run_study(study, copy, Processes(1), study.runs, 5)
    assert more.proposed == again.proposed  # there are no others
    found = gather(again, copy)
    assert found["arms"]["N7"]["N"] == 7 and found["arms"]["N7"]["measures"]
    assert found["unnamed"] == []


def test_a_run_that_is_given_up_is_ended_and_is_no_failure(fake, copy, monkeypatch):
    monkeypatch.setenv("LINGER", "60")  # it goes on for a minute after its second step of three
    monkeypatch.setenv("STEPS", "2")
    study = load_study(FILE)
    told = []

    def sweep_that_gives_up(study, directory, count, processes, run):
        def gives_up(rung, reward):
            told.append((rung, reward))
            return True

        swept = study.with_proposed(["N7"])
        assert run(swept, "N7", gives_up) is None
        return swept

    monkeypatch.setattr(sweep, "sweep", sweep_that_gives_up)
    start = time.monotonic()
    swept = runner.run_study(study, copy, Processes(1), [], 1)
    assert time.monotonic() - start < 30
    assert told == [(3, 0.3)] and [call.command for call in fake.take()] == ["train"]
    given_up = {"state": GIVEN_UP, "chosen": {"N": 7}, "value": None, "rungs": 1}
    outcome = {"arms": {"N7": given_up}, "importance": {}, "direction": {}}
    found = gather(swept, copy, outcome)
    (swept_run,) = (row for row in found["runs"] if row["arm"] == "N7")
    assert swept_run["state"] == GIVEN_UP
    assert not [line for line in list_failures(found) if "N7" in line]
    assert "1 were given up on the way: N7 (1 of 10)" in markdown(swept, found, [])


def test_a_study_whose_commands_outlived_it_is_reported_and_says_what_is_not_known(finished, copy):
    whole = gather(load_study(FILE), finished.directory)
    assert whole["unrecorded"] == []
    copy.journal.path.unlink()
    study, found = load_study(FILE), gather(load_study(FILE), copy)
    assert {row["state"] for row in found["runs"]} == {"done"} and found["arms"] == whole["arms"]
    assert len(found["unrecorded"]) == len(finished.calls)
    assert "grpo seed 0: train" in found["unrecorded"]
    text = markdown(study, found, [])
    assert "4 of 4 runs are done." in text and "grpo seed 0: train" in text
    assert "hours" not in text and "Machine: not known" in text


def test_a_run_that_failed_once_and_was_ended_by_nobody_s_command_is_done(finished, copy):
    rows = [row for row in copy.journal.read() if (row["arm"], row["stage"]) != ("grpo", "train")]
    failed = rows[0] | {"arm": "grpo", "stage": "train", "returncode": 1, "error": "error: no disk"}
    copy.journal.path.unlink()
    for step, row in enumerate([*rows, failed]):
        copy.journal.append(row | {"step": step})
    start = {"step": 0} | rows[0]["environment"] | {"hardware": "another machine"}
    (copy.run("grpo", 0) / "starts.jsonl").write_text(json.dumps(start) + "\n")
    found = gather(load_study(FILE), copy)
    assert {row["state"] for row in found["runs"]} == {"done"}
    assert found["unrecorded"] == ["grpo seed 0: train"]
    assert len(found["machines"]) == 2 and "at least" in markdown(load_study(FILE), found, [])


def test_a_study_without_results_says_what_became_of_its_runs(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("FAIL", "seed")
    directory = run(tmp_path / "w")
    with pytest.raises(WorkdirError, match="(?s)grpo seed 0: train: error: only 0"):
        gather(load_study(FILE), directory)


def test_the_command_ends_with_status_1_if_a_claim_does_not_hold(fake, tmp_path, monkeypatch):
    flags = SimpleNamespace(
        config=FILE,
        workdir=str(tmp_path / "w"),
        report=False,
        out=None,
        sweep=0,
        at_once=1,
        arms=[],
        seeds=[],
        across=None,
    )
    monkeypatch.setattr(command.flags, "FLAGS", flags)
    command.main(["study"])
    assert (tmp_path / "w" / "report.md").exists()

    claims = (Claim("aggregated", "grpo", "marginal_mean", 0.0),)
    changed = dataclasses.replace(load_study(FILE), claims=claims)
    monkeypatch.setattr(command, "load_study", lambda path: changed)
    with pytest.raises(SystemExit, match=r"(?s)another config.*claims"):  # stated before the runs
        command.main(["study"])
    flags.report, flags.workdir = True, str(tmp_path / "w2")
    shutil.copytree(tmp_path / "w", flags.workdir)
    (tmp_path / "w2" / "config.json").write_text(
        json.dumps(changed.plain() | {"config_digest": command.digest_of(changed.plain())})
    )
    with pytest.raises(SystemExit, match="claim: aggregated: grpo > marginal_mean"):
        command.main(["study"])


DRIVER = """
import pathlib
import sys
sys.path[:0] = ["tests", "tests/studies"]
import test_runner
test_runner.runner.find_trained = test_runner.trained
sys.executable = sys.argv[1]
test_runner.run(pathlib.Path(sys.argv[2]), int(sys.argv[3]))
"""


def start(tmp_path, monkeypatch, seconds, at_once=1):
    """A study in a process of its own, once its first commands of so many seconds run."""
    monkeypatch.setenv("SLEEP", str(seconds))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    arguments = [sys.executable, str(tmp_path / "w"), str(at_once)]
    driver = subprocess.Popen([PYTHON, "-c", DRIVER, *arguments], cwd=ROOT)
    deadline, calls = time.monotonic() + 120, tmp_path / "calls"
    while not calls.exists() or len(calls.read_text().splitlines()) < at_once:
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    monkeypatch.setenv("SLEEP", "0")
    return driver


@pytest.mark.slow
@pytest.mark.parametrize(
    ("at_once", "told", "code"),
    [(1, signal.SIGTERM, 1), pytest.param(2, signal.SIGINT, 130, marks=needs_two_cores)],
)
def test_a_study_that_is_told_to_stop_stops_its_runs_too(
    fake, tmp_path, monkeypatch, at_once, told, code
):
    driver = start(tmp_path, monkeypatch, 600, at_once)
    driver.send_signal(told)
    assert driver.wait(timeout=60) == code
    run(tmp_path / "w")  # nothing is left that keeps it out
    begun = at_once - 1  # one of two had begun to train
    assert fake.take_commands().count("train") == 3 + begun


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_study_and_its_runs_at_once(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("STUBBORN", "1")  # its runs take no notice of the first
    driver = start(tmp_path, monkeypatch, 600)
    driver.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        driver.wait(timeout=1)
    driver.send_signal(signal.SIGINT)
    assert driver.wait(timeout=60) == 130
    run(tmp_path / "w")  # nothing is left that keeps it out


@pytest.mark.slow
def test_after_kill_9_the_run_that_is_left_keeps_the_next_study_out_and_then_it_goes_on(
    fake, tmp_path, monkeypatch
):
    driver, deadline = start(tmp_path, monkeypatch, seconds=3), time.monotonic() + 120
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    with pytest.raises(WorkdirError, match="--workdir=.*at work"):
        run(tmp_path / "w")
    while True:  # until the run that was left has ended
        try:
            run(tmp_path / "w")
            break
        except WorkdirError:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    commands = fake.take_commands()
    assert commands.count("train") == 3 and commands.count("evaluate") == 6
