"""A training run around its loop: where it stands, what it writes, who watches it."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from spiral_jax.core import config, distributed, faults
from spiral_jax.core.groups import Groups
from spiral_jax.core.metrics import divide
from spiral_jax.core.progress import Progress
from spiral_jax.evaluation.tables import evaluation_line
from spiral_jax.evaluation.wave import Evaluator, FailedEvaluation
from spiral_jax.learner.state import TrainState, abstract_state, init_state, keeps_base
from spiral_jax.rollout.actor import Actor
from spiral_jax.rollout.collect import Batch, FirstKept, NoSignal
from spiral_jax.rollout.stages import Stage
from spiral_jax.run.checkpoint import CheckpointError, Checkpoints
from spiral_jax.run.examples import Examples, show_nothing
from spiral_jax.run.guards import NumericsGuard, check_mismatch, watched_metrics
from spiral_jax.run.log import RunLog
from spiral_jax.run.position import Position
from spiral_jax.run.preemption import Preemption
from spiral_jax.run.rehearsal import prompt_lengths
from spiral_jax.run.retention import Retention
from spiral_jax.run.saver import Saver
from spiral_jax.run.setup import Setup, make_evaluator
from spiral_jax.run.telemetry import StepProfile, memory_metrics, sampling_metrics, update_metrics
from spiral_jax.run.trace_log import TraceRows
from spiral_jax.run.watchdog import Watchdog, deadline
from spiral_jax.run.workdir import Workdir, WorkdirError, occupy_workdir
from spiral_jax.verifier.pool import VerifierFailure
from spiral_jax.verifier.verifier import Verifier


@dataclasses.dataclass
class TrainingRun:
    """What surrounds the loop of training, all of it open.

    Attributes:
      at: where the run stands; `record` moves it on.
    """

    setup: Setup
    at: Position
    actor: Actor
    evaluator: Evaluator
    log: RunLog
    saver: Saver
    guard: NumericsGuard
    preemption: Preemption
    watchdog: Watchdog
    profile: StepProfile
    progress: Progress
    trace_rows: TraceRows
    _step_began: float = 0.0
    _problems: FirstKept | None = None

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or all tokens spent."""
        t = self.setup.c.train
        spent = t.max_sampled_tokens and self.at.sampled_tokens >= t.max_sampled_tokens
        return self.at.step >= t.steps or bool(spent)

    def begin(self, directory: Workdir) -> None:
        """Compiles what samples, and notes the start: it can fail no more. Not after a notice."""
        setup, reports = self.setup, ()
        if not self.finished:
            with self.progress.phase("compiling"), self.preemption.interruptible():
                lengths = prompt_lengths(setup)
                reports = setup.task.report, lengths, setup.sampler.start_report()
        self.progress.take_times()  # a step's times are its own
        if self.preemption.notice:
            return
        directory.begin()
        if not self.finished:
            writers, plain = setup.c.metrics.writers, config.to_plain(setup.c)
            reward_source = setup.reward.fingerprint()
            self.log.note_start(self.at.step, writers, plain, reward_source)
            print(*filter(None, reports), sep="\n", flush=True)
            self.log.note_start_up_time()

    def steps(self) -> Iterator[int]:
        """The steps to do, until the run is finished or a preemption notice has come."""
        while not self.finished and not self.preemption.reached():
            self.profile.begin(self.at.step)
            self.watchdog.begin("step", self.at.step)
            self._step_began = time.monotonic()
            yield self.at.step

    def first_kept(self) -> FirstKept:
        """The problems of the next step, in cursor order, none of them tried yet.

        Before them are those whose stored populations it reads.
        """
        at = self.at
        stored = at.populations.drawn(at.step) if at.populations else ()
        self._problems = self.actor.first_kept(at.cursor, stored)
        return self._problems

    @contextlib.contextmanager
    def keeping_failed(self) -> Iterator[None]:
        """Writes the traces of a step that gives no batch, or of an evaluation that could not be
        judged, and names their file in the error.
        """
        try:
            yield
        except (NoSignal, VerifierFailure) as error:
            kind, rollouts = type(error), self._problems.decided() if self._problems else None
            if isinstance(error, FailedEvaluation):
                kind, rollouts = VerifierFailure, error.rollouts
            if rollouts is None:
                raise
            path = self.log.add_failed(self.at.step, self.trace_rows.make_failed(rollouts))
            raise kind(
                f"{error} The traces of all {len(rollouts)} problems are in {path}; `python -m "
                f"spiral_jax.report --workdir={self.log.path}` shows them."
            ) from error

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        """The update of a step; the last save has ended before it, so a kill costs one step."""
        self.saver.settle()
        with self.progress.phase("updating"):
            yield

    def read(self, metrics: Any) -> Any:
        """The train step's metrics on the host; waits for them."""
        faults.passed("update")
        return jax.device_get(metrics)

    def record(self, batch: Batch, metrics: dict[str, Any], state: TrainState) -> None:
        """Logs and saves a step.

        Raises:
          Mismatch, BadSteps: its numbers cannot be right.
          CheckpointError: too many saves have failed.
        """
        c, step, self._problems = self.setup.c, self.at.step, None
        sampled = int(metrics["sampling/generated_tokens"])
        metrics = batch.metrics | metrics | self.at.metrics()
        self._log(step, batch, _divide(metrics), sampled)
        self.at = self.at.after(batch, sampled)
        if self.finished or (c.checkpoint.every and self.at.step % c.checkpoint.every == 0):
            with self.progress.phase("checkpoint"):
                self.saver.save(self.at.step, state, self._checkpoint_record())
        self.watchdog.end()

    def evaluate(self, policy: Any) -> None:
        """Evaluates the policy where that is due, unless it was done before.

        It is due at the start, every `eval.every` steps and at the end. A preemption notice ends
        it.
        """
        e, step = self.setup.c.eval, self.at.step
        due = step == 0 or self.finished or bool(e.every and step % e.every == 0)
        if not (e.problems and due) or self.preemption.notice or self.log.is_evaluated(step):
            return
        evaluation, began = None, time.monotonic()
        self.watchdog.begin("evaluation", step)
        with self.progress.phase("evaluating"), self.preemption.interruptible():
            evaluation = self.evaluator.evaluate(policy, step)
        self.watchdog.end()
        if evaluation is not None:
            row, results = evaluation
            self.log.add_evaluation(step, row, results)
            self.progress.say(f"{evaluation_line(row)}, {time.monotonic() - began:.1f} s")
        self.progress.take_times()  # a step's times are its own

    def finish(self, state: TrainState) -> None:
        """Waits until the last checkpoint is on disk; after a notice it is saved first.

        Raises:
          CheckpointError: it could not be written.
        """
        if self.preemption.notice and self.at.step:
            self.saver.save_if_missing(self.at.step, state, self._checkpoint_record())
        if not self.saver.settle():
            raise CheckpointError(
                f"{self.log.path}: the checkpoint of step {self.at.step} could not be written; see "
                "above."
            )

    def _checkpoint_record(self) -> dict[str, Any]:
        """What a checkpoint says beside its arrays."""
        return {"at": self.at.to_plain(), "data": self.setup.task.fingerprint}

    def _log(self, step: int, batch: Batch, metrics: dict[str, Any], sampled: int) -> None:
        c, model = self.setup.c, self.setup.model
        metrics |= self.guard.check(step, metrics)
        check_mismatch(step, metrics, c.train.mismatch_limit)
        seconds = time.monotonic() - self._step_began
        metrics |= self.progress.take_times()
        metrics |= {"time/step": seconds, "tokens_per_s": sampled / seconds}
        trained = [groups for groups, _ in batch.roles.values()]
        metrics |= update_metrics(model, trained, metrics["time/updating"])
        metrics |= sampling_metrics(model, metrics)
        metrics |= memory_metrics()
        metrics["checkpoint/failed_saves"] = float(self.saver.failures)
        traces = None
        if c.trace_log.every and step % c.trace_log.every == 0:
            traces = self.trace_rows.make(batch)
        self.log.add_step(step, metrics, traces)
        self.guard.check_bad_steps(self.log.path, step, batch)
        reward = metrics.get("reward/aggregated", metrics["reward/search"])
        kept, tried = (int(metrics[f"sampling/{name}"]) for name in ("kept", "tried"))
        more = f"kept {kept} of {tried} problems"
        self.progress.step_done(step + 1, reward, sampled, seconds, more)


