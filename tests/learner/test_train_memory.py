"""What lies in memory while the weights are updated: nothing of the sampler's."""

import collections

import jax
from small_training import small_training

from spiral_jax import train as program
from spiral_jax.run.setup import set_up_training


def test_during_an_update_neither_decode_weights_nor_caches_take_memory(tmp_path, monkeypatch):
    c = small_training(tmp_path, steps=2)
    # one role, without evaluations: the fewest programs
    c.loss.estimator, c.eval.problems = "grpo", 0
    c.checkpoint.every = 0  # a save copies the state, on CPUs to where the state lies
    make_train_step, before, left_by_step = program.make_train_step, jax.live_arrays(), []
    small = "key<", "int32[]", "uint32[]"

    def watched(learner, model):
        step = make_train_step(learner, model)

        def watched_step(*arguments):
            known = {id(a) for a in jax.tree.leaves([before, arguments])}
            kinds = [str(a.aval) for a in jax.live_arrays() if id(a) not in known]
            large = [kind for kind in kinds if not kind.startswith(small)]
            left_by_step.append(collections.Counter(large))
            return step(*arguments)

        return watched_step

    monkeypatch.setattr(program, "make_train_step", watched)
    assert program.train(set_up_training(c), str(tmp_path / "run")) is None  # it is finished
    assert left_by_step == [{}, {}]
