"""`python -m spiral_jax.study` with commands that train and evaluate nothing: order, resume,
failures, the lock.
"""

import json
import os
import pathlib
import signal
import stat
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import study_small
from matplotlib.image import imread

from spiral_jax import study
from spiral_jax.core.config import ConfigError, to_plain
from spiral_jax.evaluation.results import ResultsError
from spiral_jax.run.workdir import WorkdirError
from spiral_jax.studies import figures as plots
from spiral_jax.studies import report, sweep
from spiral_jax.studies.design import load_study
from spiral_jax.studies.directory import StudyDirectory
from spiral_jax.studies.gather import gather
from spiral_jax.studies.processes import Processes

ROOT = pathlib.Path(__file__).parents[2]
FILE = "tests/study_small.py"
GOLDEN = ROOT / "tests" / "golden_results.json"
PYTHON, DRAW = sys.executable, plots.draw
FAKE = r'''#!{python}
"""Stands for the Python that runs spiral_jax.train and spiral_jax.evaluate."""
import json, os, pathlib, sys, time
if sys.argv[1] == "-c":
    print(json.dumps({"hardware": "a machine", "devices": os.environ.get("DEVICES", "1 x cpu"),
                      "versions": {"python": "3", "jax": "0"}, "commit": "0123456789abcdef", "modified": True}))
    sys.exit()
given = dict(a.split("=", 1) for a in sys.argv[3:])
command, workdir = sys.argv[2].split(".")[1], pathlib.Path(given["--workdir"])
with open(os.environ["CALLS"], "a") as calls:
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    calls.write(json.dumps([command, given | {"cores": cores}]) + "\n")
deadline = time.monotonic() + 60
while open(os.environ["CALLS"]).read().count('["train"') < int(os.environ.get("MEET", "0")) and command == "train":
    assert time.monotonic() < deadline, "nobody came"
    time.sleep(0.01)
time.sleep(float(os.environ.get("SLEEP", "0")))
if os.environ.get("FAIL", "nothing") in str(workdir):
    print("a stack trace\nerror: only 0 of 16 problems have a non-zero advantage")
    sys.exit(1)
workdir.mkdir(parents=True, exist_ok=True)
if command == "train":
    row = {"sampling/generated_tokens": 100.0, "sampling/prefilled_tokens": 30.0, "time/step": 0.5,
           "reward/search": 0.1, "entropy/search": 0.2, "grad_norm/search": 1.0, "grad_norm/aggregation": 2.0,
           "reward/aggregated": 0.3, "verifier/parse_rate_search": 0.9, "verifier/parse_rate_aggregation": 1.0}
    steps = int(os.environ.get("STEPS", "3"))
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row | {"step": i}) + "\n" for i in range(steps)))
else:
    results = json.loads(pathlib.Path(os.environ["GOLDEN"]).read_text())
    results["settings"] |= json.loads(os.environ["SETTINGS"])
    seed = int(given["--config.seed"])
    for b, record in enumerate(results["records"]):
        record["search"]["strategy"] = [("left", "right", None)[(b + n) % 3] for n in range(6)]
        for i in range(len(record["aggregation"]["answer"])):
            if "marginal_mean" in str(workdir) and (b + i + seed) % 5:
                record["aggregation"]["answer"][i] = 0
    (workdir / "results.json").write_text(json.dumps(results))
'''


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Puts `FAKE` in Python's place; returns a function that reads which commands were called, and
    forgets them.
    """
    script, calls = tmp_path / "python", tmp_path / "calls"
    script.write_text(FAKE.replace("{python}", sys.executable))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setenv("CALLS", str(calls))
    monkeypatch.setenv("GOLDEN", str(GOLDEN))
    asked = to_plain(study_small.get_config("evaluation").eval)
    monkeypatch.setenv("SETTINGS", json.dumps({name: asked[name] for name in json.loads(GOLDEN.read_text())["settings"]
                                               if name in asked}))  # fmt: skip
    monkeypatch.setattr(study, "find_trained", trained)
    monkeypatch.setattr(plots, "draw", lambda found, out: [])  # seconds; one test draws them

    def read():
        lines = calls.read_text().splitlines() if calls.exists() else []
        calls.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    return read


def trained(workdir, step):
    """Stands for `find_trained`: a checkpoint after every step."""
    if not (workdir / "metrics.jsonl").exists():
        raise WorkdirError("no run")
    return SimpleNamespace(step=len((workdir / "metrics.jsonl").read_text().splitlines()))


def run(path, at_once=1):
    path.mkdir(exist_ok=True)
    found = StudyDirectory(path)
    study.run_study(load_study(FILE), found, Processes(at_once))
    return found


def test_every_run_is_an_ordinary_command_seed_by_seed(fake, tmp_path):
    run(tmp_path / "w")
    short = [
        (command, given["--config"].partition(":")[2], given["--config.seed"])
        for command, given in fake()
    ]
    assert short == [
        ("evaluate", "evaluation", "0"),
        *[("train", "marginal_mean", "0"), ("evaluate", "evaluation", "0")],
        *[("train", "grpo", "0"), ("evaluate", "evaluation", "0")],
        *[("evaluate", "evaluation", "0"), ("evaluate", "evaluation", "0")],  # the pairs of `cross`
        *[("train", "marginal_mean", "1"), ("evaluate", "evaluation", "1")],
    ]


needs_two_cores = pytest.mark.skipif(
    len(getattr(os, "sched_getaffinity", lambda _: [0])(0)) < 2, reason="one core"
)


@needs_two_cores
def test_runs_side_by_side_are_the_same_runs_each_on_cores_of_its_own(fake, tmp_path, monkeypatch):
    run(tmp_path / "one")
    plain = lambda calls: sorted(json.dumps([c, given | {"cores": 0}]) for c, given in calls)  # noqa: E731
    alone = [line.replace("/one/", "/two/") for line in plain(fake())]
    monkeypatch.setenv("MEET", "2")  # the first training goes on only once the second has begun too
    directory = run(tmp_path / "two", at_once=2)
    calls = fake()
    assert plain(calls) == alone
    cores = {tuple(given["cores"]) for _, given in calls}
    assert len(cores) == 2 and not set.intersection(*map(set, cores))
    rows = directory.journal.read()
    assert [row["step"] for row in rows] == list(range(len(calls))) and {
        row["at_once"] for row in rows
    } == {2}


@pytest.mark.parametrize("at_once", [0, -1, 10_000])
def test_side_by_side_is_at_most_a_core_each(at_once):
    with pytest.raises(ConfigError, match=rf"--at_once={at_once}: must be from 1 to \d+"):
        Processes(at_once)


@needs_two_cores
def test_an_accelerator_is_not_shared(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("DEVICES", "1 x NVIDIA H100 (cuda)")
    with pytest.raises(ConfigError, match=r"--at_once=2: .*NVIDIA H100"):
        run(tmp_path / "w", at_once=2)
    assert fake() == []
    run(tmp_path / "w")


def test_an_evaluation_starts_from_what_its_run_has_trained_and_the_base_from_nothing(
    fake, tmp_path
):
    directory = run(tmp_path / "w")
    evaluations = [
        given
        for command, given in fake()
        if command == "evaluate" and "+" not in given["--workdir"]
    ]
    runs = [
        directory.run(arm, seed)
        for arm, seed in (("marginal_mean", 0), ("grpo", 0), ("marginal_mean", 1))
    ]
    assert [given.get("--config.model.init_from") for given in evaluations] == [
        None,
        *(f"{path}@3" for path in runs),
    ]
    assert not any("--config.eval.searcher" in given for given in evaluations)


def test_a_pair_is_the_search_of_one_arm_under_the_aggregator_of_the_other(fake, tmp_path):
    directory = run(tmp_path / "w")
    pairs = [
        given for command, given in fake() if command == "evaluate" and "+" in given["--workdir"]
    ]
    trained_at = f"{directory.run('marginal_mean', 0)}@3"
    fields = ("--config.eval.searcher", "--config.model.init_from")
    assert [tuple(map(given.get, fields)) for given in pairs] == [
        ("base", trained_at),
        (trained_at, None),
    ]
    cross = gather(load_study(FILE), directory)["cross"]
    seeds = {
        (row["searcher"], row["reader"]): row["measures"]["aggregated"]["seeds"] for row in cross
    }
    assert seeds == {("base", "base"): 1, ("base", "marginal_mean"): 1, ("marginal_mean", "base"): 1,
                     ("marginal_mean", "marginal_mean"): 2}  # fmt: skip


def test_a_pair_waits_until_both_of_its_runs_have_ended(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("FAIL", "marginal_mean/seed_0")
    run(tmp_path / "w")
    assert not any("--config.eval.searcher" in given for _, given in fake())


def test_what_is_done_is_not_done_again(fake, tmp_path):
    run(tmp_path / "w")
    fake()
    run(tmp_path / "w")
    assert fake() == []


def test_a_failed_run_ends_no_other_is_reported_and_tried_again(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("FAIL", "runs/grpo")
    directory = run(tmp_path / "w")
    assert [command for command, _ in fake()].count("evaluate") == 5
    found = gather(load_study(FILE), directory)
    states = {(row["arm"], row["seed"]): (row["state"], row["error"]) for row in found["runs"]}
    assert states["grpo", 0] == (
        "failed",
        "train: error: only 0 of 16 problems have a non-zero advantage",
    )
    assert states["marginal_mean", 1] == ("done", "")
    assert [claim["verdict"] for claim in found["claims"]][:2] == ["open", "open"]
    text = report.write(load_study(FILE), found, tmp_path / "report")
    assert "3 of 4 runs are done" in text and "only 0 of 16 problems" in text
    monkeypatch.delenv("FAIL")
    run(tmp_path / "w")
    assert [command for command, _ in fake()] == ["train", "evaluate"]
    assert {row["state"] for row in gather(load_study(FILE), directory)["runs"]} == {"done"}


def test_a_run_that_fails_after_a_checkpoint_is_evaluated_and_still_called_failed(
    fake, tmp_path, monkeypatch
):
    run(tmp_path / "w")
    other = tmp_path / "other"
    other.mkdir()
    directory = StudyDirectory(other)
    kept = directory.run("grpo", 0)
    kept.parent.mkdir(parents=True)
    kept.mkdir()
    steps = (
        (StudyDirectory(tmp_path / "w").run("grpo", 0) / "metrics.jsonl")
        .read_text()
        .splitlines(keepends=True)
    )
    (kept / "metrics.jsonl").write_text("".join(steps[:2]))
    monkeypatch.setenv("FAIL", "runs/grpo")
    run(other)
    found = gather(load_study(FILE), directory)
    (row,) = [row for row in found["runs"] if row["arm"] == "grpo"]
    assert (
        row["state"] == "failed"
        and row["error"].startswith("train:")
        and row["steps"] == 2
        and "measures" in row
    )


def test_a_run_that_was_told_to_stop_is_not_evaluated_and_goes_on(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("STEPS", "2")  # of the three that its configuration asks for
    directory = run(tmp_path / "w")
    assert [command for command, _ in fake()] == [
        "evaluate",
        "train",
        "train",
        "train",
    ]  # base alone; no pair
    assert {row["state"] for row in gather(load_study(FILE), directory)["runs"]} == {
        "done",
        "not finished",
    }
    monkeypatch.delenv("STEPS")
    run(tmp_path / "w")
    assert [command for command, _ in fake()] == ["train", "evaluate"] * 2 + ["evaluate"] * 2 + [
        "train",
        "evaluate",
    ]


def test_the_report_says_everything_and_its_pictures_are_drawn(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "draw", DRAW)
    found = gather(load_study(FILE), run(tmp_path / "w"))
    text = report.write(load_study(FILE), found, tmp_path / "out" / "report")
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == json.loads(
        json.dumps(found)
    )
    s = study_small.get_config()
    for part in (
        s.title,
        s.question,
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


def test_arms_may_be_added_but_a_run_is_held_to_its_experiment_and_none_goes_unsaid(fake, tmp_path):
    directory = run(tmp_path / "w")
    less = load_study(FILE)
    with less.s.unlocked():
        less.s.arms = less.s.arms[1:3]
        less.s.claims, less.s.cross, less.s.strategies = (), (), 0
    workdir = directory.run("marginal_mean", 1)
    (directory.path / "runs" / "rloo" / "seed_0").mkdir(parents=True)
    found = gather(less, directory)
    assert found["unnamed"] == ["rloo/seed_0"] and "rloo/seed_0" in report.write(
        less, found, tmp_path / "report"
    )
    assert "arms" not in less.plain() and "claims" in less.plain()
    c = load_study(FILE).experiments["marginal_mean"]
    c.seed = 1
    (workdir / "config.json").write_text(json.dumps(to_plain(c) | {"config_digest": ""}))
    gather(less, directory)
    c.optimizer.lr = 0.5
    (workdir / "config.json").write_text(json.dumps(to_plain(c) | {"config_digest": ""}))
    with pytest.raises(
        WorkdirError, match="(?s)seed_1: was run with another config.*optimizer.lr: 0.5 -> 0.0003"
    ):
        gather(less, directory)
    c.optimizer.lr = 3e-4
    (workdir / "config.json").write_text(json.dumps(to_plain(c) | {"config_digest": ""}))
    less.evaluation.eval.n = 16
    with pytest.raises(
        ResultsError, match="(?s)results.json: sampled with another config.*eval.n: 8 -> 16"
    ):
        gather(less, directory)


def test_a_sweep_tries_what_optuna_proposes_and_goes_on_where_it_was_stopped(
    fake, tmp_path, monkeypatch
):
    directory = run(tmp_path / "w")
    fake()
    with monkeypatch.context() as patch:  # killed while its first arm is trained
        patch.setattr(study.Runner, "run_arm", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sweep.sweep(load_study(FILE), directory, 2, runner(directory).value_of)
    (first,) = sweep.proposed(directory)
    swept = study.run_study(load_study(FILE), directory, Processes(1), 3)
    trained = [
        given["--config"].partition(":")[2] for command, given in fake() if command == "train"
    ]
    assert trained[0] == first and len(trained) == 3 and tuple(trained) == swept.proposed
    assert set(trained) < {"N5", "N7", "N9", "N11"}  # those that fit
    again = study.run_study(load_study(FILE), directory, Processes(1), 4)
    assert again.proposed[:3] == swept.proposed and set(again.proposed) == {"N5", "N7", "N9", "N11"}
    more = study.run_study(load_study(FILE), directory, Processes(1), 5)
    assert more.proposed == again.proposed  # there are no others
    found = gather(again, directory)
    assert (
        found["arms"]["N7"]["N"] == 7 and found["arms"]["N7"]["measures"] and found["unnamed"] == []
    )
    without = load_study("configs/study_two_halves.py")
    with pytest.raises(ConfigError, match="study_two_halves.py: has no function propose"):
        sweep.sweep(without, directory, 1, lambda study, arm: None)


def interrupted(self, arm, seed, number):
    if arm.startswith("N"):
        raise KeyboardInterrupt


def runner(directory):
    return study.Runner(load_study(FILE), directory, {}, None, "", Processes(1))


def test_a_study_without_results_says_what_became_of_its_runs(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("FAIL", "seed")
    directory = run(tmp_path / "w")
    with pytest.raises(
        WorkdirError, match="(?s)no run has been evaluated.*grpo seed 0: train: error: only 0"
    ):
        gather(load_study(FILE), directory)


def test_the_command_ends_with_status_1_if_a_claim_does_not_hold(fake, tmp_path, monkeypatch):
    flags = SimpleNamespace(
        config=FILE, workdir=str(tmp_path / "w"), report=False, out=None, sweep=0, at_once=1
    )
    monkeypatch.setattr(study.flags, "FLAGS", flags)
    study.main(["study"])
    loaded = load_study(FILE)
    with loaded.s.unlocked():
        loaded.s.claims = (("aggregated", "grpo", "marginal_mean", 0.0),)
    monkeypatch.setattr(study, "load_study", lambda path: loaded)
    flags.workdir = str(tmp_path / "w2")
    with pytest.raises(SystemExit, match="claim: aggregated: grpo > marginal_mean"):
        study.main(["study"])
    with pytest.raises(
        SystemExit, match=r"(?s)another config.*claims"
    ):  # the claims were stated before
        flags.workdir = str(tmp_path / "w")
        study.main(["study"])


DRIVER = """
import sys
sys.path.insert(0, "tests")
import test_study
from spiral_jax import study
study.find_trained = test_study.trained
sys.executable = sys.argv[1]
test_study.run(test_study.pathlib.Path(sys.argv[2]), int(sys.argv[3]))
"""


def started(tmp_path, monkeypatch, seconds, at_once=1):
    """A study in a process of its own, once its first commands of so many seconds run."""
    monkeypatch.setenv("SLEEP", str(seconds))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    driver = subprocess.Popen(
        [PYTHON, "-c", DRIVER, sys.executable, str(tmp_path / "w"), str(at_once)], cwd=ROOT
    )
    deadline, calls = time.monotonic() + 120, pathlib.Path(os.environ["CALLS"])
    while (
        not (calls.exists() and len(calls.read_text().splitlines()) >= at_once)
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    monkeypatch.setenv("SLEEP", "0")
    return driver


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [1, pytest.param(2, marks=needs_two_cores)])
def test_a_study_that_is_told_to_stop_stops_its_runs_too(fake, tmp_path, monkeypatch, at_once):
    driver = started(tmp_path, monkeypatch, 600, at_once)
    driver.terminate()
    assert driver.wait(timeout=60) == 1
    run(tmp_path / "w")  # nothing is left that keeps it out
    assert [command for command, _ in fake()].count("train") == 3 + (
        at_once - 1
    )  # one of two had begun to train


@pytest.mark.slow
def test_after_kill_9_the_run_that_is_left_keeps_the_next_study_out_and_then_it_goes_on(
    fake, tmp_path, monkeypatch
):
    driver, deadline = started(tmp_path, monkeypatch, seconds=3), time.monotonic() + 120
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    with pytest.raises(WorkdirError, match="a run that a killed one has left"):
        run(tmp_path / "w")
    while True:  # until the run that was left has ended
        try:
            run(tmp_path / "w")
            break
        except WorkdirError:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    commands = [command for command, _ in fake()]
    assert commands.count("train") == 3 and commands.count("evaluate") == 6
