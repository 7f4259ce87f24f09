"""Plans: bad input, memory by arithmetic, the search for what fits, a whole step, real programs."""

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import qwen3_4b, qwen3_4b_one_card, tiny
from spiral_jax.core.config import ConfigError
from spiral_jax.core.groups import Role
from spiral_jax.core.mesh import AXES, abstract_mesh, mesh_shape
from spiral_jax.model import hf
from spiral_jax.model.architecture import Architecture
from spiral_jax.model.flops import decode_flops
from spiral_jax.planning import topology as topologies
from spiral_jax.planning.compiled import compile_kept, needed_bytes
from spiral_jax.planning.fit import Planner
from spiral_jax.planning.gpus import missing_compiler
from spiral_jax.planning.hlo import parse
from spiral_jax.planning.inventory import take_inventory
from spiral_jax.planning.planned_program import Forbidden, plan_programs, train_program
from spiral_jax.planning.profile import forbidden_arrays, profile
from spiral_jax.planning.settings import PlanSettings, apply_overrides, as_flags
from spiral_jax.planning.shipped_models import planned_model
from spiral_jax.planning.text import chip_memory, plan
from spiral_jax.planning.topology import CHIPS, Topology, find_topology, make_mesh
from spiral_jax.planning.usage import Usage
from spiral_jax.planning.whole_step import bucket_of
from spiral_jax.planning.work import Assumptions, Work, work_of_step

DOCS = pathlib.Path(__file__).parents[2] / "docs"
LIBTPU = importlib.util.find_spec("libtpu") is not None
NEEDS_LIBTPU = pytest.mark.skipif(
    not LIBTPU, reason='libtpu is not installed: pip install ".[plan]"'
)


def four_b():
    c = qwen3_4b.get_config()
    return c, planned_model(c.model)[0].arch


def planner(c, arch, topology, free=0.1):
    def take(overrides):
        changed = apply_overrides(c, overrides)
        model = hf.model_config(arch, changed.model)
        mesh = make_mesh(changed.mesh, topology)
        return take_inventory(changed, model, mesh, topology.chip.hbm_bytes)

    return Planner(
        settings=PlanSettings.from_config(c),
        take=take,
        arch=arch,
        topology=topology,
        assumed=Assumptions(),
        free=free,
        say=lambda text: None,
    )


def gpus(kind="h100", chips=8, **numbers):
    return Topology(f"{kind}:{chips}", dataclasses.replace(CHIPS[kind], **numbers), chips, None)


@pytest.mark.parametrize(
    "name", ["v9:2x2", "h100", "h100:0", "v5e:8", "v5p:4x4", "h100:2x4", "v5e:axb", ""]
)
def test_an_unknown_topology_names_the_known_ones(name):
    with pytest.raises(ConfigError) as raised:
        find_topology(name)
    message = str(raised.value)
    assert f"--topology={name}" in message and "v5e:AxB" in message and "h100:N" in message


