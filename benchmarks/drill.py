"""The run that the drills kill.

A random model of a few thousand parameters, three problems, steps of well under a second, every
kind of file that a real run writes. The tests and `benchmarks.kill_soak` share it.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Sequence
from subprocess import CompletedProcess

import jax
import numpy as np
import orbax.checkpoint as ocp
from safetensors.numpy import save_file

from benchmarks.nursery import Nursery
from spiral_jax.core.faults import VARIABLE
from spiral_jax.tasks import two_halves
from spiral_jax.tasks.problem import Problem

ROOT = pathlib.Path(__file__).parent.parent
BUNDLED = ROOT / "spiral_jax" / "assets" / "tiny"
PROBLEMS = 3  # an epoch ends every step or two
CLOCK = ("time/", "memory/", "tokens_per_s")  # metrics that two equal runs need not share

FLAGS = [
    "--config=configs/tiny.py",
    "--config.task.name=jsonl",
    "--config.task.reward=benchmarks.drill:reward",
    "--config.search.traces=4",
    "--config.aggregation.subsets=3",
    "--config.aggregation.subset_size=2",
    "--config.aggregation.traces=2",
    "--config.sampling.rows=16",
    "--config.batch.problems=2",
    "--config.batch.search_groups=2",
    "--config.batch.aggregation_groups=6",
    "--config.verifier.workers=1",
    "--config.eval.problems=1",
    "--config.checkpoint.every=1",
    "--config.trace_log.every=1",
    "--config.trace_log.keep_steps=1000",
    "--config.optimizer.lr=1e-2",
    "--config.optimizer.warmup_steps=0",
]


def reward(text: str, problem: Problem) -> bool:
    """A coin that falls the same way for the same text: so a random model is right at times."""
    return zlib.crc32(text.encode("utf-8", "surrogatepass")) % 2 == 0


def prepare(folder: pathlib.Path, seed: int = 0) -> None:
    """Writes `folder`/model, `folder`/train.jsonl and `folder`/eval.jsonl, once."""
    if (folder / "eval.jsonl").exists():
        return
    write_model(folder / "model", seed)
    task = two_halves.task(0)
    _write_problems(folder / "train.jsonl", [task.train(i) for i in range(PROBLEMS)])
    _write_problems(folder / "eval.jsonl", [task.held_out(0)])


def _write_problems(path: pathlib.Path, problems: list[Problem]) -> None:
    rows = [{"problem": problem.text, "answer": problem.answer} for problem in problems]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def files_of(folder: pathlib.Path) -> list[str]:
    """Flags that name what `prepare` wrote."""
    return [
        f"--config.model.hf_path={folder / 'model'}",
        f"--config.task.train_path={folder / 'train.jsonl'}",
        f"--config.task.eval_path={folder / 'eval.jsonl'}",
    ]


def write_model(path: pathlib.Path, seed: int) -> None:
    """A model of one layer with random weights, and the bundled model's tokenizer."""
    shutil.copytree(BUNDLED, path, dirs_exist_ok=True)
    config = json.loads((BUNDLED / "config.json").read_text())
    D, F, H, J, E = 16, 32, 2, 1, 8
    config |= {
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": 1,
        "num_attention_heads": H,
        "num_key_value_heads": J,
        "head_dim": E,
        "tie_word_embeddings": True,
    }
    config.pop("layer_types", None)
    (path / "config.json").write_text(json.dumps(config))

    rng = np.random.default_rng(seed)
    kernels = {
        "self_attn.q_proj": (H * E, D),
        "self_attn.k_proj": (J * E, D),
        "self_attn.v_proj": (J * E, D),
        "self_attn.o_proj": (D, H * E),
        "mlp.gate_proj": (F, D),
        "mlp.up_proj": (F, D),
        "mlp.down_proj": (D, F),
    }
    norms = {
        "self_attn.q_norm": E,
        "self_attn.k_norm": E,
        "input_layernorm": D,
        "post_attention_layernorm": D,
    }
    weights = {}
    for name, shape in kernels.items():
        weights[f"model.layers.0.{name}.weight"] = rng.normal(0, 0.3, shape)
    for name, size in norms.items():
        weights[f"model.layers.0.{name}.weight"] = np.ones(size)
    weights["model.embed_tokens.weight"] = rng.normal(0, 0.3, (config["vocab_size"], D))
    weights["model.norm.weight"] = np.ones(D)
    arrays = {name: array.astype(np.float32) for name, array in weights.items()}
    save_file(arrays, path / "model.safetensors")


