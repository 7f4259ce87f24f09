"""Completed groups and their loss weights -> static arrays of micro-batches, one block per (role,
length bucket).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from spiral_jax.core.groups import Groups, Role
from spiral_jax.core.metrics import Mean


@struct.dataclass
class Block:
    """Micro-batches of one role and one (P, G); the leading axis A counts them, only the first
    `count` hold groups.

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

    def micro_batch(self, a: jax.Array) -> dict[str, jax.Array]:
        """The arrays of micro-batch `a` (traced), under their names without the leading axis."""
        arrays = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if "_Ax" in field.name
        }
        return {name.replace("_Ax", "_"): array[a] for name, array in arrays.items()}

    def tokens(self) -> jax.Array:
        """int32 scalar: tokens of all traces of the micro-batches that hold groups."""
        held = jnp.arange(self.trace_len_AxUxC.shape[0]) < self.count
        return jnp.sum(self.trace_len_AxUxC, where=held[:, None, None])


def padding(blocks: Sequence[Block]) -> dict[str, Mean]:
    """`padding/<role>`: the share of a step's computed token rows that hold no token. On the host."""
    found: dict[str, Mean] = {}
    for block in blocks:
        used, (U, P), (C, G) = (
            int(block.count),
            block.prompt_AxUxP.shape[1:],
            block.trace_AxUxCxG.shape[2:],
        )
        trace_len = block.trace_len_AxUxC[:used]
        prompt_len = np.where(trace_len.any(axis=-1), block.prompt_len_AxU[:used], 0)
        rows = used * U * (P + C * G)
        part = Mean(float(rows - prompt_len.sum() - trace_len.sum()), float(rows))
        name = f"padding/{block.role.label}"
        found[name] = found[name].merge(part) if name in found else part
    return found


def abstract_block(
    role: Role, most_groups: int, micro_groups: int, C: int, P: int, G: int
) -> Block:
    """Shapes and dtypes of a block for up to `most_groups` groups."""
    A, U = -(-most_groups // micro_groups), micro_groups
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, np.int32)  # noqa: E731
    floats = lambda *shape: jax.ShapeDtypeStruct(shape, np.float32)  # noqa: E731
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


def empty_block(role: Role, most_groups: int, micro_groups: int, C: int, P: int, G: int) -> Block:
    """A block of that shape without groups: all padding."""
    shapes = abstract_block(role, most_groups, micro_groups, C, P, G)
    block = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    block.prompt_len_AxU[...] = 1
    return block


def make_blocks(
    role: Role,
    groups: Groups,
    weight_UxC: np.ndarray,
    lengths: Sequence[tuple[int, int]],
    micro_groups: int,
    most_groups: int,
) -> list[Block]:
    """One block per (P, G) of `lengths`; a group goes into the first that holds its prompt and its
    longest trace.

    Args:
      weight_UxC: float32 loss weights.
      most_groups: of this role in a step; fixes the blocks' static size, whatever the lengths of
      today's groups.

    Raises:
      ValueError: a group fits into none of them.
    """
    prompt_U, trace_U = groups.requests.prompt_len_U, groups.trace_len_UxC.max(axis=1, initial=0)
    fits = np.stack([(prompt_U <= P) & (trace_U <= G) for P, G in lengths], axis=1)
    if not fits.any(axis=1).all():
        u = int(np.flatnonzero(~fits.any(axis=1))[0])
        raise ValueError(
            f"a {role.label} group with a prompt of {prompt_U[u]} and traces of up to {trace_U[u]} tokens fits into "
            f"none of config.batch.{role.label}_lengths = {[tuple(pair) for pair in lengths]}: widen the last entry."
        )
    bucket_U = fits.argmax(axis=1)
    blocks = []
    for i, (P, G) in enumerate(lengths):
        block = empty_block(role, most_groups, micro_groups, groups.requests.traces, P, G)
        index = np.flatnonzero(bucket_U == i)
        block.count[...] = -(-len(index) // micro_groups)
        _fill(block, groups, weight_UxC, index)
        blocks.append(block)
    return blocks


def _fill(block: Block, groups: Groups, weight_UxC: np.ndarray, index: np.ndarray) -> None:
    """Writes the groups at `index` into the block's flattened (A, U) rows."""
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
        width = min(rows.shape[-1], source.shape[-1])
        if rows.ndim == 1:
            rows[: len(index)] = source[index]
        else:
            rows[: len(index), ..., :width] = source[index][..., :width]
