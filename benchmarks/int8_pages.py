"""What do int8 keys and values change? A config's run, with pages in the compute dtype and in int8.

    python -m benchmarks.int8_pages --json=docs/results/int8_pages.json [--seeds=0,1,2]
        [--workdir=DIR] [--config=configs/tiny.py] [-- --config.train.steps=2 ...]

Of each run: how far sampler and trainer are apart (nat a token), the share of tokens that the
truncated importance ratio leaves, the training reward by step, and the last held-out evaluation.
A picture of the rewards is written beside the report.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

from absl import app, flags

from benchmarks.machine import commit, machine
from benchmarks.markdown import table_lines
from spiral_jax.reporting.axes import new_figure, tidy
from spiral_jax.reporting.style import BLUE, VERMILION

CONFIG = flags.DEFINE_string("config", "configs/tiny.py", "what is trained")
WORKDIR = flags.DEFINE_string(
    "workdir", "runs/int8_pages", "where the runs go; finished ones are not run again"
)
JSON = flags.DEFINE_string("json", None, "file that gets the report", required=True)
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "seeds of the runs")

DTYPES = ("compute", "int8")
KL, LARGEST, SHARE = "mismatch/kl", "mismatch/max_abs_log_ratio", "mismatch/effective_share"
REWARDS = ("reward/aggregated", "reward/search")
LINES = {
    "compute": {"color": BLUE, "ls": "-", "label": "pages in the compute dtype"},
    "int8": {"color": VERMILION, "ls": "--", "label": "pages in int8"},
}
LAST = 10  # steps whose mean reward the table shows


def main(argv: list[str]) -> None:
    root, overrides = pathlib.Path(WORKDIR.value), argv[1:]
    report = {"machine": machine(), "commit": commit(), "overrides": overrides, "runs": []}
    for seed in SEEDS.value:
        for dtype in DTYPES:
            report["runs"].append(run(root / f"{dtype}_{seed}", seed, dtype, overrides))
            pathlib.Path(JSON.value).write_text(json.dumps(report, indent=1) + "\n")
    plot_rewards(report["runs"], pathlib.Path(JSON.value).with_suffix(".png"))
    print("\n".join(table_lines(HEADS, map(cells, report["runs"]))))


def run(workdir: pathlib.Path, seed: str, dtype: str, overrides: list[str]) -> dict:
    """Trains in a process of its own, and reads its logs."""
    command = [
        sys.executable,
        "-m",
        "spiral_jax.train",
        f"--config={CONFIG.value}",
        f"--workdir={workdir}",
        f"--config.seed={seed}",
        f"--config.sampling.cache_dtype={dtype}",
        "--config.train.mismatch_limit=0",
        *overrides,
    ]
    subprocess.run(command, check=True)
    steps, evaluations = read_rows(workdir / "metrics.jsonl"), workdir / "evaluations.jsonl"
    keys = (KL, LARGEST, SHARE, *REWARDS)
    return {
        "dtype": dtype,
        "seed": int(seed),
        "steps": [{key: step[key] for key in keys if key in step} for step in steps],
        "last": read_rows(evaluations)[-1] if evaluations.exists() else None,
    }


def read_rows(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def plot_rewards(runs: list[dict], file: pathlib.Path) -> None:
    """The training reward of aggregations by step, a thin line for each run."""
    figure = new_figure(6, 3)
    axes = figure.subplots()
    tidy(axes)
    for run in runs:
        rewards = [100 * step[REWARDS[0]] for step in run["steps"]]
        label = {} if run["seed"] == runs[0]["seed"] else {"label": None}
        axes.plot(rewards, lw=1, **(LINES[run["dtype"]] | label))
    axes.set_xlabel("step")
    axes.set_ylabel("reward of aggregations, %")
    axes.legend(frameon=False)
    figure.savefig(file)


HEADS = (
    "pages",
    "seed",
    "KL, mean of steps",
    "largest log ratio",
    "least effective share",
    f"reward of aggregations, last {LAST} steps",
    "aggregated, held out",
)


def cells(run: dict) -> list[str]:
    steps = run["steps"]
    kls, rewards = ([step[key] for step in steps if key in step] for key in (KL, REWARDS[0]))
    last = run["last"]["aggregated"] if run["last"] else None
    return [
        run["dtype"],
        str(run["seed"]),
        f"{sum(kls) / len(kls):.2g}",
        f"{max(step[LARGEST] for step in steps):.2g}",
        f"{min(step[SHARE] for step in steps):.6f}",
        f"{100 * sum(rewards[-LAST:]) / max(1, len(rewards[-LAST:])):.1f} %",
        f"{100 * last['mean']:.1f} [{100 * last['low']:.1f}, {100 * last['high']:.1f}]"
        if last
        else "",
    ]


if __name__ == "__main__":
    app.run(main)
