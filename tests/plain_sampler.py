"""Sampling as it is defined: the training forward pass of the whole group for every token.

No cache, no pages.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from spiral_jax.core import mesh as meshes
from spiral_jax.core.groups import Groups, Stop
from spiral_jax.learner.logprobs import response_hidden
from spiral_jax.model.transformer import head_kernel
from spiral_jax.sampling.draw import draw_token
from spiral_jax.sampling.keys import trace_keys, uniforms


@functools.partial(jax.jit, static_argnums=(0, 1))
def next_tokens(config, draw, variables, prompt, prompt_len, trace, key, g):
    hidden = response_hidden(config, variables, prompt, prompt_len, trace)
    at = jax.lax.dynamic_index_in_dim(hidden, g, axis=2, keepdims=False)
    head = head_kernel(config, variables["params"]).astype(at.dtype)
    logits = jnp.einsum("ucd,dv->ucv", at, head).astype(jnp.float32)
    return draw_token(draw, logits, uniforms(key, jnp.broadcast_to(g, key.shape[:2])))


def plain_sample(settings, variables, requests):
    """`sampling.protocol.sample` of all requests, one group after the other's token."""
    U, C, G = len(requests), requests.traces, requests.max_tokens
    limit = np.full((U, C), G) if requests.limit_UxC is None else requests.limit_UxC
    rows = np.arange(-(-U // 4) * 4) % U  # a multiple of the mesh's groups

    def place(array):
        return jax.device_put(array[rows], meshes.group_sharding(settings.mesh))

    trace, logprob = np.zeros((U, C, G), np.int32), np.zeros((U, C, G), np.float32)
    length, stop = np.zeros((U, C), np.int32), np.full((U, C), int(Stop.LENGTH), np.int32)
    id_UxCx6 = np.broadcast_to(requests.id_Ux6[:, None], (U, C, 6))
    index_UxC = np.broadcast_to(np.arange(C), (U, C))
    with jax.set_mesh(settings.mesh):
        key = place(np.asarray(trace_keys(settings.seed, id_UxCx6, index_UxC)))
        prompt, prompt_len = place(requests.prompt_UxP), place(requests.prompt_len_U)
        for g in range(G):
            drawn = next_tokens(
                settings.config, settings.draw, variables, prompt, prompt_len, place(trace), key, g
            )
            token, value = (np.asarray(a)[:U] for a in drawn)
            runs = (stop == Stop.LENGTH) & (g < limit)
            trace[..., g], logprob[..., g] = np.where(runs, token, 0), np.where(runs, value, 0)
            length += runs
            stop[runs & np.isin(token, settings.stop_ids)] = Stop.STOP
    return Groups(requests, trace, length, logprob, stop)
