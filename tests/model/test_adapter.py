"""LoRA adapters in PEFT's format: what PEFT wrote we run, and what we write PEFT runs."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_model import forward, on_mesh, random_ids, rows_of

from spiral_jax.core.config import ConfigError
from spiral_jax.core.mesh import path_name, weight_shardings
from spiral_jax.model import hf
from spiral_jax.model.adapter import abstract_lora, check_adapter, load_adapter, save_adapter
from spiral_jax.model.architecture import read_architecture
from spiral_jax.model.tensor_files import WeightsError
from spiral_jax.model.transformer import ModelConfig

PARITY = 1e-4  # float32 against float32 in another order of sums, logits up to about 3
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(params=["qwen3", "llama"])
def base(request, qwen3_checkpoint, llama_checkpoint):
    make = {"qwen3": qwen3_checkpoint, "llama": llama_checkpoint}[request.param]
    return make(num_key_value_heads=3, tie_word_embeddings=False)[0]


def random_lora(config, mesh):
    """A and B both random, large enough to be seen in the logits."""

    def make(path, leaf):
        rng = np.random.default_rng([*path_name(path).encode()])
        return rng.normal(0, 0.1, leaf.shape).astype(np.float32)

    tree = jax.tree_util.tree_map_with_path(make, abstract_lora(config))
    return jax.device_put(tree, weight_shardings(tree, mesh))


def in_peft(base, adapter):
    """row -> logits of PEFT's model of the adapter in a directory."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    return lambda row: model(torch.tensor(row, dtype=torch.long)[None]).logits[0].detach().numpy()


def gap(logits, theirs, ids):
    """Largest difference of logits from the prompt's last token on, in some groups."""
    worst = 0.0
    for u, c in ((0, 0), (1, 1), (3, 0)):
        row = np.concatenate([ids.prompt[u, : ids.prompt_len[u]], ids.trace[u, c]])
        worst = max(
            worst, np.abs(theirs(row)[ids.prompt_len[u] - 1 :] - rows_of(logits, ids, u, c)).max()
        )
    return worst


@pytest.fixture
def saved(qwen3_checkpoint, mesh, tmp_path):
    """(directory with an adapter, its model config) for the error tests."""
    base, _ = qwen3_checkpoint(num_key_value_heads=3, tie_word_embeddings=False)
    config = ModelConfig(read_architecture(base), lora_rank=4, lora_alpha=6.0)
    save_adapter(tmp_path, random_lora(config, mesh), config, str(base))
    return tmp_path, config


def test_what_we_write_gives_the_same_logits_in_peft(base, mesh, tmp_path):
    config = ModelConfig(read_architecture(base), lora_rank=4, lora_alpha=6.0)
    params, lora, ids = hf.load_params(base, config, mesh), random_lora(config, mesh), random_ids()
    save_adapter(tmp_path, lora, config, str(base))
    logits = np.asarray(on_mesh(forward, mesh, config, {"params": params, "lora": lora}, ids)[1])
    theirs = in_peft(base, tmp_path)
    assert gap(logits, theirs, ids) <= PARITY
    other = dataclasses.replace(config, lora_alpha=7.0)
    logits = np.asarray(on_mesh(forward, mesh, other, {"params": params, "lora": lora}, ids)[1])
    assert gap(logits, theirs, ids) > 10 * PARITY
    again = load_adapter(tmp_path, config, mesh)
    assert jax.tree.all(
        jax.tree.map(lambda a, b: (np.asarray(a) == np.asarray(b)).all(), again, lora)
    )


def test_what_peft_writes_gives_the_same_logits_here(base, mesh, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    lora_config = LoraConfig(
        r=4, lora_alpha=6, target_modules=TARGETS, task_type="CAUSAL_LM", lora_dropout=0.1
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora_config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(tmp_path)
    config, ids = ModelConfig(read_architecture(base), lora_rank=4, lora_alpha=6.0), random_ids()
    variables = {
        "params": hf.load_params(base, config, mesh),
        "lora": load_adapter(tmp_path, config, mesh),
    }
    logits = np.asarray(on_mesh(forward, mesh, config, variables, ids)[1])
    assert gap(logits, in_peft(base, tmp_path), ids) <= PARITY


BAD = {
    "r": 8,
    "lora_alpha": 5,
    "peft_type": "IA3",
    "target_modules": ["q_proj", "v_proj"],
    "use_rslora": True,
    "use_dora": True,
    "bias": "all",
    "rank_pattern": {"q_proj": 2},
    "modules_to_save": ["lm_head"],
    "layers_to_transform": [0],
    "fan_in_fan_out": True,
    "init_lora_weights": "pissa",
    "a_field_of_the_future": True,
}


@pytest.mark.parametrize("name", BAD)
def test_an_adapter_of_another_kind_is_an_error_that_names_the_field_and_its_value(saved, name):
    directory, config = saved
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: BAD[name]}))
    with pytest.raises(ConfigError) as error:
        check_adapter(directory, config)
    assert f"{file}: {name} = {BAD[name]!r}" in str(error.value)


def test_a_missing_or_damaged_adapter_is_an_error_with_its_path(saved, mesh, tmp_path_factory):
    directory, config = saved
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(
        ConfigError, match=f"config.model.adapter_path = '{empty}': no adapter_config.json"
    ):
        check_adapter(empty, config)
    weights = directory / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    save_file({n: t for n, t in tensors.items() if n != name}, weights)
    with pytest.raises(WeightsError, match=f"{name} is missing"):
        load_adapter(directory, config, mesh)
    save_file(tensors | {name: tensors[name].T.copy()}, weights)
    with pytest.raises(WeightsError, match=rf"{name} has shape \[4, 80\]"):
        load_adapter(directory, config, mesh)
    save_file(
        tensors | {"base_model.model.lm_head.lora_A.weight": np.zeros((4, 48), np.float32)}, weights
    )
    with pytest.raises(WeightsError, match="first base_model.model.lm_head.lora_A.weight"):
        load_adapter(directory, config, mesh)
    weights.unlink()
    with pytest.raises(WeightsError, match=f"{weights}: no such file"):
        load_adapter(directory, config, mesh)
    (directory / "adapter_config.json").write_text("{")
    with pytest.raises(ConfigError, match="adapter_config.json: not valid JSON"):
        load_adapter(directory, config, mesh)


@pytest.mark.devices8
def test_adapters_are_placed_as_the_table_says(saved, mesh):
    directory, config = saved
    lora = load_adapter(directory, config, mesh)
    assert lora["layers"]["q"]["a"].shape == (2, 48, 4)
    assert lora["last_layer"]["q"]["a"].shape == (48, 4)
    expected = weight_shardings(abstract_lora(config), mesh)
    assert jax.tree.all(jax.tree.map(lambda a, s: a.sharding == s, lora, expected))
