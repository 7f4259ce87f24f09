"""Hugging Face directories: safetensors to parameters and back, by one table.

We iterate over our own leaves, not over the file's keys, and read lazily: each device's slice comes straight from the
file. Stacked layers [L, ...] are L tensors there, and our kernels are [in, out] where theirs are [out, in].
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from spiral_jax.config import ConfigError
from spiral_jax.mesh import path_name, weight_spec
from spiral_jax.model.architecture import hf_fields
from spiral_jax.model.qwen3 import ModelConfig, init_variables

WEIGHTS = "model.safetensors"
BUNDLED = {"bundled:tiny": pathlib.Path(__file__).parent.parent / "assets" / "tiny"}

# Our path -> (their name, transposed); {} is the layer.
_TOP = {
    "embed": ("model.embed_tokens.weight", False),
    "final_norm": ("model.norm.weight", False),
    "head": ("lm_head.weight", True),
}
_LAYER = {
    "attention_norm": ("input_layernorm.weight", False),
    "mlp_norm": ("post_attention_layernorm.weight", False),
    "q_norm": ("self_attn.q_norm.weight", False),
    "k_norm": ("self_attn.k_norm.weight", False),
    **{f"{name}/kernel": (f"self_attn.{name}_proj.weight", True) for name in "qkvo"},
    **{f"{name}/kernel": (f"mlp.{name}_proj.weight", True) for name in ("gate", "up", "down")},
}


class WeightsError(ValueError):
    """A weights file that does not hold what its config.json promises; the message names the tensor."""


def resolve_path(hf_path: str) -> pathlib.Path:
    """`config.model.hf_path` -> directory. Raises `ConfigError` if there is none."""
    path = BUNDLED.get(hf_path, pathlib.Path(hf_path))
    if not path.is_dir():
        raise ConfigError(
            f"config.model.hf_path = {hf_path!r}: no such directory. Give a Hugging Face directory (config.json, "
            f"{WEIGHTS}, tokenizer files) or one of {', '.join(BUNDLED)}."
        )
    return path


def abstract_params(config: ModelConfig) -> Any:
    """Shapes and dtypes of the base parameters."""
    return jax.eval_shape(lambda: init_variables(config, jax.random.key(0)))["params"]


def load_params(path: pathlib.Path, config: ModelConfig, mesh: Mesh) -> Any:
    """Base parameters from `path`/model.safetensors, placed as the sharding table says, in `config.param_dtype`.

    Raises:
      WeightsError: no or corrupt file; a tensor that is missing, not used, or of another shape; an `lm_head` stored
        beside tied embeddings that contradicts them.
    """
    file = path / WEIGHTS
    if not file.is_file():
        raise WeightsError(f"{file}: no such file. A single-file safetensors checkpoint is expected there.")
    try:
        with safe_open(file, framework="flax") as tensors:
            expected = abstract_params(config)
            _check_tensors(file, tensors, expected, config)
            return jax.tree_util.tree_map_with_path(
                lambda at, leaf: _read_leaf(tensors, path_name(at), leaf, mesh), expected
            )
    except SafetensorError as error:
        raise WeightsError(f"{file}: corrupt ({error}). Fetch the checkpoint again.") from error


def save_params(path: pathlib.Path, params: Any, config: ModelConfig, stop_ids: tuple[int, ...]) -> None:
    """Writes config.json and model.safetensors (in the dtype of `params`) that `load_params` and transformers read."""
    path.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for at, leaf in jax.tree_util.tree_leaves_with_path(params):
        names, transposed = _their_names(path_name(at), config.arch.L)
        array = np.asarray(jax.device_get(leaf))
        for name, part in zip(names, array if "layers/" in path_name(at) else [array], strict=True):
            tensors[name] = np.ascontiguousarray(part.T if transposed else part)
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    fields = hf_fields(config.arch, stop_ids)
    (path / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": list(stop_ids)}, indent=2) + "\n")


def _their_names(name: str, layers: int) -> tuple[list[str], bool]:
    if name.startswith("layers/"):
        theirs, transposed = _LAYER[name.removeprefix("layers/")]
        return [f"model.layers.{layer}.{theirs}" for layer in range(layers)], transposed
    theirs, transposed = _TOP[name]
    return [theirs], transposed


def _check_tensors(file: pathlib.Path, tensors: Any, expected: Any, config: ModelConfig) -> None:
    """Every tensor we need is there in the right shape, and there is none that we would ignore."""
    stored, used = set(tensors.keys()), set()
    for at, leaf in jax.tree_util.tree_leaves_with_path(expected):
        names, transposed = _their_names(path_name(at), config.arch.L)
        shape = leaf.shape[1:] if "layers/" in path_name(at) else leaf.shape
        shape = shape[::-1] if transposed else shape
        for name in names:
            if name not in stored:
                raise WeightsError(f"{file}: tensor {name} is missing (shape {list(shape)} expected by config.json).")
            found = tuple(tensors.get_slice(name).get_shape())
            if found != shape:
                raise WeightsError(f"{file}: tensor {name} has shape {list(found)}; config.json says {list(shape)}.")
            used.add(name)
    head, embed = _TOP["head"][0], _TOP["embed"][0]
    if config.arch.tied and head in stored:
        used.add(head)
        if not np.array_equal(np.asarray(tensors.get_tensor(head)), np.asarray(tensors.get_tensor(embed))):
            raise WeightsError(f"{file}: tensor {head} differs from {embed}, but config.json ties them.")
    if extra := sorted(stored - used):
        raise WeightsError(f"{file}: {len(extra)} tensors are not part of this architecture, first {extra[0]}.")


def _read_leaf(tensors: Any, name: str, leaf: jax.ShapeDtypeStruct, mesh: Mesh) -> jax.Array:
    stacked = name.startswith("layers/")
    names, transposed = _their_names(name, leaf.shape[0] if stacked else 1)

    def read(index: tuple[slice, ...]) -> np.ndarray:
        chosen, rest = (names[index[0]], index[1:]) if stacked else (names, index)
        rest = rest[::-1] if transposed else rest
        parts = [
            np.asarray(tensors.get_slice(n)[rest if len(rest) > 1 else rest[0]].astype(leaf.dtype)) for n in chosen
        ]
        parts = [part.T if transposed else part for part in parts]
        return np.stack(parts) if stacked else parts[0]

    return jax.make_array_from_callback(leaf.shape, NamedSharding(mesh, weight_spec(name, leaf.shape, mesh)), read)


def model_config(arch: Any, c: Any) -> ModelConfig:
    """`config.model` and a checkpoint's architecture -> ModelConfig. What is trained is float32."""
    full = c.lora_rank == 0
    return ModelConfig(
        arch=arch,
        param_dtype=jnp.float32 if full else jnp.dtype(c.param_dtype),
        compute_dtype=jnp.dtype(c.compute_dtype),
        lora_rank=c.lora_rank,
        lora_alpha=c.lora_alpha,
        query_block=c.attention_query_block,
        remat=c.remat,
    )
