"""spiral_jax on one accelerator: random weights of Qwen3-4B's sizes sample, and are trained.

bfloat16 and adapters of rank 32, as `configs/qwen3_4b.py` has them, with rows and micro-batches
for one device of 80 GB. All rows run, every trace is decoded up to its limit (no id ends one), and
two of the groups are trained on, one a micro-batch. Beside each time is the roofline of
`spiral_jax.plan` for the same program by arithmetic.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.stages import Compiled
from ml_collections import ConfigDict

from benchmarks.one_device_cases import (
    DATA_SHEET,
    NO_ACCELERATOR,
    SHAPES,
    SHORT,
    SMALL_MODEL,
    SMALL_MODEL_SHAPE,
    GroupShape,
    architecture,
)
from benchmarks.peers.contestant import serve
from configs import qwen3_4b
from spiral_jax.core import mesh as meshes
from spiral_jax.core.groups import GroupRequests, Groups, Purpose, Role
from spiral_jax.core.metrics import divide
from spiral_jax.learner.blocks import Block, abstract_block, make_blocks
from spiral_jax.learner.settings import RoleShapes
from spiral_jax.learner.state import init_state, variables
from spiral_jax.model import hf
from spiral_jax.model.attention.backends import choose_page_backend, refusal
from spiral_jax.model.flops import ideal_train_flops, prefill_flops
from spiral_jax.model.transformer import ModelConfig, init_variables
from spiral_jax.planning.inventory import Inventory, place_block, take_inventory
from spiral_jax.planning.planned_program import (
    PlannedProgram,
    decode_program,
    prefill_program,
    train_program,
)
from spiral_jax.planning.roofline import roofline
from spiral_jax.planning.topology import CHIPS
from spiral_jax.planning.usage import Usage
from spiral_jax.run import telemetry
from spiral_jax.sampling.engine import Engine
from spiral_jax.sampling.memory import Room, make_schedule, memory_of_a_device
from spiral_jax.sampling.prefill import Prompts
from spiral_jax.sampling.protocol import sample
from spiral_jax.sampling.settings import GroupLimits
from spiral_jax.sampling.shapes import abstract_pool, prompt_shapes
from spiral_jax.sampling.weights import DecodeWeights

TRAINED = 2  # groups, one a micro-batch
XLA_BLOCK = 1024  # of 256 and 1,024 the faster one on an H100
CHIP = CHIPS[DATA_SHEET]


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
    """A train step, and what is planned of it."""

    program: PlannedProgram
    step: Compiled


class SpiralDevice:
    def load(self, small: bool, attention: str, model: str = "") -> dict[str, Any]:
        """Makes the weights of Qwen3-4B's sizes, or of another model's.

        Programs are compiled when they are asked for, one after the other: a GPU's compiler times
        kernels, and another one beside it would spoil that.

        Returns {"skip": why nothing can be measured here}, or what was loaded.
        """
        c, device = qwen3_4b.get_config(), jax.devices()[0]
        if device.platform == "cpu" and not small:
            return NO_ACCELERATOR
        arch = architecture(small, model)
        config = dataclasses.replace(
            hf.model_config(arch, c.model),
            attention=attention,
            pages=choose_page_backend(attention, device, arch.E),
            attention_block=XLA_BLOCK,
        )
        reason = refusal(attention, device, config.compute_dtype, arch.E)
        if reason:
            return {"skip": f"attention {attention}: {reason}"}

        shapes = SHORT if small else SHAPES
        if model == SMALL_MODEL and not small:
            shapes = {Role.SEARCH: SMALL_MODEL_SHAPE}
        self.cases = {role.label: make_case(role, shape, config) for role, shape in shapes.items()}
        self.model, mesh = config, self.inventory.mesh

        def make_base() -> Any:
            return init_variables(config, jax.random.key(0))["params"]

        shardings = meshes.weight_shardings(jax.eval_shape(make_base), mesh)
        self.base = jax.block_until_ready(jax.jit(make_base, out_shardings=shardings)())
        self.weights = None
        versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}
        return {
            "device": device.device_kind,
            "layers": arch.L,
            "versions": versions,
        }

    @property
    def inventory(self) -> Inventory:
        return self.cases[Role.SEARCH.label].inventory

    def _weights(self, case: RoleCase) -> DecodeWeights:
        if self.weights is None:
            _, state = init_state(
                self.inventory.settings.learner, self.model, self.inventory.mesh, self.base
            )
            self.weights = case.engine.prepare(variables(self.model, self.base, state.trained))
        return self.weights

    def _sample(self, case: RoleCase, tokens: int) -> Groups:
        """Groups of traces of that many tokens."""
        return sample(case.engine, self._weights(case), requests(case, tokens))

    def prefill(self, role: str) -> dict[str, Any]:
        """Of all prompts but their last tokens, which are the first that their traces decode.

        The program's calls alone: pages of zeros are made once a step, not once a prompt.
        """
        case = self.cases[role]
        U, _, P, _ = case.shape
        engine, prompts = case.engine, prompts_of_a_call(case)
        name = "prefill", prompts.token_ZxWxP.shape[2]
        calls = -(-U // int(np.sum(prompts.length_ZxW > 0)))
        weights, pool = self._weights(case), engine.programs[("pool",)].run()

        def run(pool: Any) -> Any:
            for _ in range(calls):
                pool = engine.programs[name].run(weights, pool, prompts)
            return jax.block_until_ready(pool)

        pool = run(pool)  # the first calls
        seconds, _ = timed(lambda: run(pool))
        program = prefill_program(case.inventory, P)
        flops = prefill_flops(self.model.arch, self.model.lora_rank, np.full(U, P))
        return {
            "seconds": seconds,
            "roofline_seconds": roofline(program.estimate, CHIP, 1).seconds * calls,
            "tokens_per_s": U * P / seconds,
            "mfu": flops / seconds / CHIP.flops_per_s,
            "peak_gb": peak_gb(),
        }

    def decode(self, role: str) -> dict[str, Any]:
        """Of one token of every row."""
        case = self.cases[role]
        U, C, _, G = case.shape
        few = G // 8
        self._sample(case, 2)  # the first calls
        start, _ = timed(lambda: self._sample(case, few))
        whole, case.groups = timed(lambda: self._sample(case, G))
        seconds = (whole - start) / (G - few)
        program = decode_program(case.inventory, full_rows(case, own=(few + G) / 2))
        return {
            "seconds": seconds,
            "roofline_seconds": roofline(program.estimate, CHIP, 1).seconds,
            "tokens_per_s": U * C / seconds,
            "hbm_gb": program.ideal_hbm_bytes / 1e9,
            "peak_gb": peak_gb(),
        }

    def train(self, role: str, remat: str) -> dict[str, Any]:
        """Of a micro-batch of one group, Adam's update shared among them.

        Mismatch is between the log-probs that the sampler recorded and the trainer's; it is left
        out where nothing was sampled.
        """
        self.weights = None  # the decode copy
        case = self.cases[role]
        compiled = compile_step(case, remat)
        _, C, P, G = case.shape
        weight_UxC = np.random.default_rng(1).normal(size=(TRAINED, C)).astype(np.float32)
        groups = (case.groups or random_groups(case)).take(np.arange(TRAINED))
        (block,) = make_blocks({case.role: (groups, weight_UxC)}, {case.role: case.trained})
        block = jax.device_put(block, jax.tree.map(lambda leaf: leaf.sharding, case.block))

        inventory, step = case.inventory, compiled.step
        _, state = init_state(inventory.settings.learner, self.model, inventory.mesh, self.base)
        state, metrics = jax.block_until_ready(step(state, self.base, [block]))
        seconds, _ = timed(lambda: jax.block_until_ready(step(state, self.base, [block])))
        seconds /= TRAINED

        flops = ideal_train_flops(self.model.arch, self.model.lora_rank, None, 1, C, P, G)
        memory, program = step.memory_analysis(), compiled.program
        mismatch = {name: value for name, value in metrics.items() if name.startswith("mismatch/")}
        return {
            "seconds": seconds,
            "roofline_seconds": roofline(program.estimate, CHIP, 1).seconds,
            "tokens_per_s": (P + C * G) / seconds,
            "mfu": flops / seconds / CHIP.flops_per_s,
            "needed_gb": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e9,
            "planned_gb": (program.arguments + program.kept + program.estimated_temporary) / 1e9,
            **(divide(jax.device_get(mismatch)) if case.groups else {}),
        }


def make_case(role: Role, shape: GroupShape, model: ModelConfig) -> RoleCase:
    """The 4B run of one role alone, on the first device."""
    c = qwen3_4b.get_config()
    c.mesh.data = c.mesh.fsdp = c.mesh.tensor = 1
    c.sampling.rows = shape.groups * shape.C
    c[role.label].traces, c[role.label].max_tokens = shape.C, shape.G
    c.batch[f"{role.label}_groups"] = 1
    c.batch[f"{role.label}_lengths"] = ((shape.P, shape.G),)
    mesh = meshes.make_mesh(c.mesh, jax.devices()[:1])
    device = memory_of_a_device(mesh)
    inventory = take_inventory(c, model, mesh, device)
    settings = dataclasses.replace(inventory.engine.settings, stop_ids=())
    limits = [GroupLimits(shape.P, shape.C, shape.G)]
    room = Room(device, resident=sum(inventory.state_memory().values()))
    schedule = make_schedule(c, settings, limits, room)
    engine, pool = Engine(settings, schedule), abstract_pool(settings, schedule)
    inventory = dataclasses.replace(inventory, engine=engine, pool=pool)
    return RoleCase(role, shape, c, inventory, engine)


def full_rows(case: RoleCase, own: float) -> Usage:
    """All rows run, and have so many tokens of their own."""
    U, C, P, G = case.shape
    bundles = 1 / min(C, case.engine.schedule.width)
    return Usage(
        rows=U * C,
        bound="rows",
        pages_a_row=case.engine.schedule.pages / (U * C),
        own=own,
        prompt=P,
        bundles_a_row=bundles,
        prompt_read=P * bundles,
        longest_trace=G,
        longest_prompt=P,
    )


def compile_step(case: RoleCase, remat: str) -> CompiledStep:
    model = dataclasses.replace(case.inventory.model, remat=remat)
    mesh = case.inventory.mesh
    inventory = take_inventory(case.c, model, mesh, memory_of_a_device(mesh))
    program = train_program(inventory, case.block)
    return CompiledStep(program, program.lower().compile())


def prompts_of_a_call(case: RoleCase) -> Prompts:
    """As many random prompts as a call of the prefill program takes, each with its own pages."""
    U, _, P, _ = case.shape
    settings, schedule = case.engine.settings, case.engine.schedule
    shapes = prompt_shapes(settings, schedule, schedule.prompts[-1])
    _, W, T = shapes.table_ZxWxT.shape
    W = min(W, U)
    rng, V = np.random.default_rng(0), case.inventory.model.arch.V
    prompts = Prompts(
        rng.integers(1, V, shapes.token_ZxWxP.shape, np.int32),
        np.zeros(shapes.length_ZxW.shape, np.int32),
        np.zeros(shapes.table_ZxWxT.shape, np.int32),
    )
    prompts.length_ZxW[:, :W] = P - 1
    prompts.table_ZxWxT[:, :W] = 1 + np.arange(W * T).reshape(W, T)
    return meshes.place(prompts, jax.tree.map(lambda leaf: leaf.sharding, shapes))


def requests(case: RoleCase, tokens: int) -> GroupRequests:
    """Groups of random prompts for all rows, whose traces have that many tokens."""
    U, C, P, G = case.shape
    V = case.inventory.model.arch.V
    id_Ux6 = np.zeros((U, 6), np.int32)
    id_Ux6[:] = (Purpose.EVALUATION, 0, 0, 0, case.role, 0)
    id_Ux6[:, 2] = np.arange(U)
    return GroupRequests(
        np.random.default_rng(0).integers(1, V, (U, P), np.int32),
        np.full(U, P, np.int32),
        id_Ux6,
        C,
        G,
        np.full((U, C), tokens, np.int32),
    )


def random_groups(case: RoleCase) -> Groups:
    """Where nothing was sampled: traces of random ids, recorded as if they were equally likely."""
    U, C, _, G = case.shape
    V = case.inventory.model.arch.V
    return Groups(
        requests(case, G),
        trace_UxCxG=np.random.default_rng(2).integers(1, V, (U, C, G), np.int32),
        trace_len_UxC=np.full((U, C), G, np.int32),
        logprob_UxCxG=np.full((U, C, G), -np.log(V), np.float32),
        stop_UxC=np.zeros((U, C), np.int32),
    )


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
    serve(SpiralDevice())
