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

The same command on the same workdir resumes at the newest checkpoint, bit for bit; a finished run prints its table.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from spiral_jax import batching, config, initial, report
from spiral_jax import mesh as meshes
from spiral_jax.checkpoint import CheckpointError, Checkpoints
from spiral_jax.collect import Batch, NoSignal, collect_batch
from spiral_jax.config import ConfigError
from spiral_jax.evaluation import evaluate
from spiral_jax.groups import Role
from spiral_jax.metrics import Mean, divide
from spiral_jax.model.tensor_files import WeightsError
from spiral_jax.progress import Progress
from spiral_jax.rollout import Actor
from spiral_jax.setup import Setup, check_shapes, keep_compiled_programs, set_up
from spiral_jax.tasks.problem import TaskError
from spiral_jax.telemetry import StepProfile, memory_metrics, update_metrics
from spiral_jax.trace_log import render_examples, trace_rows
from spiral_jax.train_step import abstract_state, init_state, make_train_step, variables
from spiral_jax.verifier.pool import VerifierFailure
from spiral_jax.verifier.verifier import Verifier
from spiral_jax.workdir import StepLog, TraceLog, WorkdirError, open_workdir


class Mismatch(RuntimeError):
    """Sampler and trainer give different log-probs for the same policy."""


# What a user can mend: these end the program with their message alone, without a stack trace.
USER_ERRORS = (ConfigError, WeightsError, TaskError, WorkdirError, CheckpointError, NoSignal, VerifierFailure, Mismatch)


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "the experiment: a file of configs/", lock_config=True)
    flags.DEFINE_string("workdir", None, "directory of the run: logs, traces, checkpoints")
    flags.DEFINE_bool("dry_run", False, "check config, data, tokenizer and shapes; write nothing")
    flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    if given.workdir is None and not given.dry_run:
        raise app.UsageError("--workdir is required (or --dry_run)")
    logging.set_verbosity(logging.WARNING)
    try:
        keep_compiled_programs()
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
    path = open_workdir(workdir, config.to_plain(c), config.digest(c))
    checkpoints = Checkpoints(path / "checkpoints", c.checkpoint.keep)
    reference = c.loss.kl_coef > 0 and not c.model.lora_rank  # KL is to what the run started from
    as_started = checkpoints.latest() is None or reference
    base, lora = setup.load_start() if as_started else (setup.load_base(), None)
    frozen, state = init_state(c, setup.model, base, mesh, lora)
    at = Position()
    if checkpoints.latest() is not None:
        state, record = checkpoints.restore(abstract_state(c, setup.model, mesh))
        at = Position(**record["at"])
        _check_data(record["data"], setup)
    metrics_log, traces, evaluations = _open_logs(path, c, at.step)
    train_step = make_train_step(c, setup.model)

    with Verifier(setup.reward, c.verifier.workers, c.verifier.timeout_s) as verifier, \
            Progress(c.train.steps, at.step) as progress, checkpoints, jax.set_mesh(mesh), \
            StepProfile(c, path) as profile:  # fmt: skip
        if not _finished(c, at):
            print(*filter(None, (setup.task.report, setup.sampler.start_report())), sep="\n", flush=True)
        actor = Actor(c, setup.task, setup.scaffold, setup.sampler, verifier, progress)
        evaluator = dataclasses.replace(actor, sampler=setup.eval_sampler)
        weights = setup.sampler.prepare(variables(setup.model, frozen, state.trained))
        while not _finished(c, at):
            if at.step == 0 or (c.eval.every and at.step % c.eval.every == 0):
                _evaluate_once(evaluator, weights, at.step, evaluations)
            profile.at(at.step)
            start = time.monotonic()

            batch = collect_batch(actor, weights, at.step, at.cursor)
            if at.step == 0:
                print(render_examples(batch.rollouts, setup.tokenizer), flush=True)
            with progress.phase("updating"):
                blocks, padding = _blocks(c, batch, mesh)
                state, found = train_step(state, frozen, blocks)
                weights = setup.sampler.prepare(variables(setup.model, frozen, state.trained))
                found = jax.device_get(found)
            metrics = _step_metrics(batch, found | padding)
            _check_mismatch(c, at.step, metrics)

            if c.trace_log.every and at.step % c.trace_log.every == 0:
                traces.write(at.step, trace_rows(batch.rollouts, setup.tokenizer, c.trace_log.fraction))
            seconds = time.monotonic() - start
            metrics |= progress.take_times() | {"time/step": seconds, "tokens_per_s": batch.sampled_tokens / seconds}
            trained = [groups for groups in (batch.rollouts.search, batch.rollouts.aggregation) if groups is not None]
            metrics |= update_metrics(setup.model.arch, setup.model.lora_rank, trained, metrics["time/updating"])
            metrics |= memory_metrics()
            metrics_log.append({"step": at.step} | metrics)
            at = Position(at.step + 1, batch.next_cursor, at.sampled_tokens + batch.sampled_tokens)
            reward = metrics.get("reward/aggregated", metrics["reward/search"])
            progress.step_done(at.step, reward, batch.sampled_tokens, seconds)
            if _finished(c, at) or (c.checkpoint.every and at.step % c.checkpoint.every == 0):
                with progress.phase("checkpoint"):
                    checkpoints.save(at.step, state, {"at": dataclasses.asdict(at), "data": setup.task.fingerprint})
        checkpoints.wait()
        _evaluate_once(evaluator, weights, at.step, evaluations)
    _report(path, at, evaluations)


