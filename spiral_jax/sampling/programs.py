"""All programs of a sampler, compiled once from shapes alone; a shape that is not among them is an
error, never a compilation.

    decode[rows]   for all rows, and for fewer of them as `Schedule.row_counts` says
    prefill[i]     prompts of each length, i: the class that groups with such prompts enter
    enter[i]       groups whose prompts are prefilled into that class
    move[i, j]     from a class to one that is narrower or longer
    clear[i]       a class without groups
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.stages import Compiled, Lowered

from spiral_jax.core import mesh as meshes
from spiral_jax.core.config import ConfigError
from spiral_jax.model.transformer import with_matmul_precision
from spiral_jax.sampling.decode import decode_chunk
from spiral_jax.sampling.prefill import Prefilled, Prompts, prefill
from spiral_jax.sampling.slots import (
    Admission,
    DecodeSettings,
    SlotClass,
    empty_state,
    enter,
    move,
    state_shardings,
)
from spiral_jax.sampling.weights import abstract_weights


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Static shape of the work.

    Attributes:
      classes: of slots; within one prompt length a group may move from class to class.
      chunk: decode steps a call, at most.
      exit_groups: a chunk ends early when this many groups can leave their slot.
      prefill_tokens: prompt tokens, padding included, of one call a shard.
      row_counts: rows of a shard, ascending, for which there are decode programs beside the one for
      all rows.
    """

    classes: tuple[SlotClass, ...]
    chunk: int
    exit_groups: int
    prefill_tokens: int
    row_counts: tuple[int, ...] = ()

    def entries(self) -> list[int]:
        """The class in which groups of each prompt length begin: the widest, of those the one with
        the least G.
        """
        of_length = itertools.groupby(self._by_prompt(), lambda i: self.classes[i].P)
        return [
            min(members, key=lambda i: (-self.classes[i].C, self.classes[i].G))
            for _, members in of_length
        ]

    def moves(self) -> list[tuple[int, int]]:
        """Pairs (from, to) of classes: the same prompt length, no wider, no shorter."""

        def may(a: SlotClass, b: SlotClass) -> bool:
            return a.P == b.P and b.C <= a.C and b.G >= a.G and (b.C, b.G) != (a.C, a.G)

        return [(i, j) for i, j in itertools.permutations(range(len(self.classes)), 2)
                if may(self.classes[i], self.classes[j])]  # fmt: skip

    def leave_at(self, i: int) -> int:
        """Running traces at which a group can move from class i to a narrower one; 0 where there is
        none.
        """
        return max((self.classes[j].C for a, j in self.moves() if a == i and self.classes[j].C < self.classes[i].C),
                   default=0)  # fmt: skip

    def decode_rows(self, shards: int) -> list[int]:
        """Rows of a shard that each decode program computes, ascending; the last computes all."""
        everything = sum(slots.rows for slots in self.classes) // shards
        return [*(rows for rows in self.row_counts if rows < everything), everything]

    def _by_prompt(self) -> list[int]:
        return sorted(range(len(self.classes)), key=lambda i: self.classes[i].P)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program, and what compiling it took. Under JAX_DISABLE_JIT it is the Python
    function itself.
    """

    run: Callable[..., Any]
    seconds: float

    @property
    def temp_bytes(self) -> int:
        """Device memory that it needs beside arguments and results."""
        analysis = self.run.memory_analysis() if isinstance(self.run, Compiled) else None
        return analysis.temp_size_in_bytes if analysis else 0


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is compiled: a function, the shapes and shardings of its arguments, and the shardings of
    its results.
    """

    mesh: Mesh
    function: Callable[..., Any]
    shapes: tuple[Any, ...]
    out: Any
    donate: tuple[int, ...] = ()

    def lower(self) -> Lowered:
        with jax.set_mesh(self.mesh):
            jitted = jax.jit(self.function, out_shardings=self.out, donate_argnums=self.donate)
            return jitted.lower(*self.shapes)

    def compile(self) -> Program:
        if jax.config.jax_disable_jit:
            return Program(self.function, 0.0)
        start = time.monotonic()
        return Program(self.lower().compile(), time.monotonic() - start)


