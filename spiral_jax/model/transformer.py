"""Qwen3 and Llama in Flax Linen, purely functional: modules used by `init` and `apply`, the cache
explicit.

Collections: `params` (the base, or what full fine-tuning trains) and `lora` (adapters; absent at
rank 0). Training scans over stacked layers; the sampler applies one `Block` per layer on separate
per-layer arrays (slicing stacked weights inside a loop would copy all of them). Of a prompt nobody
reads more in the last layer than keys, values and what its last token predicts, so training
computes no more of it there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from spiral_jax.core.mesh import constrain_groups
from spiral_jax.model.architecture import Architecture
from spiral_jax.model.group_attention import (
    KEPT,
    Lengths,
    last_token_attention,
    prompt_attention,
    trace_attention,
)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What the program needs to know beside the arrays.

    Attributes:
      arch: sizes and constants of the checkpoint.
      param_dtype: of `params`; adapters are always float32.
      compute_dtype: of activations and caches; norms, rope and softmax are float32.
      lora_rank: 0 = no adapters.
      lora_alpha: adapters are scaled by alpha / rank.
      attention_block: queries, and keys, whose scores exist at once in training (see
      `group_attention`).
      remat: what the backward pass keeps of each layer, one of `config.REMAT`; it computes the rest
      once more.
    """

    arch: Architecture
    param_dtype: Any = jnp.float32
    compute_dtype: Any = jnp.float32
    lora_rank: int = 0
    lora_alpha: float = 1.0
    attention_block: int = 512
    remat: str = "layer"


def in_its_dtype(config: ModelConfig, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, traced so that products of a float32 model are float32; of another model as it
    is.

    By default JAX multiplies float32 matrices in TF32 on GPUs and in bfloat16 on TPUs: sampler and
    trainer would part.
    """
    if jnp.dtype(config.compute_dtype) != jnp.float32:
        return function

    @functools.wraps(function)
    def traced(*args: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return function(*args)

    return traced


_PROJECTED = "projected"  # the name of what a `Linear` returns, for policies of `jax.checkpoint`
# What a policy of `config.REMAT` keeps of a layer beside its input.
_POLICIES = {
    "dots": jax.checkpoint_policies.save_only_these_names(KEPT, _PROJECTED),
    "attention": jax.checkpoint_policies.save_only_these_names(KEPT),
    "layer": jax.checkpoint_policies.nothing_saveable,
}


class Linear(nn.Module):
    """x W, plus (alpha / rank) x A B where the `lora` collection has the layer's adapter (LoRA,
    arXiv 2106.09685).

    Tokens are rows of a matrix: to sum a gradient over two axes, XLA's CPU backend would transpose
    x or its cotangent.
    """

    config: ModelConfig
    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, width = self.config, x.shape[-1]
        kernel = self.param(
            "kernel", nn.initializers.normal(0.02), (width, self.features), c.param_dtype
        )
        rows = x.reshape(-1, width)
        y = rows @ kernel.astype(x.dtype)
        if c.lora_rank:
            init_a = nn.initializers.normal(width**-0.5)
            a = self.variable(
                "lora",
                "a",
                lambda: init_a(self.make_rng("params"), (width, c.lora_rank), jnp.float32),
            )
            b = self.variable("lora", "b", jnp.zeros, (c.lora_rank, self.features), jnp.float32)
            y += _adapted(c.lora_alpha / c.lora_rank, rows, a.value, b.value)
        return checkpoint_name(y, _PROJECTED).reshape(*x.shape[:-1], self.features)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _adapted(scale: float, x_NxD: jax.Array, a_DxR: jax.Array, b_RxF: jax.Array) -> jax.Array:
    """scale x A B. Products in x's dtype; gradients of A and B in float32, whose sums over rows are
    float32.
    """
    return _adapted_forward(scale, x_NxD, a_DxR, b_RxF)[0]


def _adapted_forward(
    scale: float, x: jax.Array, a: jax.Array, b: jax.Array
) -> tuple[jax.Array, tuple]:
    inner_NxR = scale * (x @ a.astype(x.dtype))
    return inner_NxR @ b.astype(x.dtype), (x, inner_NxR, a, b)


def _adapted_backward(
    scale: float, kept: tuple, d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, inner_NxR, a, b = kept
    d_inner_NxR = scale * (d_out @ b.astype(x.dtype).T)
    over_rows = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    d_a_RxD = over_rows(_turned(d_inner_NxR), x)
    return d_inner_NxR @ a.astype(x.dtype).T, _turned(d_a_RxD), over_rows(_turned(inner_NxR), d_out)


def _turned(x: jax.Array) -> jax.Array:
    """x.T as an array of its own. Without the barriers XLA makes it part of the product before or
    behind it, and its CPU backend takes up to 3 times as long for a product of two factors that
    both have their rows first.
    """
    return jax.lax.optimization_barrier(jax.lax.optimization_barrier(x).T)


_adapted.defvjp(_adapted_forward, _adapted_backward)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis in float32, returned in x's dtype.

    The first two axes of x [U, T, ...] become one: of a single group XLA's CPU backend would take 4
    times as long.
    """
    y = (x.reshape(-1, *x.shape[2:]) if x.ndim > 2 else x).astype(jnp.float32)
    y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * scale.astype(jnp.float32)).astype(x.dtype).reshape(x.shape)


