"""Does a run fit a topology, and if not, what first change of its configuration makes it fit?"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Literal

from spiral_jax.core import mesh as meshes
from spiral_jax.core.config import ConfigError
from spiral_jax.learner.settings import RoleShapes
from spiral_jax.model.architecture import Architecture
from spiral_jax.planning.inventory import Inventory, TooFewPages
from spiral_jax.planning.planned_program import plan_programs
from spiral_jax.planning.profile import Profile, profile
from spiral_jax.planning.settings import Overrides, PlanSettings, mesh_overrides, micro_field
from spiral_jax.planning.topology import Topology
from spiral_jax.planning.usage import usage_of
from spiral_jax.planning.whole_step import predict, whole_run
from spiral_jax.planning.work import Assumptions, work_of_step

Part = Literal["train", "sampler", "pages", "mesh"]


@dataclasses.dataclass(frozen=True)
class Attempt:
    """A configuration that was tried: what it changes, and what came of it.

    Attributes:
      at_fault: what has to change if it does not fit; None where it fits. "sampler": it takes too
        much; "pages": what it takes is too little for one group.
      pages: what the sampler has, for JSON; None where it has too few.
      profiles: of the programs by name, up to the first that does not fit.
      step: what `predict` says of a whole step, where it fits.
      run: what `whole_run` says of all steps, where it fits.
    """

    overrides: Overrides
    verdict: str
    at_fault: Part | None
    pages: dict[str, Any] | None = None
    profiles: dict[str, Profile] = dataclasses.field(default_factory=dict)
    step: dict[str, Any] | None = None
    run: dict[str, Any] | None = None

    @property
    def fullest(self) -> Profile:
        """Of the program that needs most of a chip's memory."""
        return max(self.profiles.values(), key=lambda profile: profile.needed)

    @property
    def fits(self) -> bool:
        return self.at_fault is None


@dataclasses.dataclass(frozen=True)
class Planner:
    """What all attempts share.

    Attributes:
      settings: what is configured.
      take: the inventory of the run with some fields of its configuration changed.
      arch: the model's sizes.
      free: share of a chip's memory that must stay free.
      say: is told of every program before it is compiled.
    """

    settings: PlanSettings
    take: Callable[[Overrides], Inventory]
    arch: Architecture
    topology: Topology
    assumed: Assumptions
    free: float
    say: Callable[[str], None]

    def attempts(self, most: int) -> Iterator[Attempt]:
        """Tries the configuration as it is, then changes of it until one fits or `most` were tried.

        What was at fault decides what is changed next: micro-batch and remat, the memory for
        pages, what a token takes of it, or the mesh.
        """
        as_configured = self.attempt({})
        yield as_configured
        if as_configured.fits or not most:
            return

        tried = 0
        settings = _resolve_mesh(self.settings, self.topology.chips)
        for shape in mesh_shapes(self.settings.mesh, self.arch, self.topology.chips):
            shards = shape[0] * shape[1]
            options: dict[Part, deque[Overrides]] = {
                "train": deque(train_options(settings, shards)),
                "sampler": deque(memory_options(settings)),
                "pages": deque([{}, {"sampling.cache_dtype": "int8"}]),
            }
            while all(options.values()):
                overrides = mesh_overrides(shape)
                for of_part in options.values():
                    overrides |= of_part[0]
                attempt = as_configured
                if settings.is_changed_by(overrides):
                    attempt = self.attempt(overrides)
                    yield attempt
                    tried += 1
                if attempt.fits or tried >= most:
                    return
                if attempt.at_fault == "mesh":
                    break
                options[attempt.at_fault].popleft()

    def attempt(self, overrides: Overrides) -> Attempt:
        """Compiles (or estimates) the programs, the largest first, up to one that is too large."""
        try:
            inventory = self.take(overrides)
        except TooFewPages as error:
            return Attempt(overrides, str(error), "pages")
        except ConfigError as error:
            return Attempt(overrides, str(error), "train")

        room = (1 - self.free) * self.topology.chip.hbm_bytes
        resident: dict[Part, dict[str, int]] = {
            "mesh": inventory.policy_memory(),
            "sampler": inventory.sampler_memory(),
        }
        for part, memory in resident.items():
            needed = sum(memory.values())
            if needed > room:
                verdict = f"{', '.join(memory)}: {_gib(needed)} of {_gib(room)}"
                return Attempt(overrides, verdict, part, inventory.pages())

        works, schedule = work_of_step(inventory.settings, self.assumed), inventory.engine.schedule
        usage = usage_of(works, schedule, self.assumed.row_occupancy)
        programs = plan_programs(inventory, works, usage)
        profiles = {}
        for name, program in programs.items():
            self.say(program.name)
            profiles[name] = profile(program, self.topology, self.free)
            if not profiles[name].fits:
                needed, room = profiles[name].needed, profiles[name].room
                verdict = f"{program.name}: {_gib(needed)} of {_gib(room)}"
                part = "train" if name.startswith("train") else "sampler"
                return Attempt(overrides, verdict, part, inventory.pages(), profiles)
        step = predict(
            inventory.settings,
            self.topology,
            works,
            self.assumed,
            usage,
            inventory.shards,
            profiles,
        )
        run = whole_run(inventory.settings, step, inventory.chips)
        return Attempt(overrides, "fits", None, inventory.pages(), profiles, step, run)


def _resolve_mesh(settings: PlanSettings, chips: int) -> PlanSettings:
    """With what a -1 of the mesh stands for; a mesh that cannot be stays as it is."""
    sizes = dict(zip(meshes.AXES, settings.mesh, strict=True))
    with contextlib.suppress(ConfigError):
        return dataclasses.replace(settings, mesh=meshes.mesh_shape(sizes, chips, ""))
    return settings


def mesh_shapes(
    configured: tuple[int, int, int], arch: Architecture, chips: int
) -> Iterator[tuple[int, int, int]]:
    """(data, fsdp, tensor): tensor from what is configured upwards; for each fsdp, then all."""
    _, fsdp, least_tensor = configured
    for tensor in range(max(1, least_tensor), arch.J + 1):
        if arch.J % tensor or chips % tensor:
            continue
        shards = chips // tensor
        if fsdp > 0 and shards % fsdp == 0:
            yield shards // fsdp, fsdp, tensor
        if fsdp != shards:
            yield 1, shards, tensor


def train_options(settings: PlanSettings, shards: int) -> list[Overrides]:
    """Micro-batches that the mesh divides, from the configured size down; then with remat.

    The smallest has one group a shard.
    """
    options = []
    for halvings in range(8):
        option, divides = {}, True
        for role, shapes in settings.learner.shapes.items():
            size = _halve(shapes, halvings, shards)
            divides = divides and shapes.most_groups % size == 0
            if size != shapes.micro_groups:
                option[micro_field(role)] = size
        if divides and option not in options:
            options.append(option)
    if settings.remat == "layer":
        return options
    return options + [option | {"model.remat": "layer"} for option in options]


def _halve(shapes: RoleShapes, halvings: int, multiple: int) -> int:
    """Groups of the role's micro-batch, halved so often: a multiple, at least that itself."""
    return max(multiple, shapes.micro_groups // 2**halvings // multiple * multiple)


def memory_options(settings: PlanSettings) -> list[Overrides]:
    """The memory for pages: as configured, three quarters of it, half of it."""
    lower = [{"sampling.memory": round(share * settings.memory, 4)} for share in (0.75, 0.5)]
    return [{}, *lower]


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
