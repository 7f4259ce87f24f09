"""What a finished training run shows: its curves, and the table of its evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spiral_jax.core import distributed
from spiral_jax.evaluation.tables import evaluation_table
from spiral_jax.run.log import RunLog
from spiral_jax.run.workdir import read_config


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
        plain, digest = read_config(log.path)
        text = describe_run(log.path.name, plain, digest, log.starts(), steps, sampled_tokens)
        text += f"\n{evaluation_table(evaluations)}"
        (log.path / "results.md").write_text(text)
        print(text, flush=True)


def describe_run(
    name: str,
    plain: Mapping[str, Any],
    digest: str,
    starts: Sequence[Mapping[str, Any]],
    steps: int,
    sampled_tokens: int,
) -> str:
    """What results.md is of, in Markdown: model, task, config, commit, date, machine.

    Args:
      plain, digest: the configuration, see `read_config`.
      starts: rows of starts.jsonl; the last is what made the results.
    """
    model, task, loss = plain["model"], plain["task"]["name"], plain["loss"]["estimator"]
    trained = f"LoRA rank {model['lora_rank']}" if model["lora_rank"] else "all parameters"
    origin = model["adapter_path"] or model["init_from"]
    began = f", from {origin}" if origin else ""
    lines = [
        f"# {name}: held-out accuracy\n",
        f"- model: {model['hf_path']}, {trained}{began}",
        f"- training: {task}, {loss}, {steps} steps, {sampled_tokens:,} sampled tokens",
        f"- config: config.json beside this file, SHA-256 {digest[:12]}, seed {plain['seed']}",
    ]
    if starts:
        last = starts[-1]
        commit = last["commit"] or "not known"
        changed = ", with changes that are not committed" if last["modified"] else ""
        versions = last["versions"]
        lines += [
            f"- commit: {commit}{changed}; jax {versions['jax']}, Python {versions['python']}",
            f"- started: {starts[0]['time']}"
            + (f", for the last time {last['time']}" if len(starts) > 1 else "")
            + f", on {last['devices']}",
        ]
    return "\n".join(lines) + "\n"
