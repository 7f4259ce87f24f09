"""An evaluation by command, wave by wave: what is journalled, and who watches it."""

from __future__ import annotations

import hashlib
import pathlib
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from spiral_jax.core import distributed
from spiral_jax.core.progress import Progress
from spiral_jax.evaluation.answers import CORRECT
from spiral_jax.evaluation.settings import EvaluationSettings
from spiral_jax.evaluation.wave import Evaluator, Record, Wave, held_out_problems
from spiral_jax.rollout.requests import Asked
from spiral_jax.run.examples import Examples, show_nothing
from spiral_jax.run.preemption import Preemption
from spiral_jax.run.setup import Setup, make_evaluator
from spiral_jax.run.start import trained_digest
from spiral_jax.run.watchdog import Watchdog, deadline
from spiral_jax.run.workdir import StepLog, Workdir, WorkdirError
from spiral_jax.verifier.verifier import Verifier


class Evaluated(NamedTuple):
    """Everything that an evaluation has found, over all its waves.

    Attributes:
      notice: the signal that has ended it before all of them were done, else None.
    """

    asked: list[Asked]
    records: list[Record]
    counts: Counter
    notice: signal.Signals | None


def run_waves(setup: Setup, directory: Workdir, stamp: Mapping[str, str]) -> Evaluated:
    """Evaluates the waves that waves.jsonl does not hold yet, and appends them.

    SIGTERM or a Ctrl-C ends the wave that is under way, which the next call begins anew.

    Args:
      directory: is begun once the weights are there.
      stamp: what the weights and the data are, by name; stands in each wave's line.

    Raises:
      WorkdirError: the journal was begun with other weights or data.
    """
    asked = held_out_problems(setup.evaluation, setup.task, setup.scaffold)
    size = setup.evaluation.wave
    waves = [asked[i : i + size] for i in range(0, len(asked), size)]
    journal = StepLog(directory.path / "waves.jsonl")
    journal.cut_back(len(waves))
    done, notice = _count_done(journal, stamp), None
    if done < len(waves):
        with (
            Verifier(setup.reward, setup.verifier) as verifier,
            Progress(len(waves), done, unit="wave") as progress,
            jax.set_mesh(setup.mesh),
            Preemption(setup.c.train.grace_s) as preemption,
        ):
            show = show_nothing if done else Examples(setup.tokenizer).show
            evaluator = make_evaluator(setup, verifier, progress, preemption.look, show)
            begin = directory.begin
            for number, wave in _evaluate(setup, evaluator, preemption, waves, done, begin):
                row = {"step": number, **stamp, "records": wave.records, "counts": wave.counts}
                journal.append(row)
            notice = preemption.notice
            if notice:
                kept = len(journal.read()) if distributed.is_first() else 0
                preemption.announce(f"{kept} of {len(waves)} waves are kept")

    rows = journal.read()
    records = [record for row in rows for record in row["records"]]
    counts = sum((Counter(row["counts"]) for row in rows), Counter())
    return Evaluated(asked, records, counts, notice)


def _start(setup: Setup, evaluator: Evaluator) -> tuple[Any, Any | None]:
    """The policy, and the one that searches if another does; all programs are compiled."""
    progress, sampler = evaluator.progress, evaluator.sampler
    with progress.phase("compiling"):
        reports = setup.task.report, sampler.start_report()
        print(*filter(None, reports), sep="\n", flush=True)
    read = "the weights that config.model names to be read (config.train.wait_s)"
    with progress.phase("loading weights"), deadline(read, setup.c.train.wait_s):
        policy, search_policy = sampler.prepare(setup.start.load_policy()), None
        if name := setup.evaluation.searcher:
            search_policy = sampler.prepare(setup.start.searcher(name).load_policy())
    return policy, search_policy


def _evaluate(
    setup: Setup,
    evaluator: Evaluator,
    preemption: Preemption,
    waves: Sequence[Sequence[Asked]],
    done: int,
    begin: Callable[[], None],
) -> Iterator[tuple[int, Wave]]:
    """The waves from number `done` on, with their numbers, until a notice has come.

    `begin` is called once the weights are there.
    """
    limits, policies = setup.c.train, None
    with preemption.interruptible():
        policies = _start(setup, evaluator)
        begin()
    with Watchdog(limits.watchdog, limits.wait_s) as watchdog:
        for number in range(done, len(waves)):
            if preemption.reached():
                return
            began, wave = time.monotonic(), None
            watchdog.begin("wave", number)
            with preemption.interruptible():
                policy, search_policy = policies
                wave = evaluator.wave(policy, waves[number], search_policy=search_policy)
            if wave is None:
                return
            watchdog.end()
            yield number, wave
            _show_wave(evaluator.progress, number, wave, time.monotonic() - began)


def _show_wave(progress: Progress, number: int, wave: Wave, seconds: float) -> None:
    """One line: the share of right aggregation traces, and the speed."""
    tokens = sum(n for name, n in wave.counts.items() if name.endswith("sampled_tokens"))
    answers = [answer for record in wave.records for answer in record["aggregation"]["answer"]]
    right = float(np.mean([answer == CORRECT for answer in answers]))
    progress.step_done(number + 1, right, tokens, seconds)


def _count_done(journal: StepLog, stamp: Mapping[str, str]) -> int:
    """How many waves the journal holds. Raises `WorkdirError`: with another stamp than this."""

    def read() -> list[dict]:
        # earlier versions did not note the reward, nor what was trained
        known = [{**stamp, **row} for row in journal.read()]
        return [{name: row[name] for name in ("step", *stamp)} for row in known]

    done = distributed.from_first(read)
    for row in done:
        for name, value in stamp.items():
            if row[name] != value:
                raise WorkdirError(
                    f"{journal.path}: wave {row['step']} was evaluated with other {name} "
                    f"({row[name][:12]} -> {value[:12]}; same path, new content). Give another "
                    "--workdir, or put the old files back."
                )
    return len(done)


def trained_digests(settings: EvaluationSettings) -> dict[str, str]:
    """`trained_digest` of each run whose weights are evaluated, by the field that names it."""
    named = {"init_from": settings.init_from, "searcher": settings.searcher}
    return {field: trained_digest(run) for field, run in named.items() if run not in ("", "base")}


def model_fingerprint(directories: Sequence[pathlib.Path]) -> str:
    """SHA-256 over every weight file's name, size and 256 blocks of it.

    It tells other weights in the same place, without reading all of them.
    """
    digest = hashlib.sha256()
    files = [file for path in directories for file in sorted(path.glob("*.safetensors"))]
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for start in np.linspace(0, max(size - 4096, 0), 256, dtype=np.int64):
                file.seek(int(start))
                digest.update(file.read(4096))
    return digest.hexdigest()
