"""Weights from and to Hugging Face directories: exact, placed by the table, never incomplete."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

from spiral_jax.core.config import ConfigError, defaults
from spiral_jax.core.mesh import make_mesh, path_name
from spiral_jax.model import hf
from spiral_jax.model.architecture import read_architecture
from spiral_jax.model.transformer import ModelConfig

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def leaves(tree):
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def assert_equal(tree, expected):
    found, expected = leaves(tree), leaves(expected)
    assert found.keys() == expected.keys()
    for name, leaf in found.items():
        assert leaf.dtype == expected[name].dtype, name
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(expected[name]), err_msg=name)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def checkpoint(request, qwen3_checkpoint):
    """(directory, transformers' model), tied and untied."""
    return qwen3_checkpoint(num_key_value_heads=2, tie_word_embeddings=request.param)


@pytest.fixture
def rewrite(qwen3_checkpoint, tmp_path):
    """(change, tied) -> a checkpoint whose tensors went through `change(dict)`."""

    def write(change, tied=False):
        source, _ = qwen3_checkpoint(num_key_value_heads=2, tie_word_embeddings=tied)
        (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
        tensors = load_file(source / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path

    return write


def load(directory, mesh, **options):
    config = ModelConfig(read_architecture(directory), **options)
    return config, hf.load_params(directory, config, mesh)


def by_hand(state, L=3):
    """transformers' state dict as our tree: L - 1 layers stacked, kernels [in, out]."""
    state = {name: tensor.detach().numpy() for name, tensor in state.items()}
    rooms = dict.fromkeys("qkvo", "self_attn") | dict.fromkeys(("gate", "up", "down"), "mlp")

    def layer(number):
        at = f"model.layers.{number}"
        return {
            "attention_norm": state[f"{at}.input_layernorm.weight"],
            "mlp_norm": state[f"{at}.post_attention_layernorm.weight"],
            "q_norm": state[f"{at}.self_attn.q_norm.weight"],
            "k_norm": state[f"{at}.self_attn.k_norm.weight"],
        } | {
            name: {"kernel": state[f"{at}.{room}.{name}_proj.weight"].T}
            for name, room in rooms.items()
        }

    tree = {"embed": state["model.embed_tokens.weight"], "final_norm": state["model.norm.weight"]}
    tree["last_layer"] = layer(L - 1)
    if L > 1:
        stack = [layer(number) for number in range(L - 1)]
        tree["layers"] = jax.tree.map(lambda *arrays: np.stack(arrays), *stack)
    return tree


@pytest.mark.devices8
def test_every_value_is_loaded_where_it_belongs(checkpoint, mesh):
    directory, model = checkpoint
    config, params = load(directory, mesh)
    expected = by_hand(model.state_dict())
    if not config.arch.tied:
        expected["head"] = model.lm_head.weight.detach().numpy().T
    assert_equal(params, expected)


def test_a_single_layer_is_the_last_one(qwen3_checkpoint, mesh, tmp_path):
    directory, model = qwen3_checkpoint(num_hidden_layers=1, tie_word_embeddings=True)
    config, params = load(directory, mesh)
    assert_equal(params, by_hand(model.state_dict(), L=1))
    hf.save_params(tmp_path, params, config, (5,))
    saved, source = (load_file(d / "model.safetensors") for d in (tmp_path, directory))
    assert saved.keys() == source.keys()
    for name, array in source.items():
        np.testing.assert_array_equal(saved[name], array, err_msg=name)


class Transfer:
    """An array on its way to the devices; its host memory is in use until someone waits for it."""

    def __init__(self, array):
        self.array, self.arrived = array, False

    def block_until_ready(self):
        self.arrived = True
        return self


def test_one_parameter_at_a_time_is_on_its_way_to_the_devices(checkpoint, mesh, monkeypatch):
    """On a busy machine copies lag behind reading: a run once held two parameters and more."""
    started, make = [], jax.make_array_from_callback

    def start(shape, sharding, read):
        assert all(transfer.arrived for transfer in started)
        started.append(Transfer(make(shape, sharding, read)))
        return started[-1]

    monkeypatch.setattr(jax, "make_array_from_callback", start)
    load(checkpoint[0], mesh)
    assert len(started) > 10 and started[-1].arrived


# What each device of a 2 x 2 x 2 mesh holds: fsdp and tensor each cut one axis of a matrix in half.
# V = 97 is odd.
LAYER_SHARDS = {
    "attention_norm": (48,),
    "mlp_norm": (48,),
    "q_norm": (16,),
    "k_norm": (16,),
    "q/kernel": (24, 48),
    "k/kernel": (24, 16),
    "v/kernel": (24, 16),
    "o/kernel": (48, 24),
    "gate/kernel": (24, 40),
    "up/kernel": (24, 40),
    "down/kernel": (40, 24),
}
SHARDS = {"embed": (97, 24), "head": (24, 97), "final_norm": (48,)}
SHARDS |= {f"layers/{name}": (2, *shape) for name, shape in LAYER_SHARDS.items()}
SHARDS |= {f"last_layer/{name}": shape for name, shape in LAYER_SHARDS.items()}


@pytest.mark.devices8
@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1), (1, 1, 8)])
def test_loading_on_eight_devices_equals_one_and_each_holds_its_share(qwen3_checkpoint, shape):
    if jax.device_count() != 8:
        pytest.skip("needs 8 devices")
    directory, model = qwen3_checkpoint(num_key_value_heads=2, tie_word_embeddings=False)
    sizes = ConfigDict(dict(zip(("data", "fsdp", "tensor"), shape, strict=True)))
    _, params = load(directory, make_mesh(sizes))
    head = {"head": model.lm_head.weight.detach().numpy().T}
    assert_equal(params, by_hand(model.state_dict()) | head)
    if shape != (2, 2, 2):
        return
    assert leaves(params).keys() == SHARDS.keys()
    bytes_of = dict.fromkeys(jax.devices(), 0)
    for name, leaf in leaves(params).items():
        assert {shard.data.shape for shard in leaf.addressable_shards} == {SHARDS[name]}, name
        for shard in leaf.addressable_shards:
            bytes_of[shard.device] += shard.data.nbytes
    assert set(bytes_of.values()) == {4 * sum(int(np.prod(cut)) for cut in SHARDS.values())}


