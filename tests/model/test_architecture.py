"""config.json is read in both spellings of transformers; what is not supported is an error."""

import dataclasses
import json
import math

import jax
import pytest

from spiral_jax.core.config import ConfigError
from spiral_jax.model.architecture import (
    Architecture,
    hf_fields,
    parse_architecture,
    read_architecture,
)
from spiral_jax.model.families import FAMILIES, Routing
from spiral_jax.model.transformer import ModelConfig, init_variables

# The config.json of Qwen3-4B-Instruct-2507, as transformers 4 wrote it.
FOUR_B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 9728,
    "max_position_embeddings": 262144,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
ARCH = Architecture(
    V=151936, D=2560, F=9728, L=36, H=32, J=8, E=128, norm_eps=1e-6, rope_theta=5e6, tied=True
)
# The config.json of SmolLM2-135M-Instruct.
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}
SMALL = Architecture(
    V=97, D=48, F=80, L=3, H=6, J=3, E=16, norm_eps=1e-3, rope_theta=777.0, tied=True
)
SMOLLM2_ARCH = Architecture(
    V=49152,
    D=576,
    F=1536,
    L=30,
    H=9,
    J=3,
    E=64,
    norm_eps=1e-5,
    rope_theta=1e5,
    tied=True,
    family=FAMILIES["llama"],
)
ABSENT = object()


def changed(**fields):
    return {name: value for name, value in (FOUR_B | fields).items() if value is not ABSENT}


NEW_SPELLING = changed(
    rope_theta=ABSENT,
    rope_scaling=ABSENT,
    torch_dtype=ABSENT,
    dtype="bfloat16",
    rope_parameters={"rope_theta": 5000000, "rope_type": "default"},
    layer_types=["full_attention"] * 36,
)


def test_both_spellings_are_the_same_architecture():
    assert parse_architecture(FOUR_B, "config.json") == ARCH
    assert parse_architecture(NEW_SPELLING, "config.json") == ARCH
    both = changed(rope_parameters={"rope_theta": 5e6, "rope_type": "default"})
    assert parse_architecture(both, "config.json") == ARCH


@pytest.mark.parametrize(
    "name, other, field",
    [
        ("vocab_size", 99, "V"),
        ("hidden_size", 99, "D"),
        ("intermediate_size", 99, "F"),
        ("num_hidden_layers", 99, "L"),
        ("num_attention_heads", 24, "H"),
        ("num_key_value_heads", 4, "J"),
        ("head_dim", 64, "E"),
        ("rms_norm_eps", 1e-3, "norm_eps"),
        ("rope_theta", 777, "rope_theta"),
        ("tie_word_embeddings", False, "tied"),
    ],
)
def test_each_field_sets_its_own_size_or_constant(name, other, field):
    expected = dataclasses.replace(ARCH, **{field: other})
    assert parse_architecture(changed(**{name: other}), "here") == expected


UNSUPPORTED = [
    ("rope_scaling", {"rope_type": "longrope", "factor": 4.0}),
    ("use_sliding_window", True),
    ("model_type", "gemma2"),
    ("model_type", "qwen2_moe"),
    ("model_type", ABSENT),
    ("model_type", ["qwen3"]),
    ("attention_bias", True),
    ("attention_dropout", 0.1),
    ("hidden_act", "gelu"),
    ("quantization_config", {"bits": 4}),
    ("layer_types", ["full_attention"] * 35 + ["sliding_attention"]),
    ("rope_parameters", {"rope_theta": 5e6, "rope_type": "dynamic", "factor": 4.0}),
    ("rope_theta", ABSENT),
    ("rms_norm_eps", "small"),
    ("rms_norm_eps", None),
    ("rms_norm_eps", -1e-6),
    ("rope_theta", "5e6"),
    ("rope_theta", 0),
    ("tie_word_embeddings", "false"),  # bool("false") is True
    ("vocab_size", True),
    ("hidden_size", 0),
    ("hidden_size", 2560.0),
    ("num_key_value_heads", 5),  # 32 query heads cannot share 5
    ("head_dim", 127),  # rope rotates halves
] + [
    (name, ABSENT)
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "tie_word_embeddings",
    )
]


