"""Projections and their adapters; those that read the same input are computed together."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from spiral_jax.model import int8, layouts

# Names for policies of `jax.checkpoint`: of a projection's output, and of x A of its adapter.
PROJECTED, INNER = "projected", "adapter_inner"


class Linear(nn.Module):
    """x W, plus a bias, plus (alpha / rank) x A B with adapters (LoRA, arXiv 2106.09685).

    W is [width, features] and the bias [features], in `params`; A [width, rank] and B [rank,
    features] are float32, in `lora`. B starts as zeros and so changes nothing. W in int8 has its
    `scale` [features] beside it (`int8.py`).

    Attributes:
      width: of what it reads.
      features: that it writes.
      dtype: of W and of the bias.
      lora_rank: 0 = no adapter.
      quantised: W is in int8.
    """

    width: int
    features: int
    dtype: Any
    lora_rank: int
    lora_alpha: float
    has_bias: bool = False
    quantised: bool = False

    def setup(self) -> None:
        size, zeros = (self.width, self.features), nn.initializers.zeros
        if self.quantised:
            self.kernel = self.param("kernel", zeros, size, jnp.int8)
            self.scale = self.param("scale", zeros, (self.features,), jnp.float32)
        else:
            self.kernel = self.param("kernel", nn.initializers.normal(0.02), size, self.dtype)
        if self.has_bias:
            self.bias = self.param("bias", zeros, (self.features,), self.dtype)
        if not self.lora_rank:
            return

        def random_a() -> jax.Array:
            init = nn.initializers.normal(self.width**-0.5)
            return init(self.make_rng("params"), (self.width, self.lora_rank), jnp.float32)

        self.a = self.variable("lora", "a", random_a)
        self.b = self.variable("lora", "b", jnp.zeros, (self.lora_rank, self.features), jnp.float32)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., width] -> [..., features], in x's dtype."""
        (y,) = joint_linear(x, self)
        return y

    def without_adapter(self, x_NxD: jax.Array) -> jax.Array:
        """x W, plus the bias."""
        if self.quantised:
            y_NxF = int8.multiply(x_NxD, self.kernel, self.scale)
        else:
            y_NxF = x_NxD @ self.kernel.astype(x_NxD.dtype)
        return y_NxF + self.bias.astype(x_NxD.dtype) if self.has_bias else y_NxF


def joint_linear(x: jax.Array, *projections: Linear) -> list[jax.Array]:
    """What each of several projections makes of the same x [..., D], in x's dtype.

    Their adapters, which have one rank and alpha, share one product of x with all of their A.
    """
    rows_NxD = layouts.token_rows(x)
    outputs = [projection.without_adapter(rows_NxD) for projection in projections]

    one = projections[0]
    if one.lora_rank:
        a = tuple(projection.a.value for projection in projections)
        b = tuple(projection.b.value for projection in projections)
        adapted = _adapters(one.lora_alpha / one.lora_rank, rows_NxD, a, b)
        outputs = [y_NxF + more_NxF for y_NxF, more_NxF in zip(outputs, adapted, strict=True)]

    named = [checkpoint_name(y_NxF, PROJECTED) for y_NxF in outputs]
    return [y_NxF.reshape(*x.shape[:-1], y_NxF.shape[-1]) for y_NxF in named]


