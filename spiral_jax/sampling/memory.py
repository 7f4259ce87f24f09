"""Whether a device has room for the sampler, and the report that a run starts with."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import jax
from jax.sharding import Mesh

from spiral_jax.core import mesh as meshes
from spiral_jax.core.config import ConfigError
from spiral_jax.sampling.programs import CompiledProgram, Name
from spiral_jax.sampling.settings import DecodeSettings, Schedule
from spiral_jax.sampling.shapes import abstract_prefilled, abstract_state
from spiral_jax.sampling.weights import abstract_weights

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Needed:
    """Bytes on a device of what lies there while traces are sampled."""

    weights: int
    slots: int
    prompts: int

    @property
    def total(self) -> int:
        return self.weights + self.slots + self.prompts


def needed_bytes(settings: DecodeSettings, schedule: Schedule) -> Needed:
    """What the sampler needs on each device, beside what its programs take while they run."""
    slots = [abstract_state(settings, slots) for slots in schedule.classes]
    prompts = [abstract_prefilled(settings, schedule, i) for i in schedule.entries()]
    return Needed(
        weights=_bytes_on_a_device(abstract_weights(settings.config, settings.mesh)),
        slots=_bytes_on_a_device(slots),
        prompts=_bytes_on_a_device(prompts),
    )


def check_memory(settings: DecodeSettings, schedule: Schedule, device_bytes: int) -> None:
    """Checks that decode weights, slots and prefilled prompts fit into a device's memory.

    Raises:
      ConfigError: they alone need more than it has.
    """
    needed = needed_bytes(settings, schedule)
    missing = needed.total - device_bytes
    if missing > 0:
        raise ConfigError(
            f"config.sampling.classes need {needed.slots / GIB:.2f} GiB of keys and values a "
            f"device, beside {needed.prompts / GIB:.2f} GiB of prefilled prompts and "
            f"{needed.weights / GIB:.2f} GiB of decode weights: {missing / GIB:.2f} GiB more than "
            f"its {device_bytes / GIB:.2f} GiB. Lower slots, C, P or G of the largest class, or "
            "sampling.prefill_tokens, set sampling.cache_dtype = 'int8', or raise mesh.tensor."
        )


def memory_of_a_device(mesh: Mesh) -> int:
    """Bytes of one device: what it reports, or its share of the host's on a CPU."""
    stats = mesh.local_devices[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return host // jax.local_device_count()


def describe(
    programs: dict[Name, CompiledProgram], settings: DecodeSettings, schedule: Schedule
) -> str:
    """The report of a start: every program with its compile time and memory, and the caches."""
    seconds = sum(program.seconds for program in programs.values())
    needed = needed_bytes(settings, schedule)
    lines = [
        f"sampler: {len(programs)} programs, compiled in {seconds:.1f} s; a device holds "
        f"{needed.weights / GIB:.2f} GiB of weights, {needed.slots / GIB:.2f} GiB of keys and "
        f"values, and up to {needed.prompts / GIB:.2f} GiB of prefilled prompts"
    ]
    for (kind, *which), program in programs.items():
        if kind == "decode":
            sizes = f"{which[0]} rows a shard"
        else:
            sizes = " -> ".join(str(schedule.classes[i].sizes) for i in which)
        temporary = f"{program.temp_bytes / 2**20:9.1f} MiB temporary"
        lines.append(f"  {kind:7} {program.seconds:6.1f} s {temporary}  {sizes}")

    shards = meshes.group_count_multiple(settings.mesh)
    for i, slots in enumerate(schedule.classes):
        if slots.slots == shards:
            lines.append(
                f"  note: config.sampling.classes[{i}] has one slot a shard, whose cache a TPU "
                f"copies once a call, which takes memory. {2 * shards} slots avoid that."
            )
    return "\n".join(lines)


def _bytes_on_a_device(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in leaves)
