"""One process of a small pod: python -m tests.pod_worker TASK ...

Every task checks its own results; what the test looks at is the exit code and what was printed.
"""

import json
import os
import pathlib
import signal
import time

import jax
import numpy as np
from absl import app, flags
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from spiral_jax.core import distributed, mesh
from spiral_jax.core.errors import UserError

SHAPES = {"layers": {"q": {"kernel": (3, 16, 8)}}, "embed": (32, 8), "final_norm": (8,), "step": ()}


class Mendable(UserError):
    pass


def exchange():
    """Values of all, of the first, shares; also many times, so that old ones are forgotten."""
    me, count = jax.process_index(), jax.process_count()
    for round in range(20):
        assert distributed.gather({"process": me, "round": round}) == [
            {"process": process, "round": round} for process in range(count)
        ]
    assert distributed.from_first(lambda: [me, "é"]) == [0, "é"]
    for items in (0, 1, 7):
        own = [f"item {i}" for i in distributed.share(items)]
        assert distributed.unite(distributed.gather(own)) == [f"item {i}" for i in range(items)]
    distributed.check_equal(config="same", data="same too")
    kept = distributed.global_state.client.key_value_dir_get("spiral_jax/exchange")
    assert len(kept) <= 2 * count, kept
    values = np.arange(64).reshape(8, 8)
    x = mesh.place(values, NamedSharding(this_mesh(), P(("data", "fsdp"), "tensor")))
    doubled = jax.jit(lambda x: 2 * x, out_shardings=mesh.replicated(this_mesh()))(x)
    np.testing.assert_array_equal(np.asarray(doubled), 2 * values)


def differ():
    distributed.check_equal(config=f"of {jax.process_index()}")


def late():
    """Process 1 does not come."""
    if jax.process_index() == 0:
        distributed.gather(0, timeout_s=1.0)
    time.sleep(60)


def fail():
    """Process 1 fails while process 0 waits for it in a program, and any other in an exchange."""
    if jax.process_index() == 1:
        time.sleep(1)
        raise Mendable("the disc is full: empty it")
    distributed.gather(0)


def preempt():
    """All leave the same chunk of the same step, in which one of them got a SIGTERM.

    What they begin afterwards they leave at once.
    """
    from spiral_jax.run.preemption import Preemption

    with Preemption(grace_s=60.0) as preemption:
        for _ in range(2):
            assert not preemption.reached()
            assert decode(preemption, chunks=2) == 2
        assert not preemption.reached()
        done = decode(preemption, chunks=200, terminated=3)
        assert preemption.notice and preemption.reached() and 3 < done < 200, done
        assert decode(preemption, chunks=2) == 0
    ends = distributed.gather(done)
    assert min(ends) == max(ends), ends


def decode(preemption, chunks, terminated=None):
    """How many chunks come to their end; process 1 gets a SIGTERM in chunk `terminated`."""
    done = 0
    with preemption.interruptible():
        while done < chunks:
            preemption.look()
            if (done, jax.process_index()) == (terminated, 1):
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            done += 1
    return done


def this_mesh():
    sizes = [int(size) for size in flags.FLAGS.mesh.split(",")]
    return mesh.make_mesh(ConfigDict(dict(zip(mesh.AXES, sizes, strict=True))))


def checkpoint():
    """Restores the newest checkpoint onto this mesh, checks every value, saves the next one."""
    from spiral_jax.run.checkpoint import Checkpoints

    def arrays(step):
        def make(path, shape):
            rng = np.random.default_rng([*mesh.path_name(path).encode()])
            return step + rng.normal(size=shape).astype(np.float32)

        return jax.tree_util.tree_map_with_path(
            make, SHAPES, is_leaf=lambda shape: isinstance(shape, tuple)
        )

    with Checkpoints(pathlib.Path(flags.FLAGS.directory), keep=5) as checkpoints:
        step = checkpoints.latest() or 0
        expected, here = arrays(step), mesh.weight_shardings(arrays(step), this_mesh())
        if step:
            state, record = checkpoints.restore(mesh.with_shardings(expected, here))
            assert record == {"cursor": 7 * step}
            pairs = zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True)
            for restored, array in pairs:
                for shard in restored.addressable_shards:
                    np.testing.assert_array_equal(np.asarray(shard.data), array[shard.index])
        checkpoints.save(step + 1, mesh.place(arrays(step + 1), here), {"cursor": 7 * (step + 1)})


def replay():
    """Steps that read stored populations: each process judges its share, and all keep the same."""
    from spiral_jax.rollout.populations import Populations
    from tests.scripted_sampler import SamplerByRound, scripted_training

    right = np.random.default_rng(0).random((3, 100, 4, 4)) < 0.5

    def script(round, cursor, k, i):
        return f"{k}{i} \\boxed{{{7 if round and right[round, cursor, k, i] else 8}}}"

    training = scripted_training(script, sampler_class=SamplerByRound, replay__problems=3)
    stored, cursor = Populations(training.actor.stages.replay), 0
    for step in range(4):
        batch = training.collect(step, cursor, stored.drawn(step))
        replayed = batch.replay.replayed.answers() if step else ()
        stored, cursor = stored.after(step, batch.rollouts.answers(), replayed), batch.next_cursor
    assert {each.round for each in stored.kept} > {1}
    weights = [weight_UxC.tolist() for _, weight_UxC in batch.roles.values()]
    first, *others = distributed.gather([stored.to_plain(), weights])
    assert others and all(other == first for other in others)


TASKS = {
    task.__name__: task for task in (exchange, differ, late, fail, preempt, checkpoint, replay)
}


def main(argv):
    with distributed.session(flags.FLAGS):
        distributed.announce(this_mesh())
        for name in argv[1:]:
            TASKS[name]()
        print(json.dumps({"done": argv[1:]}), flush=True)


if __name__ == "__main__":
    distributed.define_flags()
    flags.DEFINE_string("mesh", "-1,1,1", "sizes of its axes")
    flags.DEFINE_string("directory", "", "of the checkpoints")
    app.run(main)