@pytest.mark.parametrize("name, value", UNSUPPORTED)
def test_an_unsupported_or_missing_field_is_an_error_that_names_field_and_file(name, value):
    with pytest.raises(ConfigError, match=name) as error:
        parse_architecture(changed(**{name: value}), "models/x/config.json")
    assert "models/x/config.json" in str(error.value)
    if value is not ABSENT and name not in ("layer_types", "rope_parameters", "rope_scaling"):
        assert repr(value) in str(error.value) or "missing" in str(error.value)


def test_llama_is_qwen3_without_norms_of_heads_and_its_head_width_may_be_implied():
    assert parse_architecture(SMOLLM2, "config.json") == SMOLLM2_ARCH
    narrow = dataclasses.replace(SMOLLM2_ARCH, E=32)
    assert parse_architecture(SMOLLM2 | {"head_dim": 32}, "config.json") == narrow
    plain = SMOLLM2 | {"rope_scaling": {"type": "default"}}
    assert parse_architecture(plain, "config.json") == SMOLLM2_ARCH


def test_what_old_llama_files_leave_out_has_the_value_it_had():
    old = {
        "num_key_value_heads",
        "rope_theta",
        "tie_word_embeddings",
        "pretraining_tp",
        "mlp_bias",
        "attention_bias",
    }
    fields = {name: value for name, value in SMOLLM2.items() if name not in old}
    expected = dataclasses.replace(SMOLLM2_ARCH, J=9, rope_theta=1e4, tied=False)
    assert parse_architecture(fields, "config.json") == expected


UNSUPPORTED_LLAMA = [
    ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
    ("rope_scaling", {"type": "dynamic", "factor": 2.0}),
    ("rope_scaling", {"factor": 2.0}),
    ("rope_parameters", {"rope_theta": 1e5, "rope_type": "default", "partial_rotary_factor": 0.5}),
    ("rope_parameters", "yarn"),
    ("rope_interleaved", True),
    ("attention_bias", True),
    ("mlp_bias", True),
    ("pretraining_tp", 2),
    ("hidden_act", "gelu"),
    ("num_attention_heads", 7),  # does not divide 576, and head_dim is absent
]


@pytest.mark.parametrize("name, value", UNSUPPORTED_LLAMA)
def test_what_is_not_supported_of_llama_is_an_error_that_names_the_field(name, value):
    with pytest.raises(ConfigError, match=f"here: .*{name}"):
        parse_architecture(SMOLLM2 | {name: value}, "here")


def test_a_rope_theta_that_contradicts_itself_is_an_error_with_both_values():
    fields = changed(rope_parameters={"rope_theta": 1e4, "rope_type": "default"})
    with pytest.raises(ConfigError, match=r"rope_theta.*10000\.0.*5000000\.0"):
        parse_architecture(fields, "config.json")


def test_a_misspelt_field_is_met_with_the_right_one():
    with pytest.raises(ConfigError, match="head_dim is missing.*'head_dims'"):
        parse_architecture(changed(head_dim=ABSENT, head_dims=128), "config.json")


def test_a_window_that_is_not_used_is_ignored():
    unused = changed(sliding_window=4096, max_window_layers=10)
    assert parse_architecture(unused, "config.json") == ARCH


def test_a_file_is_read_and_a_missing_or_corrupt_one_is_an_error_with_its_path(tmp_path):
    file = tmp_path / "config.json"
    with pytest.raises(ConfigError, match=f"{tmp_path}.*no config.json"):
        read_architecture(tmp_path)
    file.write_text(json.dumps(FOUR_B))
    assert read_architecture(tmp_path) == ARCH
    for content in (b"", json.dumps(FOUR_B).encode()[:-1], b"\xff\xfe", b"[]", b"null"):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=f"{file}: not valid JSON"):
            read_architecture(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_what_we_write_is_read_back(tied, family):
    routing = Routing(5, 2, True) if family.routed else None
    arch = dataclasses.replace(SMALL, tied=tied, family=family, routing=routing)
    fields = json.loads(json.dumps(hf_fields(arch, (5, 6))))
    assert parse_architecture(fields, "config.json") == arch
    assert fields["eos_token_id"] == [5, 6]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_the_number_of_parameters_is_that_of_the_initialised_tree(tied, family):
    routing = Routing(5, 2, True) if family.routed else None
    arch = dataclasses.replace(SMALL, tied=tied, family=family, routing=routing)
    tree = jax.eval_shape(lambda: init_variables(ModelConfig(arch), jax.random.key(0)))["params"]
    assert arch.parameters == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
