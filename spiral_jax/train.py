"""Trains one model to search and to aggregate (SPIRAL, arXiv 2606.23595). Start reading here.

    python -m spiral_jax.train --config=configs/tiny.py --workdir=runs/tiny [--config.optimizer.lr=1e-3] [--dry_run]

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

The same command on the same workdir resumes at the newest checkpoint, bit for bit; a finished run prints its table. On
several hosts it is started once on each: `spiral_jax.distributed`.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
import sys
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from spiral_jax import STARTED, batching, config, distributed, environment, faults, initial, results
from spiral_jax import mesh as meshes
from spiral_jax.checkpoint import CheckpointError, Checkpoints, Retention
from spiral_jax.collect import Batch, NoSignal, collect_batch
from spiral_jax.config import ConfigError
from spiral_jax.distributed import DistributedError
from spiral_jax.evaluation import evaluate
from spiral_jax.groups import Role
from spiral_jax.guards import BadSteps, NumericsGuard, watched
from spiral_jax.metric_writers import MetricWriters
from spiral_jax.metrics import divide
from spiral_jax.model.tensor_files import WeightsError
from spiral_jax.preemption import Preemption
from spiral_jax.progress import Progress
from spiral_jax.rollout import Actor
from spiral_jax.saving import Saver
from spiral_jax.setup import Setup, check_shapes, keep_compiled_programs, set_up
from spiral_jax.tasks.problem import TaskError
from spiral_jax.trace_log import render_examples, trace_rows
from spiral_jax.train_step import TrainState, abstract_state, init_state, make_train_step, variables
from spiral_jax.verifier.pool import VerifierFailure
from spiral_jax.verifier.verifier import Verifier
from spiral_jax.watchdog import Watchdog, deadline
from spiral_jax.workdir import StepLog, TraceLog, WorkdirError, open_workdir


class Mismatch(RuntimeError):
    """Sampler and trainer give different log-probs for the same policy."""


# What a user can mend: these end the program with their message alone, without a stack trace.
USER_ERRORS = (ConfigError, WeightsError, TaskError, WorkdirError, CheckpointError, NoSignal, VerifierFailure, Mismatch,
               DistributedError, BadSteps)  # fmt: skip


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "the experiment: a file of configs/", lock_config=True)
    flags.DEFINE_string("workdir", None, "directory of the run: logs, traces, checkpoints")
    flags.DEFINE_bool("dry_run", False, "check config, data, tokenizer and shapes; write nothing")
    distributed.define_flags()
    flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    if given.workdir is None and not given.dry_run:
        raise app.UsageError("--workdir is required (or --dry_run)")
    logging.set_verbosity(logging.WARNING)
    try:
        with distributed.joined(given, USER_ERRORS):
            keep_compiled_programs()
            distributed.introduce(meshes.make_mesh(given.config.mesh))
            setup = set_up(given.config)
            if given.dry_run:
                check_shapes(setup)
                print(setup.c, *filter(None, [setup.task.report]), sep="\n")
                print("config, data, tokenizer and shapes are fine; nothing was written")
            else:
                train(setup, given.workdir)
    except USER_ERRORS as error:
        sys.exit(f"error: {error}")


@dataclasses.dataclass
class Position:
    """Where a run stands, beside its weights: it is saved with them, and a resumed run goes on from it."""

    step: int = 0
    cursor: int = 0
    sampled_tokens: int = 0


def train(setup: Setup, workdir: str) -> None:
    """Trains until `train.steps`, or until `train.max_sampled_tokens` are spent, from scratch or where it stopped."""
    c, mesh = setup.c, setup.mesh
    if not pathlib.Path(workdir, "checkpoints").exists():  # a resumed run no longer needs what it started from
        initial.check_start(c, setup.path, setup.model)
    path = open_workdir(workdir, config.to_plain(c), config.digest(c), c.resume.allow)
    evaluations = StepLog(path / "evaluations.jsonl")
    retention = Retention(c.checkpoint.keep, c.checkpoint.keep_every, functools.partial(_scores, c, evaluations))
    checkpoints = Checkpoints(path / "checkpoints", retention)
    distributed.check_equal(
        config=config.digest(c), data=setup.task.fingerprint, checkpoint=f"step {checkpoints.latest()}"
    )
    with deadline("weights and checkpoint to be read (config.train.wait_s)", c.train.wait_s):
        frozen, state, at = _start_or_resume(setup, checkpoints)
    metrics_log, traces = _open_logs(path, c, at.step, evaluations)
    train_step = make_train_step(c, setup.model)
    record = lambda at: {"at": dataclasses.asdict(at), "data": setup.task.fingerprint}  # noqa: E731
    saver = Saver(checkpoints, c.checkpoint.max_failures, c.train.wait_s)
    guard = NumericsGuard(
        c.train.max_bad_steps, c.train.spike, distributed.from_first(lambda: watched(metrics_log.read()))
    )
    v = c.verifier

    with Verifier(setup.reward, v.workers, v.timeout_s, v.memory_gb, v.environment) as verifier, \
            Progress(c.train.steps, at.step) as progress, checkpoints, jax.set_mesh(mesh), \
            _started(path, c, at) as writers, Preemption(c.train.grace_s) as preemption, \
            Watchdog(c.train.watchdog) as watchdog:  # fmt: skip
        if not _finished(c, at):
            print(*filter(None, (setup.task.report, setup.sampler.start_report())), sep="\n", flush=True)
        actor = Actor(c, setup.task, setup.scaffold, setup.sampler, verifier, progress)
        evaluator = dataclasses.replace(actor, c=config.for_evaluation_in_training(c), sampler=setup.eval_sampler)
        weights = setup.sampler.prepare(variables(setup.model, frozen, state.trained))
        evaluate_once = lambda weights, step: preemption.run(  # noqa: E731
            lambda: _evaluate_once(evaluator, weights, step, evaluations, path, writers)
        )
        start_up = {"time/start_up": time.monotonic() - STARTED}
        if not _finished(c, at):
            print(f"start-up took {start_up['time/start_up']:.1f} s", flush=True)
        while not _finished(c, at) and not preemption.reached(at.step):
            if at.step == 0 or (c.eval.every and at.step % c.eval.every == 0):
                evaluate_once(weights, at.step)
            start = time.monotonic()
            watchdog.step_starts(at.step)

            batch = preemption.run(functools.partial(collect_batch, actor, weights, at.step, at.cursor))
            if batch is None:
                break
            saver.settle()  # here, so that a kill never costs two finished steps
            if at.step == 0:
                print(render_examples(batch.rollouts, setup.tokenizer), flush=True)
            with progress.phase("updating"):
                state, found = train_step(state, frozen, _blocks(c, batch, mesh))
                faults.passed("update")
                weights = setup.sampler.prepare(variables(setup.model, frozen, state.trained))
                found = jax.device_get(found)
            metrics = _step_metrics(batch, found)
            metrics |= guard.check(at.step, metrics)
            _check_mismatch(c, at.step, metrics)

            if c.trace_log.every and at.step % c.trace_log.every == 0:
                traces.write(at.step, trace_rows(c, batch, setup.tokenizer))
            seconds = time.monotonic() - start
            metrics |= progress.take_times() | {"time/step": seconds, "tokens_per_s": batch.sampled_tokens / seconds}
            metrics |= {"checkpoint/failed_saves": float(saver.failures)} | start_up
            start_up = {}
            metrics_log.append({"step": at.step} | metrics)
            guard.check_bad_steps(path, at.step, batch)
            writers.write({"step": at.step} | metrics)
            at = Position(at.step + 1, batch.next_cursor, at.sampled_tokens + batch.sampled_tokens)
            reward = metrics.get("reward/aggregated", metrics["reward/search"])
            progress.step_done(at.step, reward, batch.sampled_tokens, seconds)
            if _finished(c, at) or (c.checkpoint.every and at.step % c.checkpoint.every == 0):
                with progress.phase("checkpoint"):
                    saver.save(at.step, state, record(at))
            watchdog.step_ends()
        if preemption.noticed and at.step and not checkpoints.has(at.step):
            saver.save(at.step, state, record(at))
        if not saver.settle():
            raise CheckpointError(f"{path}: the checkpoint of step {at.step} could not be written; see above.")
        evaluate_once(weights, at.step)
    if preemption.noticed:
        print(f"preempted: saved at step {at.step}; the same command goes on from there", flush=True)
    elif distributed.is_first():
        _summarise(path, at, evaluations)


def _start_or_resume(setup: Setup, checkpoints: Checkpoints) -> tuple[Any, TrainState, Position]:
    """(frozen base, state, position) from the newest whole checkpoint, or from what config.model names."""
    c, mesh = setup.c, setup.mesh
    new = checkpoints.latest() is None
    base, lora = setup.load_start() if new else (setup.load_base(), None)
    frozen, state = init_state(c, setup.model, base, mesh, lora)
    if new:
        return frozen, state, Position()
    state, record = checkpoints.restore_newest(abstract_state(c, setup.model, mesh))
    _check_data(record["data"], setup)
    return frozen, state, Position(**record["at"])


def _finished(c: ConfigDict, at: Position) -> bool:
    spent = c.train.max_sampled_tokens and at.sampled_tokens >= c.train.max_sampled_tokens
    return at.step >= c.train.steps or bool(spent)


def _check_data(fingerprint: str, setup: Setup) -> None:
    if fingerprint != setup.task.fingerprint:
        raise WorkdirError(
            f"the task's data have changed since the checkpoint ({fingerprint[:12]} -> {setup.task.fingerprint[:12]}): "
            "restore the files, or start in another --workdir."
        )


def _open_logs(path: pathlib.Path, c: ConfigDict, step: int, evaluations: StepLog) -> tuple[StepLog, TraceLog]:
    """Metrics and traces; they and the evaluations are cut back to what the checkpoint of `step` has seen."""
    metrics_log, traces = StepLog(path / "metrics.jsonl"), TraceLog(path / "traces", c.trace_log.keep_steps)
    metrics_log.cut_back(step)
    traces.cut_back(step)
    evaluations.cut_back(step + 1)
    return metrics_log, traces


def _scores(c: ConfigDict, evaluations: StepLog) -> dict[int, float]:
    """What config.checkpoint.keep_best goes by: the measure's mean by step, the same on all processes."""
    measure = c.checkpoint.keep_best
    if not measure:
        return {}
    read = lambda: [(row["step"], row[measure]["mean"]) for row in evaluations.read() if measure in row]  # noqa: E731
    return {step: score for step, score in distributed.from_first(read)}


