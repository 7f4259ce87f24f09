"""The real program in two processes of four devices against one of eight: the same run."""

import gzip
import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from small_pods import ROOT, launch
from small_runs import random_like

from spiral_jax.core import mesh as meshes
from spiral_jax.model import hf
from spiral_jax.model.architecture import Architecture
from spiral_jax.model.transformer import ModelConfig

pytestmark = pytest.mark.cpu_bits("it runs in processes of its own, on CPUs")

SAME_GRADIENT = 2e-6  # relative L2: sums over devices in another order
ARCH = Architecture(
    V=352, D=32, F=48, L=1, H=4, J=2, E=8, norm_eps=1e-5, rope_theta=500.0, tied=True
)
RUN = [
    "--config=configs/tiny.py",
    "--config.task.reward=tests.small_rewards:every_other",
    f"--config.prompt.stop={tuple(range(10, 60))}",
    "--config.prompt.keep_tail_tokens=8",
    "--config.search.traces=4",
    "--config.search.max_tokens=8",
    "--config.aggregation.subsets=2",
    "--config.aggregation.subset_size=2",
    "--config.aggregation.traces=2",
    "--config.aggregation.max_tokens=4",
    "--config.sampling.rows=8",
    "--config.sampling.keep_rate=0.5",
    "--config.batch.problems=4",
    "--config.batch.search_groups=4",
    "--config.batch.search_lengths=((16, 8),)",
    "--config.batch.aggregation_groups=8",
    "--config.batch.aggregation_lengths=((64, 4),)",
    "--config.optimizer.b1=0.0",  # Adam's first moment is the gradient itself
    "--config.train.steps=1",
    "--config.trace_log.every=1",
    "--config.eval.problems=4",
    "--config.eval.subsets=2",
    "--config.verifier.workers=1",
    "--config.verifier.timeout_s=30.0",
    "--config.verifier.environment=('JUDGED', 'WATCHED', 'WRITTEN')",
    "--config.mesh.data=2",
    "--config.mesh.fsdp=2",
    "--config.mesh.tensor=2",
]

# Python runs it before the program: it notes every file that is opened for writing or renamed, and
# every directory that is made.
WATCH_WRITES = """
import os, sys
def hook(event, args):
    opened = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if opened or event in ("os.mkdir", "os.rename"):
        path = os.path.abspath(os.fsdecode(args[0])) if not isinstance(args[0], int) else ""
        if path.startswith(os.environ["WATCHED"]):
            os.write(watched, (path + "\\n").encode())
watched = os.open(os.environ["WRITTEN"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
sys.addaudithook(hook)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model with the bundled tokenizer."""
    directory = tmp_path_factory.mktemp("model") / "random"
    bundled = ROOT / "spiral_jax" / "assets" / "tiny"
    others = shutil.ignore_patterns("config.json", "generation_config.json", "model.safetensors")
    shutil.copytree(bundled, directory, ignore=others)
    one_device = jax.make_mesh((1, 1, 1), meshes.AXES, devices=jax.devices()[:1])
    config = ModelConfig(ARCH, param_dtype=np.float32)
    params = random_like(hf.abstract_params(config), one_device, seed=0, scale=1.0)
    hf.save_params(directory, params, config, (1,))
    return directory


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    """(directory of the test, {"one": processes of the run, "two": ...})."""
    top = tmp_path_factory.mktemp("runs")
    (top / "watch").mkdir()
    (top / "watch" / "sitecustomize.py").write_text(WATCH_WRITES)
    program = ["-m", "spiral_jax.train", *RUN, f"--config.model.hf_path={model}"]
    done = {}
    for name, processes, devices in (("one", 1, 8), ("two", 2, 4)):

        def environment(process, name=name):
            return {
                "PYTHONPATH": str(top / "watch"),
                "WATCHED": str(top / name),
                "WRITTEN": str(top / f"written_{name}_{process}"),
                "JUDGED": str(top / f"judged_{name}_{process}"),
            }

        command = [*program, f"--workdir={top / name}"]
        done[name] = launch(command, processes, devices, timeout=400, env=environment)
        for process in done[name]:
            assert process.returncode == 0, process.stderr[-3000:]
    return top, done


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def traces(path):
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


def without_clock(rows):
    clock = ("time/", "memory/", "tokens_per_s")
    return [{key: row[key] for key in row if not key.startswith(clock)} for row in rows]


