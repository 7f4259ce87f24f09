"""All programs of a sampler, compiled once from shapes alone.

    pool           pages of zeros
    prefill[P]     prompts of up to P tokens
    decode[N]      N rows of each shard

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
from spiral_jax.model.products import product_options, with_matmul_precision
from spiral_jax.sampling.decode import Chunk, decode_chunk
from spiral_jax.sampling.prefill import prefill
from spiral_jax.sampling.settings import DecodeSettings, Schedule
from spiral_jax.sampling.shapes import (
    abstract_pool,
    empty_pool,
    exit_shapes,
    prompt_shapes,
    row_shapes,
)
from spiral_jax.sampling.weights import abstract_weights

# Unless told not to, XLA for GPUs lays all weights that multiply the same few rows side by side, to
# have one product: it would copy the weights of every layer for every token that is decoded.
_GPU_OPTIONS = {"xla_gpu_dot_merger_threshold_mb": 0}

Name = tuple[Any, ...]  # ("pool",), ("prefill", P), ("decode", N)


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
      compute_dtype: the model's.
      donate: arguments whose memory the results take over.
    """

    mesh: Mesh
    function: Callable[..., Any]
    shapes: tuple[Any, ...]
    out: Any
    compute_dtype: Any
    donate: tuple[int, ...] = ()

    @property
    def compiler_options(self) -> dict[str, Any]:
        """Of `Lowered.compile`, for the mesh's devices; none where it has none."""
        platform = meshes.platform_of(self.mesh)
        own = _GPU_OPTIONS if platform in meshes.GPU_PLATFORMS else {}
        return own | product_options(self.compute_dtype, platform)

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
    programs: dict[Name, Recipe] = {("pool",): _pool(settings, schedule)}
    for tokens in schedule.prompts:
        programs["prefill", tokens] = _prefill(settings, schedule, tokens)
    for rows in schedule.rows:
        programs["decode", rows] = _decode(settings, schedule, rows)
    return programs


def _pool(settings: DecodeSettings, schedule: Schedule) -> Recipe:
    function = functools.partial(empty_pool, settings, schedule)
    out = shardings(abstract_pool(settings, schedule))
    return Recipe(settings.mesh, function, (), out, settings.config.compute_dtype)


def _prefill(settings: DecodeSettings, schedule: Schedule, tokens: int) -> Recipe:
    function = functools.partial(prefill, settings, settings.chunk_of(tokens))
    pool = abstract_pool(settings, schedule)
    weights = abstract_weights(settings.config, settings.mesh)
    return Recipe(
        settings.mesh,
        with_matmul_precision(settings.config.compute_dtype, function),
        (weights, pool, prompt_shapes(settings, schedule, tokens)),
        shardings(pool),
        settings.config.compute_dtype,
        donate=(1,),
    )


def _decode(settings: DecodeSettings, schedule: Schedule, rows: int) -> Recipe:
    function = functools.partial(decode_chunk, settings, schedule.chunk)
    pool = abstract_pool(settings, schedule)
    weights = abstract_weights(settings.config, settings.mesh)
    everywhere = meshes.replicated(settings.mesh)  # every process follows all groups
    return Recipe(
        settings.mesh,
        with_matmul_precision(settings.config.compute_dtype, function),
        (weights, pool, row_shapes(settings, schedule, rows), exit_shapes(settings)),
        Chunk(shardings(pool), everywhere, everywhere, everywhere),
        settings.config.compute_dtype,
        donate=(1,),
    )


def shardings(tree: Any) -> Any:
    """The shardings of a tree of shapes or arrays."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)
