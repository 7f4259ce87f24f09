"""Measures how a checkpoint does with one trace, with many, with an aggregator and with rounds of
self-aggregation.

    python -m spiral_jax.evaluate --config=configs/qwen3_4b.py --config.model.hf_path=DIR
    --workdir=W
    python -m spiral_jax.evaluate --compare A/results.json B/results.json [--workdir=W]

Held-out problems are evaluated in waves of `config.eval.wave`; each finished wave is a line of
W/waves.jsonl, so that the same command goes on where it was stopped and ends with the same
W/results.json (layout: `spiral_jax.evaluation.results`), a table, and four pictures. The first wave
prints one prompt and one trace of each role, as they really were: a wrong chat template shows
there. A finished evaluation prints its table again. Of the config it uses `model`, `mesh`, `task`,
`prompt`, `search.max_tokens`, `aggregation.max_tokens`, `sampling`, `verifier`, `eval`, `seed`,
`train.wait_s` and `train.watchdog`. The model is the checkpoint of `model.hf_path`, with the
adapter of `model.adapter_path`, or as `model.init_from` has trained it; it reads the search traces
of `eval.searcher` where that names another.

`--compare` sets two results on the same problems and scaffold side by side: samples that B needs
for what A reaches, gaps with paired intervals, the same four pictures with both (in B's directory,
`compare/`, unless --workdir is given).
"""

from __future__ import annotations

import hashlib
import pathlib
import sys
import time
from collections import Counter

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags
from rich.console import Console
from rich.table import Table

from spiral_jax.core import config, config_checks, distributed
from spiral_jax.core.errors import UserError
from spiral_jax.core.mesh import make_mesh
from spiral_jax.core.progress import Progress
from spiral_jax.evaluation import comparison, results
from spiral_jax.evaluation.wave import evaluate_wave, held_out
from spiral_jax.reporting import evaluation_figures as scaling_plots
from spiral_jax.rollout.requests import Actor
from spiral_jax.run.setup import Setup, keep_compiled_programs, set_up
from spiral_jax.run.trace_log import render_examples
from spiral_jax.run.watchdog import Watchdog, deadline
from spiral_jax.run.workdir import StepLog, WorkdirError, open_workdir
from spiral_jax.tasks.problem import Problem
from spiral_jax.verifier.settings import VerifierSettings
from spiral_jax.verifier.verifier import CORRECT, Verifier


def define_flags() -> None:
    config_flags.DEFINE_config_file(
        "config", None, "model, task and what to sample", lock_config=True
    )
    flags.DEFINE_string(
        "workdir", None, "directory of the evaluation, or of the comparison's pictures"
    )
    flags.DEFINE_bool("compare", False, "compare two results.json: A, the baseline, and B")
    distributed.define_flags()
    flags.FLAGS.set_gnu_getopt(True)  # flags may follow the two files


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    logging.set_verbosity(logging.WARNING)
    try:
        if given.compare:
            if len(argv) != 3:
                raise app.UsageError(f"--compare takes two results.json, got {argv[1:]}")
            compare(argv[1], argv[2], given.workdir)
            return
        if len(argv) > 1:
            raise app.UsageError(f"unknown arguments: {argv[1:]}")
        if given.config is None or given.workdir is None:
            raise app.UsageError(
                "--config and --workdir are required (or --compare A/results.json B/results.json)"
            )
        with distributed.session(given):
            distributed.announce(make_mesh(given.config.mesh))
            evaluate(given.config, given.workdir)
    except UserError as error:
        sys.exit(f"error: {error}")


def evaluate(c: ConfigDict, workdir: str) -> None:
    """Evaluates what `c` names, or goes on with it; writes results.json and pictures, prints the
    table.

    Raises:
      WorkdirError: `workdir` holds an evaluation with another config, other weights or other data.
    """
    config_checks.validate_evaluation(c)
    keep_compiled_programs()
    setup = set_up(config.for_evaluation(c), training=False)
    path = open_workdir(workdir, config.to_plain(c), config.digest(c))
    model = model_fingerprint(
        [setup.path, *([pathlib.Path(c.model.adapter_path)] if c.model.adapter_path else [])]
    )
    journal = StepLog(path / "waves.jsonl")
    distributed.check_equal(config=config.digest(c), model=model, data=setup.task.fingerprint)
    settings = VerifierSettings.from_config(c.verifier)
    with Verifier(setup.reward, settings) as verifier:
        problems = run_waves(setup, journal, model, verifier)
    if not distributed.is_first():
        return
    waves = journal.read()
    records = [record for wave in waves for record in wave["records"]]
    counts = sum((Counter(wave["counts"]) for wave in waves), Counter())
    found = results.make_results(setup.c, model, problems, records, counts)
    results.write_results(path / "results.json", found)
    _show(
        results.results_tables(found),
        path / "results.json",
        scaling_plots.draw({path.name: found}, path),
    )


