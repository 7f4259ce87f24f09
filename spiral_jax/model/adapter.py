"""LoRA adapters in PEFT's format: adapter_config.json and adapter_model.safetensors <-> the `lora`
collection.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from spiral_jax.core.config import ConfigError
from spiral_jax.model.hf import MAX_SHARD_BYTES, PROJECTIONS, check_tensors, outputs_of, read_tree
from spiral_jax.model.tensor_files import open_tensors, write_tensors
from spiral_jax.model.transformer import ModelConfig, init_variables

STEM = "adapter_model"
_CONFIG = "adapter_config.json"
_TARGETS = sorted(theirs.split(".")[1] for theirs in PROJECTIONS.values())
# Fields of adapter_config.json that do not change what a trained adapter computes. Any other must
# be empty.
_INERT = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "target_modules", "lora_dropout", "init_lora_weights", "megatron_core", "qalora_group_size",
}  # fmt: skip


def abstract_lora(config: ModelConfig) -> Any:
    """Shapes and dtypes of the `lora` collection."""
    return jax.eval_shape(lambda: init_variables(config, jax.random.key(0)))["lora"]


def check_adapter(path: pathlib.Path, config: ModelConfig) -> None:
    """Reads `path`/adapter_config.json and compares it with `config.model`.

    Raises:
      ConfigError: none there or damaged; rank, alpha or target modules are others than configured;
        a field asks for what a plain LoRA adapter does not do.
    """
    file = path / _CONFIG
    try:
        fields = json.loads(file.read_bytes())
        kind = fields.get("peft_type")
    except OSError as error:
        raise ConfigError(f"config.model.adapter_path = {str(path)!r}: no {_CONFIG} there. Give a directory that "
                          "PEFT's save_pretrained or spiral_jax.export --adapter wrote.") from error  # fmt: skip
    except (ValueError, AttributeError) as error:
        raise ConfigError(
            f"{file}: not valid JSON of an adapter ({error}). Fetch the adapter again."
        ) from error
    if kind != "LORA":
        raise ConfigError(f"{file}: peft_type = {kind!r} is not supported; must be 'LORA'.")
    for name, theirs, ours in (
        ("r", "lora_rank", config.lora_rank),
        ("lora_alpha", "lora_alpha", config.lora_alpha),
    ):
        if fields.get(name) != ours:
            raise ConfigError(
                f"{file}: {name} = {fields.get(name)!r}, but config.model.{theirs} = {ours!r}: they must be equal."
            )
    targets = fields.get("target_modules")
    if not isinstance(targets, list) or sorted(targets) != _TARGETS:
        raise ConfigError(
            f"{file}: target_modules = {targets!r}: must be the list of all of {', '.join(_TARGETS)}."
        )
    init = fields.get("init_lora_weights")
    if init not in (True, False, None, "gaussian"):  # the others change the base weights
        raise ConfigError(
            f"{file}: init_lora_weights = {init!r} is not supported; must be true, false or 'gaussian'."
        )
    for name, value in fields.items():
        if name not in _INERT and value and value != "none":
            raise ConfigError(f"{file}: {name} = {value!r} is not supported; must be empty.")


def load_adapter(path: pathlib.Path, config: ModelConfig, mesh: Mesh) -> Any:
    """The adapter in `path` as the `lora` collection, float32, placed on `mesh`.

    Raises:
      ConfigError: see `check_adapter`.
      WeightsError: see `check_tensors`.
    """
    check_adapter(path, config)
    with open_tensors(path, STEM) as files:
        check_tensors(files, abstract_lora(config), config.arch)
        return read_tree(files, abstract_lora(config), config.arch, mesh)


def save_adapter(path: pathlib.Path, lora: Any, config: ModelConfig, base: str) -> None:
    """Writes `lora` in float32 into the directory `path`; `base` is where PEFT finds the base
    model.
    """
    alpha = config.lora_alpha
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.lora_rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": _TARGETS,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    outputs = outputs_of(lora, config.arch.L, np.dtype(np.float32))
    write_tensors(path, STEM, outputs, MAX_SHARD_BYTES)
    (path / _CONFIG).write_text(json.dumps(fields, indent=2) + "\n")
