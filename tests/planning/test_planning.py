"""Plans: bad input, memory by arithmetic, the search for what fits, a whole step, and real programs
of a tiny model.
"""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from configs import qwen3_4b, tiny
from spiral_jax.core.config import ConfigError
from spiral_jax.core.groups import Role
from spiral_jax.core.mesh import AXES, mesh_shape
from spiral_jax.model import hf
from spiral_jax.model.architecture import Architecture
from spiral_jax.planning import compiled as compiled_module
from spiral_jax.planning import topology as topologies
from spiral_jax.planning.compiled import compile_kept, needed_bytes
from spiral_jax.planning.fit import Planner, as_flags, changed
from spiral_jax.planning.hlo import parse
from spiral_jax.planning.inventory import Forbidden, Run
from spiral_jax.planning.profile import forbidden_arrays, profile
from spiral_jax.planning.shipped_models import planned_model
from spiral_jax.planning.topology import CHIPS, Topology, find_topology
from spiral_jax.planning.whole_step import Assumptions, bucket, work_of

LIBTPU = importlib.util.find_spec("libtpu") is not None
ASSUMED = Assumptions()


def four_b():
    c = qwen3_4b.get_config()
    return c, planned_model(c)[0].arch


def planner(arch, topology, free=0.1):
    return Planner(arch, topology, ASSUMED, free, say=lambda text: None)


def gpus(kind="h100", chips=8, **numbers):
    return Topology(f"{kind}:{chips}", dataclasses.replace(CHIPS[kind], **numbers), chips, None)


@pytest.mark.parametrize(
    "name", ["v9:2x2", "h100", "h100:0", "v5e:8", "v5p:4x4", "h100:2x4", "v5e:axb", ""]
)
def test_an_unknown_topology_names_the_known_ones(name):
    with pytest.raises(ConfigError, match=r"v5e:AxB.*h100:N"):
        find_topology(name)


def test_without_libtpu_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install -r requirements-plan\.txt"):
        find_topology("v5e:2x2")
    assert find_topology("h200:8").chips == 8  # GPUs need none


def test_the_4b_model_is_planned_from_its_name_and_another_must_be_there():
    c = qwen3_4b.get_config()
    model, where = planned_model(c)
    assert model.arch.parameters == 4_022_468_096 and where.endswith(
        "Qwen3-4B-Instruct-2507/config.json"
    )
    c.model.hf_path = "no/such/directory"
    with pytest.raises(ConfigError, match="Qwen3-4B-Instruct-2507"):
        planned_model(c)


def test_a_directory_with_config_json_alone_is_enough(tmp_path):
    c = tiny.get_config()
    (tmp_path / "config.json").write_bytes(
        (hf.BUNDLED["bundled:tiny"] / "config.json").read_bytes()
    )
    c.model.hf_path = str(tmp_path)
    assert planned_model(c)[0] == planned_model(tiny.get_config())[0]


def test_state_bytes_of_a_chip_are_those_of_the_arithmetic():
    """64 chips, base cut in 8 x 4, its decode copy in 4: the numbers of docs/scaling.md."""
    c, arch = four_b()
    mesh = AbstractMesh((2, 8, 4), AXES)
    run = Run(c, hf.model_config(arch, c.model), mesh)
    memory = run.sampler_memory()
    adapters = 66_060_288
    assert memory["weights"] == pytest.approx(
        2 * arch.parameters / 32 + 4 * adapters / 8, rel=0.12
    )  # cut one way
    assert memory["optimizer"] == pytest.approx(
        2 * (memory["weights"] - 2 * arch.parameters / 32), rel=0.02
    )
    head = arch.V * arch.D  # a transposed copy of the tied embedding
    assert memory["decode copy"] == pytest.approx(
        2 * (arch.parameters + head + adapters) / 4, rel=0.02
    )
    token = 2 * 2 * arch.L * arch.J * arch.E  # keys and values of one token in bfloat16: 144 KiB
    tokens = sum(slots * (P + C * G) for slots, C, P, G in c.sampling.classes)
    assert memory["keys and values"] == tokens * token // 64
    trains = run.train_program(run.blocks[0]).memory
    assert trains["weights"] == memory["weights"] and trains["optimizer"] == memory["optimizer"]
    assert (
        not {"decode copy", "keys and values"} & trains.keys()
    )  # both are gone by then, see test_train_memory


def test_groups_that_the_mesh_does_not_divide_lead_to_the_first_change_that_fits():
    c, arch = four_b()
    c.mesh.fsdp = 64
    first, *_, last = planner(arch, gpus(chips=64)).attempts(c, most=12)
    assert not first.fits and "batch.search_groups = 16" in first.verdict and "64" in first.verdict
    assert last.fits and last.overrides["batch.search_groups"] % 64 == 0
    assert all(slots % 64 == 0 for slots, *_ in last.overrides["sampling.classes"])
    again = planner(arch, gpus(chips=64)).attempt(changed(c, last.overrides), {})
    assert again.fits and again.step == last.step
    assert "--config.batch.search_groups=64" in as_flags(last.overrides)