@pytest.mark.devices8
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_files_of_every_dtype_load_in_the_dtype_of_the_parameters(rewrite, mesh, stored, wanted):
    def narrow(tensors):
        tensors.update({name: array.astype(DTYPES[stored]) for name, array in tensors.items()})

    directory = rewrite(narrow)
    _, params = load(directory, mesh, param_dtype=jnp.dtype(wanted))
    file = load_file(directory / "model.safetensors")
    for name, theirs, transposed in (
        ("embed", "model.embed_tokens.weight", False),
        ("head", "lm_head.weight", True),
        ("layers/down/kernel", "model.layers.{}.mlp.down_proj.weight", True),
        ("layers/q_norm", "model.layers.{}.self_attn.q_norm.weight", False),
        ("last_layer/down/kernel", "model.layers.2.mlp.down_proj.weight", True),
    ):
        stacked = name.startswith("layers/")
        arrays = [file[theirs.format(layer)] for layer in range(2 if stacked else 1)]
        assert {array.dtype for array in arrays} == {np.dtype(DTYPES[stored])}
        arrays = [(array.T if transposed else array).astype(DTYPES[wanted]) for array in arrays]
        expected = np.stack(arrays) if stacked else arrays[0]
        found = leaves(params)[name]
        assert found.dtype == wanted
        np.testing.assert_array_equal(np.asarray(found), expected)


# Errors


