"""Does a configuration fit a topology, and if not, what first change makes it fit: micro-batch,
remat, slots, mesh.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from spiral_jax.core import mesh as meshes
from spiral_jax.core.config import ConfigError, groups_of_step
from spiral_jax.model import hf
from spiral_jax.model.architecture import Architecture
from spiral_jax.planning.inventory import Run
from spiral_jax.planning.profile import Profile, profile
from spiral_jax.planning.topology import Topology
from spiral_jax.planning.whole_step import Assumptions, predict, work_of

Overrides = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Attempt:
    """A configuration that was tried: what it changes, and what came of it.

    `part`: what has to change if it does not fit: "train", "sampler" or "mesh"; "" where it fits.
    """

    overrides: Overrides
    verdict: str
    part: str
    profiles: dict[str, Profile] = dataclasses.field(default_factory=dict)
    step: dict[str, Any] | None = None

    @property
    def fits(self) -> bool:
        return not self.part


@dataclasses.dataclass(frozen=True)
class Planner:
    """What all attempts share.

    Attributes:
      arch: the model's sizes.
      free: share of a chip's memory that must stay free.
      say: is told of every program before it is compiled.
    """

    arch: Architecture
    topology: Topology
    assumed: Assumptions
    free: float
    say: Callable[[str], None]

    def attempts(self, c: ConfigDict, most: int) -> Iterator[Attempt]:
        """Tries the configuration as it is, then changes of it until one fits or `most` were tried.

        What was too large decides what is changed next: micro-batch and remat, slots and cache, or
        the mesh.
        """
        as_given = self.attempt(c, {})
        yield as_given
        if as_given.fits or not most:
            return
        tried, given = 0, _with_whole_mesh(c, self.topology.chips)
        for shape in mesh_shapes(c, self.arch, self.topology.chips):
            mesh = _mesh_overrides(shape)
            train, sampler = (
                deque(options(c, shape[0] * shape[1]))
                for options in (train_options, sampler_options)
            )
            while train and sampler:
                overrides = mesh | train[0] | sampler[0]
                attempt = as_given
                if changed(c, overrides) != given:
                    attempt = self.attempt(c, overrides)
                    yield attempt
                    tried += 1
                if attempt.fits or tried >= most:
                    return
                if attempt.part == "mesh":
                    break
                (train if attempt.part == "train" else sampler).popleft()

    def attempt(self, c: ConfigDict, overrides: Overrides) -> Attempt:
        """Compiles (or estimates) the programs of `c` with `overrides`, the largest first, up to
        one too large.
        """
        c = changed(c, overrides)
        try:
            run = Run(c, hf.model_config(self.arch, c.model), make_mesh(c, self.topology))
        except ConfigError as error:
            return Attempt(
                overrides, str(error), "sampler" if "sampling." in str(error) else "train"
            )
        room = (1 - self.free) * self.topology.chip.hbm_bytes
        for part, memory in (("mesh", run.policy_memory()), ("sampler", run.sampler_memory())):
            if sum(memory.values()) > room:
                return Attempt(
                    overrides,
                    f"{', '.join(memory)}: {_gib(sum(memory.values()))} of {_gib(room)}",
                    part,
                )
        works, done = work_of(c, self.assumed), {}
        for name, program in run.programs({work.role: work.prompt for work in works}).items():
            self.say(program.name)
            done[name] = one = profile(program, self.topology, self.free)
            if not one.fits:
                verdict = f"{program.name}: {_gib(one.needed)} of {_gib(one.room)}"
                return Attempt(
                    overrides, verdict, "train" if name.startswith("train") else "sampler", done
                )
        return Attempt(
            overrides, "fits", "", done, predict(run, self.topology, works, self.assumed, done)
        )


def make_mesh(c: ConfigDict, topology: Topology) -> Mesh | AbstractMesh:
    """config.mesh on the topology's devices; without any, its sizes alone."""
    if topology.devices is not None:
        return meshes.make_mesh(c.mesh, topology.devices)
    return AbstractMesh(meshes.mesh_shape(c.mesh, topology.chips, "GPU"), meshes.AXES)


def changed(c: ConfigDict, overrides: Overrides) -> ConfigDict:
    c = c.copy_and_resolve_references()
    for field, value in overrides.items():
        room, name = field.split(".")
        c[room][name] = value
    return c


def _mesh_overrides(shape: tuple[int, int, int]) -> Overrides:
    return {f"mesh.{axis}": size for axis, size in zip(meshes.AXES, shape, strict=True)}


def _with_whole_mesh(c: ConfigDict, chips: int) -> ConfigDict:
    """`c` with what a -1 in config.mesh stands for; a mesh that cannot be stays as it is."""
    with contextlib.suppress(ConfigError):
        return changed(c, _mesh_overrides(meshes.mesh_shape(c.mesh, chips, "")))
    return changed(c, {})


def mesh_shapes(c: ConfigDict, arch: Architecture, chips: int) -> Iterator[tuple[int, int, int]]:
    """(data, fsdp, tensor): tensor from what is configured upwards, and for each the configured
    fsdp, then all.
    """
    for tensor in range(1, arch.J + 1):
        if tensor >= c.mesh.tensor and arch.J % tensor == 0 and chips % tensor == 0:
            rest = chips // tensor
            for fsdp in dict.fromkeys(
                ([c.mesh.fsdp] if rest % max(c.mesh.fsdp, 1) == 0 else []) + [rest]
            ):
                if fsdp > 0:
                    yield rest // fsdp, fsdp, tensor


def train_options(c: ConfigDict, multiple: int) -> list[Overrides]:
    """Micro-batches that the mesh divides, from the configured size down to one group a shard; then
    with remat.
    """
    roles = {f"{role}_groups": groups for role, groups in groups_of_step(c).items()}
    options = []
    for halvings in range(8):
        sizes = {}
        for field, groups in roles.items():
            size = max(multiple, c.batch[field] // 2**halvings // multiple * multiple)
            sizes |= {f"batch.{field}": size} if groups % size == 0 else {}
        kept = {
            field: size
            for field, size in sizes.items()
            if size != c.batch[field.removeprefix("batch.")]
        }
        if len(sizes) == len(roles) and kept not in options:
            options.append(kept)
    remat = (
        []
        if c.model.remat == "layer"
        else [option | {"model.remat": "layer"} for option in options]
    )
    return options + remat


def sampler_options(c: ConfigDict, multiple: int) -> list[Overrides]:
    """Slots that the mesh divides: as configured, two a shard, one a shard; then the last with an
    int8 cache.
    """
    options = []
    for least in (None, 2 * multiple, multiple):
        classes = tuple((least or slots, C, P, G) for slots, C, P, G in c.sampling.classes)
        if all(slots % multiple == 0 for slots, *_ in classes):
            option = (
                {}
                if classes == tuple(map(tuple, c.sampling.classes))
                else {"sampling.classes": classes}
            )
            options += [option] if option not in options else []
    return options + [options[-1] | {"sampling.cache_dtype": "int8"}]


def as_flags(overrides: Overrides) -> str:
    """The changes as flags of a command."""
    return " ".join(f"--config.{field}={_word(value)}" for field, value in overrides.items())


def _word(value: Any) -> str:
    return f"'{value}'" if isinstance(value, tuple) else str(value)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
