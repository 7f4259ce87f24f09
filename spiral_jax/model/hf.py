"""Hugging Face directories: safetensors to parameters or adapters and back, by one table.

We iterate over our own leaves, not over the file's keys, and read lazily: each device's slice comes
straight from the files. Stacked layers [L, ...] are L tensors there, and our kernels are [in, out]
where theirs are [out, in].
"""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub import snapshot_download
from jax.sharding import Mesh, NamedSharding

from spiral_jax.core.config import ConfigError
from spiral_jax.core.mesh import path_name, weight_spec
from spiral_jax.model.architecture import hf_fields
from spiral_jax.model.tensor_files import (
    Output,
    TensorFiles,
    WeightsError,
    open_tensors,
    write_tensors,
)
from spiral_jax.model.transformer import ModelConfig, init_variables

STEM = "model"  # of the weight files' names
MAX_SHARD_BYTES = 5 * 10**9  # larger files are awkward to copy and to resume
_ASSETS = pathlib.Path(__file__).parent.parent / "assets"
BUNDLED = {"bundled:tiny": _ASSETS / "tiny", "bundled:end_digit": _ASSETS / "end_digit"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FROM_HUB = [
    "*.json",
    "*.safetensors",
    "*.jinja",
    "tokenizer*",
    "vocab*",
    "merges*",
    "LICENSE*",
    "NOTICE*",
]
_ROPE_CONSTANT = (
    ".self_attn.rotary_emb.inv_freq"  # old Llama files store what rope_theta already says
)
_COMPARED_ROWS = 8192  # of the embedding at once: a few hundred MB at most

# Our path -> (their name, transposed); {} is the layer.
PROJECTIONS = {name: f"self_attn.{name}_proj" for name in "qkvo"} | {
    name: f"mlp.{name}_proj" for name in ("gate", "up", "down")
}
_TOP = {
    "embed": ("model.embed_tokens.weight", False),
    "final_norm": ("model.norm.weight", False),
    "head": ("lm_head.weight", True),
}
_LAYER = {
    "attention_norm": ("model.layers.{}.input_layernorm.weight", False),
    "mlp_norm": ("model.layers.{}.post_attention_layernorm.weight", False),
    "q_norm": ("model.layers.{}.self_attn.q_norm.weight", False),
    "k_norm": ("model.layers.{}.self_attn.k_norm.weight", False),
}
for _name, _theirs in PROJECTIONS.items():
    _LAYER[f"{_name}/kernel"] = (f"model.layers.{{}}.{_theirs}.weight", True)
    _LAYER[f"{_name}/a"] = (
        f"base_model.model.model.layers.{{}}.{_theirs}.lora_A.weight",
        True,
    )  # as PEFT names them
    _LAYER[f"{_name}/b"] = (f"base_model.model.model.layers.{{}}.{_theirs}.lora_B.weight", True)


def resolve_path(hf_path: str) -> pathlib.Path:
    """`config.model.hf_path` -> directory: a local one, a bundled one, or else a Hub id that is
    downloaded once.

    Raises:
      ConfigError: there is none, or the Hub cannot give it.
    """
    path = BUNDLED.get(hf_path, pathlib.Path(hf_path))
    if path.is_dir():
        return path
    advice = (
        f"Give a Hugging Face directory (config.json, {STEM}.safetensors or shards with their index, tokenizer files), "
        f"the Hub's organisation/name, or one of {', '.join(BUNDLED)}."
    )
    if not _HUB_ID.fullmatch(hf_path):
        raise ConfigError(f"config.model.hf_path = {hf_path!r}: no such directory. {advice}")
    try:
        return pathlib.Path(
            snapshot_download(hf_path, allow_patterns=_FROM_HUB, ignore_patterns=["*/*"])
        )
    except (
        Exception
    ) as error:  # no network, no such repository, no permission: each has its own class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"config.model.hf_path = {hf_path!r}: no such directory, and the Hub did not give it ({reason}). {advice}"
        ) from error


def abstract_params(config: ModelConfig) -> Any:
    """Shapes and dtypes of the base parameters."""
    return jax.eval_shape(lambda: init_variables(config, jax.random.key(0)))["params"]


def load_params(path: pathlib.Path, config: ModelConfig, mesh: Mesh) -> Any:
    """Base parameters of the checkpoint in `path`, placed as the sharding table says, in
    `config.param_dtype`.

    On the host there is never more than this host's share of one (stacked) parameter.

    Raises:
      WeightsError: missing, contradicting or corrupt files; a tensor that is missing, not used, or
        of another shape or an unsupported dtype; an `lm_head` stored beside tied embeddings that
        contradicts them.
    """
    with open_tensors(path, STEM) as files:
        check_tensors(files, abstract_params(config), config.arch.tied)
        return read_tree(files, abstract_params(config), mesh)


def check_tensors(files: TensorFiles, expected: Any, tied: bool) -> None:
    """`files` hold every array of `expected` (shapes of `params` or `lora`), and nothing that would
    be ignored.

    Raises:
      WeightsError: a tensor is missing, of another shape or of an unsupported dtype, or it has no
        place; a head that is stored although it is `tied` differs from the embedding.
    """
    used = {_TOP["head"][0]} if tied else set()
    for at, leaf in jax.tree_util.tree_leaves_with_path(expected):
        names, transposed = tensor_names(path_name(at), leaf.shape[0])
        shape = _stored_shape(path_name(at), leaf.shape, transposed)
        for name in names:
            if name not in files.names:
                raise WeightsError(
                    f"{files.where}: tensor {name} is missing (shape {list(shape)} expected by config.json)."
                )
            if files.shape(name) != shape:
                raise WeightsError(
                    f"{files.where}: tensor {name} has shape {list(files.shape(name))}; config.json says {list(shape)}."
                )
            files.dtype(name)
            used.add(name)
    constants = {name for name in files.names if name.endswith(_ROPE_CONSTANT)}
    if extra := sorted(files.names - used - constants):
        raise WeightsError(
            f"{files.where}: {len(extra)} tensors are not part of this architecture, first {extra[0]}."
        )
    if tied and _TOP["head"][0] in files.names:
        _check_tied(files)


