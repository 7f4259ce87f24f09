"""One layer's attention on one accelerator: ours, and jax's own on repeated prompts.

Qwen3-4B's heads in bfloat16. Prompts are attended to chunk by chunk, as prefill does; a group is
its prompt and its traces together, as in training. jax's `dot_product_attention` knows no groups:
it gets each trace with its own copy of the prompt. It is cuDNN's; on CPUs, to try this program,
that in plain XLA. Operations are those that a group needs, its prompt once, whoever computes more
(`spiral_jax.model.flops`): so are TFLOP/s.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.one_device_cases import (
    DATA_SHEET,
    NO_ACCELERATOR,
    SHAPES,
    SHORT,
    GroupShape,
    architecture,
)
from benchmarks.peers.contestant import serve
from benchmarks.peers.spiral_device import XLA_BLOCK
from configs import qwen3_4b
from spiral_jax.model.attention import groups
from spiral_jax.model.attention.backends import XLA, make_backend, make_prompt_backend, refusal
from spiral_jax.model.attention.part import KeyValue, Lengths
from spiral_jax.model.flops import attention_pairs
from spiral_jax.planning.topology import CHIPS
from spiral_jax.sampling.settings import kernel_chunk

CUDNN = "cudnn"
DTYPE = jnp.bfloat16
FORWARD, BACKWARD = 4, 8  # operations a (query, key) pair and element of a head
TIMED_S, TRIES = 0.2, 3


class Arrays(NamedTuple):
    """Queries, keys and values of prompts [U, P, ...] and of traces [U, C, G, ...]."""

    prompt_q: jax.Array
    prompt: KeyValue
    trace_q: jax.Array
    own: KeyValue


class AttentionDevice:
    def load(self, small: bool) -> dict[str, Any]:
        """Returns {"skip": why nothing can be measured here}, or what measures."""
        if jax.default_backend() == "cpu" and not small:
            return NO_ACCELERATOR
        self.arch = architecture(small)
        self.shapes = {role.label: shape for role, shape in (SHORT if small else SHAPES).items()}
        self.expected: dict[tuple[str, str], Any] = {}  # what cuDNN found, by (method, role)
        return {"device": jax.devices()[0].device_kind, "cudnn_is": _implementation()}

    def prompts(self, role: str, attention: str) -> dict[str, Any]:
        """Forward pass of all prompts."""
        groups, _, P, _ = self.shapes[role]
        arrays = self._arrays(GroupShape(groups, 1, P, 1))
        attend = functools.partial(_prompts, attention)
        pairs = groups * attention_pairs(np.array([P]), np.zeros((1, 0)))
        return self._measure("prompts", role, attention, attend, arrays, FORWARD * pairs)

    def forward(self, role: str, attention: str) -> dict[str, Any]:
        """Forward pass of one group."""
        attend = functools.partial(_group, attention)
        return self._measure_group("forward", role, attention, attend, FORWARD)

    def both_passes(self, role: str, attention: str) -> dict[str, Any]:
        """Forward and backward pass of one group."""

        def total(arrays: Arrays) -> jax.Array:
            out = _group(attention, arrays)
            return sum(jnp.sum(jnp.square(a.astype(jnp.float32))) for a in out)

        return self._measure_group(
            "both_passes", role, attention, jax.grad(total), FORWARD + BACKWARD
        )

    def _measure_group(
        self, method: str, role: str, attention: str, work: Callable[..., Any], operations: int
    ) -> dict[str, Any]:
        _, C, P, G = self.shapes[role]
        pairs = attention_pairs(np.array([P]), np.full((1, C), G))
        arrays = self._arrays(GroupShape(1, C, P, G))
        return self._measure(method, role, attention, work, arrays, operations * pairs)

    def _measure(
        self,
        method: str,
        role: str,
        attention: str,
        work: Callable[..., Any],
        arrays: Arrays,
        operations: int,
    ) -> dict[str, Any]:
        device, arch = jax.devices()[0], self.arch
        reason = None if attention == CUDNN else refusal(attention, device, DTYPE, arch.E)
        if reason:
            return {"skip": f"attention {attention}: {reason}"}
        result, seconds = _best_time(jax.jit(work), arrays)
        flops = operations * arch.H * arch.E
        peak = CHIPS[DATA_SHEET].flops_per_s
        measured = {
            "seconds": seconds,
            "tflop_per_s": flops / seconds / 1e12,
            "mfu": flops / seconds / peak,
        }
        if attention == CUDNN:
            self.expected[method, role] = jax.device_get(result)
        elif (method, role) in self.expected:
            measured["difference"] = _difference(result, self.expected[method, role])
        return measured

    def _arrays(self, shape: GroupShape) -> Arrays:
        U, C, P, G = shape
        H, J, E = self.arch.H, self.arch.J, self.arch.E

        @jax.jit
        def draw() -> Arrays:
            keys = iter(jax.random.split(jax.random.key(0), 6))

            def normal(*sizes: int) -> jax.Array:
                return jax.random.normal(next(keys), sizes, DTYPE)

            return Arrays(
                normal(U, P, H, E),
                KeyValue(normal(U, P, J, E), normal(U, P, J, E)),
                normal(U, C, G, H, E),
                KeyValue(normal(U, C, G, J, E), normal(U, C, G, J, E)),
            )

        return draw()


def _prompts(attention: str, arrays: Arrays) -> jax.Array:
    """[U, P, H, E], as `spiral_jax.sampling.prefill` computes it, without what is around it."""
    if attention == CUDNN:
        return _dot_product_attention(arrays.prompt_q, *arrays.prompt)
    U, P, _, E = arrays.prompt_q.shape
    chunk = qwen3_4b.get_config().sampling.prefill_chunk
    chunk = min(P, chunk) if attention == XLA else kernel_chunk(P, chunk)
    padded = jax.tree.map(
        lambda a: jnp.pad(a, ((0, 0), (0, -P % chunk), (0, 0), (0, 0))),
        (arrays.prompt_q, arrays.prompt),
    )
    backend = make_prompt_backend(attention)
    length_U = jnp.full(U, P, jnp.int32)
    store = backend.empty(U, P + -P % chunk, arrays.prompt.k.shape[2], E, DTYPE)

    def attend_chunk(i: jax.Array, done: Any) -> Any:
        store, out = done
        start = i * chunk
        q, new = jax.tree.map(
            lambda a: jax.lax.dynamic_slice_in_dim(a, start, chunk, axis=1), padded
        )
        attended, store = backend.attend(store, q, new, start, length_U)
        return store, jax.lax.dynamic_update_slice_in_dim(out, attended, start, axis=1)

    _, out = jax.lax.fori_loop(0, -(-P // chunk), attend_chunk, (store, padded[0]))
    return out[:, :P]


def _group(attention: str, arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    """(of prompts [U, P, H, E], of traces [U, C, G, H, E])."""
    U, C, G = arrays.trace_q.shape[:3]
    P = arrays.prompt_q.shape[1]
    if attention == CUDNN:
        rows = [
            jnp.concatenate([jnp.repeat(a, C, axis=0), b.reshape(U * C, *b.shape[2:])], axis=1)
            for a, b in zip(
                (arrays.prompt_q, *arrays.prompt), (arrays.trace_q, *arrays.own), strict=True
            )
        ]
        out = _dot_product_attention(*rows).reshape(U, C, P + G, *arrays.prompt_q.shape[2:])
        return out[:, 0, :P], out[:, :, P:]
    backend = make_backend(attention, XLA_BLOCK)
    lengths = Lengths(
        jnp.full(U, P, jnp.int32), jnp.full((U, C), G, jnp.int32), jnp.int32(P), jnp.int32(G)
    )
    return (
        groups.prompt_attention(backend, arrays.prompt_q, arrays.prompt, lengths),
        groups.trace_attention(backend, arrays.trace_q, arrays.prompt, arrays.own, lengths),
    )


def _dot_product_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=_implementation())


def _implementation() -> str:
    return XLA if jax.default_backend() == "cpu" else CUDNN


def _best_time(work: Callable[..., Any], arrays: Arrays) -> tuple[Any, float]:
    """(its result, seconds of a call): the best of some tries of several calls each."""
    result = jax.block_until_ready(work(arrays))
    start = time.perf_counter()
    jax.block_until_ready(work(arrays))
    calls = max(1, int(TIMED_S / (time.perf_counter() - start)))
    seconds = []
    for _ in range(TRIES):
        start = time.perf_counter()
        for _ in range(calls):
            last = work(arrays)
        jax.block_until_ready(last)
        seconds.append((time.perf_counter() - start) / calls)
    return result, min(seconds)


def _difference(found: Any, expected: Any) -> float:
    """Relative, in L2 over all arrays together."""
    apart = whole = 0.0
    for a, b in zip(jax.tree.leaves(jax.device_get(found)), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        apart += np.sum(np.square(a - b))
        whole += np.sum(np.square(b))
    return float(np.sqrt(apart / whole))


if __name__ == "__main__":
    serve(AttentionDevice())
