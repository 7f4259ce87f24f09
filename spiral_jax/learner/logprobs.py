"""Log-probabilities of response tokens without ever holding [.., T, V]: head on response positions
only, in chunks.

    logprob = logits[token] / temperature - lse        d logprob / d logits = (onehot(token) - softmax) / temperature

The derivative needs no cotangent but a factor. So under a frozen head the forward pass already
multiplies it with the head, while a chunk's logits exist, and nothing is computed twice; a trained
head computes the logits once more.
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


def token_logprobs(
    hidden_UxCxGxD: jax.Array,
    kernel_DxV: jax.Array,
    trace_UxCxG: jax.Array,
    temperature: float,
    chunk: int,
    trace_len_UxC: jax.Array | None = None,
    frozen_head: bool = False,
    tied: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Log-prob of each trace token and the entropy of its distribution, both [U, C, G] float32, in
    nat.

    Chunks of `chunk` response positions: [U, C, chunk, V] logits exist at a time; chunks behind the
    longest trace (None: G) are not computed. Padded positions hold finite numbers without meaning;
    lengths mask them later. Entropy passes no gradient, and to a frozen head neither do the
    log-probs. `tied`: the kernel is an embedding, [V, D].
    """
    G = trace_UxCxG.shape[-1]
    chunk = -(-G // -(-G // chunk))
    pad = ((0, 0), (0, 0), (0, -G % chunk))
    longest = G if trace_len_UxC is None else jnp.max(trace_len_UxC)
    head = _Head(temperature, chunk, frozen_head, "vd" if tied else "dv")
    hidden, kernel = (
        jnp.pad(hidden_UxCxGxD, (*pad, (0, 0))),
        kernel_DxV.astype(hidden_UxCxGxD.dtype),
    )
    logprob, entropy = _in_chunks(
        head, hidden, kernel, jnp.pad(trace_UxCxG, pad), -(-longest // chunk)
    )
    return logprob[..., :G], entropy[..., :G]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_chunks(
    head: _Head, hidden: jax.Array, kernel: jax.Array, trace: jax.Array, count: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(log-probs, entropies) of whole chunks, of which `count` are computed; the rest are zero."""
    logprob, entropy, *_ = _forward(head._replace(frozen=False), hidden, kernel, trace, count)
    return logprob, entropy


def _forward(
    head: _Head, hidden: jax.Array, kernel: jax.Array, trace: jax.Array, count: jax.Array
) -> tuple[jax.Array, ...]:
    """(log-prob, entropy, lse), all [U, C, G], and of a frozen head d logprob / d hidden [U, C, G,
    D].
    """

    def one(i: jax.Array, done: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        h, ids = _rows(hidden, i, head.chunk), _rows(trace, i, head.chunk)
        logits = _logits(head, h, kernel)
        top = jnp.max(logits, axis=-1)
        below = logits - top[:, None]
        weight = jnp.exp(below)
        total = jnp.sum(weight, axis=-1)
        chosen = jnp.take_along_axis(logits, ids[:, None], axis=-1)[:, 0]
        lse = top + jnp.log(total)
        new = [chosen - lse, jnp.log(total) - jnp.sum(weight * below, axis=-1) / total, lse]
        if head.frozen:
            mean = _dot(f"nv,{head.axes}->nd", weight.astype(h.dtype), kernel)
            of_chosen = kernel[ids] if head.axes == "vd" else kernel[:, ids].T
            new.append((of_chosen - mean / total[:, None]) / head.temperature)
        return tuple(_write(a, b, i, head.chunk) for a, b in zip(done, new, strict=True))

    zeros = [jnp.zeros(trace.shape, jnp.float32)] * 3 + [jnp.zeros_like(hidden)] * head.frozen
    with jax.named_scope(LOGPROBS_SCOPE):
        return jax.lax.fori_loop(0, count, one, tuple(zeros))


def _keep(
    head: _Head, hidden: jax.Array, kernel: jax.Array, trace: jax.Array, count: jax.Array
) -> Any:
    logprob, entropy, lse, *d_hidden = _forward(head, hidden, kernel, trace, count)
    return (logprob, entropy), (d_hidden[0] if head.frozen else (hidden, kernel, trace, count, lse))


def _backward(head: _Head, kept: Any, cotangents: tuple[jax.Array, jax.Array]) -> tuple:
    d_logprob, _ = cotangents
    if head.frozen:
        return (d_logprob[..., None] * kept).astype(kept.dtype), None, None, None
    hidden, kernel, trace, count, lse = kept

    def one(i: jax.Array, done: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h, ids, of_row, d = (_rows(a, i, head.chunk) for a in (hidden, trace, lse, d_logprob))
        softmax = jnp.exp(_logits(head, h, kernel) - of_row[:, None])
        one_hot = jnp.arange(softmax.shape[-1]) == ids[:, None]
        d_logits = (d[:, None] / head.temperature * (one_hot - softmax)).astype(h.dtype)
        d_kernel = _dot(f"nd,nv->{head.axes}", h, d_logits)
        return _write(done[0], _dot(f"nv,{head.axes}->nd", d_logits, kernel), i, head.chunk), done[
            1
        ] + d_kernel

    zeros = jnp.zeros_like(hidden), jnp.zeros(kernel.shape, jnp.float32)
    with jax.named_scope(LOGPROBS_SCOPE):
        d_hidden, d_kernel = jax.lax.fori_loop(0, count, one, zeros)
    return d_hidden, d_kernel.astype(kernel.dtype), None, None


_in_chunks.defvjp(_keep, _backward)


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
    trace_len_UxC: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probs and entropies [U, C, G] of whole groups under `variables`; arguments as in
    `token_logprobs`.

    With adapters the head is frozen.
    """
    hidden = response_hidden(
        config, variables, prompt_UxP, prompt_len_U, trace_UxCxG, trace_len_UxC
    )
    tied, frozen = config.arch.tied, config.lora_rank > 0
    kernel = variables["params"]["embed" if tied else "head"]
    return token_logprobs(
        hidden, kernel, trace_UxCxG, temperature, chunk, trace_len_UxC, frozen, tied
    )


def length_mask(trace_len_UxC: jax.Array, G: int) -> jax.Array:
    """bool [U, C, G]: which positions are tokens. Masks only ever come from lengths."""
    return jnp.arange(G) < trace_len_UxC[..., None]