def test_without_libtpu_slices_are_planned_by_arithmetic_and_it_is_said(monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    slice_ = find_topology("v5e:2x2")
    assert (slice_.chips, slice_.devices) == (4, None)
    assert "libtpu" in slice_.missing and "[plan]" in slice_.missing
    assert "CUDA plugin" in find_topology("h200:8").missing


def test_a_plan_of_a_slice_by_arithmetic_is_near_the_compilers(monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    compiled = json.loads((DOCS / "results" / "scaling" / "v5e_8x8.json").read_text())
    c = qwen3_4b.get_config()
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = 2, 8, 4
    c.batch.search_groups = c.batch.aggregation_groups = 16
    c.model.remat = "attention"
    said = []
    report = plan(c, "v5e:8x8", Assumptions(), free=0.1, most_tries=1, say=said.append)
    assert report["fits"] and report["source"] == "arithmetic" and "libtpu" in said[0]
    for name in ("train/search/0", "train/aggregation/0", "train/aggregation/2"):
        ratio = (
            report["programs"][name]["needed_bytes"] / compiled["programs"][name]["needed_bytes"]
        )
        assert 0.8 < ratio < 1.0, name  # 0.85 to 0.89: the compiler's temporaries are larger


def test_the_4b_model_is_planned_from_its_name_and_another_must_be_there():
    c = qwen3_4b.get_config()
    model, file = planned_model(c.model)
    assert model.arch.parameters == 4_022_468_096
    assert file.endswith("Qwen3-4B-Instruct-2507/config.json")
    c.model.hf_path = "no/such/directory"
    with pytest.raises(ConfigError, match="no/such/directory.*Qwen3-4B-Instruct-2507"):
        planned_model(c.model)


def test_a_directory_with_config_json_alone_is_enough(tmp_path):
    c = tiny.get_config()
    bundled, _ = planned_model(c.model)
    config = hf.BUNDLED["bundled:tiny"] / "config.json"
    (tmp_path / "config.json").write_bytes(config.read_bytes())
    c.model.hf_path = str(tmp_path)
    assert planned_model(c.model)[0] == bundled


def test_state_bytes_of_a_chip_are_those_of_the_arithmetic():
    """64 chips, base cut in 8 x 4, its decode copy in 4: the numbers of docs/results/scaling.md."""
    c, arch = four_b()
    mesh = abstract_mesh((2, 8, 4))
    chip_bytes = CHIPS["v5e"].hbm_bytes
    inventory = take_inventory(c, hf.model_config(arch, c.model), mesh, chip_bytes)
    memory = inventory.sampler_memory()
    base = 2 * arch.parameters / 32
    adapters = 66_060_288
    # adapters are cut along one axis
    assert memory["weights"] == pytest.approx(base + 4 * adapters / 8, rel=0.12)
    assert memory["optimizer"] == pytest.approx(2 * (memory["weights"] - base), rel=0.02)

    head = arch.V * arch.D  # a transposed copy of the tied embedding
    # B of q, k, v, and of gate, up, lie below joined matrices, in columns of which each adapter's
    # rows fill their own and are 0 elsewhere
    zeros = arch.L * 32 * (2 * (arch.H + 2 * arch.J) * arch.E + 2 * arch.F)
    decode_copy = 2 * (arch.parameters + head + adapters + zeros) / 4
    assert memory["decode copy"] == pytest.approx(decode_copy, rel=0.02)
    token = 2 * 2 * arch.L * arch.J * arch.E  # keys and values of one token in bfloat16: 144 KiB
    page = inventory.engine.schedule.page
    assert memory["keys and values"] == inventory.engine.schedule.pages * page * token // 4
    free = chip_bytes - sum(inventory.policy_memory().values())
    assert 0.5 * free < memory["keys and values"] <= c.sampling.memory * free

    training = train_program(inventory, inventory.blocks[0]).memory
    assert training["weights"] == memory["weights"]
    assert training["optimizer"] == memory["optimizer"]
    # both are gone by then, see test_train_memory
    assert not {"decode copy", "keys and values"} & training.keys()


def test_on_one_card_a_base_in_int8_lies_once_and_the_4b_run_fits():
    """In bfloat16 it lies twice, and does not fit."""
    c, arch = qwen3_4b_one_card.get_config(), four_b()[1]
    attempt = planner(c, arch, gpus("rtx4090", 1)).attempt({})
    assert attempt.fits and attempt.pages["rows"] >= 100

    heads, own = arch.H * arch.E, arch.J * arch.E
    columns = 2 * heads + 2 * own + 3 * arch.F  # of matrices that have D rows, or D columns
    outputs = heads + 2 * own + 2 * arch.F + 2 * arch.D  # each has a scale in float32
    norms = arch.L * (2 * arch.D + 2 * arch.E) + arch.D
    base = arch.L * (arch.D * columns + 4 * outputs) + 2 * (arch.V * arch.D + norms)
    adapters = 66_060_288
    memory = attempt.profiles["decode"].memory
    assert memory["weights"] == base + 4 * adapters
    assert memory["decode copy"] == 2 * adapters
    # each pass reads the base and the adapters, once
    read = attempt.profiles["decode"].program.ideal_hbm_bytes
    assert base + 2 * adapters < read < 2 * base + memory["keys and values"]

    c.model.param_dtype = "bfloat16"
    assert planner(c, arch, gpus("rtx4090", 1)).attempt({}).at_fault == "sampler"


def test_groups_that_the_mesh_does_not_divide_lead_to_the_first_change_that_fits():
    c, arch = four_b()
    c.mesh.fsdp = 64
    first, *_, last = planner(c, arch, gpus(chips=64)).attempts(most=12)
    assert not first.fits and first.at_fault == "train"
    assert "batch.search_groups = 16" in first.verdict and "64" in first.verdict
    assert last.fits and last.overrides["batch.search_groups"] % 64 == 0
    assert "--config.batch.search_groups=64" in as_flags(last.overrides)

    again = planner(apply_overrides(c, last.overrides), arch, gpus(chips=64)).attempt({})
    assert again.fits and again.step == last.step


def test_pages_that_leave_a_program_no_room_become_fewer():
    c, arch = four_b()
    c.sampling.memory = 1.0
    first, *_, last = planner(c, arch, gpus()).attempts(most=12)
    assert first.at_fault == "sampler"
    assert last.fits and last.overrides["sampling.memory"] < 1
    assert "batch.search_groups" not in last.overrides
    assert last.pages["pages"] < first.pages["pages"]


def test_pages_too_few_for_a_group_become_smaller():
    """The largest group has a prompt of 17,920 tokens and 8 traces of 4,096, 144 KiB a token."""
    c, arch = four_b()
    group = (17_920 + 8 * 4096) * 147_456
    c.sampling.memory = 0.75 * group
    first, *_, last = planner(c, arch, gpus()).attempts(most=12)
    assert first.at_fault == "pages" and "config.sampling.memory" in first.verdict
    assert last.fits and last.overrides["sampling.cache_dtype"] == "int8"
    assert "sampling.memory" not in last.overrides


def test_what_was_too_large_is_what_changes():
    c, arch = four_b()
    c.batch.search_groups = c.batch.aggregation_groups = 32  # training is fuller than sampling
    as_configured = planner(c, arch, gpus()).attempt({})
    largest = max(profile.needed for profile in as_configured.profiles.values())
    small = gpus(hbm_bytes=int(0.97 * largest / 0.9))
    *failed, last = planner(c, arch, small).attempts(most=12)
    assert failed[0].at_fault == "train"
    assert "train" in failed[0].verdict and not failed[0].overrides
    assert last.fits and last.overrides["batch.search_groups"] < c.batch.search_groups
    assert "sampling.memory" not in last.overrides


@pytest.mark.parametrize("mesh", [(2, 4, 1), (1, -1, 1)])
def test_no_configuration_is_tried_twice(mesh):
    c, arch = four_b()
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = mesh
    tried = []
    for attempt in planner(c, arch, gpus(hbm_bytes=10**10)).attempts(most=2):
        changed = apply_overrides(c, attempt.overrides)
        shape = mesh_shape(changed.mesh, 8, "GPU")
        changed.mesh.data, changed.mesh.fsdp, changed.mesh.tensor = shape
        tried.append(str(changed))
    assert len(tried) == 3 and len(set(tried)) == len(tried)


def test_a_model_that_no_change_makes_fit_says_so():
    c, arch = four_b()
    *_, last = planner(c, arch, gpus(chips=1, hbm_bytes=10**10)).attempts(most=12)
    assert not last.fits and last.step is None


def test_a_step_samples_and_trains_the_groups_of_its_configuration():
    c, arch = four_b()
    settings = PlanSettings.from_config(c)
    assumed = Assumptions(problem_share=0.5, response_share=0.25)
    search, aggregation = work_of_step(settings, assumed)
    assert (search.sampled, search.trained, search.traces) == (512, 256, 8)
    assert (search.prompt, search.response) == (512, 1024)
    assert (aggregation.sampled, aggregation.trained) == (2048, 1024)
    assert aggregation.prompt == 512 + 4 * 1024
    assert bucket_of(search, settings.learner.shapes[Role.SEARCH]) == 0
    assert bucket_of(aggregation, settings.learner.shapes[Role.AGGREGATION]) == 1

    step = planner(c, arch, gpus()).attempt({}).step
    assert step["sampled_tokens"] == 512 * 8 * 2048 + 2048 * 4 * 2048
    assert step["micro_batches"] == 256 // 16 + 1024 // 16
    assert step["step_seconds"] == pytest.approx(sum(step["seconds"].values()))


@pytest.mark.parametrize("budget, steps", [(0, 250), (1, 1), (10**8, 4), (10**12, 250)])
def test_a_run_takes_its_steps_until_the_tokens_are_spent(budget, steps):
    """A step samples 512 * 8 + 2048 * 4 traces of 2,048 tokens: 25,165,824."""
    c, arch = four_b()
    c.train.max_sampled_tokens = budget
    last = planner(c, arch, gpus()).attempt({})
    assert last.run["steps"] == steps
    seconds = sum(last.step["step_seconds"] for _ in range(steps))
    assert last.run["hours"] * 60 * 60 == pytest.approx(seconds)
    assert last.run["chip_hours"] * 60 * 60 == pytest.approx(8 * seconds)


def test_what_is_left_free_is_what_a_smaller_chip_may_lack():
    c, arch = four_b()
    c.sampling.memory = 20e9  # bytes: a share of the chip would be less on a smaller one
    chip_bytes = CHIPS["h100"].hbm_bytes
    memory = chip_memory(planner(c, arch, gpus()).attempt({}), chip_bytes)
    assert memory["bytes"] == chip_bytes and memory["free_bytes"] > 0
    for lacking, fits in ((0, True), (1, False)):
        small = gpus(hbm_bytes=chip_bytes - memory["free_bytes"] - lacking)
        attempt = planner(c, arch, small, free=0.0).attempt({})
        assert attempt.fits == fits
    assert memory["fullest"] in attempt.verdict


@pytest.mark.parametrize(
    "message, size",
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory. Used 20.50G of 15.75G hbm. Exceeded",
            int(20.5 * 2**30),
        ),
        ("Used 512.00K of 1K hbm", 2**19),
        ("INTERNAL: something else", None),
    ],
)
def test_what_a_program_needs_is_read_from_the_compilers_error(message, size):
    assert needed_bytes(message) == size


