"""How fast is a step of the 4B model on one accelerator, and how far from the plan's arithmetic?

    python -m benchmarks.one_device --topology=h100:1 --json=docs/one_device.json

Random weights of Qwen3-4B's sizes in bfloat16 and adapters of rank 32, as `configs/qwen3_4b.py` has
them, with slots and micro-batches for one device of 80 GB. For each role all slots are filled,
every trace is decoded up to its limit (no id ends one), and two of the groups are trained on. All
programs are compiled, and run once, before one is timed: minutes. Beside each time is the roofline
of `spiral_jax.plan` for the same program; mismatch is between the log-probs that the sampler
recorded and the trainer's.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import pathlib
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags
from jax.stages import Compiled
from ml_collections import ConfigDict

from benchmarks.machine import commit, machine
from configs import qwen3_4b
from spiral_jax.core import mesh as meshes
from spiral_jax.core.config import ConfigError
from spiral_jax.core.groups import GroupRequests, Groups, Purpose, Role
from spiral_jax.core.metrics import divide
from spiral_jax.learner.blocks import Block, abstract_block, make_blocks
from spiral_jax.learner.settings import RoleShapes
from spiral_jax.learner.state import init_state, variables
from spiral_jax.model.flops import ideal_train_flops
from spiral_jax.model.transformer import init_variables
from spiral_jax.planning.inventory import Inventory, place_block, take_inventory
from spiral_jax.planning.planned_program import (
    PlannedProgram,
    decode_program,
    prefill_program,
    train_program,
)
from spiral_jax.planning.roofline import roofline
from spiral_jax.planning.shipped_models import planned_model
from spiral_jax.planning.topology import Topology, find_topology
from spiral_jax.run import telemetry
from spiral_jax.sampling.engine import Engine, make_samplers
from spiral_jax.sampling.protocol import sample

TOPOLOGY = flags.DEFINE_string("topology", "h100:1", "whose data sheet the rooflines are of")
JSON = flags.DEFINE_string("json", None, "file that gets the report")
SMALL = flags.DEFINE_bool("small", False, "two layers and short groups, to try this program itself")

TRAINED = 2  # groups, one a micro-batch


class GroupShape(NamedTuple):
    """The groups that are sampled: a slot each, C traces of up to G tokens after P of a prompt."""

    slots: int
    C: int
    P: int
    G: int

    def __str__(self) -> str:
        return f"{self.slots} x ({self.P} + {self.C} x {self.G})"


class Variant(NamedTuple):
    """A way of training: model.remat and model.attention_block."""

    remat: str
    attention_block: int


# What fits beside 16 GB of weights; a quarter of the paper's trace length.
SHAPES = {
    Role.SEARCH: GroupShape(16, 8, 1024, 1024),
    Role.AGGREGATION: GroupShape(8, 4, 9216, 1024),
}
SHORT = {Role.SEARCH: GroupShape(2, 8, 64, 16), Role.AGGREGATION: GroupShape(2, 4, 128, 16)}
VARIANTS = (Variant("attention", 256), Variant("attention", 1024), Variant("dots", 256))


@dataclasses.dataclass
class RoleCase:
    """One role's work: its configuration, its programs, and the groups that were sampled."""

    role: Role
    shape: GroupShape
    c: ConfigDict
    inventory: Inventory
    engine: Engine
    groups: Groups | None = None

    @property
    def block(self) -> Block:
        """Shapes of what a step trains on."""
        _, _, P, G = self.shape
        return place_block(abstract_block(self.role, self.trained, P, G), self.inventory.mesh)

    @property
    def trained(self) -> RoleShapes:
        _, C, P, G = self.shape
        return RoleShapes(((P, G),), micro_groups=1, most_groups=TRAINED, traces=C)


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A train step of a case, and what is planned of it."""

    case: RoleCase
    variant: Variant
    program: PlannedProgram
    step: Compiled

    @property
    def label(self) -> str:
        remat, block = self.variant
        return f"{self.case.role.label}, remat {remat}, blocks of {block}"


def main(argv: list[str]) -> None:
    try:
        topology = find_topology(TOPOLOGY.value)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    shapes = SHORT if SMALL.value else SHAPES
    cases = [make_case(role, shape) for role, shape in shapes.items()]
    model, mesh = cases[0].inventory.model, cases[0].inventory.mesh
    report = {
        "machine": machine(),
        "device": jax.devices()[0].device_kind,
        "commit": commit(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
        "layers": model.arch.L,
        "sampling": {},
        "training": {},
    }
    with ThreadPoolExecutor() as threads:  # compilers use one core each
        samplers = [threads.submit(compile_sampler, case) for case in cases]
        steps = [
            threads.submit(compile_step, case, variant) for case in cases for variant in VARIANTS
        ]
    for sampler in samplers:
        sampler.result()

    def make_base() -> Any:
        return init_variables(model, jax.random.key(0))["params"]

    shardings = meshes.weight_shardings(jax.eval_shape(make_base), mesh)
    base = jax.jit(make_base, out_shardings=shardings)()
    _, state = init_state(cases[0].inventory.settings.learner, model, mesh, base)
    weights = cases[0].engine.prepare(variables(model, base, state.trained))
    for case in cases:
        report["sampling"][case.role.label] = measure_sampling(case, weights, topology)
        show(report)
    del weights
    for future in steps:
        compiled = future.result()
        report["training"][compiled.label] = measure_training(compiled, base, topology)
        show(report)


def compile_sampler(case: RoleCase) -> None:
    _ = case.engine.programs  # compiles them


def compile_step(case: RoleCase, variant: Variant) -> CompiledStep:
    inventory = case.inventory
    model = dataclasses.replace(
        inventory.model, remat=variant.remat, attention_block=variant.attention_block
    )
    program = train_program(take_inventory(case.c, model, inventory.mesh), case.block)
    return CompiledStep(case, variant, program, program.lower().compile())


def show(report: dict[str, Any]) -> None:
    """Prints and writes what there is so far."""
    text = json.dumps(report, indent=1) + "\n"
    print(text, flush=True)
    if JSON.value:
        pathlib.Path(JSON.value).write_text(text)


def make_case(role: Role, shape: GroupShape) -> RoleCase:
    """The 4B run of one role alone, on the first device."""
    c = qwen3_4b.get_config()
    c.mesh.data = c.mesh.fsdp = c.mesh.tensor = 1
    c.sampling.classes, c.sampling.row_counts = (tuple(shape),), ()
    c[role.label].traces = shape.C
    c.batch[f"{role.label}_groups"] = 1
    c.batch[f"{role.label}_lengths"] = ((shape.P, shape.G),)
    model, _ = planned_model(c.model, jax.devices()[:1])
    if SMALL.value:
        model = dataclasses.replace(model, arch=dataclasses.replace(model.arch, L=2))
    mesh = meshes.make_mesh(c.mesh, jax.devices()[:1])
    engine, _ = make_samplers(c, model, mesh, stop_ids=())
    return RoleCase(role, shape, c, take_inventory(c, model, mesh), engine)


def measure_sampling(case: RoleCase, weights: Any, topology: Topology) -> dict[str, Any]:
    """Seconds of all prompts' prefill, first tokens included, and of one token of every row."""
    slots, C, P, G = case.shape
    few = G // 8 + 1

    def sample_tokens(tokens: int) -> Groups:
        return sample(case.engine, weights, requests(case, tokens))

    sample_tokens(2)  # the first calls
    prefill, _ = timed(lambda: sample_tokens(1))
    start, _ = timed(lambda: sample_tokens(few))
    whole, case.groups = timed(lambda: sample_tokens(G))
    decode = (whole - start) / (G - few)

    decoding, prefilling = decode_program(case.inventory), prefill_program(case.inventory, P)
    prefill_calls = slots / prefilling.groups
    prefill_roofline = roofline(prefilling.estimate, topology.chip, 1).seconds
    return {
        "groups": str(case.shape),
        "seconds": whole,
        "decode_seconds_a_token": decode,
        "decode_roofline_seconds": roofline(decoding.estimate, topology.chip, 1).seconds,
        "decode_tokens_per_s": slots * C / decode,
        "decode_hbm_gb": decoding.ideal_hbm_bytes / 1e9,
        "prefill_seconds": prefill,
        "prefill_roofline_seconds": prefill_roofline * prefill_calls,
        "prefill_tokens_per_s": slots * P / prefill,
        "peak_gb": peak_gb(),
    }


