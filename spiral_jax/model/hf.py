"""Hugging Face directories: safetensors to parameters or adapters and back, by one table.

We iterate over our own leaves, not over the file's keys, and read lazily: each device's slice comes
straight from the files. A leaf of our stacked layers [L - 1, ...] is L - 1 tensors there, one of
experts [X, ...] is X tensors, and our kernels are [in, out] where theirs are [out, in]. A base in
int8 is rounded while it is read: no device ever holds it in floats.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub import snapshot_download
from jax.sharding import Mesh, NamedSharding

from spiral_jax.core.config import ConfigError, require
from spiral_jax.core.mesh import path_name, weight_spec
from spiral_jax.model import int8
from spiral_jax.model.architecture import Architecture, hf_fields
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
BUNDLED = {f"bundled:{name}": _ASSETS / name for name in ("tiny", "end_digit", "three_parts")}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FROM_HUB = ["*.json", "*.safetensors", "*.jinja", "LICENSE*", "NOTICE*"]
_FROM_HUB += ["tokenizer*", "vocab*", "merges*"]
# Old Llama files store what rope_theta already says.
_ROPE_CONSTANT = ".self_attn.rotary_emb.inv_freq"
_COMPARED_ROWS = 8192  # of the embedding at once: a few hundred MB at most

# Our name -> (their name, whether theirs is transposed); {} is the layer, a second {} the expert.
PROJECTIONS = {name: f"self_attn.{name}_proj" for name in "qkvo"} | {
    name: f"mlp.{name}_proj" for name in ("gate", "up", "down")
}
_TOP = {
    "embed": ("model.embed_tokens.weight", False),
    "final_norm": ("model.norm.weight", False),
    "head": ("lm_head.weight", True),
}
_HEAD, _EMBED = _TOP["head"][0], _TOP["embed"][0]
_LAYER = {
    "attention_norm": ("model.layers.{}.input_layernorm.weight", False),
    "mlp_norm": ("model.layers.{}.post_attention_layernorm.weight", False),
    "q_norm": ("model.layers.{}.self_attn.q_norm.weight", False),
    "k_norm": ("model.layers.{}.self_attn.k_norm.weight", False),
}
_PEFT = "base_model.model."  # PEFT names an adapter's weights so
_LAYER["experts/router"] = ("model.layers.{}.mlp.gate.weight", True)
for _name in ("gate", "up", "down"):
    _module = f"model.layers.{{}}.mlp.experts.{{}}.{_name}_proj"
    _LAYER[f"experts/{_name}"] = (f"{_module}.weight", True)
    _LAYER[f"experts/{_name}_a"] = (f"{_PEFT}{_module}.lora_A.weight", True)
    _LAYER[f"experts/{_name}_b"] = (f"{_PEFT}{_module}.lora_B.weight", True)
for _name, _theirs in PROJECTIONS.items():
    _module = f"model.layers.{{}}.{_theirs}"
    _LAYER[f"{_name}/kernel"] = (f"{_module}.weight", True)
    _LAYER[f"{_name}/scale"] = _LAYER[f"{_name}/kernel"]  # of a kernel in int8
    _LAYER[f"{_name}/bias"] = (f"{_module}.bias", False)
    _LAYER[f"{_name}/a"] = (f"{_PEFT}{_module}.lora_A.weight", True)
    _LAYER[f"{_name}/b"] = (f"{_PEFT}{_module}.lora_B.weight", True)


class Stored(NamedTuple):
    """How one of our leaves lies in the files.

    Attributes:
      names: of their tensors, an array of strings [*lead]: the tensor of that name is our
        leaf[index]. `lead` is the layers of a stacked leaf, then the experts of one that has them,
        or nothing.
      transposed: whether each is the transpose of ours.
    """

    names: np.ndarray
    transposed: bool

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of each tensor for a leaf of ours."""
        ours = ours[self.names.ndim :]
        return ours[::-1] if self.transposed else ours

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, index in our leaf) of each."""
        for index in np.ndindex(self.names.shape):
            yield str(self.names[index]), index


def stored(name: str, arch: Architecture) -> Stored:
    """How our leaf of this path lies in the files."""
    room, _, rest = name.partition("/")
    if room not in ("layers", "last_layer"):
        theirs, transposed = _TOP[name]
        return Stored(np.array(theirs), transposed)
    number, _, of_layer = rest.partition("/")
    if number.isdecimal():  # a base in int8 is not stacked
        layers, is_stacked, rest = (int(number),), False, of_layer
    elif room == "layers":
        layers, is_stacked = range(arch.L - 1), True
    else:
        layers, is_stacked = (arch.L - 1,), False
    theirs, transposed = _LAYER[rest]
    names = [[theirs.format(layer, x) for x in _experts(theirs, arch)] for layer in layers]
    lead = (len(names),) if is_stacked else ()
    lead += (len(names[0]),) if theirs.count("{}") == 2 else ()
    return Stored(np.array(names).reshape(lead), transposed)


def _experts(theirs: str, arch: Architecture) -> range:
    return range(arch.routing.experts) if theirs.count("{}") == 2 else range(1)


def resolve_path(hf_path: str) -> pathlib.Path:
    """`config.model.hf_path` -> a local or bundled directory, or a Hub id that is downloaded once.

    Raises:
      ConfigError: there is none, or the Hub cannot give it.
    """
    path = BUNDLED.get(hf_path, pathlib.Path(hf_path))
    if path.is_dir():
        return path
    advice = (
        f"Give a Hugging Face directory (config.json, {STEM}.safetensors or shards with their "
        "index, tokenizer files), the Hub's organisation/name, or one of "
        f"{', '.join(BUNDLED)}."
    )
    field = f"config.model.hf_path = {hf_path!r}"
    if not _HUB_ID.fullmatch(hf_path):
        raise ConfigError(f"{field}: no such directory. {advice}")
    try:
        return pathlib.Path(
            snapshot_download(hf_path, allow_patterns=_FROM_HUB, ignore_patterns=["*/*"])
        )
    except Exception as error:  # no network, no repository, no permission: each has its own class
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(
            f"{field}: no such directory, and the Hub did not give it ({reason}). {advice}"
        ) from error


def adapted_projections(config: ModelConfig) -> tuple[str, ...]:
    """Ours that have an adapter: all, but those of experts where `lora_experts` is False."""
    every = config.lora_experts or not config.arch.routing
    return tuple(name for name in PROJECTIONS if every or name in "qkvo")


def abstract_params(config: ModelConfig) -> Any:
    """Shapes and dtypes of the base parameters."""
    return jax.eval_shape(lambda: init_variables(config, jax.random.key(0)))["params"]


def stored_params(config: ModelConfig) -> Any:
    """Shapes of the base parameters as files have them: in floats, and so without scales."""
    return abstract_params(dataclasses.replace(config, param_dtype=jnp.float32))


def load_params(path: pathlib.Path, config: ModelConfig, mesh: Mesh) -> Any:
    """Base parameters of the checkpoint in `path`, placed on `mesh`, in `config.param_dtype`.

    On the host there is never more than this host's share of one (stacked) parameter.

    Raises:
      WeightsError: missing, contradicting or corrupt files; a tensor that is missing, not used, or
        of another shape or an unsupported dtype; an `lm_head` stored beside tied embeddings that
        contradicts them.
    """
    with open_tensors(path, STEM) as files:
        check_tensors(files, stored_params(config), config.arch)
        return read_tree(files, abstract_params(config), config.arch, mesh)


def check_tensors(files: TensorFiles, expected: Any, arch: Architecture) -> None:
    """`files` hold every array of `expected`, and nothing that would be ignored.

    Args:
      expected: shapes of `params` or `lora`.

    Raises:
      WeightsError: a tensor is missing, of another shape or of an unsupported dtype, or it has no
        place; a head that is stored beside a tied embedding differs from it.
    """
    used = set()
    for at, leaf in jax.tree_util.tree_leaves_with_path(expected):
        tensors = stored(path_name(at), arch)
        for name, _ in tensors.tensors():
            _check_tensor(files, name, tensors.shape(leaf.shape))
            used.add(name)

    unused = files.names - used
    if _EMBED in used and arch.tied and _HEAD in unused:
        _check_tied(files)
        unused -= {_HEAD}
    extra = sorted(name for name in unused if not name.endswith(_ROPE_CONSTANT))
    if extra:
        raise WeightsError(
            f"{files.where}: {len(extra)} tensors are not part of this architecture, "
            f"first {extra[0]}."
        )


def _check_tensor(files: TensorFiles, name: str, shape: tuple[int, ...]) -> None:
    if name not in files.names:
        raise WeightsError(
            f"{files.where}: tensor {name} is missing (shape {list(shape)} expected by "
            "config.json)."
        )
    if files.shape(name) != shape:
        raise WeightsError(
            f"{files.where}: tensor {name} has shape {list(files.shape(name))}; config.json says "
            f"{list(shape)}."
        )
    files.dtype(name)  # raises for one that is not supported


def _check_tied(files: TensorFiles) -> None:
    """A head stored beside tied embeddings must be the embedding: compared in blocks of rows."""
    same, V = files.shape(_HEAD) == files.shape(_EMBED), files.shape(_EMBED)[0]
    for start in range(0, V if same else 0, _COMPARED_ROWS):
        rows = (slice(start, min(start + _COMPARED_ROWS, V)), slice(None))
        same &= np.array_equal(files.read(_HEAD, rows), files.read(_EMBED, rows))
    if not same:
        raise WeightsError(
            f"{files.where}: tensor {_HEAD} differs from {_EMBED}, but config.json ties them."
        )


def read_tree(files: TensorFiles, expected: Any, arch: Architecture, mesh: Mesh) -> Any:
    """The arrays of `expected` (shapes and dtypes) from checked files.

    They are placed on `mesh` as the sharding table says.
    """

    def read(at: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        ours = path_name(at)
        sharding = NamedSharding(mesh, weight_spec(ours, leaf.shape, mesh))
        tensors = stored(ours, arch)
        read_tensor = _tensor_reader(files, ours, leaf, tensors.transposed)
        return _read_leaf(read_tensor, tensors.names, leaf, sharding)

    return jax.tree_util.tree_map_with_path(read, expected)


_TensorReader = Callable[[str, tuple[slice, ...]], np.ndarray]


def _tensor_reader(
    files: TensorFiles, ours: str, leaf: jax.ShapeDtypeStruct, transposed: bool
) -> _TensorReader:
    """(name of a tensor, slices of our axes) -> that part of what our leaf has of it."""

    def as_stored(name: str, slices: tuple[slice, ...]) -> np.ndarray:
        if transposed:
            return files.read(name, slices[::-1]).T
        return files.read(name, slices)

    # A scale is one of whole columns, so these are read whatever part of them is asked for.
    def scale(name: str, slices: tuple[slice, ...]) -> np.ndarray:
        return int8.scale_of(as_stored(name, (slice(None), *slices)))

    def quantised(name: str, slices: tuple[slice, ...]) -> np.ndarray:
        rows, columns = slices
        return int8.quantise(as_stored(name, (slice(None), columns)))[rows]

    if leaf.dtype == np.int8:
        return quantised
    return scale if ours.endswith("/scale") else as_stored


def _read_leaf(
    read_tensor: _TensorReader,
    names: np.ndarray,
    leaf: jax.ShapeDtypeStruct,
    sharding: NamedSharding,
) -> jax.Array:
    """Args: names: of the leaf's tensors; see `Stored`."""

    @functools.cache  # devices that hold the same slice share one reading of it
    def read_slice(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        slices = tuple(slice(*pair) for pair in bounds)
        out = np.empty([stop - start for start, stop in bounds], leaf.dtype)
        lead = names.ndim
        of_slice = np.asarray(names[slices[:lead]])
        for index in np.ndindex(of_slice.shape):
            out[index] = read_tensor(str(of_slice[index]), slices[lead:])
        return out

    def read(index: tuple[slice, ...]) -> np.ndarray:
        bounds = (part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))
        return read_slice(tuple(bounds))

    # Copies to devices lag behind: without waiting, several parameters would be in host memory.
    return jax.block_until_ready(jax.make_array_from_callback(leaf.shape, sharding, read))


