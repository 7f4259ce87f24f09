"""Qwen3 and Llama in Flax Linen, purely functional: modules used by `init` and `apply`, the cache explicit.

Collections: `params` (the base, or what full fine-tuning trains) and `lora` (adapters; absent at rank 0). Training
scans over stacked layers; the sampler applies one `Block` per layer on separate per-layer arrays (slicing stacked
weights inside a loop would copy all of them).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from spiral_jax.mesh import constrain_groups
from spiral_jax.model.architecture import Architecture
from spiral_jax.model.group_attention import KEPT, Lengths, prompt_attention, trace_attention


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What the program needs to know beside the arrays.

    Attributes:
      arch: sizes and constants of the checkpoint.
      param_dtype: of `params`; adapters are always float32.
      compute_dtype: of activations and caches; norms, rope and softmax are float32.
      lora_rank: 0 = no adapters.
      lora_alpha: adapters are scaled by alpha / rank.
      attention_block: queries, and keys, whose scores exist at once in training (see `group_attention`).
      remat: what the backward pass keeps of each layer, one of `config.REMAT`; it computes the rest once more.
    """

    arch: Architecture
    param_dtype: Any = jnp.float32
    compute_dtype: Any = jnp.float32
    lora_rank: int = 0
    lora_alpha: float = 1.0
    attention_block: int = 512
    remat: str = "layer"


_PROJECTED = "projected"  # the name of what a `Linear` returns, for policies of `jax.checkpoint`
# What a policy of `config.REMAT` keeps of a layer beside its input.
_POLICIES = {
    "dots": jax.checkpoint_policies.save_only_these_names(KEPT, _PROJECTED),
    "attention": jax.checkpoint_policies.save_only_these_names(KEPT),
    "layer": jax.checkpoint_policies.nothing_saveable,
}


class Linear(nn.Module):
    """x W, plus (alpha / rank) x A B where the `lora` collection has the layer's adapter (LoRA, arXiv 2106.09685).

    Tokens are rows of a matrix: to sum a gradient over two axes, XLA's CPU backend would transpose x or its cotangent.
    """

    config: ModelConfig
    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, width = self.config, x.shape[-1]
        kernel = self.param("kernel", nn.initializers.normal(0.02), (width, self.features), c.param_dtype)
        rows = x.reshape(-1, width)
        y = rows @ kernel.astype(x.dtype)
        if c.lora_rank:
            init_a = nn.initializers.normal(width**-0.5)
            a = self.variable("lora", "a", lambda: init_a(self.make_rng("params"), (width, c.lora_rank), jnp.float32))
            b = self.variable("lora", "b", jnp.zeros, (c.lora_rank, self.features), jnp.float32)
            y += (c.lora_alpha / c.lora_rank) * ((rows @ a.value.astype(x.dtype)) @ b.value.astype(x.dtype))
        return checkpoint_name(y, _PROJECTED).reshape(*x.shape[:-1], self.features)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis in float32, returned in x's dtype."""
    y = x.astype(jnp.float32)
    y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * scale.astype(jnp.float32)).astype(x.dtype)


def rope(x: jax.Array, position: jax.Array, theta: float) -> jax.Array:
    """Rotary embedding, halves rotated against each other. x [..., heads, E], position [...] int32."""
    half = x.shape[-1] // 2
    angle = position[..., None, None].astype(jnp.float32) * theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(
        [a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], axis=-1
    ).astype(x.dtype)


class Block(nn.Module):
    """One layer. `__call__` runs whole groups; the sampler puts its own attention between `project` and `finish`."""

    config: ModelConfig
    prompt_tokens: int = 0  # P of the rows that `__call__` gets
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
        arch = self.config.arch
        h = rms_norm(x, self.attention_norm, arch.norm_eps)
        q, k, v = (linear(h).reshape(*x.shape[:-1], -1, arch.E) for linear in (self.q, self.k, self.v))
        if arch.qk_norm:
            q, k = rms_norm(q, self.q_norm, arch.norm_eps), rms_norm(k, self.k_norm, arch.norm_eps)
        return rope(q, position, arch.rope_theta), rope(k, position, arch.rope_theta), v

    def finish(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """Residual of attention output [..., H, E], then the feed-forward part."""
        x += self.o(attended.reshape(*x.shape[:-1], -1))
        h = rms_norm(x, self.mlp_norm, self.config.arch.norm_eps)
        with jax.named_scope("mlp"):
            return x + self.down(nn.silu(self.gate(h)) * self.up(h))

    def __call__(self, x_UxTxD: jax.Array, position_UxT: jax.Array, lengths: Lengths) -> tuple[jax.Array, None]:
        """Rows of T = P + C * G tokens: the prompt, then its traces one after the other. (x, nothing), as scan asks."""
        P, C, block = self.prompt_tokens, self.traces, self.config.attention_block
        U, T, _ = x_UxTxD.shape
        x = constrain_groups(x_UxTxD)
        q, k, v = self.project(x, position_UxT)
        out = prompt_attention(q[:, :P], k[:, :P], v[:, :P], lengths, block)
        if C:
            G = (T - P) // C
            own_q, own_k, own_v = (a[:, P:].reshape(U, C, G, *a.shape[2:]) for a in (q, k, v))
            of_traces = trace_attention(own_q, (k[:, :P], v[:, :P]), (own_k, own_v), lengths, block)
            out = jnp.concatenate([out, of_traces.reshape(U, C * G, *out.shape[2:])], axis=1)
        return self.finish(x, out), None


class Transformer(nn.Module):
    """Embedding, stacked layers, final norm. The head is applied where it is needed: see `head_kernel`."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        prompt_UxP: jax.Array,
        prompt_len_U: jax.Array,
        trace_UxCxG: jax.Array | None,
        trace_len_UxC: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states [U, T, D] of groups after the final norm, T = P + C * G; a trace starts at `prompt_len`.

        They have no meaning behind the longest prompt, and in traces behind the longest trace (None: G).
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
        layers = nn.scan(
            Block if c.remat == "none" else nn.remat(Block, prevent_cse=False, policy=_POLICIES[c.remat]),
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=arch.L,
        )
        longest_trace = jnp.int32(G) if trace_len_UxC is None else jnp.max(trace_len_UxC)
        lengths = Lengths(prompt_len_U, jnp.max(prompt_len_U), longest_trace)
        x, _ = layers(c, P, C, name="layers")(x, position, lengths)
        norm = self.param("final_norm", nn.initializers.ones, (arch.D,), c.param_dtype)
        return rms_norm(x, norm, arch.norm_eps)


def init_variables(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Random `{"params": ...}`, with `"lora"` at rank > 0 (B is zero, so a fresh adapter changes nothing)."""
    ids, length = jnp.zeros((1, 1), jnp.int32), jnp.ones((1,), jnp.int32)
    return dict(Transformer(config).init(key, ids, length, None))


def head_kernel(config: ModelConfig, params: dict[str, Any]) -> jax.Array:
    """[D, V]: the output projection, which is the embedding transposed where they are tied."""
    return params["embed"].T if config.arch.tied else params["head"]
