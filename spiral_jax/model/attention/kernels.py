"""Group attention by kernels: one call a part, merged by log-sum-exp.

A kernel knows one sequence of queries and one of keys. A trace's own past is one part for each of
the U * C traces; the prompt is another, for which all traces of a group are one sequence of C * Q
queries. Kernels do not split over devices by themselves, so each call is a program of a shard:
groups along the mesh's group axes, heads along `tensor`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from spiral_jax.core.mesh import GROUP_AXES
from spiral_jax.model.attention.part import Attended, Cotangents, KeyValue, Lengths, merge

_QUERIES = P(GROUP_AXES, None, None, "tensor", None)  # U C Q H E, and own keys U C Q J E
_PROMPT = P(GROUP_AXES, None, "tensor", None)  # U P J E
_LSE = P(GROUP_AXES, None, "tensor", None)  # U C H Q


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The backend of one kind of device; see `groups.Backend`. Its layout is that of the model.

    Attributes:
      part_forward: (q, k, v, q_len, kv_len, causal=) -> `Attended`, of [B, T, H, E] queries and
        [B, S, J, E] keys and values with int32 [B] lengths.
      part_backward: (q, k, v, q_len, kv_len, attended, d_out, causal=) -> `Cotangents`; `attended`
        may be of more keys than the part's.
    """

    part_forward: Callable[..., Attended]
    part_backward: Callable[..., Cotangents]

    def arrange(
        self, q_UxCxQxHxE: jax.Array, own: KeyValue, prompt: KeyValue | None
    ) -> tuple[jax.Array, KeyValue, KeyValue | None]:
        return q_UxCxQxHxE, own, prompt

    def restore(self, out_UxCxQxHxE: jax.Array, Q: int) -> jax.Array:
        del Q
        return out_UxCxQxHxE

    def forward(
        self, q: jax.Array, own: KeyValue, prompt: KeyValue | None, lengths: Lengths
    ) -> tuple[jax.Array, jax.Array]:
        """(output [U, C, Q, H, E], log-sum-exp [U, C, H, Q])."""
        return _on_shards(
            self._forward, (_QUERIES, _QUERIES, _PROMPT, _specs(lengths)), (_QUERIES, _LSE)
        )(q, own, prompt, lengths)

    def backward(
        self,
        q: jax.Array,
        own: KeyValue,
        prompt: KeyValue | None,
        lengths: Lengths,
        out: jax.Array,
        lse: jax.Array,
        d_out: jax.Array,
    ) -> tuple[jax.Array, KeyValue, KeyValue | None]:
        inputs = (_QUERIES, _QUERIES, _PROMPT, _specs(lengths), _QUERIES, _LSE, _QUERIES)
        outputs = (_QUERIES, _QUERIES, _PROMPT)
        return _on_shards(self._backward, inputs, outputs)(q, own, prompt, lengths, out, lse, d_out)

    def attend_chunk(
        self,
        q_UxTxHxE: jax.Array,
        own: KeyValue,
        before: KeyValue | None,
        start: jax.Array,
        prompt_len_U: jax.Array,
    ) -> jax.Array:
        """Attention [U, T, H, E] of a chunk of prompts to itself and to what comes before it.

        Args:
          own: [U, T, J, E], the chunk's.
          before: [U, P, J, E], of which the first `start` tokens are there; None: nothing is.
        """
        groups = P(GROUP_AXES)
        return _on_shards(self._attend_chunk, (_PROMPT, _PROMPT, _PROMPT, P(), groups), _PROMPT)(
            q_UxTxHxE, own, before, start, prompt_len_U
        )

    def _attend_chunk(
        self,
        q: jax.Array,
        own: KeyValue,
        before: KeyValue | None,
        start: jax.Array,
        prompt_len_U: jax.Array,
    ) -> jax.Array:
        length_U = jnp.clip(prompt_len_U - start, 0, q.shape[1])
        of_own = self.part_forward(q, own.k, own.v, length_U, length_U, causal=True)
        if before is None:
            return of_own.out_BxTxHxE
        before_U = jnp.minimum(prompt_len_U, start)
        of_before = self.part_forward(q, before.k, before.v, length_U, before_U, causal=False)
        return merge(of_own, of_before).out_BxTxHxE

    def _forward(
        self, q: jax.Array, own: KeyValue, prompt: KeyValue | None, lengths: Lengths
    ) -> tuple[jax.Array, jax.Array]:
        U, C, Q, H, E = q.shape
        length_B = _own_lengths(prompt, lengths)
        by_trace = self.part_forward(
            _by_trace(q), _by_trace(own.k), _by_trace(own.v), length_B, length_B, causal=True
        )
        if prompt is not None:
            by_group = self.part_forward(
                _by_group(q), prompt.k, prompt.v, _all_queries(q), lengths.prompt_U, causal=False
            )
            of_prompt = Attended(
                by_group.out_BxTxHxE.reshape(U * C, Q, H, E),
                jnp.moveaxis(by_group.lse_BxHxT.reshape(U, H, C, Q), 2, 1).reshape(U * C, H, Q),
            )
            by_trace = merge(by_trace, of_prompt)
        return by_trace.out_BxTxHxE.reshape(q.shape), by_trace.lse_BxHxT.reshape(U, C, H, Q)

    def _backward(
        self,
        q: jax.Array,
        own: KeyValue,
        prompt: KeyValue | None,
        lengths: Lengths,
        out: jax.Array,
        lse: jax.Array,
        d_out: jax.Array,
    ) -> tuple[jax.Array, KeyValue, KeyValue | None]:
        U, C, Q, H, _ = q.shape
        length_B = _own_lengths(prompt, lengths)
        of_own = self.part_backward(
            _by_trace(q),
            _by_trace(own.k),
            _by_trace(own.v),
            length_B,
            length_B,
            Attended(_by_trace(out), _by_trace(lse)),
            _by_trace(d_out),
            causal=True,
        )
        d_own = KeyValue(
            of_own.k_BxSxJxE.reshape(own.k.shape), of_own.v_BxSxJxE.reshape(own.v.shape)
        )
        d_q = of_own.q_BxTxHxE.reshape(q.shape)
        if prompt is None:
            return d_q, d_own, None
        lse_by_group = jnp.moveaxis(lse, 1, 2).reshape(U, H, C * Q)
        of_prompt = self.part_backward(
            _by_group(q),
            prompt.k,
            prompt.v,
            _all_queries(q),
            lengths.prompt_U,
            Attended(_by_group(out), lse_by_group),
            _by_group(d_out),
            causal=False,
        )
        d_q = d_q.astype(jnp.float32) + of_prompt.q_BxTxHxE.reshape(q.shape)
        d_prompt = KeyValue(of_prompt.k_BxSxJxE, of_prompt.v_BxSxJxE)
        return d_q.astype(q.dtype), d_own, d_prompt


