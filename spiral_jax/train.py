"""Trains one model to search and to aggregate (SPIRAL, arXiv 2606.23595). Start reading here.

    python -m spiral_jax.train --config=configs/tiny.py --workdir=runs/tiny [--dry_run[=config]]
                               [--config.optimizer.lr=1e-3]

The same command on the same workdir resumes at the newest checkpoint, bit for bit; a finished run
prints its table. On several hosts it is started once on each: `core/distributed.py`.
"""

from __future__ import annotations

import signal
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from spiral_jax.core import config, distributed
from spiral_jax.core.command import refuse_arguments, run_command
from spiral_jax.core.errors import UserError
from spiral_jax.core.mesh import make_mesh
from spiral_jax.learner.blocks import make_blocks, padding, place_blocks
from spiral_jax.learner.state import variables
from spiral_jax.learner.step import make_train_step
from spiral_jax.objective.advantages import compute_advantages
from spiral_jax.reporting.summary import summarise_run
from spiral_jax.run.preemption import exit_code
from spiral_jax.run.rehearsal import WHOLE_CONFIG, dry_run
from spiral_jax.run.setup import Setup, keep_compiled_programs, set_up_training
from spiral_jax.run.training_run import open_run


def train(setup: Setup, workdir: str) -> signal.Signals | None:
    """Trains until all steps are done, from scratch or where the run stopped.

    Returns:
      the signal that has ended it before; None: it is finished.
    """
    model, mesh, sampler = setup.model, setup.mesh, setup.sampler
    objective, learner = setup.training.objective, setup.training.learner
    train_step = make_train_step(learner, model)

    with open_run(setup, workdir) as (run, base, state):
        policy = sampler.prepare(variables(model, base, state.trained))
        run.evaluate(policy)
        for step in run.steps():
            # Problems in cursor order -> N search traces each -> K sets of S of them -> M
            # aggregation traces of each set -> rewards of those, as they come in. Beside them sets
            # of stored answers are aggregated, as deeper rounds would (config.replay).
            problems = run.first_kept()
            rollouts = run.actor.rollouts(policy, step, problems)
            with run.preemption.interruptible():
                for rollout in rollouts:
                    # Set RL for search, the set's own mean as the baseline for aggregation.
                    # Problems whose advantages are all zero are not kept.
                    rewards = rollout.rewards()
                    advantages = compute_advantages(objective.estimator, rewards, run.at.c_R)
                    problems.add(rollout, advantages)
            if run.preemption.notice:
                break
            # The first B kept problems; their traces' advantages become loss weights.
            batch = problems.batch(objective)

            # Both kinds of trace, one gradient, one Adam step; then the new policy samples.
            sampling = rollouts.metrics()
            with run.updating():
                blocks = make_blocks(batch.roles, learner.shapes)
                del policy, rollouts  # their memory is the update's now
                state, metrics = train_step(state, base, place_blocks(blocks, mesh))
                policy = sampler.prepare(variables(model, base, state.trained))
                metrics = run.read(metrics)

            run.record(batch, sampling | metrics | padding(blocks), state)
            run.evaluate(policy)
        run.finish(state)

    if run.preemption.notice:
        run.preemption.announce(f"saved at step {run.at.step}")
    else:
        summarise_run(run.log, run.at.step, run.at.sampled_tokens)
    return run.preemption.notice


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "a file of configs/", lock_config=True)
    flags.DEFINE_string("workdir", None, "directory of the run: logs, traces, checkpoints")
    flags.DEFINE_flag(
        flags.EnumFlag(
            "dry_run",
            None,
            "check config, data, rewards, tokenizer and shapes, say what a step takes, and write "
            "nothing; --dry_run=config prints the whole configuration too",
            ["true", WHOLE_CONFIG],
            boolean=True,  # so that it needs no value
        )
    )
    flags.DEFINE_integer(
        "preempted_exit_code",
        0,
        "of a run that a preemption notice has ended, after it has saved: what makes the cluster "
        "start it again, if 0 means finished there",
    )
    distributed.define_flags()
    flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    refuse_arguments(argv)
    if given.workdir is None and not given.dry_run:
        raise app.UsageError("--workdir is required (or --dry_run)")
    logging.set_verbosity(logging.WARNING)
    try:
        config.require_whole(given.config)
        with distributed.session(given):
            keep_compiled_programs()
            distributed.announce(make_mesh(given.config.mesh))
            setup = set_up_training(given.config)
            if given.dry_run:
                return dry_run(setup, given.dry_run)
            notice = train(setup, given.workdir)
    except UserError as error:
        sys.exit(f"error: {error}")
    if notice:
        sys.exit(exit_code(notice, given.preempted_exit_code))


if __name__ == "__main__":
    define_flags()
    run_command(main)