def _divide(metrics: dict[str, Any]) -> dict[str, float | None]:
    """Divides all (sum, count) pairs of a step, at last."""
    divided = divide(metrics)
    mean, square = divided.pop("mismatch/ratio"), divided.pop("mismatch/ratio_squared")
    divided["mismatch/effective_share"] = mean**2 / square
    return divided


@contextlib.contextmanager
def open_run(setup: Setup, workdir: str) -> Iterator[tuple[TrainingRun, Any, TrainState]]:
    """Opens the run in `workdir`, from scratch or where it stopped: (run, frozen base, state)."""
    c = setup.c
    if not pathlib.Path(workdir, "checkpoints").exists():
        setup.start.check()  # a resumed run no longer needs what it started from
    plain, digest = config.to_plain(c), config.digest(c)
    reward_source = setup.reward.fingerprint()
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(occupy_workdir(workdir, plain, digest, c.resume.allow))
        path = directory.path
        log = RunLog(path, c.trace_log.keep_steps, c.checkpoint.keep_best)
        retention = Retention(c.checkpoint.keep, c.checkpoint.keep_every, log.scores)
        checkpoints = stack.enter_context(Checkpoints(path / "checkpoints", retention))
        distributed.check_equal(
            config=digest,
            data=setup.task.fingerprint,
            reward=reward_source,
            checkpoint=f"step {checkpoints.latest()}",
        )
        progress = stack.enter_context(Progress(c.train.steps, 0))
        read = "weights and checkpoint to be read (config.train.wait_s)"
        with progress.phase("loading weights"), deadline(read, c.train.wait_s):
            base, state, at = _start_or_resume(setup, checkpoints)
        progress.go_on_from(at.step)
        log.cut_back(at.step)

        verifier = stack.enter_context(Verifier(setup.reward, setup.verifier))
        stack.enter_context(jax.set_mesh(setup.mesh))
        stack.enter_context(log)
        preemption = stack.enter_context(Preemption(c.train.grace_s))
        watchdog = stack.enter_context(Watchdog(c.train.watchdog, c.train.wait_s))
        profile = stack.enter_context(StepProfile(c.profile.steps, path))
        rows = distributed.from_first(lambda: watched_metrics(log.metrics()))
        show = show_nothing if at.step else Examples(setup.tokenizer).show
        run = TrainingRun(
            setup=setup,
            at=at,
            actor=_make_actor(setup, verifier, progress, preemption, show),
            evaluator=make_evaluator(setup, verifier, progress, preemption.look, show),
            log=log,
            saver=Saver(checkpoints, c.checkpoint.max_failures, c.train.wait_s),
            guard=NumericsGuard(c.train.max_bad_steps, c.train.spike, rows),
            preemption=preemption,
            watchdog=watchdog,
            profile=profile,
            progress=progress,
            trace_rows=_make_trace_rows(setup),
        )
        run.begin(directory)
        with run.keeping_failed():
            yield run, base, state


