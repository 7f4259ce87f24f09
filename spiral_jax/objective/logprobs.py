"""Log-probabilities of response tokens without ever holding [.., T, V]: head on response positions only, in chunks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from spiral_jax.model.qwen3 import ModelConfig, Transformer, head_kernel


def response_hidden(
    config: ModelConfig,
    variables: dict[str, Any],
    prompt_UxP: jax.Array,
    prompt_len_U: jax.Array,
    trace_UxCxG: jax.Array,
) -> jax.Array:
    """Hidden states [U, C, G, D] whose head output predicts each trace token.

    Token 0 is predicted by the prompt's last token, token g by token g - 1.
    """
    U, C, G = trace_UxCxG.shape
    P = prompt_UxP.shape[1]
    hidden_UxTxD = Transformer(config).apply(variables, prompt_UxP, prompt_len_U, trace_UxCxG)
    last_UxD = jnp.take_along_axis(hidden_UxTxD, (prompt_len_U - 1)[:, None, None], axis=1)[:, 0]
    own = hidden_UxTxD[:, P:].reshape(U, C, G, -1)[:, :, :-1]
    first = jnp.broadcast_to(last_UxD[:, None, None], (U, C, 1, last_UxD.shape[-1]))
    return jnp.concatenate([first, own], axis=2)


def token_logprobs(
    hidden_UxCxGxD: jax.Array, kernel_DxV: jax.Array, trace_UxCxG: jax.Array, temperature: float, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Log-prob of each trace token and the entropy of its distribution, both [U, C, G] float32, in nat.

    Chunks of `chunk` response positions, rematerialised in the backward pass: [U, C, chunk, V] logits exist at a time.
    Padded positions hold finite numbers without meaning; lengths mask them later.
    """
    G = trace_UxCxG.shape[-1]
    chunks = -(-G // chunk)
    chunk = -(-G // chunks)
    width = ((0, 0), (0, 0), (0, chunks * chunk - G))
    hidden = jnp.pad(hidden_UxCxGxD, (*width, (0, 0)))
    hidden = jnp.moveaxis(hidden.reshape(*hidden.shape[:2], chunks, chunk, -1), 2, 0)
    trace = jnp.pad(trace_UxCxG, width)
    trace = jnp.moveaxis(trace.reshape(*trace.shape[:2], chunks, chunk), 2, 0)

    @jax.checkpoint
    def one(pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h, ids = pair
        with jax.named_scope("head"):
            logits = jnp.einsum("ucgd,dv->ucgv", h, kernel_DxV.astype(h.dtype), preferred_element_type=jnp.float32)
        logits /= temperature
        lse = jax.nn.logsumexp(logits, axis=-1)
        logprob = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0] - lse
        entropy = lse - jnp.sum(jax.nn.softmax(logits, axis=-1) * logits, axis=-1)
        return logprob, jax.lax.stop_gradient(entropy)

    logprob, entropy = one((hidden[0], trace[0])) if chunks == 1 else jax.lax.map(one, (hidden, trace))
    if chunks == 1:
        return logprob[..., :G], entropy[..., :G]
    join = lambda a: jnp.moveaxis(a, 0, 2).reshape(*a.shape[1:3], chunks * chunk)[..., :G]  # noqa: E731
    return join(logprob), join(entropy)


def group_logprobs(
    config: ModelConfig,
    variables: dict[str, Any],
    prompt_UxP: jax.Array,
    prompt_len_U: jax.Array,
    trace_UxCxG: jax.Array,
    temperature: float,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """Log-probs and entropies [U, C, G] of whole groups under `variables`."""
    hidden = response_hidden(config, variables, prompt_UxP, prompt_len_U, trace_UxCxG)
    kernel = head_kernel(config, variables["params"])
    return token_logprobs(hidden, kernel, trace_UxCxG, temperature, chunk)


def length_mask(trace_len_UxC: jax.Array, G: int) -> jax.Array:
    """bool [U, C, G]: which positions are tokens. Masks only ever come from lengths."""
    return jnp.arange(G) < trace_len_UxC[..., None]
