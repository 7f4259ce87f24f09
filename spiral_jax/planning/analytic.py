"""The same quantities by arithmetic, without a compiler: what a plan for GPUs consists of.

Assumed: attention keeps its scores on the chip; each chip gathers a layer's weights along `fsdp`
whenever it needs them; two all-reduces along `tensor` a layer and pass; gradients of what is
trained are reduced once a micro-batch.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from spiral_jax.model.architecture import Architecture
from spiral_jax.model.flops import layer_weights
from spiral_jax.planning.costs import Cost


class _Kept(NamedTuple):
    """Elements that a backward pass keeps of each token and layer, by their width.

    Attributes:
      D, F: as wide as the model, as the feed-forward layer.
      HE, JE: as wide as all heads, as all key/value heads.
    """

    D: int
    HE: int
    JE: int
    F: int


# By policy of `config.REMAT`; the gradient of the hidden state comes on top.
_KEPT = {
    "none":      _Kept(D=6, HE=2, JE=2, F=4),
    "dots":      _Kept(D=3, HE=2, JE=2, F=2),
    "attention": _Kept(D=1, HE=1, JE=0, F=0),
    "layer":     _Kept(D=1, HE=0, JE=0, F=0),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ShardedModel:
    """A model on a mesh.

    Attributes:
      axes: sizes of the mesh by axis.
      width: bytes of an activation, and of a base weight that is multiplied with it.
      stored: bytes of a base weight as it lies there.
    """

    arch: Architecture
    axes: dict[str, int]
    width: int
    stored: int

    @property
    def layer_weights(self) -> int:
        """Weights of one layer that a chip multiplies with."""
        return layer_weights(self.arch) // self.axes["tensor"]

    @property
    def layer_columns(self) -> int:
        """Elements a token of a layer's inner arrays, forward and backward, on one chip."""
        heads = 2 * (self.arch.H + self.arch.J) * self.arch.E
        return (heads + 3 * self.arch.token_F) // self.axes["tensor"]

    def sent_along_tensor(self, passes: int, tokens: int) -> float:
        """Bytes that a chip sends: two all-reduces of the hidden states a layer and pass."""
        all_reduces = 2 * self.arch.L * passes
        share = 2 * _others(self.axes["tensor"])
        return share * all_reduces * tokens * self.arch.D * self.width


def kept_activations(model: ShardedModel, remat: str, tokens: int) -> int:
    """Bytes that a forward pass over a chip's `tokens` leaves for the backward pass."""
    arch, kept = model.arch, _KEPT[remat]
    cut = kept.HE * arch.H * arch.E + kept.JE * arch.J * arch.E + kept.F * arch.token_F
    columns = kept.D * arch.D + cut // model.axes["tensor"]
    return arch.L * tokens * columns * model.width


def working_set(model: ShardedModel, tokens: int, logits: int) -> int:
    """Bytes of what is used at once: a layer's arrays, its gathered weights, a chunk of logits.

    Args:
      tokens: of one chip, whose arrays of one layer exist forward and backward.
      logits: rows of logits that exist at once on one chip.
    """
    arch, tensor = model.arch, model.axes["tensor"]
    heads = 2 * (arch.H + arch.J) * arch.E + 3 * arch.token_F
    # Rows sorted by expert, and what comes of them, forward and backward: whole on every chip.
    sorted_rows = 4 * arch.routing.chosen * arch.D if arch.routing else 0
    layer = tokens * (6 * arch.D + sorted_rows + 2 * heads // tensor) * model.width
    weights = 2 * model.layer_weights * model.width
    if model.stored != model.width:  # of a base in int8, the layer's own copy
        weights += model.layer_weights * model.stored
    return layer + weights + 3 * logits * arch.V // tensor * 4


def train_cost(model: ShardedModel, remat: str, *, flops: float, tokens: int, trained: int) -> Cost:
    """Cost of one micro-batch on one chip.

    Args:
      flops: of this chip.
      tokens: of this chip's group shard.
      trained: float32 bytes of what is trained that lie on this chip.
    """
    arch, axes = model.arch, model.axes
    passes = 2 if remat in ("none", "dots") else 3  # forward, once more, backward
    base = arch.L * model.layer_weights * model.stored
    moved = 2 * (4 * arch.D + model.layer_columns) * model.width
    gradients = 2 * _others(axes["data"] * axes["fsdp"]) * trained
    sent = {
        "all-gather": passes * base * _others(axes["fsdp"]),
        "all-reduce": model.sent_along_tensor(passes, tokens) + gradients,
    }
    return Cost(flops, passes * base + arch.L * tokens * moved * (passes + 1), sent)


def forward_cost(model: ShardedModel, *, flops: float, read: int, tokens: int) -> Cost:
    """Cost of one pass of the sampler over `tokens` of a chip's group shard.

    Args:
      flops: of this chip.
      read: bytes of weights and cache that it reads.
    """
    return Cost(flops, read, {"all-reduce": model.sent_along_tensor(1, tokens)})


def _others(chips: int) -> float:
    """The share of a ring's chips that are others."""
    return (chips - 1) / chips
