"""How a run goes on: what it holds, and that it is what the run started with."""

import gc

import jax
import numpy as np
import pytest
from small_runs import make_run

from configs import tiny
from spiral_jax.learner.state import init_state
from spiral_jax.model import hf
from spiral_jax.run.checkpoint import Checkpoints
from spiral_jax.run.setup import set_up_training
from spiral_jax.run.training_run import open_run


def size(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def finished_run(workdir, setup):
    """A run of one step in `workdir`: what it has trained."""
    record = {"at": {"step": 1, "cursor": 0, "sampled_tokens": 0}, "data": setup.task.fingerprint}
    return make_run(workdir, setup.c, setup.model, setup.mesh, record=record)[1]


@pytest.mark.parametrize(("rank", "kl_coef"), [(4, 0.0), (0, 0.1), (0, 0.0)])
def test_when_a_checkpoint_is_read_only_what_it_does_not_give_is_held(
    rank, kl_coef, tmp_path, monkeypatch
):
    c = tiny.get_config()
    c.model.lora_rank, c.loss.kl_coef, c.train.steps, c.eval.problems = rank, kl_coef, 1, 0
    setup = set_up_training(c)
    trained = finished_run(tmp_path / "run", setup)
    params = setup.start.load_base()
    frozen, _ = init_state(setup.training.learner, setup.model, setup.mesh, params)
    gc.collect()
    known = {id(array) for array in jax.live_arrays()}
    held, restore = [], Checkpoints.restore_newest

    def watched(checkpoints, abstract_state):
        gc.collect()
        held.append(size([array for array in jax.live_arrays() if id(array) not in known]))
        return restore(checkpoints, abstract_state)

    monkeypatch.setattr(Checkpoints, "restore_newest", watched)
    with open_run(setup, str(tmp_path / "run")) as (run, base, state):
        assert run.finished  # so nothing is compiled
    assert held == [size(hf.abstract_params(setup.model)) if rank or kl_coef else 0]
    jax.tree.map(np.testing.assert_array_equal, (base, state.trained), (frozen, trained))
