"""The programs of a run: how each is lowered, what it ideally costs, what it must not make."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.stages import Lowered

from spiral_jax.core.mesh import bytes_on_a_device, platform_of
from spiral_jax.learner.blocks import Block
from spiral_jax.learner.logprobs import LOGPROBS_SCOPE
from spiral_jax.learner.step import block_scope, variables
from spiral_jax.model.attention.caches import PREFIX_SCOPE
from spiral_jax.model.attention.groups import PROMPT_SCOPE, TRACE_SCOPE
from spiral_jax.model.attention.pages import OWN_SCOPE, PROMPTS_SCOPE, WRITE_SCOPE
from spiral_jax.model.attention.xla import OWN_KEYS_SCOPE, PROMPT_KEYS_SCOPE, even_block
from spiral_jax.model.flops import decode_flops, ideal_train_flops, prefill_flops
from spiral_jax.model.products import product_options
from spiral_jax.planning import analytic
from spiral_jax.planning.costs import Cost
from spiral_jax.planning.inventory import Inventory
from spiral_jax.planning.usage import Usage
from spiral_jax.planning.work import Work
from spiral_jax.sampling.decode import DECODE_SCOPE
from spiral_jax.sampling.memory import page_bytes
from spiral_jax.sampling.prefill import PREFILL_SCOPE
from spiral_jax.sampling.shapes import prompt_shapes, row_shapes
from spiral_jax.sampling.weights import lay_out

_WRITTEN_TILE = 16  # tokens: of two-byte numbers, on a TPU; those of one byte are twice as many


class Forbidden(NamedTuple):
    """Arrays that are not to be made, told by their shape.

    Attributes:
      sizes: one axis has one of them.
      others: the least product of the other axes.
      multiple: one of the other axes is a multiple of it.
    """

    sizes: set[int]
    others: int
    multiple: int = 1


@dataclasses.dataclass(frozen=True)
class PlannedProgram:
    """One program of a run. Bytes and costs are those of one chip.

    Attributes:
      name: what it does, with its sizes.
      unit: what one pass of its outer loop does.
      groups: of a unit, on all chips.
      tokens: that a unit computes, padding included, on all chips.
      lower: makes what the compiler reads.
      memory: bytes that lie there whatever the compiler does, by kind.
      arguments: bytes of those that it is given.
      estimate: cost of one unit by arithmetic.
      estimated_temporary: bytes beside `memory` and `kept`, by arithmetic.
      unit_loop: pattern of the outer loop's `op_name`; "" = the program is one unit.
      passes, kernels: of its other loops whose text does not say it, and costs of kernels whose
        work depends on what they are given; see `costs.cost_of`.
      kept: bytes of its own that the forward pass keeps for the backward pass.
      ideal_flops: of one unit; 0 where no single number is meant.
      ideal_hbm_bytes: of one unit; 0 where no single number is meant.
      forbidden: arrays that it must not make, by what they would be.
      compiler_options: that a run compiles it with, beside the topology's.
    """

    name: str
    unit: str
    groups: int
    tokens: int
    lower: Callable[[], Lowered]
    memory: dict[str, int]
    arguments: int
    estimate: Cost
    estimated_temporary: int
    unit_loop: str = ""
    passes: dict[str, float] = dataclasses.field(default_factory=dict)
    kernels: dict[str, Cost] = dataclasses.field(default_factory=dict)
    kept: int = 0
    ideal_flops: float = 0.0
    ideal_hbm_bytes: float = 0.0
    forbidden: dict[str, Forbidden] = dataclasses.field(default_factory=dict)
    compiler_options: dict[str, Any] = dataclasses.field(default_factory=dict)


def plan_programs(
    inventory: Inventory, works: list[Work], usage: Usage
) -> dict[str, PlannedProgram]:
    """All of them: train/ROLE/BUCKET, the largest first, decode, prefill/ROLE, decode_copy.

    Args:
      works: whose prompts are of mean length.
    """
    training, buckets = {}, Counter()
    for block in inventory.blocks:
        label = block.role.label
        training[f"train/{label}/{buckets[label]}"] = train_program(inventory, block)
        buckets[label] += 1
    programs = dict(sorted(training.items(), key=lambda item: -item[1].tokens))

    programs["decode"] = decode_program(inventory, usage)
    for work in sorted(works, key=lambda work: -work.role):
        programs[f"prefill/{work.role.label}"] = prefill_program(inventory, work.prompt)
    programs["decode_copy"] = decode_copy_program(inventory)
    return programs


def train_program(inventory: Inventory, block: Block) -> PlannedProgram:
    """The train step with this block alone; the unit is a micro-batch."""
    model, sharded = inventory.model, inventory.sharded_model
    A, U, P = block.prompt_AxUxP.shape
    C, G = block.trace_AxUxCxG.shape[2:]
    tokens = U * (P + C * G)
    tokens_a_shard = tokens // inventory.shards
    groups_a_shard = U // inventory.shards

    trained = bytes_on_a_device(inventory.state.trained)
    other_roles = len({other.role for other in inventory.blocks}) - 1
    memory = inventory.state_memory() | {
        "batch": bytes_on_a_device(inventory.blocks),
        "gradients of other roles": other_roles * trained,
    }
    logits = groups_a_shard * C * min(inventory.settings.learner.logprob_chunk, G)
    all_flops = ideal_train_flops(
        model.arch, model.lora_rank, model.remat, U, C, P, G, model.lora_experts
    )
    flops = all_flops / inventory.chips

    def lower() -> Lowered:
        with jax.set_mesh(inventory.mesh):
            return inventory.train_step.lower(inventory.state, inventory.base, [block])

    return PlannedProgram(
        name=f"train, {block.role.label}, {U} x ({P} + {C} x {G})",
        unit="micro-batch",
        groups=U,
        tokens=tokens,
        lower=lower,
        compiler_options=product_options(model.compute_dtype, platform_of(inventory.mesh)),
        memory=memory,
        arguments=bytes_on_a_device([inventory.base, inventory.state, block]),
        estimate=analytic.train_cost(
            sharded, model.remat, flops=flops, tokens=tokens_a_shard, trained=trained
        ),
        estimated_temporary=trained + analytic.working_set(sharded, tokens_a_shard, logits),
        # a single micro-batch has no loop
        unit_loop=_loop_of(block_scope(block.role)) if A > 1 else "",
        passes=_train_passes(inventory, P, G),
        kept=analytic.kept_activations(sharded, model.remat, tokens_a_shard),
        ideal_flops=flops,
        forbidden=_forbidden(inventory, groups_a_shard, C, P, G),
    )


def _loop_of(scope: str, within: str = "") -> str:
    """Pattern of the `op_name` of a scope's own loop, forward or backward.

    Args:
      within: another scope around it.
    """
    around = rf"\b{within}\b.*" if within else ""
    return rf"{around}\b{scope}\W*/while$"


def _loop_in(scope: str) -> str:
    """Pattern of the `op_name` of any loop inside of a scope."""
    return rf"\b{scope}\b.*/while$"


def _train_passes(inventory: Inventory, P: int, G: int) -> dict[str, float]:
    """Passes of the loops whose length depends on the groups, by pattern; the first match counts.

    They are those of a micro-batch whose longest prompt and trace fill the block. In attention a
    block of queries meets the blocks of own keys up to its diagonal, on average half of them.
    """
    block = inventory.model.attention_block
    prompt_blocks = -(-P // even_block(P, block))
    trace_blocks = -(-G // even_block(G, block))
    return {
        _loop_of(OWN_KEYS_SCOPE, within=PROMPT_SCOPE): (prompt_blocks + 1) / 2,
        _loop_of(OWN_KEYS_SCOPE, within=TRACE_SCOPE): (trace_blocks + 1) / 2,
        _loop_of(PROMPT_KEYS_SCOPE, within=TRACE_SCOPE): prompt_blocks,
        _loop_in(PROMPT_SCOPE): prompt_blocks,
        _loop_in(TRACE_SCOPE): trace_blocks,
        _loop_of(LOGPROBS_SCOPE): -(-G // inventory.settings.learner.logprob_chunk),
    }


def _forbidden(inventory: Inventory, U: int, C: int, P: int, G: int) -> dict[str, Forbidden]:
    """Whole logits [.., C G, V] and whole scores [.., P, P] of a shard's U groups.

    Sizes that another axis of the model has are left out: then a shape does not tell what an array
    is.
    """
    arch, tensor = inventory.model.arch, inventory.tensor
    axes = (arch.D, arch.F, arch.H * arch.E, arch.J * arch.E)
    ambiguous = {*axes, *(axis // tensor for axis in axes)}
    forbidden = {"logits": Forbidden({arch.V, arch.V // tensor} - ambiguous, U * C * G)}
    if P not in ambiguous:
        forbidden["scores"] = Forbidden({P}, U * arch.H // tensor * P, multiple=P)
    return forbidden


def decode_program(inventory: Inventory, usage: Usage) -> PlannedProgram:
    """The program of all rows; the unit is one token of every row.

    All rows are computed, `usage.rows` of them draw, and pages are read as far as they are used.
    """
    model, engine = inventory.model, inventory.engine
    rows = engine.schedule.rows[-1]
    token = page_bytes(engine.settings, engine.schedule.page) / engine.schedule.page
    keys_N = np.zeros(rows * inventory.shards)
    keys_N[: round(usage.rows * inventory.shards)] = usage.own + usage.prompt
    all_flops = decode_flops(model.arch, model.lora_rank, keys_N, model.lora_experts)
    flops = all_flops / inventory.chips
    weights = bytes_on_a_device(inventory.decode_weights)
    read = int(weights + usage.tokens_read * token)
    recipe = inventory.recipes["decode", rows]
    given = row_shapes(engine.settings, engine.schedule, rows)
    return PlannedProgram(
        name=f"decode, {rows * inventory.shards} rows",
        unit="token of every row",
        groups=0,
        tokens=rows * inventory.shards,
        lower=recipe.lower,
        compiler_options=recipe.compiler_options,
        memory=inventory.sampler_memory(),
        arguments=bytes_on_a_device([inventory.decode_weights, inventory.pool, given]),
        estimate=analytic.forward_cost(
            inventory.sharded_model, flops=flops, read=read, tokens=rows
        ),
        estimated_temporary=rows * model.arch.V // inventory.tensor * 4 * 3,
        unit_loop=_loop_of(DECODE_SCOPE),
        kernels=_decode_kernels(inventory, usage, token),
        ideal_flops=flops,
        ideal_hbm_bytes=read,
    )


def _decode_kernels(inventory: Inventory, usage: Usage, token: float) -> dict[str, Cost]:
    """Costs of a layer's calls of kernels that read and write pages, by pattern.

    They read whole pages, the last of each sequence is half full. Memory is written in tiles, which
    are read before.

    Args:
      token: bytes of one token's keys and values on a chip.
    """
    arch, page = inventory.model.arch, inventory.engine.schedule.page
    flops_a_key = 4 * arch.H // inventory.tensor * arch.E
    bundles = usage.rows * usage.bundles_a_row
    own_read = usage.rows * (usage.own + page / 2)
    prompt_read = usage.rows * usage.prompt_read + bundles * page / 2

    def of_a_layer(keys: float, tokens_read: float) -> Cost:
        return Cost(keys * flops_a_key, tokens_read * token / arch.L)

    return {
        rf"\b{OWN_SCOPE}\b": of_a_layer(usage.rows * usage.own, own_read),
        rf"\b{PROMPTS_SCOPE}\b": of_a_layer(usage.rows * usage.prompt, prompt_read),
        rf"\b{WRITE_SCOPE}\b": of_a_layer(0, 2 * _WRITTEN_TILE * usage.rows),
    }


def prefill_program(inventory: Inventory, prompt: int) -> PlannedProgram:
    """Prompts of so many tokens, in the shortest program that holds them; the unit is a call."""
    model, sharded = inventory.model, inventory.sharded_model
    schedule, settings = inventory.engine.schedule, inventory.engine.settings
    computed = max(1, prompt - 1)  # the last is the first that is decoded
    P = next(P for P in schedule.prompts if computed <= P)
    given = prompt_shapes(settings, schedule, P)
    shards, W, _ = given.token_ZxWxP.shape

    chunk = settings.chunk_of(P)
    chunks = -(-computed // chunk)
    tokens = chunks * chunk  # of one prompt
    all_flops = prefill_flops(
        model.arch, model.lora_rank, np.full(shards * W, tokens), model.lora_experts
    )
    flops = all_flops / inventory.chips
    weights = bytes_on_a_device(inventory.decode_weights)
    arch, width = model.arch, model.compute_dtype.itemsize
    stored = W * P * 2 * arch.L * arch.J * arch.E * width // inventory.tensor
    recipe = inventory.recipes["prefill", P]
    return PlannedProgram(
        name=f"prefill, {shards * W} prompts of {prompt} in {P}",
        unit="call",
        groups=shards * W,
        tokens=shards * W * tokens,
        lower=recipe.lower,
        compiler_options=recipe.compiler_options,
        memory=inventory.sampler_memory(),
        arguments=bytes_on_a_device([inventory.decode_weights, inventory.pool, given]),
        estimate=analytic.forward_cost(
            sharded, flops=flops, read=chunks * weights + stored, tokens=W * tokens
        ),
        estimated_temporary=stored + analytic.working_set(sharded, W * chunk, logits=W),
        passes={_loop_of(PREFILL_SCOPE): chunks, _loop_of(PREFIX_SCOPE): (chunks + 1) / 2},
        ideal_flops=flops,
    )


def decode_copy_program(inventory: Inventory) -> PlannedProgram:
    """The decode copy that is made after an update; the unit is the whole."""
    model, fsdp = inventory.model, inventory.mesh.shape["fsdp"]
    collections = variables(model, inventory.base, inventory.state.trained)
    given, copy = bytes_on_a_device(collections), inventory.decode_copy

    def lower() -> Lowered:
        with jax.set_mesh(inventory.mesh):
            return lay_out.lower(collections, model, inventory.mesh)

    return PlannedProgram(
        name="decode copy",
        unit="update",
        groups=0,
        tokens=0,
        lower=lower,
        memory=inventory.state_memory(),
        arguments=given,
        estimate=Cost(0.0, given + copy, {"all-gather": copy * (fsdp - 1) / fsdp}),
        estimated_temporary=copy,
    )
