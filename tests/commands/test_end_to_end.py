"""The real program as a user starts it: runs, logs, kill -9 and resume, refusals. Each test is a
few processes.
"""

import gzip
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from configs import tiny
from spiral_jax.core.config import ConfigError, digest, to_plain
from spiral_jax.run.setup import set_up
from spiral_jax.run.workdir import open_workdir

ROOT = pathlib.Path(__file__).parents[2]
SMALL = [
    "--config=configs/tiny.py", "--config.batch.problems=4", "--config.batch.search_groups=4",
    "--config.batch.aggregation_groups=8", "--config.sampling.classes=((8, 8, 16, 26), (32, 4, 124, 12))",
    "--config.eval.problems=8", "--config.checkpoint.every=1",
    "--config.trace_log.every=1", "--config.train.steps=4", "--config.optimizer.lr=1e-3",
]  # fmt: skip


def command(workdir, *more):
    return [sys.executable, "-m", "spiral_jax.train", *SMALL, f"--workdir={workdir}", *more]


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """The processes share what they compile, as they would with a cache directory of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        yield


def run(workdir, *more):
    return subprocess.run(
        command(workdir, *more), cwd=ROOT, capture_output=True, text=True, timeout=900
    )


def metrics_of(workdir):
    """All metrics but those of the clock."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    clock = ("time/", "memory/", "tokens_per_s")
    return [{key: value for key, value in row.items() if not key.startswith(clock)} for row in rows]


def arrays_of(workdir):
    directory = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    tree = ocp.StandardCheckpointer().restore(directory / "state")
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return directory.name, {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run, shared by the tests below."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = run(workdir)
    assert done.returncode == 0, done.stderr[-3000:]
    return workdir, done


@pytest.mark.slow
def test_a_run_writes_what_the_readme_lists(finished):
    workdir, done = finished
    assert [row["step"] for row in metrics_of(workdir)] == [0, 1, 2, 3]
    names = {"config.json", "starts.jsonl", "metrics.jsonl", "evaluations.jsonl", "evaluations", "traces",
             "checkpoints", "curves.png", "results.md"}  # fmt: skip
    assert {path.name for path in workdir.iterdir()} == names
    evaluations = [
        json.loads(line) for line in (workdir / "evaluations.jsonl").read_text().splitlines()
    ]
    assert [evaluation["step"] for evaluation in evaluations] == [0, 4]
    assert "search prompt" in done.stdout and "aggregation trace" in done.stdout
    assert (workdir / "results.md").read_text() in done.stdout
    row = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[0])
    for key in ("reward/aggregated", "advantage/search_nonzero", "loss/search", "loss/aggregation", "mismatch/kl",
                "mismatch/max_abs_log_ratio", "length/search", "verifier/parse_rate_search", "grad_norm",
                "grad_norm/search", "grad_norm/aggregation", "time/updating", "tokens_per_s"):  # fmt: skip
        assert isinstance(row[key], float), key
    assert row["mismatch/max_abs_log_ratio"] <= 1e-4


@pytest.mark.slow
def test_the_trace_log_holds_every_trace_with_its_ids_log_probs_reward_and_advantage(finished):
    workdir, _ = finished
    with gzip.open(workdir / "traces" / "step_000000.jsonl.gz", "rt") as file:
        every = [json.loads(line) for line in file]
    rows = [row for row in every if row["kept"]]
    assert len(rows) == 4 * (8 + 4 * 4) and len(every) % (8 + 4 * 4) == 0
    for row in rows:
        assert len(row["ids"]) == len(row["logprobs"]) == row["length"]
        assert row["stop"] in ("stop", "length") and row["reward"] in (0.0, 1.0)
        assert (row["role"] == "search") == (row["subset"] is None)
    by_set = {}
    for row in rows:
        if row["role"] == "aggregation":
            by_set.setdefault((row["problem"], tuple(row["subset"])), []).append(row)
    for traces in by_set.values():
        mean = sum(row["reward"] for row in traces) / 4
        for row in traces:
            expected = row["reward"] - mean
            gated = row["stop"] == "length" and expected > 0
            assert row["advantage"] == pytest.approx(0.0 if gated else expected, abs=1e-6)


