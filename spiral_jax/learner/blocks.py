"""Completed groups and their loss weights -> static arrays of micro-batches.

There is one block for each role and length bucket; what is static is `settings.RoleShapes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from spiral_jax.core.config import require
from spiral_jax.core.groups import Groups, Role
from spiral_jax.core.mesh import group_count_multiple, group_sharding, place
from spiral_jax.core.metrics import Mean
from spiral_jax.learner.settings import RoleShapes


class MicroBatch(NamedTuple):
    """U groups whose gradient is computed at once; arrays as in `Block`, without A."""

    prompt_UxP: jax.Array
    prompt_len_U: jax.Array
    trace_UxCxG: jax.Array
    trace_len_UxC: jax.Array
    logprob_UxCxG: jax.Array
    weight_UxC: jax.Array


@struct.dataclass
class Block:
    """Micro-batches of one role and one (P, G); the first `count` of A hold groups.

    A group is the atom: its prompt's work is shared by its traces. Padding groups have trace_len 0
    and weight 0.

    Attributes:
      count: int32 scalar, traced: a step with fewer groups runs fewer micro-batches of the same
        program.
      prompt_AxUxP, prompt_len_AxU, trace_AxUxCxG, trace_len_AxUxC: int32.
      logprob_AxUxCxG: float32, recorded while sampling.
      weight_AxUxC: float32: the loss is -sum weight * sum_t ratio_t, so all normalisation is in
        here.
      role: static.
    """

    count: jax.Array | np.ndarray
    prompt_AxUxP: jax.Array | np.ndarray
    prompt_len_AxU: jax.Array | np.ndarray
    trace_AxUxCxG: jax.Array | np.ndarray
    trace_len_AxUxC: jax.Array | np.ndarray
    logprob_AxUxCxG: jax.Array | np.ndarray
    weight_AxUxC: jax.Array | np.ndarray
    role: Role = struct.field(pytree_node=False)

    def micro_batch(self, a: jax.Array) -> MicroBatch:
        """Micro-batch `a`, a traced int32."""
        return MicroBatch(
            prompt_UxP=self.prompt_AxUxP[a],
            prompt_len_U=self.prompt_len_AxU[a],
            trace_UxCxG=self.trace_AxUxCxG[a],
            trace_len_UxC=self.trace_len_AxUxC[a],
            logprob_UxCxG=self.logprob_AxUxCxG[a],
            weight_UxC=self.weight_AxUxC[a],
        )

    def tokens(self) -> jax.Array:
        """int32 scalar: tokens of all traces of the micro-batches that hold groups."""
        held = jnp.arange(self.trace_len_AxUxC.shape[0]) < self.count
        return jnp.sum(self.trace_len_AxUxC, where=held[:, None, None])


def padding(blocks: Sequence[Block]) -> dict[str, Mean]:
    """`padding/<role>`: the share of a step's computed token rows that hold no token (host)."""
    shares: dict[str, Mean] = {}
    for block in blocks:
        used = int(block.count)
        _, U, P = block.prompt_AxUxP.shape
        _, _, C, G = block.trace_AxUxCxG.shape
        trace_len = block.trace_len_AxUxC[:used]
        prompt_len = np.where(trace_len.any(axis=-1), block.prompt_len_AxU[:used], 0)
        rows = used * U * (P + C * G)
        share = Mean(float(rows - prompt_len.sum() - trace_len.sum()), float(rows))
        name = f"padding/{block.role.label}"
        shares[name] = shares[name].merge(share) if name in shares else share
    return shares


def abstract_block(role: Role, shapes: RoleShapes, P: int, G: int) -> Block:
    """Shapes and dtypes of a role's block of prompts up to P and traces up to G tokens."""
    A, U, C = -(-shapes.most_groups // shapes.micro_groups), shapes.micro_groups, shapes.traces

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, np.int32)

    def floats(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, np.float32)

    return Block(
        count=ints(),
        prompt_AxUxP=ints(A, U, P),
        prompt_len_AxU=ints(A, U),
        trace_AxUxCxG=ints(A, U, C, G),
        trace_len_AxUxC=ints(A, U, C),
        logprob_AxUxCxG=floats(A, U, C, G),
        weight_AxUxC=floats(A, U, C),
        role=role,
    )


