"""Log-probabilities of response tokens without ever holding [.., T, V].

The head is applied to response positions only, in chunks of them:

    logprob              = logits[token] / temperature - lse
    d logprob / d logits = (onehot(token) - softmax) / temperature

The cotangent is only a factor of that derivative. So under a frozen head the forward pass already
multiplies the derivative with the head, while a chunk's logits exist, and nothing is computed
twice; a trained head computes the logits once more.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spiral_jax.model.transformer import ModelConfig, Transformer

LOGPROBS_SCOPE = "logprobs"  # a plan finds the loops over chunks in a compiled program by this name


def response_hidden(
    config: ModelConfig,
    variables: dict[str, Any],
    prompt_UxP: jax.Array,
    prompt_len_U: jax.Array,
    trace_UxCxG: jax.Array,
    trace_len_UxC: jax.Array | None = None,
) -> jax.Array:
    """Hidden states [U, C, G, D] whose head output predicts each trace token.

    Token 0 is predicted by the prompt's last token, token g by token g - 1. Those behind the
    longest trace (None: G) have no meaning.
    """
    U, C, G = trace_UxCxG.shape
    hidden = Transformer(config).apply(
        variables, prompt_UxP, prompt_len_U, trace_UxCxG, trace_len_UxC
    )
    own = hidden[:, 1:].reshape(U, C, G, -1)[:, :, :-1]
    first = jnp.broadcast_to(hidden[:, :1, None], (U, C, 1, hidden.shape[-1]))
    return jnp.concatenate([first, own], axis=2)


class _Head(NamedTuple):
    """What a chunk's program depends on, beside arrays.

    Attributes:
      chunk: response positions of each trace.
      axes: "dv", or "vd" where the kernel is a tied embedding: turned around it would be copied.
    """

    temperature: float
    chunk: int
    frozen: bool
    axes: str


class _PerToken(NamedTuple):
    """What the forward pass computes of trace tokens, [U, C, G] float32 each.

    Attributes:
      d_hidden: d logprob / d hidden [U, C, G, D] under a frozen head, else None.
    """

    logprob: jax.Array
    entropy: jax.Array
    lse: jax.Array
    d_hidden: jax.Array | None


def token_logprobs(
    hidden_UxCxGxD: jax.Array,
    kernel_DxV: jax.Array,
    trace_UxCxG: jax.Array,
    temperature: float,
    chunk: int,
    trace_len_UxC: jax.Array | None = None,
    *,
    frozen_head: bool = False,
    tied: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Log-prob of each trace token and the entropy of its distribution: [U, C, G] float32, in nat.

    Chunks of `chunk` response positions: [U, C, chunk, V] logits exist at a time; chunks behind the
    longest trace (None: G) are not computed. Padded positions hold finite numbers without meaning;
    lengths mask them later. Entropy passes no gradient, and to a frozen head neither do the
    log-probs. `tied`: the kernel is an embedding, [V, D].
    """
    G = trace_UxCxG.shape[-1]
    chunk = -(-G // -(-G // chunk))  # as few chunks, of as equal a size as there is
    pad = ((0, 0), (0, 0), (0, -G % chunk))
    longest = G if trace_len_UxC is None else jnp.max(trace_len_UxC)

    head = _Head(temperature, chunk, frozen_head, "vd" if tied else "dv")
    hidden = jnp.pad(hidden_UxCxGxD, (*pad, (0, 0)))
    kernel = kernel_DxV.astype(hidden_UxCxGxD.dtype)
    trace, count = jnp.pad(trace_UxCxG, pad), -(-longest // chunk)
    logprob, entropy = _logprobs_in_chunks(head, hidden, kernel, trace, count)
    return logprob[..., :G], entropy[..., :G]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logprobs_in_chunks(
    head: _Head, hidden: jax.Array, kernel: jax.Array, trace: jax.Array, count: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(log-probs, entropies) of whole chunks, of which `count` are computed; the rest are zero."""
    of_tokens = _forward(head._replace(frozen=False), hidden, kernel, trace, count)
    return of_tokens.logprob, of_tokens.entropy


def _forward(
    head: _Head, hidden: jax.Array, kernel: jax.Array, trace: jax.Array, count: jax.Array
) -> _PerToken:
    def add_chunk(i: jax.Array, done: _PerToken) -> _PerToken:
        h_NxD, ids_N = _rows(hidden, i, head.chunk), _rows(trace, i, head.chunk)
        new = _of_rows(head, h_NxD, kernel, ids_N)
        return jax.tree.map(lambda a, rows: _write(a, rows, i, head.chunk), done, new)

    zeros = jnp.zeros(trace.shape, jnp.float32)
    nothing = _PerToken(zeros, zeros, zeros, jnp.zeros_like(hidden) if head.frozen else None)
    with jax.named_scope(LOGPROBS_SCOPE):
        return jax.lax.fori_loop(0, count, add_chunk, nothing)


def _of_rows(head: _Head, h_NxD: jax.Array, kernel: jax.Array, ids_N: jax.Array) -> _PerToken:
    """The same of one chunk's positions, [N]."""
    logits_NxV = _logits(head, h_NxD, kernel)
    top = jnp.max(logits_NxV, axis=-1)
    below = logits_NxV - top[:, None]
    weight = jnp.exp(below)
    total = jnp.sum(weight, axis=-1)
    chosen = jnp.take_along_axis(logits_NxV, ids_N[:, None], axis=-1)[:, 0]
    lse = top + jnp.log(total)
    entropy = jnp.log(total) - jnp.sum(weight * below, axis=-1) / total
    d_hidden = None
    if head.frozen:
        mean = _dot(f"nv,{head.axes}->nd", weight.astype(h_NxD.dtype), kernel)
        of_chosen = kernel[ids_N] if head.axes == "vd" else kernel[:, ids_N].T
        d_hidden = (of_chosen - mean / total[:, None]) / head.temperature
    return _PerToken(chosen - lse, entropy, lse, d_hidden)


def _keep(
    head: _Head, hidden: jax.Array, kernel: jax.Array, trace: jax.Array, count: jax.Array
) -> Any:
    of_tokens = _forward(head, hidden, kernel, trace, count)
    kept = of_tokens.d_hidden if head.frozen else (hidden, kernel, trace, count, of_tokens.lse)
    return (of_tokens.logprob, of_tokens.entropy), kept


def _backward(head: _Head, kept: Any, cotangents: tuple[jax.Array, jax.Array]) -> tuple:
    d_logprob, _ = cotangents
    if head.frozen:
        return (d_logprob[..., None] * kept).astype(kept.dtype), None, None, None
    hidden, kernel, trace, count, lse = kept

    def add_chunk(i: jax.Array, done: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        d_hidden, d_kernel = done
        h, ids, lse_N, d_N = (_rows(a, i, head.chunk) for a in (hidden, trace, lse, d_logprob))
        softmax = jnp.exp(_logits(head, h, kernel) - lse_N[:, None])
        one_hot = jnp.arange(softmax.shape[-1]) == ids[:, None]
        d_logits = (d_N[:, None] / head.temperature * (one_hot - softmax)).astype(h.dtype)
        d_rows = _dot(f"nv,{head.axes}->nd", d_logits, kernel)
        d_kernel += _dot(f"nd,nv->{head.axes}", h, d_logits)
        return _write(d_hidden, d_rows, i, head.chunk), d_kernel

    zeros = jnp.zeros_like(hidden), jnp.zeros(kernel.shape, jnp.float32)
    with jax.named_scope(LOGPROBS_SCOPE):
        d_hidden, d_kernel = jax.lax.fori_loop(0, count, add_chunk, zeros)
    return d_hidden, d_kernel.astype(kernel.dtype), None, None


_logprobs_in_chunks.defvjp(_keep, _backward)


def _logits(head: _Head, hidden_NxD: jax.Array, kernel: jax.Array) -> jax.Array:
    """float32 [N, V], tempered."""
    with jax.named_scope("head"):
        return _dot(f"nd,{head.axes}->nv", hidden_NxD, kernel) / head.temperature


_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _rows(a_UxCxG: jax.Array, i: jax.Array, chunk: int) -> jax.Array:
    """Chunk i of all traces, one position a row: [N, ...]."""
    a = jax.lax.dynamic_slice_in_dim(a_UxCxG, i * chunk, chunk, 2)
    return a.reshape(-1, *a.shape[3:])


def _write(a_UxCxG: jax.Array, rows: jax.Array, i: jax.Array, chunk: int) -> jax.Array:
    """`a` with these rows as its chunk i."""
    new = rows.astype(a_UxCxG.dtype).reshape(*a_UxCxG.shape[:2], chunk, *a_UxCxG.shape[3:])
    return jax.lax.dynamic_update_slice_in_dim(a_UxCxG, new, i * chunk, 2)


def group_logprobs(
    config: ModelConfig,
    variables: dict[str, Any],
    prompt_UxP: jax.Array,
    prompt_len_U: jax.Array,
    trace_UxCxG: jax.Array,
    temperature: float,
    chunk: int,
    *,
    trace_len_UxC: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probs and entropies [U, C, G] of whole groups under `variables`.

    Arguments as in `token_logprobs`. With adapters the head is frozen.
    """
    hidden = response_hidden(
        config, variables, prompt_UxP, prompt_len_U, trace_UxCxG, trace_len_UxC
    )
    tied = config.arch.tied
    return token_logprobs(
        hidden,
        variables["params"]["embed" if tied else "head"],
        trace_UxCxG,
        temperature,
        chunk,
        trace_len_UxC,
        frozen_head=config.lora_rank > 0,
        tied=tied,
    )


def length_mask(trace_len_UxC: jax.Array, G: int) -> jax.Array:
    """bool [U, C, G]: which positions are tokens. Masks only ever come from lengths."""
    return jnp.arange(G) < trace_len_UxC[..., None]
