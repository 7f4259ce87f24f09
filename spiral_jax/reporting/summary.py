"""What a finished training run shows: its curves, and the table of its evaluations."""

from __future__ import annotations

from spiral_jax.core import distributed
from spiral_jax.evaluation.tables import evaluation_table
from spiral_jax.run.log import RunLog


def summarise_run(log: RunLog, steps: int, sampled_tokens: int) -> None:
    """Plots the curves, writes and prints the table; on the first process alone."""
    if not distributed.is_first():
        return
    # matplotlib takes half a second to import, which a restart can do without.
    from spiral_jax.reporting.training_figures import plot_training

    evaluations, picture = log.evaluations(), log.path / "curves.png"
    plot_training(log.metrics(), evaluations, picture)
    print(f"\n{steps} steps, {sampled_tokens:,} sampled tokens; curves: {picture}", flush=True)
    if evaluations:
        table = evaluation_table(evaluations)
        (log.path / "results.md").write_text(table)
        print(table, flush=True)