def read_tree(files: TensorFiles, expected: Any, mesh: Mesh) -> Any:
    """The arrays of `expected` (shapes and dtypes) from checked files, placed on `mesh` as the
    sharding table says.
    """
    return jax.tree_util.tree_map_with_path(
        lambda at, leaf: _read_leaf(files, path_name(at), leaf, mesh), expected
    )


def tensor_names(name: str, layers: int) -> tuple[list[str], bool]:
    """Our path -> their names, one a layer (one in all outside of `layers`), and whether theirs is
    transposed.
    """
    if name.startswith("layers/"):
        theirs, transposed = _LAYER[name.removeprefix("layers/")]
        return [theirs.format(layer) for layer in range(layers)], transposed
    theirs, transposed = _TOP[name]
    return [theirs], transposed


def outputs_of(tree: Any, dtype: np.dtype | None = None) -> list[Output]:
    """What `write_tensors` needs for the arrays of `params` or `lora`, in `dtype` (None: their
    own).
    """
    outputs = []
    for at, leaf in jax.tree_util.tree_leaves_with_path(tree):
        names, transposed = tensor_names(path_name(at), leaf.shape[0])
        shape, stored = (
            _stored_shape(path_name(at), leaf.shape, transposed),
            np.dtype(dtype or leaf.dtype),
        )
        for layer, name in enumerate(names):
            part = (
                (lambda leaf=leaf, i=layer: leaf[i])
                if "layers/" in path_name(at)
                else (lambda leaf=leaf: leaf)
            )
            outputs.append(Output(name, shape, stored, _host_reader(part, transposed, stored)))
    return outputs


def save_params(
    path: pathlib.Path, params: Any, config: ModelConfig, stop_ids: tuple[int, ...]
) -> None:
    """Writes config.json and weights (in the dtype of `params`) that `load_params` and transformers
    read.
    """
    path.mkdir(parents=True, exist_ok=True)
    write_tensors(path, STEM, outputs_of(params), MAX_SHARD_BYTES)
    fields = hf_fields(config.arch, stop_ids)
    (path / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    (path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": list(stop_ids)}, indent=2) + "\n"
    )


def _host_reader(part: Any, transposed: bool, dtype: np.dtype) -> Any:
    def read() -> np.ndarray:
        array = np.asarray(jax.device_get(part()))
        return (array.T if transposed else array).astype(dtype, copy=False)

    return read


def _stored_shape(name: str, shape: tuple[int, ...], transposed: bool) -> tuple[int, ...]:
    """Shape of each of their tensors for our leaf of this name and shape."""
    shape = shape[1:] if name.startswith("layers/") else shape
    return shape[::-1] if transposed else shape


def _check_tied(files: TensorFiles) -> None:
    """A head stored beside tied embeddings must be the embedding: compared in blocks of rows."""
    head, embed = _TOP["head"][0], _TOP["embed"][0]
    same, V = files.shape(head) == files.shape(embed), files.shape(embed)[0]
    for start in range(0, V if same else 0, _COMPARED_ROWS):
        rows = (slice(start, min(start + _COMPARED_ROWS, V)), slice(None))
        same &= np.array_equal(files.read(head, rows), files.read(embed, rows))
    if not same:
        raise WeightsError(
            f"{files.where}: tensor {head} differs from {embed}, but config.json ties them."
        )


def _read_leaf(files: TensorFiles, name: str, leaf: jax.ShapeDtypeStruct, mesh: Mesh) -> jax.Array:
    stacked = name.startswith("layers/")
    names, transposed = tensor_names(name, leaf.shape[0])
    done: dict[tuple, np.ndarray] = {}  # devices that hold the same slice share one reading of it

    def read(index: tuple[slice, ...]) -> np.ndarray:
        bounds = tuple(one.indices(size)[:2] for one, size in zip(index, leaf.shape, strict=True))
        if bounds not in done:
            slices = tuple(slice(*pair) for pair in bounds)
            chosen, rest = (names[slices[0]], slices[1:]) if stacked else (names, slices)
            out = np.empty([stop - start for start, stop in bounds], leaf.dtype)
            for row, theirs in zip(out if stacked else [out], chosen, strict=True):
                part = files.read(theirs, rest[::-1] if transposed else rest)
                row[...] = part.T if transposed else part
            done[bounds] = out
        return done[bounds]

    place = NamedSharding(mesh, weight_spec(name, leaf.shape, mesh))
    # Copies to devices lag behind: without waiting, several parameters would be in host memory.
    return jax.block_until_ready(jax.make_array_from_callback(leaf.shape, place, read))


def model_config(arch: Any, c: Any) -> ModelConfig:
    """`config.model` and a checkpoint's architecture -> ModelConfig. What is trained is float32."""
    full = c.lora_rank == 0
    return ModelConfig(
        arch=arch,
        param_dtype=jnp.float32 if full else jnp.dtype(c.param_dtype),
        compute_dtype=jnp.dtype(c.compute_dtype),
        lora_rank=c.lora_rank,
        lora_alpha=c.lora_alpha,
        attention_block=c.attention_block,
        remat=c.remat,
    )