def compile_programs(
    settings: DecodeSettings, schedule: Schedule
) -> dict[tuple[Any, ...], Program]:
    """Every program, by ("decode", rows), ("prefill", i), ("enter", i), ("move", i, j) and
    ("clear", i).
    """
    return {name: recipe.compile() for name, recipe in recipes(settings, schedule).items()}


def recipes(settings: DecodeSettings, schedule: Schedule) -> dict[tuple[Any, ...], Recipe]:
    """The same before they are compiled; the last decode program is that of all rows."""
    mesh, classes = settings.mesh, schedule.classes
    shards, along, everywhere = (
        meshes.group_count_multiple(mesh),
        meshes.group_sharding(mesh),
        meshes.replicated(mesh),
    )
    weights = abstract_weights(settings.config, mesh)
    states = [abstract_state(settings, slots) for slots in classes]
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=along)  # noqa: E731
    programs = {}
    for i, slots in enumerate(classes):
        programs["clear", i] = Recipe(
            mesh, functools.partial(empty_state, settings, slots), (), _places(states[i])
        )
    for i in schedule.entries():
        prompts, ready = (
            prompt_shapes(settings, schedule, i),
            abstract_prefilled(settings, schedule, i),
        )
        function = with_matmul_precision(
            settings.config, functools.partial(prefill, *_of_prefill(settings, classes[i]))
        )
        programs["prefill", i] = Recipe(mesh, function, (weights, prompts), _places(ready))
        shapes = states[i], ready, admission_shapes(settings, schedule, i)
        out = _places(states[i]), everywhere, everywhere  # every process follows all groups
        programs["enter", i] = Recipe(
            mesh, functools.partial(enter, settings), shapes, out, donate=(0,)
        )
    for i, j in schedule.moves():
        shapes = states[i], states[j], ints(shards), ints(shards), ints(shards, classes[j].C)
        out = _places(states[i]), _places(states[j])
        programs["move", i, j] = Recipe(
            mesh, functools.partial(move, settings), shapes, out, donate=(0, 1)
        )
    leave_at, counts = (
        tuple(schedule.leave_at(i) for i in range(len(states))),
        schedule.decode_rows(shards),
    )
    for rows in counts:
        fewer = max((count for count in counts if count < rows), default=0)
        function = functools.partial(
            decode_chunk,
            settings,
            classes,
            leave_at,
            schedule.chunk,
            schedule.exit_groups,
            rows,
            fewer,
        )
        function = with_matmul_precision(settings.config, function)
        out = _places(tuple(states)), everywhere, everywhere, everywhere
        programs["decode", rows] = Recipe(
            mesh, function, (weights, tuple(states)), out, donate=(1,)
        )
    return programs


def _places(tree: Any) -> Any:
    return jax.tree.map(lambda a: a.sharding, tree)


def describe(
    programs: dict[tuple[Any, ...], Program], settings: DecodeSettings, schedule: Schedule
) -> str:
    """What a person should know before the first token: every program, its compile time and memory,
    and the caches.
    """
    total = sum(program.seconds for program in programs.values())
    needed = _needed_bytes(settings, schedule)
    lines = [
        f"sampler: {len(programs)} programs, compiled in {total:.1f} s; a device holds "
        f"{needed['weights'] / 2**30:.2f} GiB of weights, {needed['slots'] / 2**30:.2f} GiB of keys and values, and up "
        f"to {needed['prompts'] / 2**30:.2f} GiB of prefilled prompts"
    ]
    for (kind, *what), program in programs.items():
        sizes = (
            [str(tuple(vars(schedule.classes[i]).values())) for i in what]
            if kind != "decode"
            else []
        )
        sizes = " -> ".join(sizes) or f"{what[0]} rows a shard"
        lines.append(
            f"  {kind:7} {program.seconds:6.1f} s {program.temp_bytes / 2**20:9.1f} MiB temporary  {sizes}"
        )
    shards = meshes.group_count_multiple(settings.mesh)
    for i, slots in enumerate(schedule.classes):
        if slots.slots == shards:
            lines.append(
                f"  note: config.sampling.classes[{i}] has one slot a shard, whose cache a TPU copies once a call, "
                f"which takes memory. {2 * shards} slots avoid that."
            )
    return "\n".join(lines)