def _own_lengths(prompt: KeyValue | None, lengths: Lengths) -> jax.Array:
    """int32 [U * C]; the prompt's own tokens are a group of one trace."""
    return lengths.prompt_U if prompt is None else lengths.trace_UxC.reshape(-1)


def _all_queries(q_UxCxQxHxE: jax.Array) -> jax.Array:
    """int32 [U]: every query of a group, as the padding of traces lies between them."""
    U, C, Q = q_UxCxQxHxE.shape[:3]
    return jnp.full(U, C * Q, jnp.int32)


def _by_trace(a_UxC: jax.Array) -> jax.Array:
    """[U, C, ...] -> [U * C, ...]."""
    return a_UxC.reshape(-1, *a_UxC.shape[2:])


def _by_group(a_UxCxQ: jax.Array) -> jax.Array:
    """[U, C, Q, ...] -> [U, C * Q, ...]."""
    return a_UxCxQ.reshape(a_UxCxQ.shape[0], -1, *a_UxCxQ.shape[3:])


def _specs(lengths: Lengths) -> Any:
    return jax.tree.map(lambda a: P(GROUP_AXES) if a.ndim else P(), lengths)


def _on_shards(function: Callable[..., Any], inputs: Any, outputs: Any) -> Callable[..., Any]:
    """`function` as the program of each shard of the mesh in context; as it is outside of one."""
    if jax.sharding.get_abstract_mesh().empty:
        return function
    return jax.shard_map(function, in_specs=inputs, out_specs=outputs, check_vma=False)