def abstract_blocks(shapes: Mapping[Role, RoleShapes]) -> list[Block]:
    """Shapes and dtypes of all blocks of a step."""
    return [
        abstract_block(role, of_role, P, G)
        for role, of_role in shapes.items()
        for P, G in of_role.lengths
    ]


def check_micro_batches(shapes: Mapping[Role, RoleShapes], mesh: Mesh) -> None:
    """Checks that the mesh divides the groups of every micro-batch.

    Raises:
      ConfigError: it does not.
    """
    multiple = group_count_multiple(mesh)
    for role, of_role in shapes.items():
        require(
            of_role.micro_groups % multiple == 0,
            f"batch.{role.label}_groups",
            of_role.micro_groups,
            f"a multiple of the mesh's data * fsdp = {multiple}",
        )


def make_blocks(
    roles: Mapping[Role, tuple[Groups, np.ndarray]], shapes: Mapping[Role, RoleShapes]
) -> list[Block]:
    """The blocks of a step, on the host: for each role, one per (P, G) of its lengths.

    Args:
      roles: groups and their loss weights, float32 [U, C].

    Raises:
      ValueError: a group fits into none of them.
    """
    blocks = []
    for role, (groups, weight_UxC) in roles.items():
        bucket_U = _buckets(role, groups, shapes[role].lengths)
        for i, (P, G) in enumerate(shapes[role].lengths):
            block = empty_block(role, shapes[role], P, G)
            _fill(block, groups, weight_UxC, np.flatnonzero(bucket_U == i))
            blocks.append(block)
    return blocks


def empty_block(role: Role, shapes: RoleShapes, P: int, G: int) -> Block:
    """A block without groups: all padding."""
    abstract = abstract_block(role, shapes, P, G)
    block = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    block.prompt_len_AxU[...] = 1
    return block


def place_blocks(blocks: Sequence[Block], mesh: Mesh) -> list[Block]:
    """The blocks on the devices: groups along the groups' axes, counts on all."""
    along = group_sharding(mesh, leading=1)
    return jax.tree.map(lambda a: place(a, along) if np.ndim(a) else a, list(blocks))


def _buckets(role: Role, groups: Groups, lengths: Sequence[tuple[int, int]]) -> np.ndarray:
    """int [U]: the first of `lengths` that holds a group's prompt and its longest trace."""
    prompt_U = groups.requests.prompt_len_U
    trace_U = groups.trace_len_UxC.max(axis=1, initial=0)
    fits = np.stack([(prompt_U <= P) & (trace_U <= G) for P, G in lengths], axis=1)
    if not fits.any(axis=1).all():
        u = int(np.flatnonzero(~fits.any(axis=1))[0])
        raise ValueError(
            f"a {role.label} group with a prompt of {prompt_U[u]} and traces of up to {trace_U[u]} "
            f"tokens fits into none of config.batch.{role.label}_lengths = {list(lengths)}: widen "
            "the last entry."
        )
    return fits.argmax(axis=1)


def _fill(block: Block, groups: Groups, weight_UxC: np.ndarray, index: np.ndarray) -> None:
    """Writes the groups at `index` into the block's rows (A, U), one after the other."""
    block.count[...] = -(-len(index) // block.prompt_len_AxU.shape[1])
    pairs = (
        (block.prompt_AxUxP, groups.requests.prompt_UxP),
        (block.prompt_len_AxU, groups.requests.prompt_len_U),
        (block.trace_AxUxCxG, groups.trace_UxCxG),
        (block.trace_len_AxUxC, groups.trace_len_UxC),
        (block.logprob_AxUxCxG, groups.logprob_UxCxG),
        (block.weight_AxUxC, weight_UxC),
    )
    for target, source in pairs:
        rows = target.reshape(-1, *target.shape[2:])  # a view
        if rows.ndim == 1:
            rows[: len(index)] = source[index]
        else:
            width = min(rows.shape[-1], source.shape[-1])
            rows[: len(index), ..., :width] = source[index][..., :width]