def _finished(c: ConfigDict, at: Position) -> bool:
    spent = c.train.max_sampled_tokens and at.sampled_tokens >= c.train.max_sampled_tokens
    return at.step >= c.train.steps or bool(spent)


def _check_data(fingerprint: str, setup: Setup) -> None:
    if fingerprint != setup.task.fingerprint:
        raise WorkdirError(
            f"the task's data have changed since the checkpoint ({fingerprint[:12]} -> {setup.task.fingerprint[:12]}): "
            "restore the files, or start in another --workdir."
        )


def _open_logs(path: pathlib.Path, c: ConfigDict, step: int) -> tuple[StepLog, TraceLog, StepLog]:
    """Metrics, traces and evaluations, each cut back to what the checkpoint of `step` has seen."""
    metrics_log, evaluations = StepLog(path / "metrics.jsonl"), StepLog(path / "evaluations.jsonl")
    traces = TraceLog(path / "traces", c.trace_log.keep_steps)
    metrics_log.cut_back(step)
    traces.cut_back(step)
    evaluations.cut_back(step + 1)
    return metrics_log, traces, evaluations


def _evaluate_once(actor: Actor, weights: Any, step: int, evaluations: StepLog) -> None:
    """Evaluates the policy after `step` steps, unless that was done before."""
    if actor.c.eval.problems and step not in [done["step"] for done in evaluations.read()]:
        with actor.progress.phase("evaluating"):
            evaluations.append(evaluate(actor, weights, step))
        actor.progress.take_times()  # a step's times are its own


def _blocks(c: ConfigDict, batch: Batch, mesh: jax.sharding.Mesh) -> tuple[list[batching.Block], dict[str, Mean]]:
    """The batch as micro-batches of the step's static shapes, along the groups' mesh axes; how much is padding."""
    roles = [(Role.SEARCH, batch.rollouts.search, batch.search_weight_UxC, c.batch.problems)]
    if batch.rollouts.aggregation is not None:
        most = c.batch.problems * c.aggregation.subsets
        roles.append((Role.AGGREGATION, batch.rollouts.aggregation, batch.aggregation_weight_UxC, most))
    blocks = []
    for role, groups, weight_UxC, most in roles:
        lengths, micro = c.batch[f"{role.label}_lengths"], c.batch[f"{role.label}_groups"]
        blocks += batching.make_blocks(role, groups, weight_UxC, [tuple(pair) for pair in lengths], micro, most)
    place = lambda a: jax.device_put(a, meshes.group_sharding(mesh, leading=1)) if np.ndim(a) else a  # noqa: E731
    return jax.tree.map(place, blocks), batching.padding(blocks)


def _step_metrics(batch: Batch, found: dict[str, Any]) -> dict[str, float | None]:
    """Divides all (sum, count) pairs of a step, at last."""
    metrics = divide(batch.metrics | found)
    mean, square = metrics.pop("mismatch/ratio"), metrics.pop("mismatch/ratio_squared")
    metrics["mismatch/effective_share"] = mean**2 / square
    return metrics


def _check_mismatch(c: ConfigDict, step: int, metrics: dict[str, float | None]) -> None:
    """At the first step both sides run the same policy: a difference beyond rounding is a bug, so the run stops."""
    limit, worst = c.train.mismatch_limit, metrics["mismatch/max_abs_log_ratio"]
    if limit and step == 0 and worst > limit:
        raise Mismatch(
            f"sampler and trainer disagree at the first step: |log ratio| up to {worst:.2e} a token, "
            f"config.train.mismatch_limit = {limit:g}. Check model.compute_dtype (bfloat16 needs a wider limit)."
        )


def _report(path: pathlib.Path, at: Position, evaluations: StepLog) -> None:
    """Draws the curves, writes and prints the table."""
    done = evaluations.read()
    report.draw_curves(path / "metrics.jsonl", done, path / "curves.png")
    print(f"\n{at.step} steps, {at.sampled_tokens:,} sampled tokens; curves: {path / 'curves.png'}", flush=True)
    if done:
        table = report.evaluation_table(done)
        (path / "results.md").write_text(table)
        print(table, flush=True)


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=config.parse_flags)
