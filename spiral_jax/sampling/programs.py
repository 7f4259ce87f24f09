"""All programs of a sampler, compiled once from shapes alone.

    decode[rows]   for all rows, and for fewer of them as `Schedule.row_counts` says
    prefill[i]     prompts of each length, i: the class that groups with such prompts enter
    enter[i]       groups whose prompts are prefilled into that class
    move[i, j]     from a class to one that is narrower or longer
    clear[i]       a class without groups

A shape that is not among them is an error, never a compilation.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from jax.stages import Compiled, Lowered

from spiral_jax.core import mesh as meshes
from spiral_jax.model.transformer import with_matmul_precision
from spiral_jax.sampling.decode import Chunk, decode_chunk
from spiral_jax.sampling.prefill import prefill
from spiral_jax.sampling.settings import DecodeSettings, Schedule
from spiral_jax.sampling.shapes import (
    abstract_prefilled,
    abstract_state,
    admission_shapes,
    move_shapes,
    prompt_shapes,
    shardings,
)
from spiral_jax.sampling.slots import Entered, empty_state, enter, move
from spiral_jax.sampling.weights import abstract_weights

# Unless told not to, XLA for GPUs lays all weights that multiply the same few rows side by side, to
# have one product: it would copy the weights of every layer for every token that is decoded.
_GPU_OPTIONS = {"xla_gpu_dot_merger_threshold_mb": 0}

# ("decode", rows), ("prefill", i), ("enter", i), ("move", i, j), ("clear", i)
Name = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """A compiled program, and the seconds that compiling it took.

    Under JAX_DISABLE_JIT it is the Python function itself.
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
    """What is compiled.

    Attributes:
      function: of arrays.
      shapes: shapes and shardings of its arguments.
      out: shardings of its results.
      donate: arguments whose memory the results take over.
    """

    mesh: Mesh
    function: Callable[..., Any]
    shapes: tuple[Any, ...]
    out: Any
    donate: tuple[int, ...] = ()

    @property
    def compiler_options(self) -> dict[str, Any]:
        """Of `Lowered.compile`, for the mesh's devices; none where it has none."""
        if not isinstance(self.mesh, Mesh):
            return {}
        is_gpu = self.mesh.devices.flat[0].platform in meshes.GPU_PLATFORMS
        return _GPU_OPTIONS if is_gpu else {}

    def lower(self) -> Lowered:
        with jax.set_mesh(self.mesh):
            jitted = jax.jit(self.function, out_shardings=self.out, donate_argnums=self.donate)
            return jitted.lower(*self.shapes)

    def compile(self) -> CompiledProgram:
        if jax.config.jax_disable_jit:
            return CompiledProgram(self.function, 0.0)
        start = time.monotonic()
        run = self.lower().compile(self.compiler_options or None)
        return CompiledProgram(run, time.monotonic() - start)


def compile_programs(settings: DecodeSettings, schedule: Schedule) -> dict[Name, CompiledProgram]:
    """Every program, by its name."""
    return {name: recipe.compile() for name, recipe in recipes(settings, schedule).items()}


def recipes(settings: DecodeSettings, schedule: Schedule) -> dict[Name, Recipe]:
    """The same before they are compiled; the last decode program is that of all rows."""
    shards = meshes.group_count_multiple(settings.mesh)
    programs: dict[Name, Recipe] = {}
    for i in range(len(schedule.classes)):
        programs["clear", i] = _clear(settings, schedule, i)
    for i in schedule.entries():
        programs["prefill", i] = _prefill(settings, schedule, i)
        programs["enter", i] = _enter(settings, schedule, i)
    for i, j in schedule.moves():
        programs["move", i, j] = _move(settings, schedule, i, j)
    for rows in schedule.decode_rows(shards):
        programs["decode", rows] = _decode(settings, schedule, rows)
    return programs


def _clear(settings: DecodeSettings, schedule: Schedule, i: int) -> Recipe:
    slots = schedule.classes[i]
    function = functools.partial(empty_state, settings, slots)
    return Recipe(settings.mesh, function, (), shardings(abstract_state(settings, slots)))


def _prefill(settings: DecodeSettings, schedule: Schedule, i: int) -> Recipe:
    chunk = settings.chunk_of(schedule.classes[i].P)
    function = functools.partial(prefill, settings.config, settings.cache_dtype, chunk)
    weights = abstract_weights(settings.config, settings.mesh)
    return Recipe(
        settings.mesh,
        with_matmul_precision(settings.config, function),
        (weights, prompt_shapes(settings, schedule, i)),
        shardings(abstract_prefilled(settings, schedule, i)),
    )


def _enter(settings: DecodeSettings, schedule: Schedule, i: int) -> Recipe:
    state = abstract_state(settings, schedule.classes[i])
    ready = abstract_prefilled(settings, schedule, i)
    everywhere = meshes.replicated(settings.mesh)  # every process follows all groups
    return Recipe(
        settings.mesh,
        functools.partial(enter, settings),
        (state, ready, admission_shapes(settings, schedule, i)),
        Entered(shardings(state), everywhere, everywhere),
        donate=(0,),
    )


def _move(settings: DecodeSettings, schedule: Schedule, i: int, j: int) -> Recipe:
    source, target = (abstract_state(settings, schedule.classes[at]) for at in (i, j))
    return Recipe(
        settings.mesh,
        functools.partial(move, settings),
        (source, target, move_shapes(settings, schedule.classes[j])),
        (shardings(source), shardings(target)),
        donate=(0, 1),
    )


def _decode(settings: DecodeSettings, schedule: Schedule, rows: int) -> Recipe:
    states = tuple(abstract_state(settings, slots) for slots in schedule.classes)
    function = functools.partial(decode_chunk, settings, schedule, rows)
    everywhere = meshes.replicated(settings.mesh)  # every process follows all groups
    return Recipe(
        settings.mesh,
        with_matmul_precision(settings.config, function),
        (abstract_weights(settings.config, settings.mesh), states),
        Chunk(shardings(states), everywhere, everywhere, everywhere),
        donate=(1,),
    )
