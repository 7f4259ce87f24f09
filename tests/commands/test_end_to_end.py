"""The real program as a user starts it: runs, logs, refusals; tests/run/test_drills.py kills it.

One run has a process of its own; all others are forks of one that has imported the program.
"""

import collections
import gzip
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from benchmarks.nursery import Nursery
from configs import tiny
from spiral_jax.core.config import ConfigError, digest, to_plain
from spiral_jax.run.setup import set_up_training
from spiral_jax.run.workdir import open_workdir

pytestmark = pytest.mark.cpu_bits("it runs in processes of its own, on CPUs")

ROOT = pathlib.Path(__file__).parents[2]
SMALL = [
    "--config=configs/tiny.py",
    "--config.search.traces=4",
    "--config.aggregation.subsets=3",
    "--config.aggregation.subset_size=2",
    "--config.aggregation.traces=2",
    "--config.aggregation.rounds=2",
    "--config.batch.problems=2",
    "--config.batch.search_groups=2",
    "--config.batch.aggregation_groups=12",
    "--config.sampling.rows=16",
    "--config.verifier.workers=1",
    "--config.eval.problems=4",
    "--config.eval.subsets=2",
    "--config.checkpoint.every=1",
    "--config.trace_log.every=1",
    "--config.train.steps=4",
    "--config.optimizer.lr=1e-3",
]
# Problems of a step; search traces, sets of a round, aggregation traces of a set.
B, N, K, M = 2, 4, 3, 2


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The processes share what they compile, as they would with a cache directory of the user's."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


@pytest.fixture(scope="module")
def run(environment):
    """(workdir, flags...) -> the finished process of that run."""
    with Nursery(environment) as nursery:

        def start(workdir, *flags):
            return nursery.run([*SMALL, f"--workdir={workdir}", *flags])

        yield start


def metrics_of(workdir):
    """All metrics but those of the clock."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    clock = ("time/", "memory/", "tokens_per_s")
    return [{key: value for key, value in row.items() if not key.startswith(clock)} for row in rows]


def kept_traces(workdir, step):
    """Rows of the trace log of the problems that were trained on, and how many rows it has."""
    with gzip.open(workdir / "traces" / f"step_{step:06d}.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    return [row for row in rows if row["kept"]], len(rows)


def contents_of(workdir):
    pictures = (".png", ".svg")  # are drawn again
    files = [path for path in workdir.rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in files if path.suffix not in pictures}


@pytest.fixture(scope="module")
def finished(environment, tmp_path_factory):
    """An uninterrupted run in a process of its own, shared by the tests below."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    program = [sys.executable, "-m", "spiral_jax.train", *SMALL, f"--workdir={workdir}"]
    done = subprocess.run(
        program, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return workdir, done


@pytest.mark.slow
def test_every_metric_has_a_meaning_in_the_docs(finished):
    page = (ROOT / "docs" / "metrics.md").read_text()
    named = set()
    for name in re.findall(r"`([\w/]+)`", page):
        named |= {name.replace("ROLE", role) for role in ("search", "aggregation")}
    workdir, _ = finished
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert {key for row in rows for key in row} - named == set()


@pytest.mark.slow
def test_a_run_writes_what_the_readme_lists(finished):
    workdir, done = finished
    assert [row["step"] for row in metrics_of(workdir)] == [0, 1, 2, 3]
    assert {path.name for path in workdir.iterdir()} == {
        "config.json",
        "starts.jsonl",
        "metrics.jsonl",
        "evaluations.jsonl",
        "evaluations",
        "traces",
        "checkpoints",
        "curves.png",
        "curves.svg",
        "results.md",
    }
    evaluations = (workdir / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in evaluations] == [0, 4]
    assert "search prompt" in done.stdout and "aggregation trace" in done.stdout
    results = (workdir / "results.md").read_text()
    assert results in done.stdout
    (start,) = map(json.loads, (workdir / "starts.jsonl").open())
    digest_of_run = json.loads((workdir / "config.json").read_text())["config_digest"]
    commit = start["commit"] or "not known"
    for part in ("bundled:tiny", digest_of_run[:12], commit, start["time"]):
        assert part in results
    row = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[0])
    for key in (
        "reward/aggregated",
        "advantage/search_nonzero",
        "loss/search",
        "loss/aggregation",
        "mismatch/kl",
        "mismatch/max_abs_log_ratio",
        "length/search",
        "verifier/parse_rate_search",
        "grad_norm",
        "grad_norm/search",
        "grad_norm/aggregation",
        "time/updating",
        "tokens_per_s",
    ):
        assert isinstance(row[key], float), key
    assert row["mismatch/max_abs_log_ratio"] <= 1e-4


@pytest.mark.slow
def test_the_trace_log_holds_every_trace_with_its_ids_log_probs_reward_and_advantage(finished):
    workdir, _ = finished
    rows, logged = kept_traces(workdir, 0)
    of_problem = N + 2 * K * M
    assert len(rows) == B * of_problem and logged % of_problem == 0
    for row in rows:
        assert len(row["ids"]) == len(row["logprobs"]) == row["length"]
        assert row["stop"] in ("stop", "length") and row["reward"] in (0.0, 1.0)
        assert (row["role"] == "search") == (row["subset"] is None) == (row["round"] is None)
    by_set = {}
    for row in rows:
        if row["round"] == 2:  # what nobody reads: credit of the others is of sets
            by_set.setdefault((row["problem"], tuple(row["subset"])), []).append(row)
    assert len(by_set) > B
    for traces in by_set.values():
        mean = sum(row["reward"] for row in traces) / M
        for row in traces:
            expected = row["reward"] - mean
            gated = row["stop"] == "length" and expected > 0
            assert row["advantage"] == pytest.approx(0.0 if gated else expected, abs=1e-6)


@pytest.mark.slow
def test_both_rounds_of_aggregation_are_trained_on_and_reported(finished):
    workdir, done = finished
    assert "--- aggregation, round 2, prompt" in done.stdout
    for row in metrics_of(workdir):
        assert 0 < row["reward/aggregated_round_1"] < 1 and row["grad_norm/aggregation"] > 0
    kept, _ = kept_traces(workdir, 1)
    counts = collections.Counter(row["round"] for row in kept)
    assert counts == {None: B * N, 1: B * K * M, 2: B * K * M}


@pytest.mark.slow
def test_a_finished_run_prints_its_table_and_changes_nothing(finished, run):
    workdir, _ = finished
    before = contents_of(workdir)
    again = run(workdir)
    assert again.returncode == 0, again.stderr[-3000:]
    assert (workdir / "results.md").read_text() in again.stdout
    assert before == contents_of(workdir)


def test_another_config_in_the_same_workdir_is_refused_with_the_difference(run, tmp_path):
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
def test_a_bad_flag_ends_the_program_with_a_message_and_writes_nothing(name, run, tmp_path):
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
    "sampling.memory": (10_000.0, "the largest group needs"),
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
        set_up_training(c)
    assert f"config.{room}" in str(caught.value) and expected in str(caught.value)


@pytest.mark.slow
def test_a_dry_run_checks_shapes_and_writes_nothing(run, tmp_path):
    done = run(tmp_path / "run", "--dry_run")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "nothing was written" in done.stdout and not (tmp_path / "run").exists()
    assert "reward " in done.stdout and "keep_tail_tokens" not in done.stdout