def _show(tables: list[Table], file: pathlib.Path, pictures: list[pathlib.Path]) -> None:
    console = Console()
    for table in tables:
        console.print(table)
    names = ", ".join(picture.name for picture in pictures)
    console.print(f"\n{file}; pictures beside it: {names}", soft_wrap=True, highlight=False)


def run_waves(setup: Setup, journal: StepLog, model: str, verifier: Verifier) -> dict[int, Problem]:
    """Evaluates the waves that `journal` does not hold yet, and appends them; returns the evaluated
    problems by index.

    Raises:
      WorkdirError: the journal was begun with other weights or data.
    """
    c = setup.c
    actor = Actor(c, setup.task, setup.scaffold, setup.eval_sampler, verifier, Progress(1, 0))
    problems = held_out(actor)
    waves = [list(problems)[i : i + c.eval.wave] for i in range(0, len(problems), c.eval.wave)]
    journal.cut_back(len(waves))
    stamp = {"model": model, "data": setup.task.fingerprint}
    done = distributed.from_first(
        lambda: [{name: wave[name] for name in ("step", *stamp)} for wave in journal.read()]
    )
    _check_journal(journal, done, stamp)
    if len(done) == len(waves):
        return problems
    with Progress(len(waves), len(done), unit="wave") as progress, jax.set_mesh(setup.mesh), \
            Watchdog(c.train.watchdog, c.train.wait_s) as watchdog:  # fmt: skip
        actor = Actor(c, setup.task, setup.scaffold, setup.eval_sampler, verifier, progress)
        with progress.phase("compiling"):
            print(
                *filter(None, (setup.task.report, setup.eval_sampler.start_report())),
                sep="\n",
                flush=True,
            )
        read = "the weights that config.model names to be read (config.train.wait_s)"
        with progress.phase("loading weights"), deadline(read, c.train.wait_s):
            policy, searcher = setup.load_policies()
            weights = setup.eval_sampler.prepare(policy)
            search_weights = None if searcher is None else setup.eval_sampler.prepare(searcher)
        for number in range(len(done), len(waves)):
            start, index_B = time.monotonic(), np.array(waves[number])
            watchdog.starts("wave", number)
            asked = [problems[index] for index in waves[number]]
            records, counts, rollouts = evaluate_wave(
                actor, weights, asked, index_B, search_weights=search_weights
            )
            watchdog.ends()
            if number == 0:
                print(render_examples(rollouts, setup.tokenizer), flush=True)
            journal.append({"step": number, **stamp, "records": records, "counts": counts})
            tokens = sum(count for name, count in counts.items() if name.endswith("sampled_tokens"))
            right = np.mean(
                [
                    answer == CORRECT
                    for record in records
                    for answer in record["aggregation"]["answer"]
                ]
            )
            progress.step_done(number + 1, float(right), tokens, time.monotonic() - start)
    return problems


def _check_journal(journal: StepLog, done: list[dict], stamp: dict[str, str]) -> None:
    for wave in done:
        for name, value in stamp.items():
            if wave[name] != value:
                raise WorkdirError(
                    f"{journal.path}: wave {wave['step']} was evaluated with other {name} ({wave[name][:12]} -> "
                    f"{value[:12]}; same path, new content). Give another --workdir, or put the old files back."
                )


def model_fingerprint(directories: list[pathlib.Path]) -> str:
    """SHA-256 over every weight file's name, size and 256 blocks of it: other weights in the same
    place show.
    """
    digest = hashlib.sha256()
    for path in [
        file for directory in directories for file in sorted(directory.glob("*.safetensors"))
    ]:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for start in np.linspace(0, max(size - 4096, 0), 256, dtype=np.int64):
                file.seek(int(start))
                digest.update(file.read(4096))
    return digest.hexdigest()


def compare(path_a: str, path_b: str, workdir: str | None) -> None:
    """Prints and draws B against A; writes comparison.json beside the pictures."""
    out = pathlib.Path(workdir or pathlib.Path(path_b).parent / "compare")
    a, b = results.read_results(path_a), results.read_results(path_b)
    found = comparison.compare(a, b)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WorkdirError(
            f"--workdir={out}: not a directory that can be written ({error})."
        ) from error
    comparison.write(out / "comparison.json", found)
    pictures = scaling_plots.draw(
        comparison.names(path_a, a, path_b, b), out, found["efficiency"][-1]
    )
    _show(comparison.tables(found), out / "comparison.json", pictures)


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=config.parse_flags)