def outputs_of(tree: Any, arch: Architecture, dtype: np.dtype | None = None) -> list[Output]:
    """What `write_tensors` needs for `params` or `lora`, in `dtype` (None: their own)."""
    outputs = []
    for at, leaf in jax.tree_util.tree_leaves_with_path(tree):
        tensors, as_stored = stored(path_name(at), arch), np.dtype(dtype or leaf.dtype)
        for name, index in tensors.tensors():
            read = _reader(leaf, index, tensors.transposed, as_stored)
            outputs.append(Output(name, tensors.shape(leaf.shape), as_stored, read))
    return outputs


def _reader(
    leaf: Any, index: tuple[int, ...], transposed: bool, dtype: np.dtype
) -> Callable[[], np.ndarray]:
    """What copies a leaf, or the part of it at `index`, to the host when it is to be written."""

    def read() -> np.ndarray:
        array = np.asarray(jax.device_get(leaf[index] if index else leaf))
        return (array.T if transposed else array).astype(dtype, copy=False)

    return read


def save_params(
    path: pathlib.Path, params: Any, config: ModelConfig, stop_ids: tuple[int, ...]
) -> None:
    """Writes config.json and weights, in the dtype of `params`, as transformers writes them."""
    path.mkdir(parents=True, exist_ok=True)
    write_tensors(path, STEM, outputs_of(params, config.arch), MAX_SHARD_BYTES)
    fields = hf_fields(config.arch, stop_ids)
    (path / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    (path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": list(stop_ids)}, indent=2) + "\n"
    )


def model_config(arch: Any, c: Any) -> ModelConfig:
    """`config.model` and a checkpoint's architecture -> ModelConfig. What is trained is float32.

    Raises:
      ConfigError: experts in int8; adapters on experts that are not there.
    """
    full = c.lora_rank == 0
    require(
        not c.lora_experts or arch.routing is not None,
        "model.lora_experts",
        c.lora_experts,
        "False for a model without experts",
    )
    require(
        not (arch.routing and c.param_dtype == "int8"),
        "model.param_dtype",
        c.param_dtype,
        "float32 or bfloat16 for a model with experts",
    )
    return ModelConfig(
        arch=arch,
        param_dtype=jnp.float32 if full else jnp.dtype(c.param_dtype),
        compute_dtype=jnp.dtype(c.compute_dtype),
        lora_rank=c.lora_rank,
        lora_alpha=c.lora_alpha,
        lora_experts=c.lora_experts,
        attention_block=c.attention_block,
        remat=c.remat,
    )
