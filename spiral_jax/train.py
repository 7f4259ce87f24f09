"""Trains one model to search and to aggregate (SPIRAL, arXiv 2606.23595). Start reading here.

    python -m spiral_jax.train --config=configs/tiny.py --workdir=runs/tiny
    [--config.optimizer.lr=1e-3] [--dry_run]

One step, in the order of the code below:

    problems          the next ones from the task's stream (`cursor` is all the state there is)
    search groups     N traces of each problem                                                  rollout_feed
    subsets           K distinct S-subsets of them, drawn by key                                objective.subsets
    aggregation       M traces for each subset, which reads its candidates                      rollout_feed
    rewards           0 / 1 on the final answer of every aggregation trace                      verifier
    advantages        set RL for search, the set's own mean as baseline for aggregation         objective.advantages
    kept batch        the first B problems in cursor order with a non-zero advantage            collect
    train step        both kinds of trace, one gradient, one Adam step                          train_step
    checkpoint, evaluation, logs

The same command on the same workdir resumes at the newest checkpoint, bit for bit; a finished run
prints its table. On
several hosts it is started once on each: `spiral_jax.core.distributed`.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from spiral_jax.core import config, distributed, faults
from spiral_jax.core import mesh as meshes
from spiral_jax.core.errors import UserError
from spiral_jax.core.groups import Role
from spiral_jax.core.metrics import divide
from spiral_jax.core.progress import Progress
from spiral_jax.evaluation.wave import evaluate
from spiral_jax.learner import blocks as batching
from spiral_jax.learner.step import (
    TrainState,
    abstract_state,
    init_state,
    make_train_step,
    variables,
)
from spiral_jax.rollout.collect import Batch, collect_batch
from spiral_jax.rollout.requests import Actor
from spiral_jax.run import start as initial
from spiral_jax.run.checkpoint import CheckpointError, Checkpoints, Retention
from spiral_jax.run.guards import NumericsGuard, watched
from spiral_jax.run.log import RunLog
from spiral_jax.run.preemption import Preemption
from spiral_jax.run.saving import Saver
from spiral_jax.run.setup import Setup, check_shapes, keep_compiled_programs, set_up
from spiral_jax.run.telemetry import StepProfile, memory_metrics, update_metrics
from spiral_jax.run.trace_log import render_examples, trace_rows
from spiral_jax.run.watchdog import Watchdog, deadline
from spiral_jax.run.workdir import WorkdirError, open_workdir
from spiral_jax.verifier.settings import VerifierSettings
from spiral_jax.verifier.verifier import Verifier


class Mismatch(UserError):
    """Sampler and trainer give different log-probs for the same policy."""


def define_flags() -> None:
    config_flags.DEFINE_config_file(
        "config", None, "the experiment: a file of configs/", lock_config=True
    )
    flags.DEFINE_string("workdir", None, "directory of the run: logs, traces, checkpoints")
    flags.DEFINE_bool("dry_run", False, "check config, data, tokenizer and shapes; write nothing")
    flags.DEFINE_integer("preempted_exit_code", 0, "of a run that a preemption notice has ended, after it has saved: "
                         "what makes the cluster start it again, if 0 means finished there")  # fmt: skip
    distributed.define_flags()
    flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    if given.workdir is None and not given.dry_run:
        raise app.UsageError("--workdir is required (or --dry_run)")
    logging.set_verbosity(logging.WARNING)
    finished = True
    try:
        with distributed.session(given):
            keep_compiled_programs()
            distributed.announce(meshes.make_mesh(given.config.mesh))
            setup = set_up(given.config)
            if given.dry_run:
                check_shapes(setup)
                print(setup.c, *filter(None, [setup.task.report]), sep="\n")
                print("config, data, tokenizer and shapes are fine; nothing was written")
            else:
                finished = train(setup, given.workdir)
    except UserError as error:
        sys.exit(f"error: {error}")
    if not finished:
        sys.exit(given.preempted_exit_code)


@dataclasses.dataclass
class Position:
    """Where a run stands, beside its weights: it is saved with them, and a resumed run goes on from
    it.
    """

    step: int = 0
    cursor: int = 0
    sampled_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Run:
    """What the loop works with, all of it open: the policy's frozen part, and who samples, logs,
    saves and watches.
    """

    setup: Setup
    frozen: Any
    actor: Actor
    log: RunLog
    saver: Saver
    guard: NumericsGuard
    preemption: Preemption
    watchdog: Watchdog
    profile: StepProfile


def train(setup: Setup, workdir: str) -> bool:
    """Trains until `train.steps`, or until `train.max_sampled_tokens` are spent, from scratch or
    where it stopped.

    Returns:
      whether it is finished: False after a preemption notice.
    """
    c, v = setup.c, setup.c.verifier
    if not pathlib.Path(
        workdir, "checkpoints"
    ).exists():  # a resumed run no longer needs what it started from
        initial.check_start(c, setup.path, setup.model)
    path = open_workdir(workdir, config.to_plain(c), config.digest(c), c.resume.allow)
    log = RunLog(path, c)
    checkpoints = Checkpoints(
        path / "checkpoints", Retention(c.checkpoint.keep, c.checkpoint.keep_every, log.scores)
    )
    newest = f"step {checkpoints.latest()}"
    distributed.check_equal(config=config.digest(c), data=setup.task.fingerprint, checkpoint=newest)
    with deadline("weights and checkpoint to be read (config.train.wait_s)", c.train.wait_s):
        frozen, state, at = _start_or_resume(setup, checkpoints)
    log.go_on(at.step, _finished(c, at))
    rows = distributed.from_first(lambda: watched(log.metrics()))
    guard = NumericsGuard(c.train.max_bad_steps, c.train.spike, rows)
    saver = Saver(checkpoints, c.checkpoint.max_failures, c.train.wait_s)

    with Verifier(setup.reward, VerifierSettings.from_config(v)) as verifier, \
            Progress(c.train.steps, at.step) as progress, checkpoints, jax.set_mesh(setup.mesh), log, \
            Preemption(c.train.grace_s) as preemption, Watchdog(c.train.watchdog, c.train.wait_s) as watchdog, \
            StepProfile(c, path) as profile:  # fmt: skip
        sampler = preemption.interrupting(setup.sampler)
        actor = Actor(c, setup.task, setup.scaffold, sampler, verifier, progress)
        run = Run(setup, frozen, actor, log, saver, guard, preemption, watchdog, profile)
        if not _finished(c, at):
            print(
                *filter(None, (setup.task.report, setup.sampler.start_report())),
                sep="\n",
                flush=True,
            )
            log.started()
        at = _loop(run, state, at)
    if preemption.noticed:
        print(
            f"preempted: saved at step {at.step}; the same command goes on from there", flush=True
        )
    else:
        log.summarise(at.step, at.sampled_tokens)
    return not preemption.noticed


def _loop(run: Run, state: TrainState, at: Position) -> Position:
    """Step after step, until the run is finished or preempted; returns where it stands then, saved
    and evaluated.
    """
    c, model, mesh = run.setup.c, run.setup.model, run.setup.mesh
    train_step, progress = make_train_step(c, model), run.actor.progress
    for_decoding = lambda state: run.setup.sampler.prepare(
        variables(model, run.frozen, state.trained)
    )  # noqa: E731
    weights = for_decoding(state)
    while not _finished(c, at) and not run.preemption.reached():
        if at.step == 0 or (c.eval.every and at.step % c.eval.every == 0):
            _evaluate_once(run, weights, at.step)
        run.profile.at(at.step)
        run.watchdog.starts("step", at.step)
        start = time.monotonic()

        batch = run.preemption.run(
            functools.partial(collect_batch, run.actor, weights, at.step, at.cursor)
        )
        if batch is None:
            break
        run.saver.settle()  # here, so that a kill never costs two finished steps
        if at.step == 0:
            print(render_examples(batch.rollouts, run.setup.tokenizer), flush=True)
        with progress.phase("updating"):
            blocks = _blocks(c, batch)
            del weights  # their memory is the update's now
            state, found = train_step(state, run.frozen, _placed(blocks, mesh))
            faults.passed("update")
            weights = for_decoding(state)
            found = jax.device_get(found)

        _log_step(run, at.step, batch, found | batching.padding(blocks), start)
        at = Position(at.step + 1, batch.next_cursor, at.sampled_tokens + batch.sampled_tokens)
        if _finished(c, at) or (c.checkpoint.every and at.step % c.checkpoint.every == 0):
            with progress.phase("checkpoint"):
                run.saver.save(at.step, state, _record(run.setup, at))
        run.watchdog.ends()
    if run.preemption.noticed and at.step:
        run.saver.save_if_missing(at.step, state, _record(run.setup, at))
    if not run.saver.settle():
        raise CheckpointError(
            f"{run.log.path}: the checkpoint of step {at.step} could not be written; see above."
        )
    _evaluate_once(run, weights, at.step)
    return at


def _start_or_resume(setup: Setup, checkpoints: Checkpoints) -> tuple[Any, TrainState, Position]:
    """(frozen base, state, position) from the newest whole checkpoint, or from what config.model
    names.
    """
    c, mesh = setup.c, setup.mesh
    new = checkpoints.latest() is None
    reference = c.loss.kl_coef > 0 and not c.model.lora_rank  # KL is to what the run started from
    base, lora = setup.load_start() if new or reference else (setup.load_base(), None)
    frozen, state = init_state(c, setup.model, base, mesh, lora)
    if new:
        return frozen, state, Position()
    state, record = checkpoints.restore_newest(abstract_state(c, setup.model, mesh))
    _check_data(record["data"], setup)
    return frozen, state, Position(**record["at"])


def _record(setup: Setup, at: Position) -> dict[str, Any]:
    """What a checkpoint says beside its arrays."""
    return {"at": dataclasses.asdict(at), "data": setup.task.fingerprint}


def _finished(c: ConfigDict, at: Position) -> bool:
    spent = c.train.max_sampled_tokens and at.sampled_tokens >= c.train.max_sampled_tokens
    return at.step >= c.train.steps or bool(spent)


def _check_data(fingerprint: str, setup: Setup) -> None:
    if fingerprint != setup.task.fingerprint:
        raise WorkdirError(
            f"the task's data have changed since the checkpoint ({fingerprint[:12]} -> {setup.task.fingerprint[:12]}): "
            "restore the files, or start in another --workdir."
        )


def _evaluate_once(run: Run, weights: Any, step: int) -> None:
    """Evaluates the policy after `step` steps, unless that was done before, or a preemption notice
    ends it.
    """
    c, progress = run.setup.c, run.actor.progress
    sampler = run.preemption.interrupting(run.setup.eval_sampler)
    evaluator = dataclasses.replace(
        run.actor, c=config.for_evaluation_in_training(c), sampler=sampler
    )
    if c.eval.problems and not run.log.is_evaluated(step):
        run.watchdog.starts("evaluation", step)
        with progress.phase("evaluating"):
            found = run.preemption.run(functools.partial(evaluate, evaluator, weights, step))
        run.watchdog.ends()
        if found is not None:
            run.log.evaluation(step, *found)
        progress.take_times()  # a step's times are its own


def _blocks(c: ConfigDict, batch: Batch) -> list[batching.Block]:
    """The batch as micro-batches of the step's static shapes, on the host."""
    most = config.groups_of_step(c)
    roles = [(Role.SEARCH, batch.rollouts.search, batch.search_weight_UxC)]
    if batch.rollouts.rounds:
        roles.append((Role.AGGREGATION, batch.rollouts.aggregation, batch.aggregation_weight_UxC))
    blocks = []
    for role, groups, weight_UxC in roles:
        lengths, micro = c.batch[f"{role.label}_lengths"], c.batch[f"{role.label}_groups"]
        blocks += batching.make_blocks(
            role, groups, weight_UxC, [tuple(pair) for pair in lengths], micro, most[role.label]
        )
    return blocks