class NeverCompiled:
    """The same program, whose compilation fails the test."""

    def __init__(self, lowered):
        self.as_text = lowered.as_text

    def compile(self):
        pytest.fail("compiled again")


def test_a_program_is_compiled_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SPIRAL_JAX_PLANS", str(tmp_path))
    lowered = jax.jit(lambda x: x * 2).lower(jnp.zeros(8))
    first = compile_kept(lowered, "here")
    assert "ENTRY" in first.text
    assert compile_kept(NeverCompiled(lowered), "here") == first


ROWS = 16
FULL = Usage(  # all rows run, at their limits
    rows=ROWS,
    bound="rows",
    pages_a_row=7,
    own=64,
    prompt=96,
    bundles_a_row=0.5,
    prompt_read=48,
    longest_trace=64,
    longest_prompt=96,
)


@pytest.fixture(scope="module")
def small_run(mesh):
    """A small model in which attention is as large a part as in a large one, on our devices."""
    c = qwen3_4b.get_config()
    c.model.compute_dtype, c.model.lora_rank = "float32", 4
    c.model.attention_block, c.loss.logprob_chunk = 16, 32
    c.search.max_tokens = c.aggregation.max_tokens = 64
    c.batch.problems = c.batch.search_groups = c.batch.aggregation_groups = 8
    c.batch.search_lengths, c.batch.aggregation_lengths = ((32, 64),), ((96, 64),)
    c.sampling.rows, c.sampling.prefill_chunk, c.eval.problems = ROWS, 32, 0
    # L = 3: of two layers the scan holds one and is no loop to count; 0.972 of the ideal operations
    # were found then
    arch = Architecture(
        V=512, D=64, F=128, L=3, H=4, J=2, E=16, norm_eps=1e-6, rope_theta=5e6, tied=True
    )
    return take_inventory(c, hf.model_config(arch, c.model), mesh, CHIPS["v5e"].hbm_bytes)