def test_a_missing_tensor_is_an_error_that_names_it_and_its_shape(rewrite, mesh):
    for name, shape in (
        ("model.layers.1.mlp.up_proj.weight", "80, 48"),
        ("model.norm.weight", "48"),
        ("lm_head.weight", "97, 48"),
    ):
        directory = rewrite(lambda tensors, name=name: tensors.pop(name))
        with pytest.raises(hf.WeightsError, match=rf"{name} is missing.*\[{shape}\]"):
            load(directory, mesh)


@pytest.mark.parametrize(
    "name", ["model.layers.3.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"]
)
def test_a_tensor_that_we_would_ignore_is_an_error_that_names_it(rewrite, mesh, name):
    directory = rewrite(lambda tensors: tensors.update({name: np.zeros((80, 48), np.float32)}))
    with pytest.raises(hf.WeightsError, match=f"not part of this architecture.* {name}"):
        load(directory, mesh)


def test_the_rope_constants_that_old_files_store_are_no_weights(rewrite, mesh):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    load(rewrite(lambda tensors: tensors.update({name: np.zeros(8, np.float32)})), mesh)


@pytest.mark.parametrize(
    "name, change",
    [
        # [in, out] where theirs is [out, in]
        ("model.layers.2.self_attn.q_proj.weight", lambda a: a.T),
        ("model.layers.0.self_attn.k_norm.weight", lambda a: a[:8]),
        ("model.embed_tokens.weight", lambda a: a[:96]),
        ("model.norm.weight", lambda a: a[None]),
    ],
)
def test_a_tensor_of_another_shape_is_an_error_with_both_shapes(rewrite, mesh, name, change):
    shapes = []

    def misshape(tensors):
        shapes.append(list(tensors[name].shape))
        tensors[name] = np.ascontiguousarray(change(tensors[name]))
        shapes.append(list(tensors[name].shape))

    directory = rewrite(misshape)
    with pytest.raises(hf.WeightsError) as error:
        load(directory, mesh)
    for part in (name, f"config.json says {shapes[0]}", f"shape {shapes[1]}"):
        assert part in str(error.value)


