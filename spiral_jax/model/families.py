"""The table of model families: what a `model_type` of transformers computes, a row each."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Family:
    """One row. All families are decoders of RMS norms, rope and gated SiLU feed-forward layers.

    Attributes:
      model_type: its name in config.json.
      writes: transformers' class, which config.json names too.
      qk_norm: queries and keys are normalised per head, before rope.
      implied: fields of config.json that may be absent, as sizes that others imply.
      unstated: (field, value) of others that may be absent, with the value that they then have.
      states: (field, value) of others that we write, each with the one value that we support.
    """

    model_type: str
    writes: str
    qk_norm: bool = False
    implied: tuple[str, ...] = ()
    unstated: tuple[tuple[str, Any], ...] = ()
    states: tuple[tuple[str, Any], ...] = ()


_ROWS = (
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        qk_norm=True,
        states=(("attention_bias", False), ("use_sliding_window", False)),
    ),
    Family(
        "llama",
        "LlamaForCausalLM",
        # Files from before grouped queries and tying say nothing of either.
        implied=("head_dim", "num_key_value_heads"),
        unstated=(("tie_word_embeddings", False), ("rope_theta", 10_000.0)),
        states=(("attention_bias", False), ("mlp_bias", False)),
    ),
)
FAMILIES = {row.model_type: row for row in _ROWS}
