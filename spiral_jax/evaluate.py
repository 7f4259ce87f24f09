"""Measures how a checkpoint does with one trace, with many, with an aggregator and with RSA.

    python -m spiral_jax.evaluate --config=configs/qwen3_4b.py --workdir=W
                                  --config.model.hf_path=DIR
    python -m spiral_jax.evaluate --compare A/results.json B/results.json [--workdir=W]
                                  [--labels=base,trained]

Held-out problems are evaluated in waves of `config.eval.wave`; each finished wave is a line of
W/waves.jsonl, so that the same command goes on where it was stopped and ends with the same
W/results.json (layout: `evaluation/results.py`), a table, and four pictures. The first wave prints
one prompt and one trace of each role, as they really were: a wrong chat template shows there. A
finished evaluation prints its table again. Of the config it uses `model`, `mesh`, `task`, `prompt`,
`search.max_tokens`, `aggregation.max_tokens`, `aggregation.subset_size`, `aggregation.order`,
`sampling`, `verifier`, `eval`, `seed`, `train.wait_s` and `train.watchdog`. The model is the
checkpoint of `model.hf_path`, with the adapter of `model.adapter_path`, or as `model.init_from` has
trained it; it reads the search traces of `eval.searcher` where that names another.

`--compare` sets two results on the same problems and scaffold side by side: samples that B needs
for what A reaches, gaps with paired intervals, the same four pictures with both (in B's directory,
`compare/`, unless --workdir is given). Pictures are PNG and SVG.
"""

from __future__ import annotations

import pathlib
import signal
import sys
from collections.abc import Sequence

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags
from rich.console import Console
from rich.table import Table

from spiral_jax.core import config, distributed
from spiral_jax.core.command import refuse_arguments, run_command
from spiral_jax.core.errors import UserError
from spiral_jax.core.mesh import make_mesh
from spiral_jax.evaluation.comparison import compare, write_comparison
from spiral_jax.evaluation.results import make_results, read_results, write_results
from spiral_jax.evaluation.tables import comparison_tables, name_sides, results_tables
from spiral_jax.reporting.evaluation_figures import plot_evaluation
from spiral_jax.run.evaluation_run import model_fingerprint, run_waves, trained_digests
from spiral_jax.run.preemption import exit_code
from spiral_jax.run.setup import keep_compiled_programs, set_up_evaluation
from spiral_jax.run.workdir import WorkdirError, occupy_workdir


def evaluate(c: ConfigDict, workdir: str) -> signal.Signals | None:
    """Evaluates what `c` names, or goes on with it; writes results and pictures, prints the table.

    Returns:
      the signal that has ended it before; None: it is finished.

    Raises:
      WorkdirError: `workdir` holds an evaluation with another config, other weights or other data.
    """
    keep_compiled_programs()
    setup = set_up_evaluation(c)
    weights = [setup.start.path]
    if c.model.adapter_path:
        weights.append(pathlib.Path(c.model.adapter_path))
    stamp = {"model": model_fingerprint(weights), "data": setup.task.fingerprint}
    stamp |= trained_digests(setup.evaluation)
    if reward_source := setup.reward.fingerprint():
        stamp["reward"] = reward_source
    plain, digest = config.to_plain(c), config.digest(c)
    with occupy_workdir(workdir, plain, digest) as directory:
        distributed.check_equal(config=digest, **stamp)
        evaluated = run_waves(setup, directory, stamp)
        if evaluated.notice or not distributed.is_first():
            return evaluated.notice
        problems = {asked.cursor: asked.problem for asked in evaluated.asked}
        results = make_results(
            setup.evaluation, stamp["model"], problems, evaluated.records, evaluated.counts
        )
        path = directory.path
        write_results(path / "results.json", results)
        pictures = plot_evaluation({path.name: results}, path)
        _show(results_tables(results), path / "results.json", pictures)
    return None


def compare_results(
    path_a: str, path_b: str, workdir: str | None, labels: Sequence[str] = ()
) -> None:
    """Prints and plots B against A; writes comparison.json beside the pictures.

    Args:
      labels: what A and B are called; none: see `name_sides`.
    """
    out = pathlib.Path(workdir or pathlib.Path(path_b).parent / "compare")
    a, b = read_results(path_a), read_results(path_b)
    comparison = compare(a, b)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WorkdirError(
            f"--workdir={out}: not a directory that can be written ({error})."
        ) from error
    write_comparison(out / "comparison.json", comparison)
    names = labels or name_sides((path_a, path_b), (a["model"], b["model"]))
    named = dict(zip(names, (a, b), strict=True))
    pictures = plot_evaluation(named, out, comparison["efficiency"][-1])
    _show(comparison_tables(comparison, names), out / "comparison.json", pictures)


def _show(tables: Sequence[Table], file: pathlib.Path, pictures: Sequence[pathlib.Path]) -> None:
    console = Console()
    for table in tables:
        console.print(table)
    names = ", ".join(picture.name for picture in pictures)
    console.print(f"\n{file}; pictures beside it: {names}", soft_wrap=True, highlight=False)


def define_flags() -> None:
    config_flags.DEFINE_config_file(
        "config", None, "model, task and what to sample", lock_config=True
    )
    flags.DEFINE_string(
        "workdir", None, "directory of the evaluation, or of the comparison's pictures"
    )
    flags.DEFINE_bool("compare", False, "compare two results.json: A, the baseline, and B")
    flags.DEFINE_list("labels", [], "what --compare calls A and B; default: model@step")
    distributed.define_flags()
    flags.FLAGS.set_gnu_getopt(True)  # flags may follow the two files


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    logging.set_verbosity(logging.WARNING)
    notice = None
    try:
        if given.compare:
            if len(argv) != 3:
                raise app.UsageError(f"--compare takes two results.json, got {argv[1:]}")
            if len(set(given.labels)) != len(given.labels) or len(given.labels) not in (0, 2):
                raise app.UsageError(f"--labels={given.labels}: two different names, A,B")
            compare_results(argv[1], argv[2], given.workdir, given.labels)
            return
        refuse_arguments(argv)
        if given.config is None or given.workdir is None:
            raise app.UsageError(
                "--config and --workdir are required (or --compare A/results.json B/results.json)"
            )
        config.require_whole(given.config)
        with distributed.session(given):
            distributed.announce(make_mesh(given.config.mesh))
            notice = evaluate(given.config, given.workdir)
    except UserError as error:
        sys.exit(f"error: {error}")
    if notice:
        sys.exit(exit_code(notice, preempted=128 + notice))


if __name__ == "__main__":
    define_flags()
    run_command(main)
