"""Directories of runs, made without training: a configuration, checkpoints of random weights."""

import jax
import numpy as np

from spiral_jax.core.config import digest, to_plain
from spiral_jax.core.mesh import weight_shardings
from spiral_jax.learner.settings import learner_settings
from spiral_jax.learner.state import abstract_state
from spiral_jax.model import hf
from spiral_jax.model.adapter import abstract_lora
from spiral_jax.run.checkpoint import Checkpoints
from spiral_jax.run.workdir import open_workdir


def random_like(shapes, mesh, seed, scale=0.1):
    rng = np.random.default_rng(seed)
    tree = jax.tree.map(lambda a: rng.normal(0, scale, a.shape).astype(a.dtype), shapes)
    return jax.device_put(tree, weight_shardings(tree, mesh))


def make_run(path, c, model, mesh, steps=(1,), scale=0.1, record=None):
    """Writes a run with a checkpoint of each step into `path`; each has the same record.

    Returns:
      what was trained by step, random: adapters, or parameters at rank 0.
    """
    open_workdir(path, to_plain(c), digest(c))
    trained_shapes = abstract_lora(model) if model.lora_rank else hf.abstract_params(model)
    state_shapes = abstract_state(learner_settings(c, groups={}), model, mesh)

    def zeros(leaf):
        return jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)

    trained = {}
    with Checkpoints(path / "checkpoints", len(steps)) as checkpoints:
        for step in steps:
            trained[step] = random_like(trained_shapes, mesh, step, scale)
            state = jax.tree.map(zeros, state_shapes).replace(trained=trained[step])
            checkpoints.save(step, state, record or {})
    return trained
