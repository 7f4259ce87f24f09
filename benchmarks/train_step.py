"""How fast is the train step? Ours against a plain one on transformers and against tunix's.

    bash benchmarks/peers/venvs.sh                               # once: an interpreter a peer
    python -m benchmarks.train_step --json=docs/results/train_step.json    # and train_step.md

All on the same groups; the plain step is torch's, tunix's is its GRPO step.
Each contestant is a process of its own that stays; they take turns, step by step. First all of them
must find the same gradient on a small batch. Each tries micro-batches of several sizes and is
measured at its fastest. Memory is the most that a process held during a measured step over what it
held after loading model and optimizer. Entries that are not run this time stay as the JSON has
them.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import statistics
from typing import Any

import numpy as np
from absl import app, flags

from benchmarks import sampler_cases, train_step_table
from benchmarks.machine import commit, machine
from benchmarks.peers.process import ContestantProcess
from benchmarks.train_step_cases import SHAPES, SMALL, Shape, write_adapters

JSON = flags.DEFINE_string(
    "json", "docs/results/train_step.json", "the report; its table goes beside it as .md"
)
SHAPE = flags.DEFINE_list("shapes", list(SHAPES), "which groups")
MODES = flags.DEFINE_list("modes", ["lora", "full"], "what is trained")
WORKDIR = flags.DEFINE_string(
    "workdir", "runs/train_step", "where model, work and the contestants' logs go"
)
REPEATS = flags.DEFINE_integer("repeats", 5, "measured steps, after those that choose the size")
PEERS = flags.DEFINE_list(
    "peers", ["transformers_step", "transformers_step_all", "tunix_step"], "against whom"
)

OURS = "spiral_step"
MICRO_BATCHES = {  # groups: what each may try; a half is half of a group's traces
    OURS: (1,),
    "transformers_step": (0.5, 1),
    "transformers_step_all": (0.5, 1),
    "tunix_step": (1,),
}
SAME_GRADIENT = 1e-4  # relative L2, float32: attention is summed in four ways

Contestants = dict[str, ContestantProcess]


def main(argv: list[str]) -> None:
    workdir, out = pathlib.Path(WORKDIR.value), pathlib.Path(JSON.value)
    sampler_cases.write_model(workdir / "model")
    write_adapters(workdir / "adapters.npz")
    report = json.loads(out.read_text()) if out.exists() else {"entries": {}}
    for mode in MODES.value:
        with contextlib.ExitStack() as stack:
            contestants = {name: ContestantProcess(name, workdir) for name in (OURS, *PEERS.value)}
            for contestant in contestants.values():
                stack.callback(contestant.close)
            loaded = load(contestants, workdir, mode)
            for name in SHAPE.value:
                entry = {"machine": machine(), "commit": commit(), "mode": mode}
                report["entries"][f"{name}, {mode}"] = entry | measure(
                    contestants, loaded, mode, SHAPES[name]
                )
                write(report, out)


def load(contestants: Contestants, workdir: pathlib.Path, mode: str) -> dict[str, Any]:
    """Loads model and adapters everywhere, and compares all gradients with ours.

    Returns what each contestant says of itself.
    """
    adapters = str(workdir / "adapters.npz") if mode == "lora" else None
    loaded, small = {}, workdir / "small.npz"
    SMALL.work().save(small)
    for name, contestant in contestants.items():
        answer = contestant.call("load", model=str(workdir / "model"), adapters=adapters)
        loaded[name] = answer["returned"]
        gradient = workdir / f"{name}_{mode}.npz"
        answer = contestant.call("gradient", work=str(small), out=str(gradient))
        loaded[name]["small_loss"] = answer["returned"]
        loaded[name]["gradient_distance"] = distance(gradient, workdir / f"{OURS}_{mode}.npz")
        print(f"{mode}; {name}: {loaded[name]}", flush=True)
        if loaded[name]["gradient_distance"] > SAME_GRADIENT:
            raise RuntimeError(f"{name} finds another gradient, so speeds cannot be compared")
    return loaded


def distance(path: pathlib.Path, reference: pathlib.Path) -> float:
    """Relative L2 over the arrays that both have.

    Those are projections or adapters, and the embedding if it is trained.
    """
    with np.load(path) as theirs, np.load(reference) as ours:
        shared = set(theirs) & set(ours)
        needed = {name for name in ours if name.startswith("layers/") and "norm" not in name}
        if not needed <= shared:
            raise RuntimeError(f"{path}: gradients of {sorted(theirs)} alone")
        apart = total = 0.0
        for name in shared:
            expected = ours[name]
            actual = theirs[name].reshape(expected.shape).astype(np.float64)
            apart += np.sum((actual - expected) ** 2)
            total += np.sum(np.square(expected))
    return float(np.sqrt(apart / total))


def measure(
    contestants: Contestants, loaded: dict[str, Any], mode: str, shape: Shape
) -> dict[str, Any]:
    """Tries micro-batch sizes, then measures in turns."""
    work, path = shape.work(), pathlib.Path(WORKDIR.value) / "work.npz"
    work.save(path)

    def step(name: str, size: float) -> dict[str, float]:
        answer = contestants[name].call("step", work=str(path), micro_batch=size)
        return run_of(answer["returned"], loaded[name])

    rows = {}
    for name in contestants:
        tried = {}
        for size in MICRO_BATCHES[name]:
            step(name, size)  # compiles, or touches new memory
            tried[size] = step(name, size)
            print(f"{shape.title}; {name}: tried {size} groups: {tried[size]}", flush=True)
        rows[name] = loaded[name] | {
            "micro_batch": min(tried, key=lambda size: tried[size]["seconds"]),
            "tried": {str(size): run for size, run in tried.items()},
            "runs": [],
        }
    for _ in range(REPEATS.value):
        for name, row in rows.items():
            row["runs"].append(step(name, row["micro_batch"]))
            print(f"{shape.title}; {name}: {row['runs'][-1]}", flush=True)
    flops = shape.flops(adapters=mode == "lora")
    return {
        "title": shape.title,
        "trained_tokens": work.trained_tokens,
        "flops": flops,
        "contestants": rows,
    }


def run_of(measured: dict[str, Any], loaded: dict[str, Any]) -> dict[str, float]:
    peak = measured["peak_bytes"] - loaded["loaded_bytes"]
    return {
        "seconds": measured["seconds"],
        "cpu_seconds": measured["cpu_seconds"],
        "bytes_over_loaded": peak,
    }


def summarise(entry: dict[str, Any]) -> None:
    """Adds what follows from the measured runs."""
    rows = entry["contestants"]
    for row in rows.values():
        speeds = [entry["trained_tokens"] / run["seconds"] for run in row["runs"]]
        row["tokens_per_s"] = {
            "median": statistics.median(speeds),
            "min": min(speeds),
            "max": max(speeds),
        }
        row["peak_bytes"] = max(run["bytes_over_loaded"] for run in row["runs"])
    peers = [name for name in rows if name != OURS]
    if peers:
        speed = {name: row["tokens_per_s"]["median"] for name, row in rows.items()}
        best = max(peers, key=speed.get)
        entry["better_peer"] = best
        entry["speed_over_better_peer"] = speed[OURS] / speed[best]
        entry["memory_over_better_peer"] = rows[OURS]["peak_bytes"] / rows[best]["peak_bytes"]


def write(report: dict[str, Any], out: pathlib.Path) -> None:
    for entry in report["entries"].values():
        summarise(entry)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    out.with_suffix(".md").write_text(train_step_table.table(report))


if __name__ == "__main__":
    app.run(main)
