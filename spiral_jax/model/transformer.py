"""Decoders in Flax Linen, purely functional: used by `init` and `apply` alone.

Collections: `params` (the base, or what full fine-tuning trains) and `lora` (adapters; absent at
rank 0). Both hold `layers`, the first L - 1 layers stacked (absent where L = 1), and `last_layer`:
nobody reads more of a prompt in the last layer than keys, values and what its last token predicts,
so training computes no more of it there.

Training scans over the stacked layers. The sampler applies one `DecoderLayer` after the other on
separate arrays (`trees.unstack_layers`) and keeps the cache, which is explicit.

A base in int8 is held once for both, as the sampler wants it: its `layers` are L - 1 trees of
separate arrays, of which training takes one after the other. A sampler that sliced stacked ones
would write each of them in the compute dtype, for every token, before it multiplied with it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from spiral_jax.core.mesh import constrain_groups
from spiral_jax.model import layouts
from spiral_jax.model.architecture import Architecture
from spiral_jax.model.attention.backends import XLA, make_backend
from spiral_jax.model.attention.groups import (
    KEPT,
    Backend,
    last_token_attention,
    prompt_attention,
    trace_attention,
)
from spiral_jax.model.attention.part import KeyValue, Lengths
from spiral_jax.model.experts import Experts
from spiral_jax.model.linear import (
    INNER,
    PROJECTED,
    JoinedLinear,
    Linear,
    joint_linear,
)
from spiral_jax.model.rope import rope
from spiral_jax.model.trees import GATE_UP, QKV, zeros_in_int8


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What the program needs to know beside the arrays.

    Attributes:
      arch: sizes and constants of the checkpoint.
      param_dtype: of `params`; adapters are always float32. int8: of the projections' matrices,
        which have scales (`int8.py`), and `float_dtype` of the rest; without experts.
      compute_dtype: of activations and caches; norms, rope and softmax are float32.
      lora_rank: 0 = no adapters.
      lora_alpha: adapters are scaled by alpha / rank.
      lora_experts: experts have adapters too, each of its own.
      attention: which backend computes attention, one of `backends.BACKENDS`.
      pages: which one the sampler reads and writes its pages with.
      attention_block: queries, and keys, whose scores exist at once in training where the backend
        is xla.
      remat: what the backward pass keeps of each layer, one of `config.REMAT`; it computes the rest
        once more.
      joined: how many parts the mesh axis `tensor` has, where projections of the same input are one
        matrix, as decoding reads them (`trees.join_projections`); 0: each is its own, as trained.
    """

    arch: Architecture
    param_dtype: Any = jnp.float32
    compute_dtype: Any = jnp.float32
    lora_rank: int = 0
    lora_alpha: float = 1.0
    lora_experts: bool = False
    attention: str = XLA
    pages: str = XLA
    attention_block: int = 512
    remat: str = "layer"
    joined: int = 0

    @property
    def quantised(self) -> bool:
        """Whether the base is in int8."""
        return jnp.dtype(self.param_dtype) == jnp.int8

    @property
    def float_dtype(self) -> Any:
        """Of all `params` but matrices in int8."""
        return self.compute_dtype if self.quantised else self.param_dtype


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis in float32, returned in x's dtype."""
    y = layouts.merged_leading_axes(x).astype(jnp.float32)
    y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * scale.astype(jnp.float32)).astype(x.dtype).reshape(x.shape)


