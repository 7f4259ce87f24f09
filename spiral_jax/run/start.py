"""What a new run starts from: a checkpoint, and a PEFT adapter or what another run has trained."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from spiral_jax.core.config import ConfigError, from_plain, require
from spiral_jax.core.mesh import weight_shardings, with_shardings
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
        """What was trained, placed on `mesh`, without optimizer state.

        Args:
          shapes: of `params` or `lora`, with their dtypes.

        Raises:
          CheckpointError: damaged, or arrays of other shapes.
        """
        target = with_shardings(shapes, weight_shardings(shapes, mesh))
        with Checkpoints(self.workdir / "checkpoints", keep=None) as checkpoints:
            return checkpoints.restore_part({"trained": target}, self.step)["trained"]

    def digest(self) -> str:
        """SHA-256 over name, shape and checksum of each array that was trained.

        The same numbers have the same digest, whenever they were saved.

        Raises:
          CheckpointError: damaged.
        """
        with Checkpoints(self.workdir / "checkpoints", keep=None) as checkpoints:
            arrays = checkpoints.arrays(self.step)
        trained = {name: array for name, array in arrays.items() if name.startswith("trained/")}
        return hashlib.sha256(json.dumps(trained, sort_keys=True).encode()).hexdigest()


def find_trained(workdir: pathlib.Path, step: int | None) -> Trained:
    """The checkpoint of `step` (None: the newest) in a run's directory.

    Raises:
      WorkdirError: no run there.
      CheckpointError: no such checkpoint.
      ConfigError: a run of another version.
    """
    c = from_plain(read_config(workdir)[0])
    with Checkpoints(workdir / "checkpoints", keep=None) as checkpoints:
        return Trained(workdir, c, checkpoints.existing(step))


@dataclasses.dataclass(frozen=True)
class Start:
    """What config.model says a run, or an evaluation, starts from.

    Attributes:
      path: directory that config.model.hf_path names.
      adapter_path, init_from: the fields of config.model; at most one of them is not empty.
        `init_from` names a step, so that a resumed run has the reference that it began with.
    """

    path: pathlib.Path
    model: ModelConfig
    mesh: Mesh
    adapter_path: str
    init_from: str

    def check(self) -> None:
        """Checks adapter and other run without reading a weight.

        Raises:
          ConfigError: not there, or made for another model; the message names the field.
        """
        if self.adapter_path:
            check_adapter(pathlib.Path(self.adapter_path), self.model)
        if self.init_from:
            self._other_run()

    def load_base(self) -> Any:
        """The checkpoint's parameters, placed on the mesh. Raises: see `hf.load_params`."""
        return hf.load_params(self.path, self.model, self.mesh)

    def load(self) -> tuple[Any, Any | None]:
        """(parameters, adapters), placed on the mesh.

        No adapters at rank 0, or where they are to be fresh.

        Raises:
          ConfigError: see `check`.
          WeightsError, CheckpointError: see `hf.load_params` and `Trained.load`.
        """
        self.check()
        trained = self._other_run() if self.init_from else None
        if trained and not self.model.lora_rank:
            return trained.load(hf.abstract_params(self.model), self.mesh), None
        base = self.load_base()
        if trained:
            return base, trained.load(abstract_lora(self.model), self.mesh)
        if self.adapter_path:
            return base, load_adapter(pathlib.Path(self.adapter_path), self.model, self.mesh)
        return base, None

    def load_policy(self) -> dict[str, Any]:
        """The model's collections; adapters without values change nothing."""
        params, lora = self.load()
        if not self.model.lora_rank:
            return {"params": params}
        if lora is None:
            lora = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract_lora(self.model))
        return {"params": params, "lora": lora}

    def searcher(self, name: str) -> Start:
        """The start that config.eval.searcher names: "base", or a run's WORKDIR@step."""
        init_from = "" if name == "base" else name
        return dataclasses.replace(self, adapter_path="", init_from=init_from)

    def _other_run(self) -> Trained:
        """The checkpoint that `init_from` names.

        Raises:
          ConfigError: it names no step, or its run has not trained the same thing on the same
            base.
        """
        field = f"config.model.init_from = {self.init_from!r}"
        workdir, step = _parse(self.init_from)
        try:
            trained = find_trained(workdir, step)
        except (WorkdirError, CheckpointError, ConfigError) as error:
            raise ConfigError(f"{field}: {error}") from error
        theirs = trained.c.model
        pairs = {
            "lora_rank": (theirs.lora_rank, self.model.lora_rank),
            "hf_path": (
                str(hf.resolve_path(theirs.hf_path).resolve()),
                str(self.path.resolve()),
            ),
        }
        if theirs.lora_rank:
            pairs["lora_alpha"] = (theirs.lora_alpha, self.model.lora_alpha)
            pairs["lora_experts"] = (theirs.lora_experts, self.model.lora_experts)
        for name, (there, here) in pairs.items():
            if there != here:
                raise ConfigError(
                    f"{field}: that run has model.{name} = {there!r}, this one {here!r}: they must "
                    "be equal. Or write that run to a directory with spiral_jax.export, and give "
                    "it as model.hf_path or model.adapter_path."
                )
        return trained


def trained_digest(name: str) -> str:
    """`Trained.digest` of what WORKDIR@step names. Raises: see `find_trained`."""
    return find_trained(*_parse(name)).digest()


def _parse(init_from: str) -> tuple[pathlib.Path, int]:
    """WORKDIR@step -> (workdir, step). Raises `ConfigError` where there is no step."""
    workdir, _, step = init_from.rpartition("@")
    require(
        bool(workdir) and step.isdecimal(),
        "model.init_from",
        init_from,
        "WORKDIR@step",
        "The newest step may be another one when a run is resumed. WORKDIR/checkpoints has them.",
    )
    return pathlib.Path(workdir), int(step)
