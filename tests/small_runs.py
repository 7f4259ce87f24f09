"""Directories of runs, made without training: the configuration and checkpoints of random weights."""

import jax
import numpy as np

from spiral_jax.core.config import digest, to_plain
from spiral_jax.core.mesh import weight_shardings
from spiral_jax.learner.step import abstract_state
from spiral_jax.model import hf
from spiral_jax.model.adapter import abstract_lora
from spiral_jax.run.checkpoint import Checkpoints
from spiral_jax.run.workdir import open_workdir


def random_like(shapes, mesh, seed, scale=0.1):
    rng = np.random.default_rng(seed)
    tree = jax.tree.map(lambda a: rng.normal(0, scale, a.shape).astype(a.dtype), shapes)
    return jax.device_put(tree, weight_shardings(tree, mesh))


def make_run(path, c, model, mesh, steps=(1,), scale=0.1):
    """Writes a run into `path`; returns what was trained by step: random adapters, or parameters at
    rank 0.
    """
    open_workdir(path, to_plain(c), digest(c))
    shapes = abstract_lora(model) if model.lora_rank else hf.abstract_params(model)
    zeros = lambda s: jax.device_put(np.zeros(s.shape, s.dtype), s.sharding)  # noqa: E731
    trained = {}
    with Checkpoints(path / "checkpoints", len(steps)) as checkpoints:
        for step in steps:
            trained[step] = random_like(shapes, mesh, step, scale)
            state = jax.tree.map(zeros, abstract_state(c, model, mesh))
            checkpoints.save(step, state.replace(trained=trained[step]), {})
    return trained
