"""Attention of whole groups in training, made of parts under one softmax.

A prompt's token attends to its past; a trace's token to the whole prompt and to its own past. The
prompt's keys exist once a group. A backend computes the parts; this file has what all of them
share: the derivative.

Kept for the backward pass are the output and the log-sum-exp of each query's scores, over all keys
that it sees. With d_out the output's cotangent,

    weight = exp(score - lse)      d_score = weight * (d_out v - sum_e out d_out)
    d_v = weight^T d_out           d_q = d_score k           d_k = d_score^T q

hold for any part of the keys alone (FlashAttention-2, arXiv 2307.08691, section 3.1), so prompt and
own keys need not lie in one array, and each part's backward pass takes the merged output and
log-sum-exp. Scores, softmax and sums are float32; products take the inputs' dtype.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from spiral_jax.model.attention.part import MASKED, KeyValue, Lengths, split_heads

KEPT = "attention"  # the name of output and log-sum-exp for policies of `jax.checkpoint`

# Names of scopes: a plan finds the loops of a compiled program by them.
PROMPT_SCOPE, TRACE_SCOPE = "prompt_attention", "trace_attention"


class Backend(Protocol):
    """Computes a group's attention and its cotangents; hashable, as it is static in a program.

    The prompt's own tokens are a group of one trace, `prompt=None`, as long as `lengths.prompt_U`.
    """

    def arrange(self, q_UxCxQxHxE: jax.Array, own: KeyValue, prompt: KeyValue | None) -> Any:
        """(queries, own, prompt) in the layout that the backend computes in; differentiable.

        Args:
          own: [U, C, Q, J, E], of each trace.
          prompt: [U, P, J, E], shared by the C traces.
        """

    def forward(
        self, q: jax.Array, own: Any, prompt: Any, lengths: Lengths
    ) -> tuple[jax.Array, jax.Array]:
        """(output like q, log-sum-exp of each query's scores), of what is arranged."""

    def backward(
        self,
        q: jax.Array,
        own: Any,
        prompt: Any,
        lengths: Lengths,
        out: jax.Array,
        lse: jax.Array,
        d_out: jax.Array,
    ) -> tuple[jax.Array, Any, Any]:
        """Cotangents of queries, own and prompt."""

    def restore(self, out: jax.Array, Q: int) -> jax.Array:
        """[U, C, Q, H, E] from the output."""


def prompt_attention(
    backend: Backend, q_UxPxHxE: jax.Array, prompt: KeyValue, lengths: Lengths
) -> jax.Array:
    """Causal self-attention of right-padded prompts; [U, P, H, E].

    Args:
      prompt: [U, P, J, E].
    """
    with jax.named_scope(PROMPT_SCOPE):
        own = KeyValue(prompt.k[:, None], prompt.v[:, None])
        return _attend(backend, q_UxPxHxE[:, None], own, None, lengths)[:, 0]


def trace_attention(
    backend: Backend, q_UxCxGxHxE: jax.Array, prompt: KeyValue, own: KeyValue, lengths: Lengths
) -> jax.Array:
    """Attention of trace tokens to the group's prompt and the trace's own past; [U, C, G, H, E].

    Args:
      prompt: [U, P, J, E], shared by the C traces.
      own: [U, C, G, J, E].
    """
    with jax.named_scope(TRACE_SCOPE):
        return _attend(backend, q_UxCxGxHxE, own, prompt, lengths)


def last_token_attention(
    q_UxHxE: jax.Array, prompt: KeyValue, prompt_len_U: jax.Array
) -> jax.Array:
    """Attention of each prompt's last token to its prompt [U, P, J, E]; [U, H, E].

    It is one query a group, so its scores exist at once.
    """
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    with jax.named_scope("last_token_attention"):
        q_UxJxRxE = split_heads(q_UxHxE, prompt.k.shape[-2])
        visible = jnp.arange(prompt.k.shape[1]) < prompt_len_U[:, None, None, None]
        score = jnp.where(visible, dot("ujre,upje->ujrp", q_UxJxRxE, prompt.k), MASKED)
        weight = jax.nn.softmax(score).astype(q_UxHxE.dtype)
        out = dot("ujrp,upje->ujre", weight, prompt.v)
        return out.reshape(q_UxHxE.shape).astype(q_UxHxE.dtype)


def _attend(
    backend: Backend,
    q_UxCxQxHxE: jax.Array,
    own: KeyValue,
    prompt: KeyValue | None,
    lengths: Lengths,
) -> jax.Array:
    arranged = backend.arrange(q_UxCxQxHxE, own, prompt)
    return backend.restore(_attend_arranged(backend, *arranged, lengths), q_UxCxQxHxE.shape[2])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_arranged(
    backend: Backend, q: jax.Array, own: Any, prompt: Any, lengths: Lengths
) -> jax.Array:
    return backend.forward(q, own, prompt, lengths)[0]


def _forward(
    backend: Backend, q: jax.Array, own: Any, prompt: Any, lengths: Lengths
) -> tuple[jax.Array, Any]:
    out, lse = backend.forward(q, own, prompt, lengths)
    out, lse = checkpoint_name(out, KEPT), checkpoint_name(lse, KEPT)
    return out, (q, own, prompt, lengths, out, lse)


def _backward(backend: Backend, kept: Any, d_out: jax.Array) -> tuple[jax.Array, Any, Any, None]:
    q, own, prompt, lengths, out, lse = kept
    d_q, d_own, d_prompt = backend.backward(q, own, prompt, lengths, out, lse, d_out)
    return d_q, d_own, d_prompt, None


_attend_arranged.defvjp(_forward, _backward)