def test_what_was_too_large_is_what_changes():
    c, arch = four_b()
    c.batch.search_groups = c.batch.aggregation_groups = (
        32  # so that training is fuller than sampling
    )
    as_given = planner(arch, gpus()).attempt(c, {})
    small = int(0.97 * max(one.needed for one in as_given.profiles.values()) / 0.9)
    *failed, last = planner(arch, gpus(hbm_bytes=small)).attempts(c, most=12)
    assert failed[0].part == "train" and "train" in failed[0].verdict and not failed[0].overrides
    assert last.fits and last.overrides["batch.search_groups"] < c.batch.search_groups
    assert "sampling.classes" not in last.overrides


@pytest.mark.parametrize("mesh", [(2, 4, 1), (1, -1, 1)])
def test_no_configuration_is_tried_twice(mesh):
    c, arch = four_b()
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = mesh
    tried = [
        changed(c, one.overrides)
        for one in planner(arch, gpus(hbm_bytes=10**10)).attempts(c, most=2)
    ]
    for one in tried:
        one.mesh.data, one.mesh.fsdp, one.mesh.tensor = mesh_shape(one.mesh, 8, "GPU")
    assert len(tried) == 3 and len({str(one) for one in tried}) == len(tried)


def test_a_model_that_no_change_makes_fit_says_so():
    c, arch = four_b()
    *_, last = planner(arch, gpus(chips=1, hbm_bytes=10**10)).attempts(c, most=12)
    assert not last.fits and last.step is None


def test_a_step_samples_and_trains_the_groups_of_its_configuration():
    c, arch = four_b()
    search, aggregation = work_of(c, Assumptions(problem_share=0.5, response_share=0.25))
    assert (search.sampled, search.trained, search.traces, search.prompt, search.response) == (
        512,
        256,
        8,
        512,
        1024,
    )
    assert (aggregation.sampled, aggregation.trained, aggregation.prompt) == (
        2048,
        1024,
        512 + 4 * 1024,
    )
    assert (bucket(c, search), bucket(c, aggregation)) == (0, 1)
    step = planner(arch, gpus()).attempt(c, {}).step
    assert step["sampled_tokens"] == 512 * 8 * 2048 + 2048 * 4 * 2048
    assert step["micro_batches"] == 256 // 16 + 1024 // 16
    assert step["step_seconds"] == pytest.approx(sum(step["seconds"].values()))


@pytest.mark.parametrize(
    "message, size",
    [("RESOURCE_EXHAUSTED: Ran out of memory. Used 20.50G of 15.75G hbm. Exceeded", int(20.5 * 2**30)),
     ("Used 512.00K of 1K hbm", 2**19), ("INTERNAL: something else", None)],
)  # fmt: skip
def test_what_a_program_needs_is_read_from_the_compilers_error(message, size):
    assert needed_bytes(message) == size


def test_a_program_is_compiled_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SPIRAL_JAX_PLANS", str(tmp_path))
    lower = lambda: jax.jit(lambda x: x * 2).lower(jnp.zeros(8))  # noqa: E731
    first = compile_kept(lower(), "here")
    monkeypatch.setattr(compiled_module, "_compile", lambda lowered: pytest.fail("compiled again"))
    assert compile_kept(lower(), "here") == first and "ENTRY" in first.text


@pytest.fixture(scope="module")
def small_run(mesh):
    """A run of a small model on this process's devices, in which attention is as large a part as in
    a large one.
    """
    c = qwen3_4b.get_config()
    c.model.compute_dtype, c.model.lora_rank = "float32", 4
    c.model.attention_block, c.loss.logprob_chunk = 16, 32
    c.search.max_tokens = c.aggregation.max_tokens = 64
    c.batch.problems = c.batch.search_groups = c.batch.aggregation_groups = 8
    c.batch.search_lengths, c.batch.aggregation_lengths = ((32, 64),), ((96, 64),)
    c.sampling.classes, c.sampling.prefill_chunk = ((8, 8, 32, 64), (8, 4, 96, 64)), 32
    # L = 3: of two layers the scan holds one and is no loop to count; 0.972 of the ideal operations
    # were found then
    arch = Architecture(
        V=512, D=64, F=128, L=3, H=4, J=2, E=16, norm_eps=1e-6, rope_theta=5e6, tied=True
    )
    return Run(c, hf.model_config(arch, c.model), mesh)


@pytest.fixture(scope="module")
def here(mesh):
    return Topology("here", CHIPS["v5e"], mesh.size, list(mesh.devices.flat))


