"""What a new run starts from: a checkpoint's parameters, and on top a PEFT adapter or what another
run has trained.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from spiral_jax.core.config import ConfigError, from_plain
from spiral_jax.core.mesh import weight_shardings
from spiral_jax.model import hf
from spiral_jax.model.adapter import abstract_lora, check_adapter, load_adapter
from spiral_jax.model.transformer import ModelConfig
from spiral_jax.run.checkpoint import CheckpointError, Checkpoints
from spiral_jax.run.workdir import WorkdirError, read_config


@dataclasses.dataclass(frozen=True)
class Trained:
    """A checkpoint of a run: its directory, its configuration, its step."""

    workdir: pathlib.Path
    c: ConfigDict
    step: int

    def load(self, shapes: Any, mesh: Mesh) -> Any:
        """What was trained, in the shapes and dtypes of `params` or `lora`, placed on `mesh`,
        without optimizer state.

        Raises:
          CheckpointError: damaged, or arrays of other shapes.
        """
        target = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            shapes,
            weight_shardings(shapes, mesh),
        )
        with Checkpoints(self.workdir / "checkpoints", keep=None) as checkpoints:
            return checkpoints.restore_part({"trained": target}, self.step)["trained"]


def find_trained(workdir: pathlib.Path, step: int | None) -> Trained:
    """The checkpoint of `step` (None: the newest) in a run's directory.

    Raises:
      WorkdirError: no run there. CheckpointError: no such checkpoint. ConfigError: a run of another
      version.
    """
    c = from_plain(read_config(workdir)[0])
    with Checkpoints(workdir / "checkpoints", keep=None) as checkpoints:
        return Trained(workdir, c, checkpoints.existing(step))


def check_start(c: ConfigDict, path: pathlib.Path, model: ModelConfig) -> None:
    """Checks config.model.adapter_path and config.model.init_from without reading a weight.

    Raises:
      ConfigError: not there, or made for another model; the message names the field.
    """
    if c.model.adapter_path:
        check_adapter(pathlib.Path(c.model.adapter_path), model)
    if c.model.init_from:
        _source(c, path)


def load_start(
    c: ConfigDict, path: pathlib.Path, model: ModelConfig, mesh: Mesh
) -> tuple[Any, Any | None]:
    """(parameters, adapters) of a new run, placed on `mesh`; no adapters at rank 0, or where they
    are to be fresh.

    Args:
      path: directory of config.model.hf_path.

    Raises:
      ConfigError: see `check_start`. WeightsError, CheckpointError: see `hf.load_params` and
      `Trained.load`.
    """
    check_start(c, path, model)
    trained = _source(c, path) if c.model.init_from else None
    if trained and not model.lora_rank:
        return trained.load(hf.abstract_params(model), mesh), None
    base = hf.load_params(path, model, mesh)
    if trained:
        return base, trained.load(abstract_lora(model), mesh)
    return base, load_adapter(
        pathlib.Path(c.model.adapter_path), model, mesh
    ) if c.model.adapter_path else None


def load_policies(
    c: ConfigDict, path: pathlib.Path, model: ModelConfig, mesh: Mesh
) -> tuple[dict, dict | None]:
    """What an evaluation draws from: the model's collections, and those of config.eval.searcher
    (None: the same).

    Raises: as `load_start`, of config.model.init_from or config.eval.searcher.
    """
    policy = _collections(load_start(c, path, model, mesh), model)
    if not c.eval.searcher:
        return policy, None
    c = c.copy_and_resolve_references()
    c.model.adapter_path, c.model.init_from = (
        "",
        "" if c.eval.searcher == "base" else c.eval.searcher,
    )
    return policy, _collections(load_start(c, path, model, mesh), model)


def _collections(start: tuple[Any, Any | None], model: ModelConfig) -> dict[str, Any]:
    """Adapters that change nothing where the model has some and the policy none."""
    params, adapters = start
    if not model.lora_rank:
        return {"params": params}
    if adapters is None:
        adapters = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract_lora(model))
    return {"params": params, "lora": adapters}


def _source(c: ConfigDict, path: pathlib.Path) -> Trained:
    """The checkpoint that config.model.init_from names. Its run must have trained the same thing on
    the same base.
    """
    field = f"config.model.init_from = {c.model.init_from!r}"
    workdir, at, step = c.model.init_from.rpartition("@")
    named = bool(at) and step.isdecimal()
    try:
        trained = find_trained(
            pathlib.Path(workdir if named else c.model.init_from), int(step) if named else None
        )
    except (WorkdirError, CheckpointError, ConfigError) as error:
        raise ConfigError(f"{field}: {error}") from error
    other = {name: (trained.c.model[name], c.model[name]) for name in ("lora_rank", "lora_alpha")}
    if not trained.c.model.lora_rank:
        del other["lora_alpha"]
    other["hf_path"] = (
        str(hf.resolve_path(trained.c.model.hf_path).resolve()),
        str(path.resolve()),
    )
    for name, (there, here) in other.items():
        if there != here:
            raise ConfigError(
                f"{field}: that run has model.{name} = {there!r}, this one {here!r}: they must be equal. Or write that "
                "run to a directory with spiral_jax.export, and give it as model.hf_path or model.adapter_path."
            )
    return trained