def test_a_corrupt_file_is_an_error_with_its_path(rewrite, mesh):
    directory = rewrite(lambda tensors: None)
    file = directory / "model.safetensors"
    whole = file.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    cuts = [len(whole) - 1, 8 + header + 100, 8 + header // 2, 5, 0]
    for content in (*(whole[:cut] for cut in cuts), b"\xff" * 100):
        file.write_bytes(content)
        with pytest.raises(hf.WeightsError, match=f"{file}: corrupt"):
            load(directory, mesh)
    file.write_bytes(whole)
    load(directory, mesh)
    file.unlink()
    with pytest.raises(hf.WeightsError, match=f"{file}: no such file"):
        load(directory, mesh)


def test_a_stored_head_beside_tied_embeddings_must_be_the_embedding(rewrite, mesh):
    def copy(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    config, params = load(rewrite(copy, tied=True), mesh)
    assert config.arch.tied and "head" not in params

    def contradict(tensors):
        copy(tensors)
        tensors["lm_head.weight"][3, 4] += 1e-3

    with pytest.raises(
        hf.WeightsError, match="lm_head.weight differs from model.embed_tokens.weight"
    ):
        load(rewrite(contradict, tied=True), mesh)

    def misshape(tensors):
        tensors["lm_head.weight"] = np.zeros((4, 4), np.float32)

    with pytest.raises(hf.WeightsError, match="lm_head.weight differs"):
        load(rewrite(misshape, tied=True), mesh)


def test_a_directory_that_is_not_there_is_an_error_that_names_the_field(tmp_path):
    assert hf.resolve_path(str(tmp_path)) == tmp_path
    for missing in (str(tmp_path / "nowhere"), "bundled:huge"):
        with pytest.raises(
            ConfigError, match=f"config.model.hf_path = {missing!r}: no such directory"
        ):
            hf.resolve_path(missing)


def test_a_hub_id_is_downloaded_unless_there_is_such_a_directory(tmp_path, monkeypatch):
    asked = []

    def download(name, **options):
        asked.append(name)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(hf, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert hf.resolve_path("org/Model-1.5B") == tmp_path / "snapshot"
    (tmp_path / "org" / "Model-1.5B").mkdir(parents=True)
    assert (
        hf.resolve_path("org/Model-1.5B").resolve() == (tmp_path / "org" / "Model-1.5B").resolve()
    )
    assert asked == ["org/Model-1.5B"]
    for no_id in ("org/model/file", "../model", "model", "/org/model"):
        with pytest.raises(ConfigError, match="no such directory. Give"):
            hf.resolve_path(no_id)
    assert asked == ["org/Model-1.5B"]


def test_what_the_hub_does_not_give_is_an_error_with_its_reason(monkeypatch):
    def download(name, **options):
        raise OSError("no route to host\nand much more")

    monkeypatch.setattr(hf, "snapshot_download", download)
    with pytest.raises(ConfigError, match=r"hf_path = 'org/model'.*Hub.*no route to host\)"):
        hf.resolve_path("org/model")


# Saving


@pytest.mark.devices8
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_save_then_load_is_bitwise_the_same(checkpoint, mesh, tmp_path, dtype):
    directory, _ = checkpoint
    config, params = load(directory, mesh, param_dtype=dtype)
    hf.save_params(tmp_path / "new" / "folder", params, config, (5, 6))
    again, loaded = load(tmp_path / "new" / "folder", mesh, param_dtype=dtype)
    assert again == config
    assert_equal(loaded, params)


@pytest.mark.devices8
def test_what_we_save_gives_the_same_logits_in_transformers(checkpoint, mesh, tmp_path):
    import torch
    from transformers import Qwen3ForCausalLM

    directory, model = checkpoint
    config, params = load(directory, mesh)
    hf.save_params(tmp_path, params, config, (5, 6))
    loaded, info = Qwen3ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in info), info  # nothing missing, unexpected or mismatched
    assert loaded.config.tie_word_embeddings == config.arch.tied and loaded.dtype == torch.float32
    ids = torch.tensor(np.random.default_rng(0).integers(0, 97, (2, 12)))
    with torch.no_grad():  # the same numbers in the same program
        assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)
    assert loaded.generation_config.eos_token_id == [5, 6]
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": [5, 6]}


def test_saved_parameters_of_an_unusual_layout_are_written_in_full(
    qwen3_checkpoint, mesh, tmp_path
):
    """Such arrays are views; a writer that copies their buffers would scramble them."""
    directory, _ = qwen3_checkpoint(num_key_value_heads=2, tie_word_embeddings=False)
    config, params = load(directory, mesh)
    views = jax.tree.map(lambda a: np.asfortranarray(np.asarray(a)), params)
    hf.save_params(tmp_path, views, config, (5,))
    source, saved = (load_file(d / "model.safetensors") for d in (directory, tmp_path))
    assert saved.keys() == source.keys()
    for name, array in source.items():
        np.testing.assert_array_equal(saved[name], array, err_msg=name)


def test_what_is_trained_is_float32_and_a_frozen_base_has_the_configured_dtype(qwen3_checkpoint):
    arch = read_architecture(qwen3_checkpoint(num_key_value_heads=2, tie_word_embeddings=False)[0])
    c = defaults().model
    c.update({"lora_alpha": 6.0, "attention_block": 7, "remat": "none"})
    config = hf.model_config(arch, c)
    assert config == ModelConfig(
        arch=arch,
        param_dtype=jnp.dtype("bfloat16"),
        compute_dtype=jnp.dtype("bfloat16"),
        lora_rank=32,
        lora_alpha=6.0,
        attention_block=7,
        remat="none",
    )
    c.lora_rank = 0
    full = hf.model_config(arch, c)
    assert (full.param_dtype, full.compute_dtype) == (jnp.float32, jnp.bfloat16)
    assert full.lora_rank == 0