def _placed(blocks: list[batching.Block], mesh: jax.sharding.Mesh) -> list[batching.Block]:
    """The blocks on the devices, along the groups' mesh axes."""
    along = meshes.group_sharding(mesh, leading=1)
    return jax.tree.map(lambda a: meshes.place(a, along) if np.ndim(a) else a, blocks)


def _log_step(run: Run, step: int, batch: Batch, found: dict[str, Any], start: float) -> None:
    """Logs a step that began at `start`, and ends the run if its numbers cannot be right."""
    c, model, progress = run.setup.c, run.setup.model, run.actor.progress
    metrics = _step_metrics(batch, found)
    metrics |= run.guard.check(step, metrics)
    _check_mismatch(c, step, metrics)
    seconds = time.monotonic() - start
    metrics |= progress.take_times() | {
        "time/step": seconds,
        "tokens_per_s": batch.sampled_tokens / seconds,
    }
    metrics |= (
        update_metrics(model.arch, model.lora_rank, batch.rollouts.stages, metrics["time/updating"])
        | memory_metrics()
    )
    metrics["checkpoint/failed_saves"] = float(run.saver.failures)
    logged = c.trace_log.every and step % c.trace_log.every == 0
    run.log.step(step, metrics, trace_rows(c, batch, run.setup.tokenizer) if logged else None)
    run.guard.check_bad_steps(run.log.path, step, batch)
    reward = metrics.get("reward/aggregated", metrics["reward/search"])
    progress.step_done(step + 1, reward, batch.sampled_tokens, seconds)


def _step_metrics(batch: Batch, found: dict[str, Any]) -> dict[str, float | None]:
    """Divides all (sum, count) pairs of a step, at last."""
    metrics = divide(batch.metrics | found)
    mean, square = metrics.pop("mismatch/ratio"), metrics.pop("mismatch/ratio_squared")
    metrics["mismatch/effective_share"] = mean**2 / square
    return metrics


def _check_mismatch(c: ConfigDict, step: int, metrics: dict[str, float | None]) -> None:
    """At the first step both sides run the same policy: a difference beyond rounding is a bug, so
    the run stops.
    """
    limit, worst = c.train.mismatch_limit, metrics["mismatch/max_abs_log_ratio"]
    if limit and step == 0 and not worst <= limit:  # NaN is no agreement
        raise Mismatch(
            f"sampler and trainer disagree at the first step: |log ratio| up to {worst:.2e} a token, "
            f"config.train.mismatch_limit = {limit:g}. Check model.compute_dtype (bfloat16 needs a wider limit)."
        )


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=config.parse_flags)
