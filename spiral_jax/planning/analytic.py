"""The same quantities by arithmetic, without a compiler: what a plan for GPUs consists of.

Assumed: attention keeps its scores on the chip; each chip gathers a layer's weights along `fsdp`
whenever it needs them; two all-reduces along `tensor` a layer and pass; gradients of what is
trained are reduced once a micro-batch.
"""

from __future__ import annotations

import math
from typing import Any

import jax

from spiral_jax.model.architecture import Architecture
from spiral_jax.model.flops import linear_weights
from spiral_jax.planning.costs import Cost

# Elements that a backward pass keeps of each token and layer under a policy of `config.REMAT`,
# beside its gradient: (of width D, of width H E, of width J E, of width F)
_KEPT = {
    "none": (6, 2, 2, 4),
    "dots": (3, 2, 2, 2),
    "attention": (1, 1, 0, 0),
    "layer": (1, 0, 0, 0),
}


def bytes_a_chip(tree: Any) -> int:
    """Bytes of a tree of shapes with shardings that lie on each chip."""
    leaves = jax.tree.leaves(tree)
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves
    )


def kept_activations(arch: Architecture, remat: str, tokens: int, tensor: int, width: int) -> int:
    """Bytes that a forward pass leaves for the backward pass on one chip, for its `tokens`, of
    `width` bytes each.
    """
    of_D, of_H, of_J, of_F = _KEPT[remat]
    cut = (of_H * arch.H * arch.E + of_J * arch.J * arch.E + of_F * arch.F) // tensor
    return arch.L * tokens * (of_D * arch.D + cut) * width


def working_set(arch: Architecture, tokens: int, logits: int, tensor: int, width: int) -> int:
    """Bytes of one layer's arrays, forward and backward, of a layer's gathered weights, and of a
    chunk of logits.
    """
    layer = (
        tokens * (6 * arch.D + 2 * (2 * (arch.H + arch.J) * arch.E + 3 * arch.F) // tensor) * width
    )
    return layer + 2 * linear_weights(arch) // tensor * width + 3 * logits * arch.V // tensor * 4


def train_cost(
    arch: Architecture,
    mesh: dict[str, int],
    remat: str,
    flops: float,
    tokens: int,
    width: int,
    trained: int,
) -> Cost:
    """Of one micro-batch on one chip.

    Args:
      mesh: sizes by axis.
      flops: of this chip.
      tokens: of this chip's group shard.
      width: bytes of an activation or base weight.
      trained: float32 bytes of what is trained that lie on this chip.
    """
    passes = 2 if remat in ("none", "dots") else 3  # forward, once more, backward
    base = arch.L * linear_weights(arch) // mesh["tensor"] * width
    moved = (
        2 * (4 * arch.D + (2 * (arch.H + arch.J) * arch.E + 3 * arch.F) // mesh["tensor"]) * width
    )
    shards = mesh["data"] * mesh["fsdp"]
    sent = {
        "all-gather": passes * base * _others(mesh["fsdp"]),
        "all-reduce": 2 * _others(mesh["tensor"]) * arch.L * passes * 2 * tokens * arch.D * width
        + 2 * _others(shards) * trained,
    }
    return Cost(flops, passes * base + arch.L * tokens * moved * (passes + 1), sent)


def forward_cost(
    arch: Architecture, mesh: dict[str, int], flops: float, read: int, tokens: int, width: int
) -> Cost:
    """Of one pass of the sampler over `tokens` of a chip's group shard; `read`: bytes of weights
    and cache.
    """
    sent = 2 * _others(mesh["tensor"]) * arch.L * 2 * tokens * arch.D * width
    return Cost(flops, read, {"all-reduce": sent})


def _others(chips: int) -> float:
    return (chips - 1) / chips