def _started(path: pathlib.Path, c: ConfigDict, at: Position) -> MetricWriters:
    """Notes in starts.jsonl what the run goes on with, unless it has ended, and opens its metric writers."""
    starts = StepLog(path / "starts.jsonl")
    if _finished(c, at) or not distributed.is_first():
        return MetricWriters((), path, "", {}, at.step)
    starts.cut_back(at.step + 1)
    starts.append({"step": at.step} | environment.describe())
    first = re.sub(r"\W", "", starts.read()[0]["time"].removesuffix("+00:00"))
    return MetricWriters(c.metrics.writers, path, f"{path.name}-{first}", config.to_plain(c), at.step)


def _evaluate_once(
    actor: Actor, weights: Any, step: int, evaluations: StepLog, path: pathlib.Path, writers: MetricWriters
) -> None:
    """Evaluates the policy after `step` steps, unless its row says that this was done before."""
    if actor.c.eval.problems and step not in distributed.from_first(
        lambda: [row["step"] for row in evaluations.read()]
    ):
        with actor.progress.phase("evaluating"):
            row, found = evaluate(actor, weights, step)
            if found is not None and distributed.is_first():
                results.write_results(path / "evaluations" / f"step_{step:06d}" / "results.json", found)
            evaluations.append(row)
            writers.write(row, "evaluation/")
        actor.progress.take_times()  # a step's times are its own