class JoinedLinear(nn.Module):
    """What `joint_linear` makes of several projections, as one product: for decoding.

    One matrix holds the W of all, and below it their B: [x, (alpha / rank) x A] times it is what
    they and their adapters make of x. Few rows are decoded at once, so a product costs what its
    weights take to read, and a narrow one hardly less than a wide one.

    `kernel` is [width + rank, columns], `a` [width, rank], of all adapters, and `bias` [columns].
    Columns come in blocks, each a part of every projection's, so that they can be cut between any
    two blocks.

    Attributes:
      width: of what it reads.
      features: that each projection writes.
      blocks: divides all of them.
      rank: of all adapters together.
      scale: alpha / rank of one adapter.
    """

    width: int
    features: tuple[int, ...]
    blocks: int
    dtype: Any
    rank: int
    scale: float
    has_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        """x [..., width] -> [..., features] of each, in x's dtype."""
        columns = sum(self.features)

        def weight(name: str, *shape: int) -> jax.Array:
            return self.param(name, nn.initializers.zeros, shape, self.dtype).astype(x.dtype)

        rows_NxK = layouts.token_rows(x)
        kernel = weight("kernel", self.width + self.rank, columns)
        if self.rank:
            inner_NxR = self.scale * (rows_NxK @ weight("a", self.width, self.rank))
            rows_NxK = jnp.concatenate([rows_NxK, inner_NxR], axis=1)
        y = rows_NxK @ kernel
        if self.has_bias:
            y += weight("bias", columns)

        by_block = y.reshape(*x.shape[:-1], self.blocks, -1)
        ends = list(itertools.accumulate(F // self.blocks for F in self.features))
        parts = jnp.split(by_block, ends[:-1], axis=-1)
        return [y.reshape(*x.shape[:-1], F) for y, F in zip(parts, self.features, strict=True)]


def join_linears(linears: Sequence[dict[str, jax.Array]], blocks: int) -> dict[str, jax.Array]:
    """The variables of a `JoinedLinear`.

    Args:
      linears: those of each projection: `kernel`, and all or none with `bias`, or with `a` and `b`.
    """

    def side_by_side(parts: Sequence[jax.Array]) -> jax.Array:
        by_block = [part.reshape(len(part), blocks, -1) for part in parts]
        return jnp.concatenate(by_block, axis=2).reshape(len(parts[0]), -1)

    def in_own_columns(own: dict[str, jax.Array]) -> jax.Array:
        """An adapter's B; zeros in the columns of the other projections."""
        return side_by_side(
            [linear["b"] if linear is own else jnp.zeros_like(linear["b"]) for linear in linears]
        )

    rows, joined = [side_by_side([linear["kernel"] for linear in linears])], {}
    if "a" in linears[0]:
        rows += [in_own_columns(linear) for linear in linears]
        joined["a"] = jnp.concatenate([linear["a"] for linear in linears], axis=1)
    if "bias" in linears[0]:
        joined["bias"] = side_by_side([linear["bias"][None] for linear in linears])[0]
    return joined | {"kernel": jnp.concatenate(rows, axis=0)}


_Arrays = tuple[jax.Array, ...]  # one for each adapter


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _adapters(scale: float, x_NxD: jax.Array, a_DxR: _Arrays, b_RxF: _Arrays) -> _Arrays:
    """scale x A B of each, in x's dtype; gradients of A and B are summed over rows in float32."""
    return _adapters_forward(scale, x_NxD, a_DxR, b_RxF)[0]


def _adapters_forward(
    scale: float, x_NxD: jax.Array, a_DxR: _Arrays, b_RxF: _Arrays
) -> tuple[_Arrays, Any]:
    all_a_DxnR = jnp.concatenate(a_DxR, axis=1).astype(x_NxD.dtype)
    inner_NxnR = checkpoint_name(scale * (x_NxD @ all_a_DxnR), INNER)
    outputs = tuple(
        inner_NxR @ b.astype(x_NxD.dtype)
        for inner_NxR, b in zip(_columns(inner_NxnR, len(b_RxF)), b_RxF, strict=True)
    )
    return outputs, (x_NxD, inner_NxnR, a_DxR, b_RxF)


def _adapters_backward(
    scale: float, kept: Any, d_out_NxF: _Arrays
) -> tuple[jax.Array, _Arrays, _Arrays]:
    x_NxD, inner_NxnR, a_DxR, b_RxF = kept
    sum_over_rows = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)

    d_inner_NxR = [
        scale * (d_out @ b.astype(x_NxD.dtype).T) for d_out, b in zip(d_out_NxF, b_RxF, strict=True)
    ]
    d_inner_NxnR = jnp.concatenate(d_inner_NxR, axis=1)
    all_a_DxnR = jnp.concatenate(a_DxR, axis=1).astype(x_NxD.dtype)
    d_x_NxD = d_inner_NxnR @ all_a_DxnR.T

    d_a_DxR = _columns(sum_over_rows(x_NxD.T, d_inner_NxnR), len(a_DxR))
    d_b_RxF = tuple(
        sum_over_rows(inner_NxR.T, d_out)
        for inner_NxR, d_out in zip(_columns(inner_NxnR, len(b_RxF)), d_out_NxF, strict=True)
    )
    return d_x_NxD, d_a_DxR, d_b_RxF


def _columns(joined_xnR: jax.Array, n: int) -> _Arrays:
    """Each adapter's columns [.., R] of what was joined."""
    return tuple(jnp.split(joined_xnR, n, axis=1))


_adapters.defvjp(_adapters_forward, _adapters_backward)