def requests(case: RoleCase, tokens: int) -> GroupRequests:
    """Groups of random prompts for all slots, whose traces have that many tokens."""
    slots, C, P, G = case.shape
    V = case.inventory.model.arch.V
    id_Ux6 = np.zeros((slots, 6), np.int32)
    id_Ux6[:] = (Purpose.EVALUATION, 0, 0, 0, case.role, 0)
    id_Ux6[:, 2] = np.arange(slots)
    return GroupRequests(
        np.random.default_rng(0).integers(1, V, (slots, P), np.int32),
        np.full(slots, P, np.int32),
        id_Ux6,
        C,
        G,
        np.full((slots, C), tokens, np.int32),
    )


def measure_training(compiled: CompiledStep, base: Any, topology: Topology) -> dict[str, Any]:
    """Seconds of a micro-batch of one group, Adam's update shared among them."""
    case, program, step = compiled.case, compiled.program, compiled.step
    _, C, P, G = case.shape
    model, chip = case.inventory.model, topology.chip
    weight_UxC = np.random.default_rng(1).normal(size=(TRAINED, C)).astype(np.float32)
    groups = case.groups.take(np.arange(TRAINED))
    (block,) = make_blocks({case.role: (groups, weight_UxC)}, {case.role: case.trained})
    block = jax.device_put(block, jax.tree.map(lambda leaf: leaf.sharding, case.block))

    learner = case.inventory.settings.learner
    _, state = init_state(learner, model, case.inventory.mesh, base)
    state, metrics = jax.block_until_ready(step(state, base, [block]))
    all_seconds, _ = timed(lambda: jax.block_until_ready(step(state, base, [block])))
    seconds = all_seconds / TRAINED

    flops = ideal_train_flops(model.arch, model.lora_rank, None, 1, C, P, G)
    memory = step.memory_analysis()
    mismatch = {name: metric for name, metric in metrics.items() if name.startswith("mismatch/")}
    return {
        "group": f"{P} + {C} x {G}",
        "seconds": seconds,
        "roofline_seconds": roofline(program.estimate, chip, 1).seconds,
        "tokens_per_s": (P + C * G) / seconds,
        "mfu": flops / seconds / chip.flops_per_s,
        "needed_gb": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e9,
        "planned_gb": (program.arguments + program.kept + program.estimated_temporary) / 1e9,
        **divide(mismatch),
    }


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that the work takes, and what it returns, which has been waited for."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def peak_gb() -> float | None:
    """The most that the device has held so far; None where it does not report it."""
    peak = telemetry.memory_metrics().get("memory/device_peak")
    return None if peak is None else peak / 1e9


if __name__ == "__main__":
    app.run(main)
