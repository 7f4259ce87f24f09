"""Feed-forward layers of experts, of which a router gives each token some (mixture of experts).

Each shard of the groups sorts its own tokens by expert and multiplies the sorted rows with the
experts' weights, group by group of rows (`jax.lax.ragged_dot`). Every device holds a share of the
columns of all experts, along `tensor`, so all devices do equal work whatever the router says.

With adapters on experts, each matrix of each expert has its own. What is cut of one lies along
`tensor` as the expert's columns do: B of gate and up, A of down. The others are whole everywhere,
so that the sum over `tensor` behind the last product is the only one: x A B of down is linear, and
what the devices have of it adds up.

X experts, Y of them for each token; N tokens; R the rank of an adapter.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from spiral_jax.core.mesh import GROUP_AXES
from spiral_jax.model.architecture import Architecture
from spiral_jax.model.families import Routing
from spiral_jax.model.linear import INNER, PROJECTED


class _Weights(NamedTuple):
    router_DxX: jax.Array
    gate_XxDxF: jax.Array
    up_XxDxF: jax.Array
    down_XxFxD: jax.Array


class _Adapter(NamedTuple):
    """Of gate, up or down: [X, width, R] and [X, R, features]."""

    a: jax.Array
    b: jax.Array


_Adapters = dict[str, _Adapter]  # by gate, up and down; {} where experts have none

# Along `tensor` alone: what lies along `fsdp` is gathered before.
_COLUMNS, _ROWS = P(None, None, "tensor"), P(None, "tensor", None)
_CUT = _Weights(P(), _COLUMNS, _COLUMNS, _ROWS)
_CUT_ADAPTERS = {
    "gate": _Adapter(P(), _COLUMNS),
    "up": _Adapter(P(), _COLUMNS),
    "down": _Adapter(_ROWS, P()),
}


class Experts(nn.Module):
    """The feed-forward part of a layer.

    An adapter adds (alpha / rank) x A B, as in `linear.Linear`: float32 `gate_a`, `gate_b` and so
    on in `lora`. The router has none.

    Attributes:
      dtype: of the weights.
      lora_rank: 0 = no adapters.
    """

    arch: Architecture
    dtype: jnp.dtype
    lora_rank: int = 0
    lora_alpha: float = 1.0

    def setup(self) -> None:
        D, F, X = self.arch.D, self.arch.F, self.arch.routing.experts

        def weight(name: str, *shape: int) -> jax.Array:
            return self.param(name, nn.initializers.normal(0.02), shape, self.dtype)

        def adapter(name: str, width: int, features: int) -> _Adapter:
            def random_a() -> jax.Array:
                init = nn.initializers.normal(width**-0.5)
                return init(self.make_rng("params"), (X, width, self.lora_rank), jnp.float32)

            b_size = (X, self.lora_rank, features)
            a = self.variable("lora", f"{name}_a", random_a)
            b = self.variable("lora", f"{name}_b", jnp.zeros, b_size, jnp.float32)
            return _Adapter(a.value, b.value)

        self.router = weight("router", D, X)
        self.gate, self.up = weight("gate", X, D, F), weight("up", X, D, F)
        self.down = weight("down", X, F, D)
        sizes = {"gate": (D, F), "up": (D, F), "down": (F, D)} if self.lora_rank else {}
        self.adapters = {name: adapter(name, *size) for name, size in sizes.items()}

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [U, ..., D], the groups in front, to the same shape and dtype."""
        weights = _Weights(self.router, self.gate, self.up, self.down)
        weights = jax.tree.map(lambda a: a.astype(x.dtype), weights)
        adapters = dict(self.adapters)
        mix = functools.partial(_mix, self.arch.routing, self.lora_alpha / max(1, self.lora_rank))
        # The one group that parameters are made with is not cut.
        if jax.sharding.get_abstract_mesh().empty or self.is_initializing():
            return mix(x, weights, adapters)

        def on_shard(x: jax.Array, weights: _Weights, adapters: _Adapters) -> jax.Array:
            return jax.lax.psum(mix(x, weights, adapters), "tensor")

        cut = (P(GROUP_AXES), _CUT, _CUT_ADAPTERS if adapters else {})
        return jax.shard_map(on_shard, in_specs=cut, out_specs=P(GROUP_AXES), check_vma=False)(
            x, weights, adapters
        )


def _mix(
    routing: Routing, scale: float, x: jax.Array, weights: _Weights, adapters: _Adapters
) -> jax.Array:
    """The weighted sum of each token's experts, of the columns that are here."""
    x_NxD = x.reshape(-1, x.shape[-1])
    share_NxY, expert_NxY = _route(routing, x_NxD, weights.router_DxX)
    by_expert = jnp.argsort(expert_NxY.reshape(-1), stable=True)
    rows_of_X = jnp.bincount(expert_NxY.reshape(-1), length=routing.experts).astype(jnp.int32)

    def multiply(rows: jax.Array, **kernels: jax.Array) -> list[jax.Array]:
        outputs = [_product(rows, kernel, rows_of_X) for kernel in kernels.values()]
        if adapters:
            a, b = zip(*(adapters[name] for name in kernels), strict=True)
            adapted = _adapted(scale, rows, a, b, rows_of_X)
            outputs = [y + more for y, more in zip(outputs, adapted, strict=True)]
        return [checkpoint_name(y, PROJECTED) for y in outputs]

    # Rows are permuted, never summed into: so gradients do not depend on an order of sums.
    repeated = jnp.repeat(x_NxD, routing.chosen, axis=0)
    sorted_rows = _permuted(repeated, by_expert)
    gate, up = multiply(sorted_rows, gate=weights.gate_XxDxF, up=weights.up_XxDxF)
    (down,) = multiply(nn.silu(gate) * up, down=weights.down_XxFxD)
    by_token = _permuted(down, jnp.argsort(by_expert)).reshape(*share_NxY.shape, -1)
    return jnp.einsum("ny,nyd->nd", share_NxY, by_token).reshape(x.shape)