def _blocks(c: ConfigDict, batch: Batch, mesh: jax.sharding.Mesh) -> list[batching.Block]:
    """The batch as micro-batches of the step's static shapes, placed along the groups' mesh axes."""
    roles = [(Role.SEARCH, batch.rollouts.search, batch.search_weight_UxC, c.batch.problems)]
    if batch.rollouts.aggregation is not None:
        most = c.batch.problems * c.aggregation.subsets
        roles.append((Role.AGGREGATION, batch.rollouts.aggregation, batch.aggregation_weight_UxC, most))
    blocks = []
    for role, groups, weight_UxC, most in roles:
        lengths, micro = c.batch[f"{role.label}_lengths"], c.batch[f"{role.label}_groups"]
        blocks += batching.make_blocks(role, groups, weight_UxC, [tuple(pair) for pair in lengths], micro, most)
    along = meshes.group_sharding(mesh, leading=1)
    return jax.tree.map(lambda a: meshes.place(a, along) if np.ndim(a) else a, blocks)


def _step_metrics(batch: Batch, found: dict[str, Any]) -> dict[str, float | None]:
    """Divides all (sum, count) pairs of a step, at last."""
    metrics = divide(batch.metrics | found)
    mean, square = metrics.pop("mismatch/ratio"), metrics.pop("mismatch/ratio_squared")
    metrics["mismatch/effective_share"] = mean**2 / square
    return metrics


def _check_mismatch(c: ConfigDict, step: int, metrics: dict[str, float | None]) -> None:
    """At the first step both sides run the same policy: a difference beyond rounding is a bug, so the run stops."""
    limit, worst = c.train.mismatch_limit, metrics["mismatch/max_abs_log_ratio"]
    if limit and step == 0 and not worst <= limit:  # NaN is no agreement
        raise Mismatch(
            f"sampler and trainer disagree at the first step: |log ratio| up to {worst:.2e} a token, "
            f"config.train.mismatch_limit = {limit:g}. Check model.compute_dtype (bfloat16 needs a wider limit)."
        )


def _summarise(path: pathlib.Path, at: Position, evaluations: StepLog) -> None:
    """Draws the curves, writes and prints the table."""
    from spiral_jax import curves  # matplotlib takes half a second, which a restart can do without

    done = evaluations.read()
    curves.draw_curves(path / "metrics.jsonl", done, path / "curves.png")
    print(f"\n{at.step} steps, {at.sampled_tokens:,} sampled tokens; curves: {path / 'curves.png'}", flush=True)
    if done:
        table = curves.evaluation_table(done)
        (path / "results.md").write_text(table)
        print(table, flush=True)


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=config.parse_flags)
