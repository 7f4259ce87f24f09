"""config.json of published models of every family, and what of them is refused by name."""

import dataclasses
import json
import pathlib

import jax
import pytest

import spiral_jax
from spiral_jax.core.config import ConfigError
from spiral_jax.model.adapter import abstract_lora
from spiral_jax.model.architecture import Architecture, hf_fields, parse_architecture
from spiral_jax.model.families import FAMILIES, MISSING, Routing
from spiral_jax.model.flops import adapter_weights, linear_weights
from spiral_jax.model.rope import Llama3, Yarn
from spiral_jax.model.transformer import ModelConfig

SHIPPED = pathlib.Path(spiral_jax.__file__).parent / "assets" / "architectures"


def shipped(name):
    return json.loads((SHIPPED / name / "config.json").read_text())


QWEN25 = shipped("Qwen2.5-1.5B-Instruct")
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 32768,
}
# As transformers 4 wrote it: without tie_word_embeddings, whose default is true for this family.
SMOLLM3 = {
    "architectures": ["SmolLM3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": 128012,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "layer_types": ["full_attention"] * 36,
    "max_position_embeddings": 65536,
    "max_window_layers": 28,
    "mlp_bias": False,
    "model_type": "smollm3",
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 4,
    "pad_token_id": 128004,
    "pretraining_tp": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "use_cache": False,
    "use_sliding_window": False,
    "vocab_size": 128256,
}
QWEN3_MOE = shipped("Qwen3-30B-A3B-Instruct-2507")
PUBLISHED = {"qwen2": QWEN25, "mistral": MISTRAL, "smollm3": SMOLLM3, "qwen3_moe": QWEN3_MOE}


def test_qwen25_has_biases_and_the_published_number_of_parameters():
    arch = parse_architecture(QWEN25, "here")
    assert arch == Architecture(
        V=151936,
        D=1536,
        F=8960,
        L=28,
        H=12,
        J=2,
        E=128,
        norm_eps=1e-6,
        rope_theta=1e6,
        tied=True,
        family=FAMILIES["qwen2"],
    )
    assert arch.family.biases == ("q", "k", "v") and not arch.family.qk_norm
    assert arch.parameters == 1_543_714_304


def test_llama_32_has_scaled_rope_and_the_published_number_of_parameters():
    arch = parse_architecture(shipped("Llama-3.2-1B-Instruct"), "here")
    assert arch.rope_scaling == Llama3(32.0, 1.0, 4.0, 8192)
    assert arch.parameters == 1_235_814_400


def test_qwen3_moe_has_experts_and_the_published_numbers_of_parameters():
    arch = parse_architecture(QWEN3_MOE, "here")
    assert arch.routing == Routing(experts=128, chosen=8, normalised=True) and arch.F == 768
    assert arch.parameters == 30_532_122_624
    # "3.3B activated" (its card): the matrices that a token passes, the head and the embedding
    activated = arch.L * linear_weights(arch) + 2 * arch.V * arch.D
    assert 3.3e9 <= activated < 3.4e9
    attention = 32 * (2 * (2048 + 4096) + 2 * (2048 + 512))
    assert adapter_weights(arch, 32) == attention
    lora = abstract_lora(ModelConfig(arch, lora_rank=32, lora_experts=True))
    assert sum(leaf.size for leaf in jax.tree.leaves(lora)) == 48 * attention + 1_660_944_384


def test_mistral_and_smollm3_have_the_published_numbers_of_parameters():
    assert parse_architecture(MISTRAL, "here").parameters == 7_248_023_552
    arch = parse_architecture(SMOLLM3, "here")
    assert arch.parameters == 3_075_098_624 and arch.tied
    assert arch.unrotated == tuple(range(3, 36, 4))
    by_interval = {name: v for name, v in SMOLLM3.items() if name != "no_rope_layers"}
    assert parse_architecture(by_interval, "here") == arch
    del by_interval["no_rope_layer_interval"]
    assert parse_architecture(by_interval, "here") == arch


def test_yarn_as_qwens_cards_say_it():
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    arch = parse_architecture(QWEN25 | {"rope_scaling": yarn}, "here")
    assert dataclasses.replace(arch, rope_scaling=None) == parse_architecture(QWEN25, "here")
    assert arch.rope_scaling == Yarn(4.0, 32768, pytest.approx(1.1386294361119891))


REFUSED = [
    ("qwen2", "use_sliding_window", True),
    ("qwen2", "layer_types", ["full_attention"] * 27 + ["sliding_attention"]),
    ("mistral", "sliding_window", 4096),
    ("mistral", "hidden_act", "gelu"),
    ("smollm3", "attention_bias", True),
    ("smollm3", "use_sliding_window", True),
    ("smollm3", "no_rope_layers", [1, 1, 1, 0]),
    ("smollm3", "no_rope_layers", [1, 1, 1, 2] * 9),
    ("smollm3", "rope_scaling", {"rope_type": "yarn", "factor": 2.0}),
    ("qwen3_moe", "decoder_sparse_step", 2),
    ("qwen3_moe", "mlp_only_layers", [0]),
    ("qwen3_moe", "num_experts", 4),  # fewer than num_experts_per_tok
    ("qwen3_moe", "num_experts_per_tok", None),
    ("qwen3_moe", "norm_topk_prob", 1),
    ("qwen3_moe", "moe_intermediate_size", 0),
]


@pytest.mark.parametrize("family, name, value", REFUSED)
def test_what_is_not_supported_is_an_error_that_names_it(family, name, value):
    named = "yarn" if name == "rope_scaling" else name
    with pytest.raises(ConfigError, match=f"here: .*{named}"):
        parse_architecture(PUBLISHED[family] | {name: value}, "here")


def test_a_window_that_mistral_has_by_default_is_refused():
    fields = {name: value for name, value in MISTRAL.items() if name != "sliding_window"}
    with pytest.raises(ConfigError, match="here: sliding_window is missing.*must be null"):
        parse_architecture(fields, "here")


@pytest.mark.parametrize("kind", MISSING)
def test_another_family_is_met_with_those_that_there_are_and_what_it_lacks(kind):
    with pytest.raises(ConfigError) as error:
        parse_architecture(QWEN25 | {"model_type": kind}, "here")
    assert all(name in str(error.value) for name in (kind, *FAMILIES))
    assert MISSING[kind] in str(error.value)


@pytest.mark.parametrize("family", PUBLISHED)
def test_what_we_write_is_read_back(family):
    arch = parse_architecture(PUBLISHED[family], "here")
    written = json.loads(json.dumps(hf_fields(arch, (5,))))
    assert parse_architecture(written, "here") == arch