@pytest.fixture(scope="module")
def here(mesh):
    return Topology("here", CHIPS["v5e"], mesh.size, list(mesh.devices.flat))


def joined_flops(arch, rank):
    """What a token costs the sampler beyond separate projections: (a layer, the last of prefill).

    Joined matrices have zeros beside each adapter's B. Where keys and values alone are needed, the
    queries are computed all the same.
    """
    D, qkv, kv = arch.D, (arch.H + 2 * arch.J) * arch.E, 2 * arch.J * arch.E
    layer = 2 * (2 * rank * qkv + rank * 2 * arch.F)
    joined, needed = (D + 3 * rank) * qkv + 3 * rank * D, D * kv + rank * (2 * D + kv)
    return layer, 2 * (joined - needed)


@pytest.mark.cpu_bits("arrays and memory of XLA's program for CPUs")
def test_the_real_programs_compute_what_the_ideal_count_says(
    small_run, here, tmp_path, monkeypatch
):
    monkeypatch.setenv("SPIRAL_JAX_PLANS", str(tmp_path))
    works = [
        Work(Role.SEARCH, 8, 8, traces=8, prompt=32, response=32, limit=64),
        Work(Role.AGGREGATION, 32, 32, traces=4, prompt=90, response=32, limit=64),
    ]
    programs = plan_programs(small_run, works, FULL)
    arch, rank = small_run.model.arch, small_run.model.lora_rank
    layer, last = joined_flops(arch, rank)
    # one and several micro-batches
    for name in ("train/search/0", "train/aggregation/0", "prefill/aggregation"):
        result = profile(programs[name], here, free=0.0)
        assert result.compiled and result.fits, name
        ideal = result.program.ideal_flops
        if name.startswith("prefill"):
            ideal += result.program.tokens / small_run.chips * ((arch.L - 1) * layer + last)
        assert 0.99 <= result.unit.flops / ideal <= 1.1, (name, result.unit, ideal)
        assert result.memory["padding"] <= 0.05 * result.program.arguments, name
        assert not result.forbidden and not result.kernels
        json.dumps(result.to_plain())

    result = profile(programs["decode"], here, free=0.0)
    # without kernels all places of all bundles are computed, over all tokens that pages hold
    schedule = small_run.engine.schedule
    places = schedule.bundles(ROWS) * schedule.width / ROWS
    keys = schedule.page * (schedule.own_pages + places * schedule.prompt_pages)
    keys_N = np.full(ROWS * small_run.shards, keys)
    computed = decode_flops(arch, rank, keys_N) + len(keys_N) * arch.L * layer
    computed /= small_run.chips
    assert result.compiled and result.fits
    assert 0.99 <= result.unit.flops / computed <= 1.02
    assert result.memory["padding"] <= 0.05 * result.program.arguments


