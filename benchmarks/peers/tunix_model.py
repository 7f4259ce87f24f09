"""The benchmarks' model as tunix describes it."""

from __future__ import annotations

import json
import pathlib

from tunix.models.qwen3.model import ModelConfig


def read_config(model: str) -> ModelConfig:
    """Of a Hugging Face directory."""
    fields = json.loads((pathlib.Path(model) / "config.json").read_text())
    return ModelConfig(
        num_layers=fields["num_hidden_layers"],
        vocab_size=fields["vocab_size"],
        embed_dim=fields["hidden_size"],
        hidden_dim=fields["intermediate_size"],
        num_heads=fields["num_attention_heads"],
        head_dim=fields["head_dim"],
        num_kv_heads=fields["num_key_value_heads"],
        rope_theta=int(fields["rope_theta"]),
        norm_eps=fields["rms_norm_eps"],
        use_tied_embedding=fields["tie_word_embeddings"],
    )
