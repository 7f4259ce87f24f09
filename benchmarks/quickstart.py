"""Does the quickstart learn what it claims? SPIRAL against aggregator_only, same base, equal
sampled tokens, all seeds.

    python -m benchmarks.quickstart --workdir=runs/quickstart --out=docs/quickstart

For each seed: the default run (`configs/tiny.py`), then `aggregator_only` until it has sampled as
many tokens. Writes
OUT.json and OUT.md: every seed, first and last held-out evaluation with 95 % intervals, seconds of
all steps together (compilation included; start and evaluations, about a minute, are not).
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

from absl import app, flags

from benchmarks.machine import machine

WORKDIR = flags.DEFINE_string(
    "workdir", "runs/quickstart", "where the runs go; finished ones are not run again"
)
OUT = flags.DEFINE_string("out", "docs/quickstart", "the report, without its ending")
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "seeds of the runs")

MEASURES = ("aggregated", "majority", "single", "pass_at_n")
ARMS = ("marginal_mean", "aggregator_only")
CONTROL_STEPS = 64  # at most: tokens a step vary by a fifth, and the budget is to end the run


def main(argv: list[str]) -> None:
    root, rows = pathlib.Path(WORKDIR.value), []
    for seed in SEEDS.value:
        tokens = 0
        for arm in ARMS:
            row = run(root / f"{arm}_{seed}", seed, arm, tokens)
            tokens = row["sampled_tokens"]
            rows.append(row)
            print(table([row]), flush=True)
    report = {"machine": machine(), "runs": rows}
    out = pathlib.Path(OUT.value)
    out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    out.with_suffix(".md").write_text(f"{report['machine']}\n\n{table(rows)}\n")


def run(workdir: pathlib.Path, seed: str, arm: str, max_tokens: int) -> dict:
    """Trains one arm in a process of its own, as a user would, and reads its logs."""
    command = [
        sys.executable, "-m", "spiral_jax.train", "--config=configs/tiny.py", f"--workdir={workdir}",
        f"--config.seed={seed}", f"--config.loss.estimator={arm}",
    ]  # fmt: skip
    if max_tokens:  # the schedule's length is about what the budget pays for
        command += [
            f"--config.train.max_sampled_tokens={max_tokens}",
            f"--config.train.steps={CONTROL_STEPS}",
        ]
    subprocess.run(command, check=True)
    steps = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    evaluations = [
        json.loads(line) for line in (workdir / "evaluations.jsonl").read_text().splitlines()
    ]
    return {
        "arm": arm,
        "seed": int(seed),
        "steps": len(steps),
        "sampled_tokens": round(sum(step["sampling/generated_tokens"] for step in steps)),
        "seconds": round(sum(step["time/step"] for step in steps)),
        "first": evaluations[0],
        "last": evaluations[-1],
        "lowest_parse_rate": {
            role: min(step[f"verifier/parse_rate_{role}"] for step in steps)
            for role in ("search", "aggregation")
        },
    }


def table(rows: list[dict]) -> str:
    """Markdown: one line a run, percent with 95 % intervals over held-out problems."""

    def cell(estimate: dict) -> str:
        return f"{100 * estimate['mean']:.1f} [{100 * estimate['low']:.1f}, {100 * estimate['high']:.1f}]"

    heads = [
        "arm",
        "seed",
        "steps",
        "tokens",
        "seconds",
        "aggregated, start",
        *(f"{m}, end" for m in MEASURES),
    ]
    heads += ["parse rate, end (search / aggregation)", "lowest in a step"]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row in rows:
        first, last, lowest = row["first"], row["last"], row["lowest_parse_rate"]
        cells = [
            row["arm"],
            str(row["seed"]),
            str(row["steps"]),
            f"{row['sampled_tokens']:,}",
            str(row["seconds"]),
        ]
        cells += [cell(first["aggregated"]), *(cell(last[measure]) for measure in MEASURES)]
        cells.append(
            f"{100 * last['parse_rate_search']:.1f} / {100 * last['parse_rate_aggregation']:.1f}"
        )
        cells.append(f"{100 * lowest['search']:.1f} / {100 * lowest['aggregation']:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    app.run(main)
