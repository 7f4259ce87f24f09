"""The model's sizes for a plan: config.json alone, without weights or tokenizer."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from huggingface_hub import hf_hub_download
from ml_collections import ConfigDict

from spiral_jax.core.config import ConfigError
from spiral_jax.model import hf
from spiral_jax.model.architecture import read_architecture
from spiral_jax.model.attention.backends import choose_backend, choose_page_backend
from spiral_jax.model.transformer import ModelConfig

_SHIPPED = pathlib.Path(__file__).parent.parent / "assets" / "architectures"


def planned_model(c: ConfigDict, devices: list[Any] | None = None) -> tuple[ModelConfig, str]:
    """The model that config.model describes, and the file that its sizes were read from.

    `hf_path` may be a directory with config.json, a bundled model, a path whose last part is one of
    the architectures that are shipped (the directory itself need not exist), or a Hub id.

    Args:
      c: config.model.
      devices: that its programs are compiled for, which say how it attends; None: by `xla`.

    Raises:
      ConfigError: none of these, a config.json that is not supported, or attention that the
        devices do not have.
    """
    path = config_directory(c.hf_path)
    model = hf.model_config(read_architecture(path), c)
    if devices:
        attention = choose_backend(c.attention, devices[0], model.compute_dtype, model.arch.E)
        pages = choose_page_backend(c.attention, devices[0], model.arch.E)
        model = dataclasses.replace(model, attention=attention, pages=pages)
    return model, str(path / "config.json")


def config_directory(hf_path: str) -> pathlib.Path:
    """The directory whose config.json describes the model that `config.model.hf_path` names."""
    path = hf.BUNDLED.get(hf_path, pathlib.Path(hf_path))
    shipped = _SHIPPED / pathlib.Path(hf_path).name
    if path.is_dir():
        return path
    if shipped.is_dir():
        return shipped

    missing = f"config.model.hf_path = {hf_path!r}: no such directory"
    names = [*hf.BUNDLED, *sorted(directory.name for directory in _SHIPPED.iterdir())]
    advice = f"A plan needs a directory with config.json, a Hub id, or one of {', '.join(names)}."
    if hf_path.count("/") != 1:
        raise ConfigError(f"{missing}. {advice}")
    try:
        return pathlib.Path(hf_hub_download(hf_path, "config.json")).parent
    except Exception as error:  # no network, repository or permission: each has its own class
        reason = f"the Hub did not give its config.json ({type(error).__name__})"
        raise ConfigError(f"{missing}, and {reason}. {advice}") from error
