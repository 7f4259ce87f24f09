"""Does the quickstart learn what it claims? SPIRAL against aggregator_only at equal sampled tokens.

    python -m benchmarks.quickstart --workdir=runs/quickstart --out=docs/results/quickstart

Same base, all seeds. For each seed: the default run (`configs/tiny.py`), then `aggregator_only`
until it has sampled as many tokens. Writes OUT.json and OUT.md: every seed, first and last held-out
evaluation with 95 % intervals, seconds of all steps together (compilation included; start and
evaluations, about a minute, are not).
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

from absl import app, flags

from benchmarks.machine import machine
from benchmarks.markdown import table_lines

WORKDIR = flags.DEFINE_string(
    "workdir", "runs/quickstart", "where the runs go; finished ones are not run again"
)
OUT = flags.DEFINE_string("out", "docs/results/quickstart", "the report, without its ending")
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "seeds of the runs")

EVALUATIONS = "evaluations.jsonl"
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
        sys.executable,
        "-m",
        "spiral_jax.train",
        "--config=configs/tiny.py",
        f"--workdir={workdir}",
        f"--config.seed={seed}",
        f"--config.loss.estimator={arm}",
    ]
    if max_tokens:  # the schedule's length is about what the budget pays for
        command += [
            f"--config.train.max_sampled_tokens={max_tokens}",
            f"--config.train.steps={CONTROL_STEPS}",
        ]
    subprocess.run(command, check=True)
    steps, evaluations = read_rows(workdir / "metrics.jsonl"), read_rows(workdir / EVALUATIONS)
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


def read_rows(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(rows: list[dict]) -> str:
    """Markdown: one line a run, percent with 95 % intervals over held-out problems."""
    heads = (
        "arm",
        "seed",
        "steps",
        "tokens",
        "seconds",
        "aggregated, start",
        *(f"{measure}, end" for measure in MEASURES),
        "parse rate, end (search / aggregation)",
        "lowest in a step",
    )
    return "\n".join(table_lines(heads, map(cells, rows)))


def cells(row: dict) -> list[str]:
    def interval(estimate: dict) -> str:
        mean, low, high = (100 * estimate[name] for name in ("mean", "low", "high"))
        return f"{mean:.1f} [{low:.1f}, {high:.1f}]"

    def pair(search: float, aggregation: float) -> str:
        return f"{100 * search:.1f} / {100 * aggregation:.1f}"

    first, last, lowest = row["first"], row["last"], row["lowest_parse_rate"]
    return [
        row["arm"],
        str(row["seed"]),
        str(row["steps"]),
        f"{row['sampled_tokens']:,}",
        str(row["seconds"]),
        interval(first["aggregated"]),
        *(interval(last[measure]) for measure in MEASURES),
        pair(last["parse_rate_search"], last["parse_rate_aggregation"]),
        pair(lowest["search"], lowest["aggregation"]),
    ]


if __name__ == "__main__":
    app.run(main)