def test_the_real_programs_compute_what_the_ideal_count_says(small_run, here, tmp_path_factory):
    os.environ["SPIRAL_JAX_PLANS"] = str(tmp_path_factory.mktemp("plans"))
    programs = small_run.programs({Role.SEARCH: 32, Role.AGGREGATION: 90})
    names = ("train/search/0", "train/aggregation/0", "decode")  # one and several micro-batches
    profiles = {name: profile(programs[name], here, free=0.0) for name in names}
    for name, one in profiles.items():
        assert one.compiled and one.fits, name
        assert one.flops_ratio and 0.99 <= one.flops_ratio <= 1.1, (
            name,
            one.unit,
            one.program.ideal_flops,
        )
        assert one.memory["padding"] <= 0.05 * one.program.arguments, name
        assert not one.forbidden and not one.kernels
    json.dumps([one.to_plain() for one in profiles.values()])


@pytest.mark.parametrize(
    ("shape", "found"),
    [((2, 4, 48, 48), True), ((8, 48, 48), True), ((2, 4 * 48, 48), True), ((2, 4 * 48 * 48), False),
     ((2, 3, 48, 48), False), ((35, 2, 4, 48, 16), False), ((48,), False)],
)  # fmt: skip
def test_whole_scores_are_told_from_the_outputs_that_all_layers_keep(shape, found):
    """35 layers' outputs [.., P, E] have more elements beside P than one layer's scores [.., P, P]."""
    array = f"f32[{','.join(map(str, shape))}]"
    module = parse(
        f"HloModule m\n\nENTRY %main () -> {array} {{\n  ROOT %a = {array} iota(), iota_dimension=0\n}}\n"
    )
    scores = Forbidden({48}, 2 * 4 * 48, multiple=48)
    assert forbidden_arrays(module, {"scores": scores}) == (
        [f"scores f32{list(shape)}"] if found else []
    )


def run_plan(tmp_path, *arguments, timeout=600):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "SPIRAL_JAX_PLANS": str(tmp_path / "plans"),
    }
    environment.pop("XLA_FLAGS", None)
    command = [
        sys.executable,
        "-m",
        "spiral_jax.plan",
        f"--json={tmp_path / 'plan.json'}",
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    return done, json.loads((tmp_path / "plan.json").read_text()) if (
        tmp_path / "plan.json"
    ).exists() else None


def test_the_command_plans_gpus(tmp_path):
    done, report = run_plan(tmp_path, "--config=configs/qwen3_4b.py", "--topology=h100:8")
    assert done.returncode == 0, done.stderr
    assert (
        report["source"] == "arithmetic"
        and report["fits"]
        and report["tried"][-1]["verdict"] == "fits"
    )
    assert "by arithmetic" in done.stdout and "A step at its best" in done.stdout
    assert {one["source"] for one in report["programs"].values()} == {"arithmetic"}


def test_the_command_ends_with_one_line_on_bad_input(tmp_path):
    done, _ = run_plan(tmp_path, "--config=configs/qwen3_4b.py", "--topology=v9:2x2")
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith(
        "error: --topology=v9:2x2"
    )


@pytest.mark.slow
@pytest.mark.skipif(
    not LIBTPU, reason="libtpu is not installed: pip install -r requirements-plan.txt"
)
def test_the_small_run_fits_four_tpu_chips(tmp_path):
    done, report = run_plan(tmp_path, "--config=configs/tiny.py", "--topology=v5e:2x2")
    assert done.returncode == 0, done.stderr
    programs = report["programs"]
    assert report["source"] == "compiled" and {one["source"] for one in programs.values()} == {
        "compiled"
    }
    assert all(
        0.85 <= one["flops_over_ideal"] <= 1.3
        for one in programs.values()
        if one["flops_over_ideal"]
    )
    assert programs["train/search/0"]["sent_bytes"]["all-reduce"] > 0  # gradients
    assert report["step"]["step_seconds"] > 0


@pytest.mark.minutes
@pytest.mark.timeout(1900)  # its own limit comes first
@pytest.mark.skipif(
    not LIBTPU, reason="libtpu is not installed: pip install -r requirements-plan.txt"
)
def test_the_papers_batch_fits_64_v5e_chips(tmp_path):
    """All programs of the 4B model; within half an hour on two cores."""
    mesh = [f"--config.mesh.{axis}={size}" for axis, size in zip(AXES, (2, 8, 4), strict=True)]
    done, report = run_plan(
        tmp_path, "--config=configs/qwen3_4b.py", "--topology=v5e:8x8", *mesh, timeout=1800
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert report["tried"] == [{"change": "", "verdict": "fits"}]
    for one in report["programs"].values():
        if "train" in one["program"]:
            assert one["flops_over_ideal"] <= 1.15
        assert math.isclose(one["room_bytes"], 0.9 * CHIPS["v5e"].hbm_bytes, rel_tol=1e-6)
