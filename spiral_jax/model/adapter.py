"""LoRA adapters in PEFT's format <-> the `lora` collection.

PEFT's files are adapter_config.json and adapter_model.safetensors. Of experts we write a tensor for
each projection of each expert, as PEFT does where they are modules (transformers 4); with
transformers 5 PEFT fuses them when it reads such files. What it writes then we read too
(`fused_adapters.py`).
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from spiral_jax.core.config import ConfigError
from spiral_jax.model.fused_adapters import PARAMETERS, by_projection
from spiral_jax.model.hf import (
    MAX_SHARD_BYTES,
    PROJECTIONS,
    adapted_projections,
    check_tensors,
    outputs_of,
    read_tree,
)
from spiral_jax.model.tensor_files import open_tensors, write_tensors
from spiral_jax.model.transformer import ModelConfig, init_variables

STEM = "adapter_model"
_CONFIG = "adapter_config.json"
# Fields of adapter_config.json that do not change what a trained adapter computes. Any other must
# be empty.
_INERT = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path"}
_INERT |= {"revision", "inference_mode", "r", "lora_alpha", "target_modules", "lora_dropout"}
_INERT |= {"init_lora_weights", "megatron_core", "qalora_group_size"}
_OF_FUSED = {"target_parameters", "rank_pattern", "alpha_pattern"}  # see `_check_fused`
_IN_FUSED = {"gate_proj", "up_proj", "down_proj"}


def target_modules(config: ModelConfig) -> list[str]:
    """PEFT's names of the projections that have an adapter."""
    return sorted(PROJECTIONS[name].split(".")[1] for name in adapted_projections(config))


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
    fields = _read_fields(path)

    def refuse(name: str, must: str) -> None:
        raise ConfigError(
            f"{file}: {name} = {fields.get(name)!r} is not supported; must be {must}."
        )

    if fields.get("peft_type") != "LORA":
        refuse("peft_type", "'LORA'")
    for name, ours in (("r", "lora_rank"), ("lora_alpha", "lora_alpha")):
        if fields.get(name) != getattr(config, ours):
            raise ConfigError(
                f"{file}: {name} = {fields.get(name)!r}, but config.model.{ours} = "
                f"{getattr(config, ours)!r}: they must be equal."
            )
    inert, ours = _INERT, target_modules(config)
    if config.lora_experts and fields.get("target_parameters"):
        _check_fused(fields, config, refuse)
        inert, ours = inert | _OF_FUSED, [name for name in ours if name not in _IN_FUSED]
    targets = fields.get("target_modules")
    if not isinstance(targets, list) or sorted(targets) != ours:
        experts = f" at model.lora_experts = {config.lora_experts}" if config.arch.routing else ""
        refuse("target_modules", f"the list of all of {', '.join(ours)}{experts}")
    if fields.get("init_lora_weights") not in (True, False, None, "gaussian"):
        refuse("init_lora_weights", "true, false or 'gaussian'")  # others change the base weights
    for name, value in fields.items():
        if name not in inert and value and value != "none":
            refuse(name, "empty")


def _check_fused(
    fields: dict[str, Any], config: ModelConfig, refuse: Callable[[str, str], None]
) -> None:
    """Checks what says which experts' parameters PEFT wraps, at which rank.

    gate_up_proj may have twice the rank, at the same alpha / rank.
    """
    wrapped = fields["target_parameters"]
    names = [name.split(".")[-1] for name in wrapped] if isinstance(wrapped, list) else []
    if sorted(names) != [*PARAMETERS]:
        refuse("target_parameters", f"the list of {' and '.join(PARAMETERS)} of mlp.experts")
    twice = {"rank_pattern": 2 * config.lora_rank, "alpha_pattern": 2 * config.lora_alpha}
    if not any(fields.get(name) for name in twice):
        return
    for (name, value), other in zip(twice.items(), reversed(twice), strict=True):
        found = fields.get(name) or {}
        # a pattern is a regular expression
        plain = {re.sub(r"[\\.*^$]", "", pattern): found[pattern] for pattern in found}
        if plain != {"gate_up_proj": value}:
            refuse(name, f"{value:g} for gate_up_proj alone, or empty as {other} must be then")


def _read_fields(path: pathlib.Path) -> dict[str, Any]:
    file = path / _CONFIG
    try:
        fields = json.loads(file.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"config.model.adapter_path = {str(path)!r}: no {_CONFIG} there. Give a directory that "
            "PEFT's save_pretrained or spiral_jax.export --adapter wrote."
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"{file}: not valid JSON of an adapter ({error}). Fetch the adapter again."
        ) from error
    if not isinstance(fields, dict):
        raise ConfigError(
            f"{file}: not valid JSON of an adapter (no object at the top). Fetch the adapter again."
        )
    return fields


def load_adapter(path: pathlib.Path, config: ModelConfig, mesh: Mesh) -> Any:
    """The adapter in `path` as the `lora` collection, float32, placed on `mesh`.

    Raises:
      ConfigError: see `check_adapter`.
      WeightsError: see `check_tensors`.
    """
    check_adapter(path, config)
    with open_tensors(path, STEM) as files:
        if config.lora_experts:
            files = by_projection(files, config)
        check_tensors(files, abstract_lora(config), config.arch)
        return read_tree(files, abstract_lora(config), config.arch, mesh)


def save_adapter(path: pathlib.Path, lora: Any, config: ModelConfig, base: str) -> None:
    """Writes `lora` in float32 into the directory `path`.

    Args:
      base: where PEFT finds the base model.
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
        "target_modules": target_modules(config),
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    outputs = outputs_of(lora, config.arch, np.dtype(np.float32))
    write_tensors(path, STEM, outputs, MAX_SHARD_BYTES)
    (path / _CONFIG).write_text(json.dumps(fields, indent=2) + "\n")
