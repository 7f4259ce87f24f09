"""The programs of a run: how each is lowered, what it ideally costs, what it must not make."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.stages import Lowered

from spiral_jax.core.groups import Role
from spiral_jax.learner.blocks import Block
from spiral_jax.learner.logprobs import LOGPROBS_SCOPE
from spiral_jax.learner.step import block_scope, variables
from spiral_jax.model.attention.caches import PREFIX_SCOPE
from spiral_jax.model.attention.groups import PROMPT_SCOPE, TRACE_SCOPE
from spiral_jax.model.attention.xla import OWN_KEYS_SCOPE, PROMPT_KEYS_SCOPE, even_block
from spiral_jax.model.flops import decode_flops, ideal_train_flops, prefill_flops
from spiral_jax.planning import analytic
from spiral_jax.planning.analytic import bytes_a_chip
from spiral_jax.planning.costs import Cost
from spiral_jax.planning.inventory import Inventory
from spiral_jax.sampling.decode import DECODE_SCOPE
from spiral_jax.sampling.prefill import PREFILL_SCOPE
from spiral_jax.sampling.shapes import prompt_shapes
from spiral_jax.sampling.weights import lay_out


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
      passes: of its other loops whose text does not say it; see `costs.cost_of`.
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
    kept: int = 0
    ideal_flops: float = 0.0
    ideal_hbm_bytes: float = 0.0
    forbidden: dict[str, Forbidden] = dataclasses.field(default_factory=dict)
    compiler_options: dict[str, Any] = dataclasses.field(default_factory=dict)


def plan_programs(inventory: Inventory, prompts: dict[Role, int]) -> dict[str, PlannedProgram]:
    """All of them: train/ROLE/BUCKET, the largest first, decode, prefill/ROLE, decode_copy.

    Args:
      prompts: mean tokens of each role's prompts, which admissions are counted for.
    """
    training, buckets = {}, Counter()
    for block in inventory.blocks:
        label = block.role.label
        training[f"train/{label}/{buckets[label]}"] = train_program(inventory, block)
        buckets[label] += 1
    programs = dict(sorted(training.items(), key=lambda item: -item[1].tokens))

    programs["decode"] = decode_program(inventory)
    for role, prompt in sorted(prompts.items(), reverse=True):
        programs[f"prefill/{role.label}"] = prefill_program(inventory, prompt)
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

    trained = bytes_a_chip(inventory.state.trained)
    other_roles = len({other.role for other in inventory.blocks}) - 1
    memory = inventory.state_memory() | {
        "batch": bytes_a_chip(inventory.blocks),
        "gradients of other roles": other_roles * trained,
    }
    logits = groups_a_shard * C * min(inventory.settings.learner.logprob_chunk, G)
    all_flops = ideal_train_flops(model.arch, model.lora_rank, model.remat, U, C, P, G)
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
        memory=memory,
        arguments=bytes_a_chip([inventory.base, inventory.state, block]),
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


def decode_program(inventory: Inventory) -> PlannedProgram:
    """The program of all rows; the unit is one token of every row."""
    model, schedule = inventory.model, inventory.engine.schedule
    rows = schedule.decode_rows(inventory.shards)[-1]
    keys_N = np.concatenate([np.full(slots.rows, slots.P + slots.G) for slots in schedule.classes])
    flops = decode_flops(model.arch, model.lora_rank, keys_N) / inventory.chips
    read = bytes_a_chip([inventory.decode_weights, inventory.caches])
    recipe = inventory.recipes["decode", rows]
    return PlannedProgram(
        name=f"decode, {rows * inventory.shards} rows",
        unit="token of every row",
        groups=sum(slots.slots for slots in schedule.classes),
        tokens=rows * inventory.shards,
        lower=recipe.lower,
        compiler_options=recipe.compiler_options,
        memory=inventory.sampler_memory(),
        arguments=bytes_a_chip([inventory.decode_weights, inventory.slots]),
        estimate=analytic.forward_cost(
            inventory.sharded_model, flops=flops, read=read, tokens=rows
        ),
        estimated_temporary=rows * model.arch.V // inventory.tensor * 4 * 3,
        unit_loop=_loop_of(DECODE_SCOPE),
        ideal_flops=flops,
        ideal_hbm_bytes=read,
    )


def prefill_program(inventory: Inventory, prompt: int) -> PlannedProgram:
    """Prompts of so many tokens, in the shapes of the class that they enter; the unit is a call."""
    model, sharded = inventory.model, inventory.sharded_model
    schedule, settings = inventory.engine.schedule, inventory.engine.settings
    wide_enough = [i for i in schedule.entries() if prompt <= schedule.classes[i].P]
    i = min(wide_enough, key=lambda i: schedule.classes[i].P)
    given = prompt_shapes(settings, schedule, i)
    shards, W, P = given.prompt_ZxWxP.shape

    chunk = settings.chunk_of(P)
    chunks = -(-prompt // chunk)
    tokens = chunks * chunk  # of one prompt
    all_flops = prefill_flops(model.arch, model.lora_rank, np.full(shards * W, tokens))
    flops = all_flops / inventory.chips
    weights = bytes_a_chip(inventory.decode_weights)
    caches = bytes_a_chip(inventory.slots[i].prompt) // schedule.classes[i].slots * shards * W
    recipe = inventory.recipes["prefill", i]
    return PlannedProgram(
        name=f"prefill, {shards * W} prompts of {prompt} in {P}",
        unit="call",
        groups=shards * W,
        tokens=shards * W * tokens,
        lower=recipe.lower,
        compiler_options=recipe.compiler_options,
        memory=inventory.sampler_memory(),
        arguments=bytes_a_chip([inventory.decode_weights, given]),
        estimate=analytic.forward_cost(
            sharded, flops=flops, read=chunks * weights + caches, tokens=W * tokens
        ),
        estimated_temporary=caches + analytic.working_set(sharded, W * chunk, logits=W),
        passes={_loop_of(PREFILL_SCOPE): chunks, _loop_of(PREFIX_SCOPE): (chunks + 1) / 2},
        ideal_flops=flops,
    )


def decode_copy_program(inventory: Inventory) -> PlannedProgram:
    """The decode copy that is made after an update; the unit is the whole."""
    model, fsdp = inventory.model, inventory.mesh.shape["fsdp"]
    collections = variables(model, inventory.base, inventory.state.trained)
    given, copy = bytes_a_chip(collections), bytes_a_chip(inventory.decode_weights)

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
