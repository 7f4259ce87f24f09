"""The programs of a run, from shapes alone: for each what lies on a chip beside it, and what it
ideally costs.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.stages import Lowered
from ml_collections import ConfigDict

from spiral_jax.core import mesh as meshes
from spiral_jax.core.groups import Role
from spiral_jax.learner.blocks import Block
from spiral_jax.learner.step import abstract_state, keeps_base, make_train_step, variables
from spiral_jax.model import hf
from spiral_jax.model.flops import decode_flops, ideal_train_flops, prefill_flops
from spiral_jax.model.group_attention import even_block
from spiral_jax.model.transformer import ModelConfig
from spiral_jax.planning import analytic
from spiral_jax.planning.analytic import bytes_a_chip
from spiral_jax.planning.costs import Cost
from spiral_jax.run.setup import abstract_blocks, check_mesh, check_micro_batches
from spiral_jax.sampling import programs as sampler_programs
from spiral_jax.sampling.engine import Engine, make_samplers
from spiral_jax.sampling.weights import abstract_weights, lay_out

_STOP_IDS = (0, 1)  # which ids end a trace changes no shape, and the tokenizer is not read


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
class Program:
    """One program of a run. Bytes and costs are those of one chip.

    Attributes:
      name: what it does, with its sizes.
      unit: what one pass of its outer loop does.
      groups: of a unit, on all chips.
      tokens: that a unit computes, padding included, on all chips.
      lower: makes what the compiler reads.
      unit_loop: pattern of the outer loop's `op_name`; "" = the program is one unit.
      passes: of its other loops whose text does not say it; see `costs.cost_of`.
      memory: bytes that lie there whatever the compiler does, by kind.
      arguments: bytes of those that it is given.
      kept: bytes of `memory` and of its own that the forward pass keeps for the backward pass.
      ideal_flops: of one unit.
      ideal_hbm_bytes: of one unit; 0 where no single number is meant.
      forbidden: arrays that it must not make, by what they would be.
      estimate: cost of one unit by arithmetic.
      estimated_temporary: bytes beside `memory` and `kept`, by arithmetic.
    """

    name: str
    unit: str
    groups: int
    tokens: int
    lower: Callable[[], Lowered]
    unit_loop: str
    passes: dict[str, float]
    memory: dict[str, int]
    arguments: int
    kept: int
    ideal_flops: float
    ideal_hbm_bytes: float
    estimate: Cost
    estimated_temporary: int
    forbidden: dict[str, Forbidden] = dataclasses.field(default_factory=dict)


class Run:
    """A configuration on a mesh of devices that need not exist.

    Raises:
      ConfigError: heads, columns, groups or slots that the mesh does not divide.
    """

    def __init__(self, c: ConfigDict, model: ModelConfig, mesh: Mesh | AbstractMesh):
        check_mesh(model.arch, mesh)
        check_micro_batches(c, mesh)
        self.c, self.model, self.mesh = c, model, mesh
        self.engine: Engine = make_samplers(c, model, mesh, _STOP_IDS)[0]
        self.sizes = dict(mesh.shape)
        self.chips, self.shards = math.prod(self.sizes.values()), meshes.group_count_multiple(mesh)
        base = hf.abstract_params(model)
        self.base = (
            _placed(base, meshes.weight_shardings(base, mesh)) if keeps_base(c, model) else None
        )
        self.state = abstract_state(c, model, mesh)
        self.decode_weights = abstract_weights(model, mesh)
        classes = self.engine.schedule.classes
        self.recipes = sampler_programs.recipes(self.engine.settings, self.engine.schedule)
        self.slots = [
            sampler_programs.abstract_state(self.engine.settings, slots) for slots in classes
        ]
        self.caches = [[state.prompt, state.own] for state in self.slots]
        self.blocks = [self.placed(block) for block in abstract_blocks(c)]

    def placed(self, block: Block) -> Block:
        """Shapes of a block, with the shardings that training gives it."""
        along, whole = (
            meshes.group_sharding(self.mesh, leading=1),
            NamedSharding(self.mesh, PartitionSpec()),
        )
        return _placed(block, jax.tree.map(lambda leaf: along if leaf.ndim else whole, block))

    @property
    def width(self) -> int:
        """Bytes of an activation."""
        return self.model.compute_dtype.itemsize

    def state_memory(self) -> dict[str, int]:
        """Bytes a chip that always lie there: base and adapters (or all in float32), optimizer."""
        return {
            "weights": bytes_a_chip([self.base, self.state.trained]),
            "optimizer": bytes_a_chip(self.state.opt),
        }

    def policy_memory(self) -> dict[str, int]:
        """The same and the decode copy, which lies there from the end of an update to the start of
        the next.
        """
        return self.state_memory() | {"decode copy": bytes_a_chip(self.decode_weights)}

    def sampler_memory(self) -> dict[str, int]:
        """The same and the caches of all slots, which lie there while traces are sampled."""
        return self.policy_memory() | {"keys and values": bytes_a_chip(self.caches)}

    def programs(self, prompts: dict[Role, int]) -> dict[str, Program]:
        """All of them, the most demanding of each kind first: train/ROLE/BUCKET, decode,
        prefill/ROLE, decode_copy.

        Args:
          prompts: mean tokens of each role's prompts, which admissions are counted for.
        """
        found, of_role = {}, Counter()
        for block in self.blocks:
            label = block.role.label
            found[f"train/{label}/{of_role[label]}"] = self.train_program(block)
            of_role[label] += 1
        found = dict(sorted(found.items(), key=lambda item: -item[1].tokens))
        found["decode"] = self.decode_program()
        for role, prompt in sorted(prompts.items(), reverse=True):
            found[f"prefill/{role.label}"] = self.prefill_program(prompt)
        return found | {"decode_copy": self.lay_out_program()}

    def train_program(self, block: Block) -> Program:
        """The train step with this block alone; the unit is a micro-batch."""
        arch, rank, remat = self.model.arch, self.model.lora_rank, self.model.remat
        (A, U, P), (*_, C, G) = block.prompt_AxUxP.shape, block.trace_AxUxCxG.shape
        tokens, tensor = U * (P + C * G), self.sizes["tensor"]
        flops = ideal_train_flops(arch, rank, remat, U, C, P, G) / self.chips
        logits = U // self.shards * C * min(self.c.loss.logprob_chunk, G)
        trained, own = bytes_a_chip(self.state.trained), tokens // self.shards
        roles = len({one.role for one in self.blocks})

        def lower() -> Lowered:
            with jax.set_mesh(self.mesh):
                return make_train_step(self.c, self.model).lower(self.state, self.base, [block])

        return Program(
            name=f"train, {block.role.label}, {U} x ({P} + {C} x {G})",
            unit="micro-batch",
            groups=U,
            tokens=tokens,
            lower=lower,
            unit_loop=rf"/{block.role.label}_block/while$"
            if A > 1
            else "",  # a single micro-batch has no loop
            passes=self._train_passes(P, G),
            memory=self.state_memory()
            | {
                "batch": bytes_a_chip(self.blocks),
                "gradients of other roles": (roles - 1) * trained,
            },
            arguments=bytes_a_chip([self.base, self.state, block]),
            kept=analytic.kept_activations(arch, remat, own, tensor, self.width),
            ideal_flops=flops,
            ideal_hbm_bytes=0.0,
            estimate=analytic.train_cost(arch, self.sizes, remat, flops, own, self.width, trained),
            estimated_temporary=trained
            + analytic.working_set(arch, own, logits, tensor, self.width),
            forbidden=self._forbidden(U // self.shards, C, P, G),
        )

    def _train_passes(self, P: int, G: int) -> dict[str, float]:
        """Loops whose length depends on the groups, for a micro-batch whose longest prompt and
        trace fill the block.

        In attention a block of queries meets the blocks of own keys up to its diagonal, on average
        half of them.
        """
        block, chunk = self.model.attention_block, self.c.loss.logprob_chunk
        prompt, trace = (-(-length // even_block(length, block)) for length in (P, G))
        return {
            r"\bprompt_attention\b.*\bown_keys\W*/while$": (prompt + 1) / 2,
            r"\btrace_attention\b.*\bown_keys\W*/while$": (trace + 1) / 2,
            r"\btrace_attention\b.*\bprompt_keys\W*/while$": prompt,
            r"\bprompt_attention\b.*/while$": prompt,
            r"\btrace_attention\b.*/while$": trace,
            r"\blogprobs\W*/while$": -(-G // chunk),
        }

    def _forbidden(self, U: int, C: int, P: int, G: int) -> dict[str, Forbidden]:
        """Whole logits [.., C G, V] and whole scores [.., P, P] of a shard's U groups.

        Sizes that another axis of the model has are left out: then a shape does not tell what an
        array is.
        """
        arch, tensor = self.model.arch, self.sizes["tensor"]
        others = {
            axis // cut
            for axis in (arch.D, arch.F, arch.H * arch.E, arch.J * arch.E)
            for cut in (1, tensor)
        }
        found = {"logits": Forbidden({arch.V, arch.V // tensor} - others, U * C * G)}
        return (
            found
            if P in others
            else found | {"scores": Forbidden({P}, U * arch.H // tensor * P, multiple=P)}
        )

    def decode_program(self) -> Program:
        """The program of all rows; the unit is one token of every row."""
        schedule, arch = self.engine.schedule, self.model.arch
        keys_N = np.concatenate(
            [np.full(slots.rows, slots.P + slots.G) for slots in schedule.classes]
        )
        rows = schedule.decode_rows(self.shards)[-1]
        recipe = self.recipes["decode", rows]
        flops = decode_flops(arch, self.model.lora_rank, keys_N) / self.chips
        read = bytes_a_chip([self.decode_weights, self.caches])
        return Program(
            name=f"decode, {rows * self.shards} rows",
            unit="token of every row",
            groups=sum(slots.slots for slots in schedule.classes),
            tokens=rows * self.shards,
            lower=recipe.lower,
            unit_loop=r"/decode/while$",
            passes={},
            memory=self.sampler_memory(),
            arguments=bytes_a_chip([self.decode_weights, self.slots]),
            kept=0,
            ideal_flops=flops,
            ideal_hbm_bytes=read,
            estimate=analytic.forward_cost(arch, self.sizes, flops, read, rows, self.width),
            estimated_temporary=rows * arch.V // self.sizes["tensor"] * 4 * 3,
        )

    def prefill_program(self, prompt: int) -> Program:
        """Prompts of so many tokens, in the shapes of the class that they enter; the unit is one
        call.
        """
        schedule, settings, arch = self.engine.schedule, self.engine.settings, self.model.arch
        i = min(
            (i for i in schedule.entries() if prompt <= schedule.classes[i].P),
            key=lambda i: schedule.classes[i].P,
        )
        shards, W, P = sampler_programs.prompt_shapes(settings, schedule, i).prompt_ZxWxP.shape
        chunk, recipe = settings.chunk_of(P), self.recipes["prefill", i]
        chunks = -(-prompt // chunk)
        flops = (
            prefill_flops(arch, self.model.lora_rank, np.full(shards * W, chunks * chunk))
            / self.chips
        )
        weights = bytes_a_chip(self.decode_weights)
        caches = bytes_a_chip(self.caches[i][0]) // schedule.classes[i].slots * shards * W
        return Program(
            name=f"prefill, {shards * W} prompts of {prompt} in {P}",
            unit="call",
            groups=shards * W,
            tokens=shards * W * chunks * chunk,
            lower=recipe.lower,
            unit_loop="",
            passes={r"/prefill/while$": chunks, r"/prefix_attention/while$": (chunks + 1) / 2},
            memory=self.sampler_memory(),
            arguments=bytes_a_chip([self.decode_weights, recipe.shapes[-1]]),
            kept=0,
            ideal_flops=flops,
            ideal_hbm_bytes=0.0,
            estimate=analytic.forward_cost(
                arch, self.sizes, flops, chunks * weights + caches, W * chunks * chunk, self.width
            ),
            estimated_temporary=caches
            + analytic.working_set(arch, W * chunk, W, self.sizes["tensor"], self.width),
        )

    def lay_out_program(self) -> Program:
        """The decode copy after an update; the unit is the whole."""
        collections, copy = (
            variables(self.model, self.base, self.state.trained),
            bytes_a_chip(self.decode_weights),
        )
        sent = {"all-gather": copy * (self.sizes["fsdp"] - 1) / self.sizes["fsdp"]}
        return Program(
            name="decode copy",
            unit="update",
            groups=0,
            tokens=0,
            lower=lambda: _lower_lay_out(self.mesh, collections, self.model),
            unit_loop="",
            passes={},
            memory=self.state_memory(),
            arguments=bytes_a_chip(collections),
            kept=0,
            ideal_flops=0.0,
            ideal_hbm_bytes=0.0,
            estimate=Cost(0.0, bytes_a_chip(collections) + copy, sent),
            estimated_temporary=copy,
        )


def _lower_lay_out(mesh: Mesh, collections: Any, model: ModelConfig) -> Lowered:
    with jax.set_mesh(mesh):
        return lay_out.lower(collections, model, mesh)


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings
    )