def check_room(settings: DecodeSettings, schedule: Schedule, device_bytes: int) -> None:
    """Raises `ConfigError` if decode weights, slots and prefilled prompts alone need more than a
    device has.
    """
    needed = _needed_bytes(settings, schedule)
    missing = sum(needed.values()) - device_bytes
    if missing > 0:
        raise ConfigError(
            f"config.sampling.classes need {needed['slots'] / 2**30:.2f} GiB of keys and values a device, beside "
            f"{needed['prompts'] / 2**30:.2f} GiB of prefilled prompts and {needed['weights'] / 2**30:.2f} GiB of "
            f"decode weights: {missing / 2**30:.2f} GiB more than its {device_bytes / 2**30:.2f} GiB. Lower slots, C, "
            "P or G of the largest class, or sampling.prefill_tokens, set sampling.cache_dtype = 'int8', or raise "
            "mesh.tensor."
        )


def device_bytes(mesh: Mesh) -> int:
    """Memory of one device: what it reports, or its share of the host's on a CPU."""
    stats = mesh.local_devices[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count()


def _needed_bytes(settings: DecodeSettings, schedule: Schedule) -> dict[str, int]:
    def on_a_device(tree: Any) -> int:
        leaves = jax.tree.leaves(tree)
        return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in leaves)

    return {
        "weights": on_a_device(abstract_weights(settings.config, settings.mesh)),
        "slots": on_a_device([abstract_state(settings, slots) for slots in schedule.classes]),
        "prompts": on_a_device(
            [abstract_prefilled(settings, schedule, i) for i in schedule.entries()]
        ),
    }


def abstract_state(settings: DecodeSettings, slots: SlotClass) -> Any:
    """Shapes, dtypes and shardings of a class's `SlotState`."""
    return _placed(jax.eval_shape(functools.partial(empty_state, settings, slots)), settings.mesh)


def abstract_prefilled(settings: DecodeSettings, schedule: Schedule, i: int) -> Prefilled:
    """Shapes, dtypes and shardings of prompts that groups enter class i from."""
    function = functools.partial(prefill, *_of_prefill(settings, schedule.classes[i]))
    weights = abstract_weights(settings.config, settings.mesh)
    return _placed(
        jax.eval_shape(function, weights, prompt_shapes(settings, schedule, i)), settings.mesh
    )


def _of_prefill(settings: DecodeSettings, slots: SlotClass) -> tuple[Any, ...]:
    """The static arguments of `prefill` for a class."""
    return settings.config, settings.cache_dtype, settings.chunk_of(slots.P)


def _placed(tree: Any, mesh: Mesh) -> Any:
    place = state_shardings(tree, mesh)
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, place
    )


def prompt_shapes(settings: DecodeSettings, schedule: Schedule, i: int) -> Prompts:
    """Shapes of a prefill for class i: as many prompts as `prefill_tokens` pays for, at least one a
    shard.
    """
    tokens = settings.cached_prompt(schedule.classes[i].P)
    ints = _ints(settings, schedule, i)
    return Prompts(ints(tokens), ints())


def admission_shapes(settings: DecodeSettings, schedule: Schedule, i: int) -> Admission:
    """Shapes of an admission into class i: as many groups as a prefill has prompts."""
    ints = _ints(settings, schedule, i)
    return Admission(ints(), ints(6), ints(), ints(schedule.classes[i].C), ints())


def _ints(
    settings: DecodeSettings, schedule: Schedule, i: int
) -> Callable[..., jax.ShapeDtypeStruct]:
    """(*shape) -> int32 [Z, W, *shape] along the groups' axes; W is that of class i."""
    slots, shards = schedule.classes[i], meshes.group_count_multiple(settings.mesh)
    W = max(
        1, min(schedule.prefill_tokens // settings.cached_prompt(slots.P), slots.slots // shards)
    )
    along = meshes.group_sharding(settings.mesh)
    return lambda *shape: jax.ShapeDtypeStruct((shards, W, *shape), jnp.int32, sharding=along)