class DecoderLayer(nn.Module):
    """One layer: `__call__` and `predict` run groups, `project` and `finish` surround attention.

    The sampler calls `project`, attends to its cache, and calls `finish`.

    Attributes:
      prompt_tokens: P of the rows that `__call__` and `predict` get.
      traces: C.
    """

    config: ModelConfig
    prompt_tokens: int = 0
    traces: int = 0

    def setup(self) -> None:
        c, arch = self.config, self.config.arch

        def linear(name: str, width: int, features: int) -> Linear:
            has_bias = name in arch.family.biases
            return Linear(
                width, features, c.float_dtype, c.lora_rank, c.lora_alpha, has_bias, c.quantised
            )

        def norm_scale(name: str, width: int) -> jax.Array:
            return self.param(name, nn.initializers.ones, (width,), c.float_dtype)

        def joined(names: tuple[str, ...], features: tuple[int, ...]) -> JoinedLinear:
            rank, scale = len(names) * c.lora_rank, c.lora_alpha / max(1, c.lora_rank)
            has_bias = names[0] in arch.family.biases
            return JoinedLinear(arch.D, features, c.joined, c.param_dtype, rank, scale, has_bias)

        own = arch.J * arch.E
        if c.joined:
            self.qkv = joined(QKV, (arch.H * arch.E, own, own))
        else:
            self.q = linear("q", arch.D, arch.H * arch.E)
            self.k = linear("k", arch.D, own)
            self.v = linear("v", arch.D, own)
        self.o = linear("o", arch.H * arch.E, arch.D)

        if arch.routing:
            expert_rank = c.lora_rank if c.lora_experts else 0
            self.experts = Experts(arch, c.param_dtype, expert_rank, c.lora_alpha)
        elif c.joined:
            self.gate_up = joined(GATE_UP, (arch.F, arch.F))
        else:
            self.gate = linear("gate", arch.D, arch.F)
            self.up = linear("up", arch.D, arch.F)
        if not arch.routing:
            self.down = linear("down", arch.F, arch.D)

        self.attention_norm = norm_scale("attention_norm", arch.D)
        self.mlp_norm = norm_scale("mlp_norm", arch.D)
        if arch.family.qk_norm:
            self.q_norm = norm_scale("q_norm", arch.E)
            self.k_norm = norm_scale("k_norm", arch.E)

    def __call__(
        self, x_UxTxD: jax.Array, position_UxT: jax.Array, lengths: Lengths
    ) -> tuple[jax.Array, None]:
        """Rows of T = P + C * G tokens: the prompt, then its traces one after the other.

        Returns (x, nothing), as a scan asks.
        """
        P = self.prompt_tokens
        x = constrain_groups(x_UxTxD)
        q, k, v = self.project(x, position_UxT)
        attended = prompt_attention(
            self._backend(), q[:, :P], KeyValue(k[:, :P], v[:, :P]), lengths
        )
        if self.traces:
            of_traces = self._attend_from_traces(q[:, P:], k, v, lengths)
            attended = jnp.concatenate([attended, of_traces], axis=1)
        return self.finish(x, attended), None

    def predict(self, x_UxTxD: jax.Array, position_UxT: jax.Array, lengths: Lengths) -> jax.Array:
        """As the last layer: [U, 1 + C * G, D] of the rows that predict a trace's token.

        Those are the prompt's last one, then all of the traces. Takes what `__call__` takes.
        """
        P = self.prompt_tokens
        x = constrain_groups(x_UxTxD)
        h = self._norm_before_attention(x)
        k, v = self._keys_values(*joint_linear(h, self.k, self.v), position_UxT)

        last_U = (lengths.prompt_U - 1)[:, None, None]
        x = jnp.concatenate([jnp.take_along_axis(x, last_U, 1), x[:, P:]], axis=1)
        h = jnp.concatenate([jnp.take_along_axis(h, last_U, 1), h[:, P:]], axis=1)
        last = jnp.take_along_axis(position_UxT, last_U[..., 0], 1)
        position = jnp.concatenate([last, position_UxT[:, P:]], axis=1)
        q = self._queries(self.q(h), position)

        prompt = KeyValue(k[:, :P], v[:, :P])
        of_last = last_token_attention(q[:, 0], prompt, lengths.prompt_U)
        of_traces = self._attend_from_traces(q[:, 1:], k, v, lengths)
        return self.finish(x, jnp.concatenate([of_last[:, None], of_traces], axis=1))

    def project(self, x: jax.Array, position: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [..., D] at `position` [...] -> q [..., H, E], k and v [..., J, E]."""
        h = self._norm_before_attention(x)
        if self.config.joined:
            q, k, v = self.qkv(h)
        else:
            q, k, v = joint_linear(h, self.q, self.k, self.v)
        return self._queries(q, position), *self._keys_values(k, v, position)

    def finish(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """Residual of attention output [..., H, E], then the feed-forward part."""
        x += self.o(attended.reshape(*x.shape[:-1], -1))
        h = rms_norm(x, self.mlp_norm, self.config.arch.norm_eps)
        with jax.named_scope("mlp"):
            if self.config.arch.routing:
                return x + self.experts(h)
            if self.config.joined:
                gate, up = self.gate_up(h)
            else:
                gate, up = joint_linear(h, self.gate, self.up)
            return x + self.down(nn.silu(gate) * up)

    def _norm_before_attention(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.attention_norm, self.config.arch.norm_eps)

    def _queries(self, projected: jax.Array, position: jax.Array) -> jax.Array:
        arch = self.config.arch
        q = self._split_heads(projected)
        if arch.family.qk_norm:
            q = rms_norm(q, self.q_norm, arch.norm_eps)
        return rope(q, position, arch.rope_theta, arch.rope_scaling)

    def _keys_values(
        self, projected_k: jax.Array, projected_v: jax.Array, position: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        arch = self.config.arch
        k, v = self._split_heads(projected_k), self._split_heads(projected_v)
        if arch.family.qk_norm:
            k = rms_norm(k, self.k_norm, arch.norm_eps)
        return rope(k, position, arch.rope_theta, arch.rope_scaling), v

    def _split_heads(self, projected: jax.Array) -> jax.Array:
        return projected.reshape(*projected.shape[:-1], -1, self.config.arch.E)

    def _attend_from_traces(
        self, q: jax.Array, k: jax.Array, v: jax.Array, lengths: Lengths
    ) -> jax.Array:
        """[U, C * G, H, E] for the traces' queries, which are as many; k and v are of all rows."""
        P = self.prompt_tokens

        def by_trace(a: jax.Array) -> jax.Array:
            return a.reshape(a.shape[0], self.traces, -1, *a.shape[2:])

        prompt = KeyValue(k[:, :P], v[:, :P])
        own = KeyValue(by_trace(k[:, P:]), by_trace(v[:, P:]))
        attended = trace_attention(self._backend(), by_trace(q), prompt, own, lengths)
        return attended.reshape(q.shape)

    def _backend(self) -> Backend:
        return make_backend(self.config.attention, self.config.attention_block)


# What a policy of `config.REMAT` keeps of a layer beside its input; "none" keeps everything.
_POLICIES = {
    "dots": jax.checkpoint_policies.save_only_these_names(KEPT, INNER, PROJECTED),
    "attention": jax.checkpoint_policies.save_only_these_names(KEPT, INNER),
    "layer": jax.checkpoint_policies.nothing_saveable,
}


def _rematerialised(remat: str, method: str, in_scan: bool) -> type[DecoderLayer]:
    """`DecoderLayer`, of whose `method` the backward pass keeps what `remat` says."""
    if remat == "none":
        return DecoderLayer
    # In a scan nothing can be shared between forward and backward pass that would undo it.
    return nn.remat(
        DecoderLayer, policy=_POLICIES[remat], prevent_cse=not in_scan, methods=[method]
    )


class Transformer(nn.Module):
    """Embedding, layers, final norm. The head is applied where it is needed: see `head_kernel`."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        prompt_UxP: jax.Array,
        prompt_len_U: jax.Array,
        trace_UxCxG: jax.Array | None,
        trace_len_UxC: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states after the final norm, of groups [U, 1 + C * G, D] or of prompts [U, P, D].

        A group's are those that predict its traces: of the prompt's last token, then of each trace.
        A trace starts at `prompt_len`. States behind the longest prompt, and in traces behind the
        longest trace (None: G), have no meaning.
        """
        c, arch = self.config, self.config.arch
        P, C = prompt_UxP.shape[1], 0 if trace_UxCxG is None else trace_UxCxG.shape[1]
        embed = self.param("embed", nn.initializers.normal(0.02), (arch.V, arch.D), c.float_dtype)
        if not arch.tied:
            self.param("head", nn.initializers.normal(0.02), (arch.D, arch.V), c.float_dtype)

        ids_UxT, position_UxT = _rows_of_groups(prompt_UxP, prompt_len_U, trace_UxCxG)
        last_position_UxT = rope_position(arch, arch.L - 1, position_UxT)
        lengths = _lengths(prompt_len_U, trace_UxCxG, trace_len_UxC)
        x = embed[ids_UxT].astype(c.compute_dtype)

        if arch.L > 1 and c.quantised:
            x = self._run_separate_layers(x, position_UxT, lengths, P, C)
        elif arch.L > 1:
            layers = nn.scan(
                _rematerialised(c.remat, "__call__", in_scan=True),
                variable_axes={"params": 0, "lora": 0},
                split_rngs={"params": True},
                in_axes=(0 if arch.unrotated else nn.broadcast, nn.broadcast),
                length=arch.L - 1,
                check_constancy_invariants=False,  # would trace the layer twice
            )
            if arch.unrotated:
                of_layers = [rope_position(arch, i, position_UxT) for i in range(arch.L - 1)]
                position_UxT = jnp.stack(of_layers)
            x, _ = layers(c, P, C, name="layers")(x, position_UxT, lengths)

        if C:
            last_layer = _rematerialised(c.remat, "predict", in_scan=False)
            x = last_layer(c, P, C, name="last_layer").predict(x, last_position_UxT, lengths)
            # Else the backward pass gathers every group's cotangent, to spare itself the weights.
            x = constrain_groups(x)
        else:
            x, _ = DecoderLayer(c, P, name="last_layer")(x, last_position_UxT, lengths)

        norm = self.param("final_norm", nn.initializers.ones, (arch.D,), c.float_dtype)
        return rms_norm(x, norm, arch.norm_eps)

    def _run_separate_layers(
        self, x_UxTxD: jax.Array, position_UxT: jax.Array, lengths: Lengths, P: int, C: int
    ) -> jax.Array:
        """All layers but the last, where each one's parameters are arrays of their own.

        A pass of the loop copies those of its layer: of one at a time.
        """
        c, arch = self.config, self.config.arch
        params = self.get_variable("params", "layers")
        choices = [lambda layers, i=i: layers[i] for i in range(arch.L - 1)]
        adapters = {"lora": self.get_variable("lora", "layers")} if c.lora_rank else {}
        rotated = jnp.array([i not in arch.unrotated for i in range(arch.L - 1)], jnp.int32)
        layer = DecoderLayer(c, P, C, parent=None)

        def run(x: jax.Array, of_layer: tuple[jax.Array, Any, jax.Array]) -> tuple[jax.Array, None]:
            i, own_adapters, is_rotated = of_layer
            own_params = jax.lax.switch(i, choices, params)
            own = {"params": own_params, **own_adapters}
            return layer.apply(own, x, is_rotated * position_UxT, lengths)

        if c.remat != "none":
            run = jax.checkpoint(run, policy=_POLICIES[c.remat], prevent_cse=False)
        x, _ = jax.lax.scan(run, x_UxTxD, (jnp.arange(arch.L - 1), adapters, rotated))
        return x


def rope_position(arch: Architecture, layer: int, position: jax.Array) -> jax.Array:
    """`position`, or zeros for a layer without rope: at position 0 nothing is rotated."""
    return jnp.zeros_like(position) if layer in arch.unrotated else position


def _rows_of_groups(
    prompt_UxP: jax.Array, prompt_len_U: jax.Array, trace_UxCxG: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Ids and positions [U, P + C * G]: the prompt, then its traces one after the other."""
    U, P = prompt_UxP.shape
    in_prompt_UxP = jnp.broadcast_to(jnp.arange(P), (U, P))
    if trace_UxCxG is None:
        return prompt_UxP, in_prompt_UxP
    G = trace_UxCxG.shape[2]
    in_trace_UxCxG = prompt_len_U[:, None, None] + jnp.broadcast_to(
        jnp.arange(G), trace_UxCxG.shape
    )
    ids = jnp.concatenate([prompt_UxP, trace_UxCxG.reshape(U, -1)], axis=1)
    return ids, jnp.concatenate([in_prompt_UxP, in_trace_UxCxG.reshape(U, -1)], axis=1)


def _lengths(
    prompt_len_U: jax.Array, trace_UxCxG: jax.Array | None, trace_len_UxC: jax.Array | None
) -> Lengths:
    if trace_UxCxG is None:
        trace_len_UxC = jnp.zeros((len(prompt_len_U), 0), jnp.int32)
        longest_trace = jnp.int32(0)
    elif trace_len_UxC is None:
        U, C, G = trace_UxCxG.shape
        trace_len_UxC, longest_trace = jnp.full((U, C), G, jnp.int32), jnp.int32(G)
    else:
        longest_trace = jnp.max(trace_len_UxC)
    return Lengths(prompt_len_U, trace_len_UxC, jnp.max(prompt_len_U), longest_trace)


def init_variables(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Random `{"params": ...}`, with `"lora"` at rank > 0, which changes nothing yet.

    The matrices of a base in int8 are zeros.
    """
    if config.quantised:
        floats = dataclasses.replace(config, param_dtype=config.compute_dtype)
        variables = init_variables(floats, key)
        return variables | {"params": zeros_in_int8(variables["params"], config.arch.L)}
    ids, length = jnp.zeros((1, 1), jnp.int32), jnp.ones((1,), jnp.int32)
    return dict(Transformer(config).init(key, ids, length, None))


def head_kernel(config: ModelConfig, params: dict[str, Any]) -> jax.Array:
    """[D, V]: the output projection, which is the embedding transposed where they are tied."""
    return params["embed"].T if config.arch.tied else params["head"]
