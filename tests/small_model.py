"""A small model and random groups, run on the mesh: what the tests of the model and of its parity
share.
"""

import functools
import typing

import jax
import numpy as np

from spiral_jax.core import mesh as meshes
from spiral_jax.learner.logprobs import group_logprobs
from spiral_jax.model.architecture import Architecture
from spiral_jax.model.transformer import Transformer, head_kernel

U, C, P, G = 4, 2, 9, 5
PROMPT_LEN = np.array([9, 6, 1, 4], np.int32)
ARCH = Architecture(
    V=97, D=48, F=80, L=3, H=6, J=3, E=16, norm_eps=1e-3, rope_theta=777.0, tied=False
)


class Ids(typing.NamedTuple):
    """Random groups whose padding is arbitrary ids, not zeros."""

    prompt: np.ndarray
    prompt_len: np.ndarray
    trace: np.ndarray


def random_ids():
    rng = np.random.default_rng(0)
    return Ids(
        rng.integers(0, 97, (U, P), np.int32), PROMPT_LEN, rng.integers(0, 97, (U, C, G), np.int32)
    )


def on_mesh(program, mesh, config, variables, ids, *rest):
    """Runs a jitted `program(config, variables, prompt, prompt_len, trace)` with groups along the
    mesh.
    """
    with jax.set_mesh(mesh):
        return program(
            config, variables, *jax.device_put(tuple(ids), meshes.group_sharding(mesh)), *rest
        )


@functools.partial(jax.jit, static_argnums=0)
def forward(config, variables, prompt, prompt_len, trace):
    """Hidden states [U, 1 + C G, D] of each prompt's last token and of its traces, and their
    logits.
    """
    hidden = Transformer(config).apply(variables, prompt, prompt_len, trace)
    return hidden, hidden @ head_kernel(config, variables["params"])


@functools.partial(jax.jit, static_argnums=0)
def logprobs(config, variables, prompt, prompt_len, trace):
    """Log-probs of trace tokens [U, C, G], their logits in chunks of 2."""
    return group_logprobs(config, variables, prompt, prompt_len, trace, 1.0, 2)[0]


def rows_of(out_UxTx, ids, u, c):
    """The entries of prompt u's last token and of trace c, one after the other."""
    G = ids.trace.shape[2]
    return np.concatenate([out_UxTx[u, :1], out_UxTx[u, 1 + c * G : 1 + (c + 1) * G]])