def rope(x: jax.Array, position: jax.Array, theta: float) -> jax.Array:
    """Rotary embedding, halves rotated against each other. x [..., heads, E], position [...] int32."""
    half = x.shape[-1] // 2
    angle = position[..., None, None].astype(jnp.float32) * theta ** (
        -jnp.arange(half, dtype=jnp.float32) / half
    )
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(
        [a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], axis=-1
    ).astype(x.dtype)


class Block(nn.Module):
    """One layer. `__call__` and `predict` run groups; the sampler has attention of its own after
    `project`.
    """

    config: ModelConfig
    prompt_tokens: int = 0  # P of the rows that `__call__` and `predict` get
    traces: int = 0  # C

    def setup(self) -> None:
        c, arch = self.config, self.config.arch
        self.q = Linear(c, arch.H * arch.E)
        self.k = Linear(c, arch.J * arch.E)
        self.v = Linear(c, arch.J * arch.E)
        self.o = Linear(c, arch.D)
        self.gate = Linear(c, arch.F)
        self.up = Linear(c, arch.F)
        self.down = Linear(c, arch.D)
        of_heads = (("q_norm", arch.E), ("k_norm", arch.E)) if arch.qk_norm else ()
        for name, width in (("attention_norm", arch.D), ("mlp_norm", arch.D), *of_heads):
            setattr(self, name, self.param(name, nn.initializers.ones, (width,), c.param_dtype))

    def project(self, x: jax.Array, position: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [..., D] at `position` [...] -> q [..., H, E], k and v [..., J, E]."""
        h = rms_norm(x, self.attention_norm, self.config.arch.norm_eps)
        return self._queries(h, position), *self._keys_values(h, position)

    def _queries(self, h: jax.Array, position: jax.Array) -> jax.Array:
        arch = self.config.arch
        q = self._heads(self.q, h)
        return rope(
            rms_norm(q, self.q_norm, arch.norm_eps) if arch.qk_norm else q,
            position,
            arch.rope_theta,
        )

    def _keys_values(self, h: jax.Array, position: jax.Array) -> tuple[jax.Array, jax.Array]:
        arch = self.config.arch
        k, v = self._heads(self.k, h), self._heads(self.v, h)
        return rope(
            rms_norm(k, self.k_norm, arch.norm_eps) if arch.qk_norm else k,
            position,
            arch.rope_theta,
        ), v

    def _heads(self, linear: Linear, h: jax.Array) -> jax.Array:
        return linear(h).reshape(*h.shape[:-1], -1, self.config.arch.E)

    def finish(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """Residual of attention output [..., H, E], then the feed-forward part."""
        x += self.o(attended.reshape(*x.shape[:-1], -1))
        h = rms_norm(x, self.mlp_norm, self.config.arch.norm_eps)
        with jax.named_scope("mlp"):
            return x + self.down(nn.silu(self.gate(h)) * self.up(h))

    def __call__(
        self, x_UxTxD: jax.Array, position_UxT: jax.Array, lengths: Lengths
    ) -> tuple[jax.Array, None]:
        """Rows of T = P + C * G tokens: the prompt, then its traces one after the other. (x,
        nothing), as scan asks.
        """
        P = self.prompt_tokens
        x = constrain_groups(x_UxTxD)
        q, k, v = self.project(x, position_UxT)
        out = prompt_attention(q[:, :P], k[:, :P], v[:, :P], lengths, self.config.attention_block)
        if self.traces:
            out = jnp.concatenate([out, self._attend_traces(q[:, P:], (k, v), lengths)], axis=1)
        return self.finish(x, out), None

    def predict(self, x_UxTxD: jax.Array, position_UxT: jax.Array, lengths: Lengths) -> jax.Array:
        """The last layer, for the rows that predict a trace's token: the prompt's last one, then
        all of the traces.

        Takes what `__call__` takes; [U, 1 + C * G, D].
        """
        P, arch = self.prompt_tokens, self.config.arch
        x = constrain_groups(x_UxTxD)
        h = rms_norm(x, self.attention_norm, arch.norm_eps)
        k, v = self._keys_values(h, position_UxT)
        last_U = (lengths.prompt_U - 1)[:, None, None]
        x, h = (jnp.concatenate([jnp.take_along_axis(a, last_U, 1), a[:, P:]], 1) for a in (x, h))
        q = self._queries(h, jnp.concatenate([last_U[..., 0], position_UxT[:, P:]], axis=1))
        of_last = last_token_attention(q[:, 0], k[:, :P], v[:, :P], lengths.prompt_U)
        out = jnp.concatenate(
            [of_last[:, None], self._attend_traces(q[:, 1:], (k, v), lengths)], axis=1
        )
        return self.finish(x, out)

    def _attend_traces(
        self, q: jax.Array, kv: tuple[jax.Array, jax.Array], lengths: Lengths
    ) -> jax.Array:
        """[U, C * G, H, E] of the traces' queries, which are as many; keys and values of all rows."""
        P, U = self.prompt_tokens, len(q)
        by_trace = lambda a: a.reshape(U, self.traces, -1, *a.shape[2:])  # noqa: E731
        of_prompt, own = (
            tuple(part(a) for a in kv)
            for part in (lambda a: a[:, :P], lambda a: by_trace(a[:, P:]))
        )
        return trace_attention(
            by_trace(q), of_prompt, own, lengths, self.config.attention_block
        ).reshape(q.shape)


class Transformer(nn.Module):
    """Embedding, stacked layers, final norm. The head is applied where it is needed: see
    `head_kernel`.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        prompt_UxP: jax.Array,
        prompt_len_U: jax.Array,
        trace_UxCxG: jax.Array | None,
        trace_len_UxC: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states after the final norm: [U, P, D] of prompts alone, or [U, 1 + C * G, D] of
        groups.

        A group's are those that predict its traces: of the prompt's last token, then of each trace.
        A trace starts at `prompt_len`. States behind the longest prompt, and in traces behind the
        longest trace (None: G), have no
        meaning. Prompts alone are no training: the backward pass would keep everything.
        """
        c, arch = self.config, self.config.arch
        embed = self.param("embed", nn.initializers.normal(0.02), (arch.V, arch.D), c.param_dtype)
        if not arch.tied:
            self.param("head", nn.initializers.normal(0.02), (arch.D, arch.V), c.param_dtype)
        U, P = prompt_UxP.shape
        ids, position = prompt_UxP, jnp.broadcast_to(jnp.arange(P), (U, P))
        C = G = 0
        if trace_UxCxG is not None:
            _, C, G = trace_UxCxG.shape
            own = prompt_len_U[:, None, None] + jnp.broadcast_to(jnp.arange(G), (U, C, G))
            ids = jnp.concatenate([ids, trace_UxCxG.reshape(U, C * G)], axis=1)
            position = jnp.concatenate([position, own.reshape(U, C * G)], axis=1)
        x = embed[ids].astype(c.compute_dtype)
        longest_trace = jnp.int32(G) if trace_len_UxC is None else jnp.max(trace_len_UxC)
        lengths = Lengths(prompt_len_U, jnp.max(prompt_len_U), longest_trace)
        if trace_UxCxG is None:
            layers = nn.scan(
                Block,
                variable_axes={"params": 0, "lora": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, nn.broadcast),
                length=arch.L,
            )
            x, _ = layers(c, P, name="layers")(x, position, lengths)
        else:
            x = self._predict(Block(c, P, C, parent=None), x, position, lengths)
        norm = self.param("final_norm", nn.initializers.ones, (arch.D,), c.param_dtype)
        return rms_norm(x, norm, arch.norm_eps)

    def _predict(
        self, block: Block, x_UxTxD: jax.Array, position_UxT: jax.Array, lengths: Lengths
    ) -> jax.Array:
        """All layers, the last one for the rows that predict alone; [U, 1 + C * G, D] before the
        final norm.

        The scan ends before the last layer, and a slice of what it scans over would be a copy of
        all other layers.
        """
        remat = lambda f, **how: f  # noqa: E731
        if self.config.remat != "none":
            remat = functools.partial(jax.checkpoint, policy=_POLICIES[self.config.remat])
        stacked = {name: tree["layers"] for name, tree in self.variables.items()}
        read = jax.lax.stop_gradient(stacked)
        before = self.config.arch.L - 1

        def whole(x: jax.Array, layer: tuple[jax.Array, Any]) -> tuple[jax.Array, None]:
            i, slots = layer
            weights = jax.tree.map(lambda stack, slot: _layer_of(stack, i, slot), read, slots)
            return block.apply(weights, x, position_UxT, lengths)

        def last(x: jax.Array, layer: Any) -> jax.Array:
            return block.apply(layer, x, position_UxT, lengths, method="predict")

        with jax.named_scope("layers"):
            scanned = jnp.arange(before), jax.tree.map(lambda a: a[:before], stacked)
            x, _ = jax.lax.scan(remat(whole, prevent_cse=False), x_UxTxD, scanned)
            return remat(last)(x, jax.tree.map(lambda a: a[before], stacked))


@jax.custom_vjp
def _layer_of(stack: jax.Array, i: jax.Array, slot: jax.Array) -> jax.Array:
    """Layer i of stacked weights, read where it lies. Its gradient is that of `slot`, the same
    layer as a scan's own
    argument: never read, it is never made, but a scan puts gradients of such arguments into one
    stack, where those of `stack` would be a sum of stacks.
    """
    del slot
    return jax.lax.dynamic_index_in_dim(stack, i, keepdims=False)


_layer_of.defvjp(
    lambda stack, i, slot: (_layer_of(stack, i, slot), None),
    lambda _, d_layer: (None, None, d_layer),
)


def init_variables(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Random `{"params": ...}`, with `"lora"` at rank > 0 (B is zero, so a fresh adapter changes
    nothing).
    """
    ids, length = jnp.zeros((1, 1), jnp.int32), jnp.ones((1,), jnp.int32)
    return dict(Transformer(config).init(key, ids, length, None))


def head_kernel(config: ModelConfig, params: dict[str, Any]) -> jax.Array:
    """[D, V]: the output projection, which is the embedding transposed where they are tied."""
    return params["embed"].T if config.arch.tied else params["head"]