@pytest.mark.parametrize(
    ("shape", "is_forbidden"),
    [
        ((2, 4, 48, 48), True),
        ((8, 48, 48), True),
        ((2, 4 * 48, 48), True),
        ((2, 4 * 48 * 48), False),
        ((2, 3, 48, 48), False),
        ((35, 2, 4, 48, 16), False),
        ((48,), False),
    ],
)
def test_whole_scores_are_told_from_the_outputs_that_all_layers_keep(shape, is_forbidden):
    """35 layers' outputs [.., P, E] have more elements beside P than one layer's [.., P, P]."""
    array = f"f32[{','.join(map(str, shape))}]"
    root = f"ROOT %a = {array} iota(), iota_dimension=0"
    module = parse(f"HloModule m\n\nENTRY %main () -> {array} {{\n  {root}\n}}\n")
    scores = Forbidden({48}, 2 * 4 * 48, multiple=48)
    expected = [f"scores f32{list(shape)}"] if is_forbidden else []
    assert forbidden_arrays(module, {"scores": scores}) == expected


def run_plan(tmp_path, *arguments, timeout=600):
    """The finished process of the command, and the plan that it wrote."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "SPIRAL_JAX_PLANS": str(tmp_path)}
    environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # other tests compile for TPUs meanwhile
    for ours in ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS"):  # not a user's
        environment.pop(ours, None)
    file = tmp_path / "plan.json"
    command = [sys.executable, "-m", "spiral_jax.plan", f"--json={file}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    return done, json.loads(file.read_text()) if file.exists() else None


@pytest.mark.skipif(
    missing_compiler() is None, reason="jax's CUDA plugin is installed: compiling takes minutes"
)
def test_the_command_plans_gpus(tmp_path):
    done, report = run_plan(tmp_path, "--config=configs/qwen3_4b.py", "--topology=h100:8")
    assert done.returncode == 0, done.stderr
    assert report["source"] == "arithmetic" and report["fits"]
    assert report["tried"][-1]["verdict"] == "fits"
    assert "by arithmetic" in done.stdout and "A step at its best" in done.stdout
    assert report["run"]["chip_hours"] == pytest.approx(8 * report["run"]["hours"])
    free = report["memory_of_a_chip"]["free_bytes"]
    needed = max(program["needed_bytes"] for program in report["programs"].values())
    assert free == CHIPS["h100"].hbm_bytes - needed
    assert {program["source"] for program in report["programs"].values()} == {"arithmetic"}


def test_the_command_ends_with_one_line_on_bad_input(tmp_path):
    done, _ = run_plan(tmp_path, "--config=configs/qwen3_4b.py", "--topology=v9:2x2")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: --topology=v9:2x2")


@pytest.mark.slow
@NEEDS_LIBTPU
def test_the_small_run_fits_four_tpu_chips(tmp_path):
    """One role's programs, in bfloat16: float32's products take twice as long to compile.

    So few rows have one decode program.
    """
    flags = ["--config.loss.estimator=grpo", "--config.sampling.rows=16"]
    flags += ["--config.model.compute_dtype=bfloat16"]
    done, report = run_plan(tmp_path, "--config=configs/tiny.py", "--topology=v5e:2x2", *flags)
    assert done.returncode == 0, done.stderr
    assert report["source"] == "compiled"
    programs = report["programs"]
    assert {program["source"] for program in programs.values()} == {"compiled"}
    ratios = [program["flops_over_ideal"] for program in programs.values()]
    assert all(0.85 <= ratio <= 1.3 for ratio in ratios if ratio)
    assert programs["train/search/0"]["sent_bytes"]["all-reduce"] > 0  # gradients
    assert report["step"]["step_seconds"] > 0


@pytest.mark.minutes
@pytest.mark.timeout(1900)  # its own limit comes first
@NEEDS_LIBTPU
def test_the_papers_batch_fits_64_v5e_chips(tmp_path):
    """All programs of the 4B model; within half an hour on two cores."""
    mesh = [f"--config.mesh.{axis}={size}" for axis, size in zip(AXES, (2, 8, 4), strict=True)]
    done, report = run_plan(
        tmp_path, "--config=configs/qwen3_4b.py", "--topology=v5e:8x8", *mesh, timeout=1800
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert report["tried"] == [{"change": "", "verdict": "fits"}]
    for program in report["programs"].values():
        if "train" in program["program"]:
            assert program["flops_over_ideal"] <= 1.15
        assert math.isclose(program["room_bytes"], 0.9 * CHIPS["v5e"].hbm_bytes, rel_tol=1e-6)