def assert_same(found, expected, rtol, path=""):
    """Trees of JSON types: the same, floats up to `rtol` of them or of one."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key in expected:
            assert_same(found[key], expected[key], rtol, f"{path}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), path
        for i, pair in enumerate(zip(found, expected, strict=True)):
            assert_same(*pair, rtol, f"{path}/{i}")
    elif isinstance(expected, float) and not expected.is_integer():
        assert found == pytest.approx(expected, rel=rtol, abs=rtol), path
    else:
        assert found == expected, path


@pytest.mark.slow
def test_tokens_rewards_and_advantages_are_equal(runs):
    top, _ = runs
    one, two = (traces(top / name / "traces" / "step_000000.jsonl.gz") for name in ("one", "two"))
    kept = [row for row in one if row["kept"]]
    assert len(kept) == 4 * (4 + 2 * 2) < len(one)  # discarded ones too
    assert_same(two, one, rtol=1e-5)  # log-probs: sums in another order
    assert {row["stop"] for row in one} == {"stop", "length"}
    assert {row["reward"] for row in one} == {0.0, 1.0}


@pytest.mark.slow
def test_dynamic_sampling_refuses_and_counts_the_same(runs):
    top, _ = runs
    one, two = (lines(top / name / "metrics.jsonl") for name in ("one", "two"))
    assert [row["step"] for row in one] == [0]
    counts = {name: one[0][f"sampling/{name}"] for name in ("kept", "surplus", "undecided")}
    assert counts["kept"] == 4
    assert one[0]["sampling/tried"] - sum(counts.values()) > 0  # refused
    assert_same(without_clock(two), without_clock(one), rtol=SAME_GRADIENT)


@pytest.mark.slow
def test_evaluations_before_and_after_the_step_are_the_same(runs):
    top, _ = runs
    one, two = (lines(top / name / "evaluations.jsonl") for name in ("one", "two"))
    assert [row["step"] for row in one] == [0, 1]
    assert one[0]["sampled_tokens"] != one[1]["sampled_tokens"]
    assert_same(two, one, rtol=1e-6)


@pytest.mark.slow
def test_the_gradient_is_the_same(runs):
    top, _ = runs

    def gradient(name):
        directory, reader = top / name / "checkpoints" / "1" / "state", ocp.PyTreeCheckpointer()
        on_host = ocp.RestoreArgs(restore_type=np.ndarray)
        where = jax.tree.map(lambda _: on_host, reader.metadata(directory).item_metadata.tree)
        opt = reader.restore(directory, restore_args=where)["opt"]
        leaves = jax.tree_util.tree_leaves_with_path(opt)
        named = {meshes.path_name(path): leaf.astype(np.float64) for path, leaf in leaves}
        return {path: leaf for path, leaf in named.items() if "/mu/" in path}

    one, two = gradient("one"), gradient("two")
    assert one.keys() == two.keys() and len(one) > 8
    size = np.sqrt(sum(np.sum(array**2) for array in one.values()))
    distance = np.sqrt(sum(np.sum((two[name] - array) ** 2) for name, array in one.items()))
    assert size > 0 and distance / size <= SAME_GRADIENT


@pytest.mark.slow
def test_only_process_0_writes_and_prints(runs):
    top, done = runs
    outside = {}
    for path in top.glob("written_*"):
        outside[path.name] = [p for p in path.read_text().split() if "/checkpoints" not in p]
    assert outside["written_two_0"] and outside["written_two_1"] == []
    assert {p.name for p in (top / "two").iterdir()} == {p.name for p in (top / "one").iterdir()}
    first, second = (process.stdout for process in done["two"])
    assert "process 0 of 2: 4 of 8 devices" in first and "search prompt" in first
    assert "process 1 of 2: 4 of 8 devices" in second
    for text in ("sampler:", "search prompt", "step 1 of", "pass@"):  # gloo prints too
        assert text not in second
    devices = "process 0 of 1: 8 of 8 devices, cpu (cpu), mesh data=2, fsdp=2, tensor=2"
    assert done["one"][0].stdout.startswith(devices)


@pytest.mark.slow
def test_each_process_judges_its_share(runs):
    top, _ = runs
    judged = {path.name: len(path.read_text().split()) for path in top.glob("judged_*")}
    both = judged["judged_two_0"] + judged["judged_two_1"]
    assert judged["judged_two_0"] == pytest.approx(both / 2, abs=both / 20)
    # some of the problems that are abandoned are still judged
    assert both == pytest.approx(judged["judged_one_0"], rel=0.2)