@pytest.mark.slow
def test_a_run_with_two_rounds_of_aggregation_trains_on_both_and_reports_them(tmp_path):
    done = run(
        tmp_path / "run",
        "--config.aggregation.rounds=2",
        "--config.train.steps=2",
        "--config.eval.problems=0",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "--- aggregation, round 2, prompt" in done.stdout
    rows = metrics_of(tmp_path / "run")
    assert rows[0]["mismatch/max_abs_log_ratio"] <= 1e-4
    assert all(
        0 < row["reward/aggregated_round_1"] < 1 and row["grad_norm/aggregation"] > 0
        for row in rows
    )
    with gzip.open(tmp_path / "run" / "traces" / "step_000001.jsonl.gz", "rt") as file:
        kept = [row for row in map(json.loads, file) if row["kept"]]
    assert {row["round"]: sum(row["round"] == other["round"] for other in kept) for row in kept} == {
        None: 4 * 8, 1: 4 * 4 * 4, 2: 4 * 4 * 4,
    }  # fmt: skip


@pytest.mark.slow
def test_kill_9_between_steps_then_the_same_command_equals_the_uninterrupted_run(
    finished, tmp_path
):
    workdir, _ = finished
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        command(killed), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 600
    while not (killed / "checkpoints" / "2").exists():
        assert process.poll() is None and time.monotonic() < deadline, (
            "the run ended before it could be killed"
        )
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "results.md").exists()
    resumed = run(killed)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "search prompt" not in resumed.stdout  # step 0 was not run again
    assert metrics_of(killed) == metrics_of(workdir)
    for path in (workdir / "traces").iterdir():
        assert (killed / "traces" / path.name).read_bytes() == path.read_bytes()
    for name in ("evaluations.jsonl", "results.md", "evaluations/step_000004/results.json"):
        assert (killed / name).read_text() == (workdir / name).read_text()
    (step, expected), (step_too, found) = arrays_of(workdir), arrays_of(killed)
    assert step == step_too == "4" and expected.keys() == found.keys()
    for name, array in expected.items():
        assert array.tobytes() == found[name].tobytes(), name


@pytest.mark.slow
def test_a_finished_run_prints_its_table_and_changes_nothing(finished):
    workdir, _ = finished
    contents = lambda: {
        p: p.read_bytes() for p in workdir.rglob("*") if p.is_file() and p.suffix != ".png"
    }  # noqa: E731
    before = contents()
    again = run(workdir)
    assert again.returncode == 0, again.stderr[-3000:]
    assert (workdir / "results.md").read_text() in again.stdout
    assert before == contents()


def test_another_config_in_the_same_workdir_is_refused_with_the_difference(tmp_path):
    c = tiny.get_config()
    open_workdir(tmp_path / "run", to_plain(c), digest(c))
    refused = run(tmp_path / "run", "--config.seed=5")
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert "seed: 0 -> 5" in refused.stderr and "workdir" in refused.stderr


FLAGS = {
    "unknown field": ("--config.search.trace=4", 'Did you mean "traces"'),
    "not a number": ("--config.train.steps=many", "steps"),
    "S > N": ("--config.aggregation.subset_size=9", "error: config.aggregation.subset_size = 9"),
}


@pytest.mark.parametrize("name", FLAGS)
def test_a_bad_flag_ends_the_program_with_a_message_and_writes_nothing(name, tmp_path):
    flag, expected = FLAGS[name]
    refused = run(tmp_path / "run", flag)
    assert refused.returncode != 0
    assert expected in refused.stderr + refused.stdout, refused.stderr[-2000:]
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "run").exists()


BAD = {
    "model.hf_path": ("/no/such", "no such directory"),
    "mesh.tensor": (3, "product of the sizes must be"),
    "batch.search_groups": (3, "divisor"),
    "task.reward": ("no_such_module:f", "no_such_module"),
    "sampling.classes": (((8, 8, 16, 26), (32, 4, 64, 12)), "aggregation prompts may have up to"),
    "batch.aggregation_lengths": (((64, 12),), "aggregation prompts may have up to"),
    "eval.problems": (10**6, "held-out problems"),
    "prompt.candidate": ("#", "{candidate}"),
}


@pytest.mark.parametrize("field", BAD)
def test_set_up_refuses_what_does_not_fit_and_names_the_field(field):
    c, (value, expected) = tiny.get_config(), BAD[field]
    room, name = field.split(".")
    c[room][name] = value
    with pytest.raises(ConfigError) as caught:
        set_up(c)
    assert f"config.{room}" in str(caught.value) and expected in str(caught.value)


@pytest.mark.slow
def test_a_dry_run_checks_shapes_and_writes_nothing(tmp_path):
    done = run(tmp_path / "run", "--dry_run")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "nothing was written" in done.stdout and not (tmp_path / "run").exists()