def _route(
    routing: Routing, x_NxD: jax.Array, router_DxX: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(shares [N, Y] in x's dtype, experts [N, Y] int32) of each token's most likely experts."""
    logits_NxX = jnp.matmul(x_NxD, router_DxX, preferred_element_type=jnp.float32)
    share_NxY, expert_NxY = jax.lax.top_k(jax.nn.softmax(logits_NxX), routing.chosen)
    if routing.normalised:
        share_NxY /= jnp.sum(share_NxY, axis=-1, keepdims=True)
    return share_NxY.astype(x_NxD.dtype), expert_NxY


def _permuted(rows: jax.Array, order: jax.Array) -> jax.Array:
    return rows.at[order].get(unique_indices=True, mode="promise_in_bounds")


# Of sorted rows [N, D], of which each group has its own matrix.
_TRANSPOSED = jax.lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), (0,), (0,))
_OVER_ROWS = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())


def _product(rows_NxD: jax.Array, kernel_XxDxF: jax.Array, rows_of_X: jax.Array) -> jax.Array:
    """[N, F]: each row times the matrix of its expert."""
    return jax.lax.ragged_dot(rows_NxD, kernel_XxDxF, rows_of_X)


_Arrays = tuple[jax.Array, ...]  # one for each adapter


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _adapted(
    scale: float, x_NxD: jax.Array, a_XxDxR: _Arrays, b_XxRxF: _Arrays, rows_of_X: jax.Array
) -> _Arrays:
    """scale x A B of each adapter of the same sorted rows, [N, F] in x's dtype.

    They share one product with all of their A. Gradients of A and B are summed over rows in
    float32.
    """
    return _adapted_forward(scale, x_NxD, a_XxDxR, b_XxRxF, rows_of_X)[0]


def _adapted_forward(
    scale: float, x_NxD: jax.Array, a_XxDxR: _Arrays, b_XxRxF: _Arrays, rows_of_X: jax.Array
) -> tuple[_Arrays, Any]:
    all_a_XxDxnR = jnp.concatenate(a_XxDxR, axis=2).astype(x_NxD.dtype)
    inner_NxnR = checkpoint_name(scale * _product(x_NxD, all_a_XxDxnR, rows_of_X), INNER)
    inners = jnp.split(inner_NxnR, len(b_XxRxF), axis=1)
    outputs = tuple(
        _product(inner_NxR, b.astype(x_NxD.dtype), rows_of_X)
        for inner_NxR, b in zip(inners, b_XxRxF, strict=True)
    )
    return outputs, (x_NxD, inner_NxnR, a_XxDxR, b_XxRxF, rows_of_X)


def _adapted_backward(
    scale: float, kept: Any, d_out_NxF: _Arrays
) -> tuple[jax.Array, _Arrays, _Arrays, None]:
    x_NxD, inner_NxnR, a_XxDxR, b_XxRxF, rows_of_X = kept
    adapters = len(b_XxRxF)

    def transposed(rows_NxF: jax.Array, kernel_XxDxF: jax.Array) -> jax.Array:
        kernel_XxDxF = kernel_XxDxF.astype(rows_NxF.dtype)
        return jax.lax.ragged_dot_general(rows_NxF, kernel_XxDxF, rows_of_X, _TRANSPOSED)

    def sum_over_rows(x_NxD: jax.Array, d_NxF: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot_general(
            x_NxD, d_NxF, rows_of_X, _OVER_ROWS, preferred_element_type=jnp.float32
        )

    d_inner_NxR = [
        scale * transposed(d_out, b) for d_out, b in zip(d_out_NxF, b_XxRxF, strict=True)
    ]
    d_inner_NxnR = jnp.concatenate(d_inner_NxR, axis=1)
    d_x_NxD = transposed(d_inner_NxnR, jnp.concatenate(a_XxDxR, axis=2))

    d_a_XxDxR = tuple(jnp.split(sum_over_rows(x_NxD, d_inner_NxnR), adapters, axis=2))
    inners = jnp.split(inner_NxnR, adapters, axis=1)
    d_b_XxRxF = tuple(
        sum_over_rows(inner_NxR, d_out) for inner_NxR, d_out in zip(inners, d_out_NxF, strict=True)
    )
    return d_x_NxD, d_a_XxDxR, d_b_XxRxF, None


_adapted.defvjp(_adapted_forward, _adapted_backward)
