"""Feed-forward layers of experts, of which a router gives each token some (mixture of experts).

Each shard of the groups sorts its own tokens by expert and multiplies the sorted rows with the
experts' weights, group by group of rows (`jax.lax.ragged_dot`). Every device holds a share of the
columns of all experts, along `tensor`, so all devices do equal work whatever the router says.

X experts, Y of them for each token; N tokens.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from spiral_jax.core.mesh import GROUP_AXES
from spiral_jax.model.architecture import Architecture
from spiral_jax.model.families import Routing
from spiral_jax.model.linear import PROJECTED


class _Weights(NamedTuple):
    router_DxX: jax.Array
    gate_XxDxF: jax.Array
    up_XxDxF: jax.Array
    down_XxFxD: jax.Array


# Along `tensor` alone: what lies along `fsdp` is gathered before.
_CUT = _Weights(P(), P(None, None, "tensor"), P(None, None, "tensor"), P(None, "tensor", None))


class Experts(nn.Module):
    """The feed-forward part of a layer; it has no adapters.

    Attributes:
      dtype: of the weights.
    """

    arch: Architecture
    dtype: jnp.dtype

    def setup(self) -> None:
        D, F, X = self.arch.D, self.arch.F, self.arch.routing.experts

        def weight(name: str, *shape: int) -> jax.Array:
            return self.param(name, nn.initializers.normal(0.02), shape, self.dtype)

        self.router = weight("router", D, X)
        self.gate, self.up = weight("gate", X, D, F), weight("up", X, D, F)
        self.down = weight("down", X, F, D)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [U, ..., D], the groups in front, to the same shape and dtype."""
        weights = _Weights(self.router, self.gate, self.up, self.down)
        weights = jax.tree.map(lambda a: a.astype(x.dtype), weights)
        mix = functools.partial(_mix, self.arch.routing)
        # The one group that parameters are made with is not cut.
        if jax.sharding.get_abstract_mesh().empty or self.is_initializing():
            return mix(x, weights)

        def on_shard(x: jax.Array, weights: _Weights) -> jax.Array:
            return jax.lax.psum(mix(x, weights), "tensor")

        return jax.shard_map(
            on_shard, in_specs=(P(GROUP_AXES), _CUT), out_specs=P(GROUP_AXES), check_vma=False
        )(x, weights)


def _mix(routing: Routing, x: jax.Array, weights: _Weights) -> jax.Array:
    """The weighted sum of each token's experts, of the columns that are here."""
    x_NxD = x.reshape(-1, x.shape[-1])
    share_NxY, expert_NxY = _route(routing, x_NxD, weights.router_DxX)
    by_expert = jnp.argsort(expert_NxY.reshape(-1), stable=True)
    rows_of_X = jnp.bincount(expert_NxY.reshape(-1), length=routing.experts).astype(jnp.int32)

    def multiply(rows: jax.Array, kernel: jax.Array) -> jax.Array:
        return checkpoint_name(jax.lax.ragged_dot(rows, kernel, rows_of_X), PROJECTED)

    # Rows are permuted, never summed into: so gradients do not depend on an order of sums.
    repeated = jnp.repeat(x_NxD, routing.chosen, axis=0)
    sorted_rows = _permuted(repeated, by_expert)
    gate = multiply(sorted_rows, weights.gate_XxDxF)
    up = multiply(sorted_rows, weights.up_XxDxF)
    down = multiply(nn.silu(gate) * up, weights.down_XxFxD)
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
