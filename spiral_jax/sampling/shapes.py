"""Shapes, dtypes and shardings of what the sampler's programs take and return; no array is made."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spiral_jax.core import mesh as meshes
from spiral_jax.model.attention.backends import make_page_backend
from spiral_jax.model.attention.pages import Pages
from spiral_jax.sampling.decode import POOL_SPEC, Exit, Pool, Rows
from spiral_jax.sampling.prefill import Prompts
from spiral_jax.sampling.settings import DecodeSettings, Schedule


def empty_pool(settings: DecodeSettings, schedule: Schedule) -> Pool:
    """Pages of zeros."""
    arch, shards = settings.config.arch, meshes.group_count_multiple(settings.mesh)

    backend = make_page_backend(settings.config.pages)

    def of_layer() -> Pages:
        pages = backend.empty(schedule.pages, schedule.page, arch.J, arch.E, settings.cache_dtype)
        return {name: jnp.broadcast_to(a, (shards, *a.shape)) for name, a in pages.items()}

    return tuple(of_layer() for _ in range(arch.L))


def abstract_pool(settings: DecodeSettings, schedule: Schedule) -> Pool:
    """The pool of all shards: along the groups' axes, heads along `tensor`."""
    pool = jax.eval_shape(lambda: empty_pool(settings, schedule))
    sharding = NamedSharding(settings.mesh, POOL_SPEC)
    return meshes.with_shardings(pool, jax.tree.map(lambda _: sharding, pool))


def prompt_shapes(settings: DecodeSettings, schedule: Schedule, tokens: int) -> Prompts:
    """Prompts of one prefill, of up to so many tokens."""
    Z, W = meshes.group_count_multiple(settings.mesh), schedule.prompts_of_a_call(tokens)
    return Prompts(
        token_ZxWxP=_ints(settings, Z, W, tokens),
        length_ZxW=_ints(settings, Z, W),
        table_ZxWxT=_ints(settings, Z, W, schedule.pages_of(tokens)),
    )


def row_shapes(settings: DecodeSettings, schedule: Schedule, rows: int) -> Rows:
    """Rows of one decode program."""
    Z, N = meshes.group_count_multiple(settings.mesh), rows
    U = schedule.bundles(rows)
    return Rows(
        token_ZxN=_ints(settings, Z, N),
        drawn_ZxN=_ints(settings, Z, N),
        limit_ZxN=_ints(settings, Z, N),
        id_ZxNx6=_ints(settings, Z, N, 6),
        trace_ZxN=_ints(settings, Z, N),
        own_table_ZxNxT=_ints(settings, Z, N, schedule.own_pages),
        prefix_ZxN=_ints(settings, Z, N),
        place_ZxN=_ints(settings, Z, N),
        member_ZxUxW=_ints(settings, Z, U, schedule.width),
        prompt_table_ZxUxT=_ints(settings, Z, U, schedule.prompt_pages),
        prompt_ZxU=_ints(settings, Z, U),
    )


def exit_shapes(settings: DecodeSettings) -> Exit:
    everywhere = meshes.replicated(settings.mesh)
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    return Exit(scalar, scalar)


def _ints(settings: DecodeSettings, *shape: int) -> jax.ShapeDtypeStruct:
    """int32 [Z, ...], along the groups' axes."""
    sharding = NamedSharding(settings.mesh, P(meshes.GROUP_AXES))
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