def _start_or_resume(setup: Setup, checkpoints: Checkpoints) -> tuple[Any, TrainState, Position]:
    """(frozen base, state, position) from the newest whole checkpoint, or from config.model.

    Raises:
      WorkdirError: the data have changed since that checkpoint.
    """
    learner, model, mesh = setup.training.learner, setup.model, setup.mesh
    start = Position.first(setup.training)
    if checkpoints.latest() is None:
        return *init_state(learner, model, mesh, *setup.start.load()), start
    base = _load_frozen(setup)
    state, record = checkpoints.restore_newest(abstract_state(learner, model, mesh))
    there, here = record["data"], setup.task.fingerprint
    if there != here:
        raise WorkdirError(
            f"the task's data have changed since the checkpoint ({there[:12]} -> {here[:12]}): "
            "restore the files, or start in another --workdir."
        )
    at = Position.from_plain(record["at"], start)
    if at.populations:
        saved = len(record["at"].get("populations", ()))
        gone = saved - len(at.populations.kept)
        if gone:
            print(f"note: {gone} of {saved} stored populations do not fit this configuration")
    return base, state, at


def _load_frozen(setup: Setup) -> Any:
    """What a resumed run reads and does not train; its checkpoint has all the rest."""
    if setup.model.lora_rank:
        return setup.start.load_base()
    if keeps_base(setup.training.learner, setup.model):  # KL is to what the run started from
        return setup.start.load()[0]
    return None


def _make_actor(
    setup: Setup,
    verifier: Verifier,
    progress: Progress,
    preemption: Preemption,
    show: Callable[[Stage, Groups], None],
) -> Actor:
    c, training = setup.c, setup.training
    needs_strategies = training.objective.row.needs.strategies
    return Actor(
        stages=training.stages,
        dynamic_sampling=training.dynamic_sampling,
        order=c.aggregation.order,
        max_problem_tokens=c.prompt.max_problem_tokens,
        task=setup.task,
        scaffold=setup.scaffold,
        sampler=setup.sampler,
        verifier=verifier,
        strategy=setup.strategy if needs_strategies else None,
        progress=progress,
        between_chunks=preemption.look,
        show=show,
    )


def _make_trace_rows(setup: Setup) -> TraceRows:
    c = setup.c
    return TraceRows(
        tokenizer=setup.tokenizer,
        fraction=c.trace_log.fraction,
        order=c.aggregation.order,
        seed=c.seed,
        drops_truncated=c.prompt.truncated == "drop",
    )
