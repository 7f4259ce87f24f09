"""Adapters of experts in files: what PEFT writes of them, fused, and what we write."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks import family_cases as cases
from spiral_jax.core.config import ConfigError, defaults
from spiral_jax.model import hf
from spiral_jax.model.adapter import abstract_lora, check_adapter, load_adapter, save_adapter
from spiral_jax.model.architecture import read_architecture
from spiral_jax.model.tensor_files import WeightsError
from spiral_jax.model.transformer import ModelConfig
from spiral_jax.model.trees import unstack_layers

ROUNDED = 1e-6  # float32 sums of four products in another order, of order 0.1
GATE_UP = ".*\\.gate_up_proj"
EXPERTS = "base_model.model.model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    """(directory of what PEFT saves of both parameters at rank 4, our config, {name: W' - W})."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    base, out = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("fused")
    fields = cases.FIELDS | cases.CASES["qwen3_moe"] | {"num_hidden_layers": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **fields))
    model.save_pretrained(base)
    before = {name: array.clone() for name, array in model.state_dict().items()}
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=cases.RANK,
            lora_alpha=cases.ALPHA,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        ),
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    adapted.save_pretrained(out)
    after = adapted.merge_and_unload().state_dict()
    changes = {name: (after[name] - array).numpy() for name, array in before.items()}
    arch = read_architecture(base)
    return out, ModelConfig(arch, lora_rank=4, lora_alpha=6.0, lora_experts=True), changes


def changed(fused, directory, **tensors):
    """A copy of that adapter with other tensors (None: without it), or fields, in `directory`."""
    source, config, _ = fused
    stored = load_file(source / "adapter_model.safetensors")
    fields = json.loads((source / "adapter_config.json").read_text())
    for name, value in tensors.items():
        fields |= {name: value} if name in fields else {}
        stored |= {name: value} if name in stored else {}
    save_file(stored, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    return config


def test_gate_and_up_have_the_ranks_that_peft_lets_them_share(fused, mesh):
    directory, config, changes = fused
    loaded = jax.tree.map(np.asarray, load_adapter(directory, config, mesh))
    for i, layer in enumerate(unstack_layers({"lora": loaded}, config.arch.L)):
        experts = layer["lora"]["experts"]
        update = {
            name: 6.0 / 4 * (experts[f"{name}_a"] @ experts[f"{name}_b"]).transpose(0, 2, 1)
            for name in ("gate", "up", "down")
        }
        theirs = f"model.layers.{i}.mlp.experts"
        expected = changes[f"{theirs}.gate_up_proj"]
        assert np.abs(expected).max() > 0.05
        found = np.concatenate([update["gate"], update["up"]], axis=1)
        np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDED)
        down = changes[f"{theirs}.down_proj"]
        np.testing.assert_allclose(update["down"], down, rtol=0, atol=ROUNDED)


def test_ranks_that_gate_and_up_cannot_have_apart_are_an_error_that_names_them(
    fused, mesh, tmp_path
):
    stored = load_file(fused[0] / "adapter_model.safetensors")
    a, b = (stored[f"{EXPERTS}.base_layer.lora_{side}.weight"] for side in "AB")
    config = changed(
        fused,
        tmp_path,
        rank_pattern={GATE_UP: 8},
        alpha_pattern={GATE_UP: 12},
        **{
            f"{EXPERTS}.base_layer.lora_A.weight": np.concatenate([a, a]),
            f"{EXPERTS}.base_layer.lora_B.weight": np.concatenate([b, b], axis=1),
        },
    )
    with pytest.raises(WeightsError, match=r"base_layer.lora_B.weight: gate of expert 0 .*lora_ra"):
        load_adapter(tmp_path, config, mesh)
    changed(fused, tmp_path, **{f"{EXPERTS}.lora_A.weight": np.zeros((5 * 3, 24), np.float32)})
    with pytest.raises(WeightsError, match=r"experts.lora_A.weight has shape \[15, 24\].*\[20, 24"):
        load_adapter(tmp_path, config, mesh)


BAD = [  # fields, and which of them is named
    ({"target_parameters": ["gate_up_proj"]}, "target_parameters"),
    ({"target_modules": ["q_proj"]}, "target_modules"),
    ({"rank_pattern": {GATE_UP: 8}}, "alpha_pattern"),  # alpha / rank would be another
    ({"rank_pattern": {GATE_UP: 8}, "alpha_pattern": {GATE_UP: 6}}, "alpha_pattern"),
    ({"rank_pattern": {".*\\.down_proj": 8}, "alpha_pattern": {GATE_UP: 12}}, "rank_pattern"),
]


@pytest.mark.parametrize(("fields", "named"), BAD)
def test_fields_that_ask_for_something_else_are_named(fused, tmp_path, fields, named):
    config = changed(fused, tmp_path, **fields)
    with pytest.raises(ConfigError, match=f"adapter_config.json: {named} = "):
        check_adapter(tmp_path, config)


def test_adapters_on_attention_alone_and_on_experts_are_told_apart(fused, tmp_path):
    directory, config, _ = fused
    on_attention = dataclasses.replace(config, lora_experts=False)
    with pytest.raises(ConfigError, match="target_parameters"):
        check_adapter(directory, on_attention)
    shapes = abstract_lora(on_attention)
    lora = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    save_adapter(tmp_path, lora, on_attention, "base")
    check_adapter(tmp_path, on_attention)
    assert not any("mlp" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    with pytest.raises(ConfigError, match="down_proj.*lora_experts = True"):
        check_adapter(tmp_path, config)


def test_a_model_without_experts_cannot_have_adapters_on_them(fused):
    c = defaults().model
    c.lora_experts = True
    assert hf.model_config(fused[1].arch, c).lora_experts
    dense = read_architecture(hf.BUNDLED["bundled:tiny"])
    with pytest.raises(ConfigError, match="model.lora_experts = True: .*without experts"):
        hf.model_config(dense, c)
