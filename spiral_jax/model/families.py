"""The table of model families: what a `model_type` of transformers computes, a row each."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Routing:
    """Which of a layer's experts a token passes.

    Attributes:
      experts: X, in each layer.
      chosen: Y, the most likely ones, which each token passes.
      normalised: their shares sum to 1, instead of being those of all experts.
    """

    experts: int
    chosen: int
    normalised: bool


@dataclasses.dataclass(frozen=True)
class Family:
    """One row. All families are decoders of RMS norms, rope and gated SiLU feed-forward layers.

    Attributes:
      model_type: its name in config.json.
      writes: transformers' class, which config.json names too.
      qk_norm: queries and keys are normalised per head, before rope.
      biases: projections that add one.
      skips_rope: config.json says which layers have no rope.
      routed: each feed-forward layer is one of experts.
      implied: fields of config.json that may be absent, as sizes that others imply.
      unstated: (field, value) of others that may be absent, with the value that they then have.
      states: (field, value) of others that we write, each with the one value that we support.
      must_state: those of them whose absence means a value that we do not support.
      ignores: fields that the family's code does not read, whatever they mean elsewhere.
    """

    model_type: str
    writes: str
    qk_norm: bool = False
    biases: tuple[str, ...] = ()
    skips_rope: bool = False
    routed: bool = False
    implied: tuple[str, ...] = ()
    unstated: tuple[tuple[str, Any], ...] = ()
    states: tuple[tuple[str, Any], ...] = ()
    must_state: tuple[str, ...] = ()
    ignores: tuple[str, ...] = ()


_NO_BIAS = (("attention_bias", False), ("mlp_bias", False))
_NO_WINDOW = (("use_sliding_window", False),)
_ROWS = (
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        qk_norm=True,
        states=(("attention_bias", False), *_NO_WINDOW),
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        biases=("q", "k", "v"),
        implied=("head_dim",),
        states=_NO_WINDOW,
    ),
    Family(
        "llama",
        "LlamaForCausalLM",
        # Files from before grouped queries and tying say nothing of either.
        implied=("head_dim", "num_key_value_heads"),
        unstated=(("tie_word_embeddings", False), ("rope_theta", 10_000.0)),
        states=_NO_BIAS,
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        implied=("head_dim",),
        states=(("sliding_window", None),),
        must_state=("sliding_window",),
    ),
    Family(
        "smollm3",
        "SmolLM3ForCausalLM",
        skips_rope=True,
        implied=("head_dim",),
        unstated=(("tie_word_embeddings", True), ("no_rope_layer_interval", 4)),
        states=(*_NO_BIAS, *_NO_WINDOW),
        ignores=("pretraining_tp",),
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        qk_norm=True,
        routed=True,
        states=(
            ("attention_bias", False),
            *_NO_WINDOW,
            ("decoder_sparse_step", 1),
            ("mlp_only_layers", ()),
        ),
    ),
)
FAMILIES = {row.model_type: row for row in _ROWS}

# What families lack here that somebody may ask for.
MISSING = {
    "gemma2": "norms behind each part of a layer, soft caps, a window",
    "gemma3_text": "norms behind each part of a layer, GELU, a window",
    "gpt_oss": "attention sinks, a window, experts with biases",
    "mixtral": "its names of experts' weights",
    "olmo2": "norms behind each part of a layer, norms of all heads together",
    "olmo3": "norms behind each part of a layer, norms of all heads together, a window",
    "phi3": "projections that are stored as one",
    "qwen2_moe": "a shared expert",
    "qwen3_next": "linear attention (gated delta net)",
    "qwen3_5": "linear attention (gated delta net), text_config",
    "qwen3_5_text": "linear attention (gated delta net)",
}