class Runs:
    """Starts or resumes the run of `folder`, with or without a fault. A context manager.

    Programs are compiled once for all of them. The processes are forks of one that has imported the
    program (benchmarks/nursery.py); `fresh` gives one of its own, as a user starts it.
    """

    def __init__(self, folder: pathlib.Path):
        prepare(folder)
        self.folder = folder
        without_fault = {name: value for name, value in os.environ.items() if name != VARIABLE}
        self._environment = without_fault | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        self._nursery = Nursery(self._environment)

    def __enter__(self) -> Runs:
        return self

    def __exit__(self, *error: object) -> None:
        self._nursery.__exit__(*error)

    def run(
        self,
        workdir: pathlib.Path,
        steps: int,
        fault: str = "",
        fresh: bool = False,
        changes: Sequence[str] = (),
    ) -> CompletedProcess[str]:
        """Args: changes: more flags, which count before the others."""
        flags = [
            *FLAGS,
            *files_of(self.folder),
            f"--workdir={workdir}",
            f"--config.train.steps={steps}",
            *changes,
        ]
        if not fresh:
            return self._nursery.run(flags, fault)
        command = [sys.executable, "-m", "spiral_jax.train", *flags]
        environment = self._environment | {VARIABLE: fault}
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
        )


def finished_steps(workdir: pathlib.Path) -> int:
    """Complete rows of metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def saved_step(workdir: pathlib.Path) -> int:
    """Step of the newest complete checkpoint; 0 without one."""
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def half_written(workdir: pathlib.Path) -> int:
    """Directories of checkpoints whose writing was cut short."""
    return len(list((workdir / "checkpoints").glob("*orbax-checkpoint-tmp*")))


def seconds_to_start(output: str) -> float | None:
    """What the run printed of its start-up."""
    match = re.search(r"start-up took ([0-9.]+) s", output)
    return float(match[1]) if match else None


def differences(one: pathlib.Path, other: pathlib.Path) -> list[str]:
    """How two finished runs differ in final state (bits), metrics and files; [] = in nothing.

    Files: traces, evaluations, and the table of results.
    """
    return [
        *_state_differences(one, other),
        *_metric_differences(one, other),
        *_file_differences(one, other),
    ]


def _state_differences(one: pathlib.Path, other: pathlib.Path) -> list[str]:
    step, arrays = _arrays(one)
    other_step, other_arrays = _arrays(other)
    if step != other_step or arrays.keys() != other_arrays.keys():
        return [f"the final checkpoints are of steps {step} and {other_step}, or hold other arrays"]
    lines = []
    for name, array in arrays.items():
        ours = np.frombuffer(array.tobytes(), np.uint8)
        theirs = np.frombuffer(other_arrays[name].tobytes(), np.uint8)
        if bits := int(np.unpackbits(ours ^ theirs).sum()):
            lines.append(f"{name}: {bits} bits")
    return lines


def _metric_differences(one: pathlib.Path, other: pathlib.Path) -> list[str]:
    lines = []
    for number, (row, other_row) in enumerate(zip(_metrics(one), _metrics(other), strict=True)):
        for key in row | other_row:
            if row.get(key) != other_row.get(key):
                lines.append(f"row {number}, {key}")
    return lines


def _file_differences(one: pathlib.Path, other: pathlib.Path) -> list[str]:
    def files(workdir: pathlib.Path) -> dict[str, bytes]:
        # not results.md, which says when it was made: its table is of evaluations.jsonl
        paths = [workdir / "evaluations.jsonl"]
        paths += [*workdir.glob("traces/*"), *workdir.glob("evaluations/*/*.json")]
        return {str(p.relative_to(workdir)): p.read_bytes() for p in paths if p.exists()}

    ours, theirs = files(one), files(other)
    return [name for name in sorted(ours | theirs) if ours.get(name) != theirs.get(name)]


def _arrays(workdir: pathlib.Path) -> tuple[int, dict[str, np.ndarray]]:
    """The newest checkpoint: its step, and its arrays by path."""
    step = saved_step(workdir)
    directory = (workdir / "checkpoints" / str(step) / "state").absolute()
    reader = ocp.PyTreeCheckpointer()
    on_host = ocp.RestoreArgs(restore_type=np.ndarray)  # whatever devices the run had
    where = jax.tree.map(lambda _: on_host, reader.metadata(directory).item_metadata.tree)
    tree = reader.restore(directory, restore_args=where)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return step, {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def _metrics(workdir: pathlib.Path) -> list[dict]:
    """The rows of metrics.jsonl without those of the clock."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if not key.startswith(CLOCK)} for row in rows]
