"""Does a mixture of experts of Qwen3-30B-A3B's widths, cut to a few layers, go all the way?

    JAX_PLATFORMS=cpu python -m benchmarks.experts_run --dir=/tmp/experts [--json=FILE] [--layers=4]

random checkpoint -> a run of one step (reads the checkpoint, samples, trains adapters, saves)
-> export, merged and as an adapter -> both read again, and compared with what was trained

Traces are short: on a CPU XLA multiplies every row with every expert. Each part is a process of its
own, so that its peak of memory is its own; the same command again goes on after the last one that
has ended. With 4 layers it needs 14 GB of disk.

XLA's CPU backend multiplies in float32. Left alone it converts the experts of all layers before the
loop over tokens, and holds them all: JAX_PLATFORMS=cpu gives it `CPU_FLAGS`.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.machine import commit, machine, memory
from benchmarks.random_checkpoint import SHARD_BYTES, make_checkpoint
from configs import tiny
from spiral_jax import library
from spiral_jax.core.mesh import host_mesh
from spiral_jax.export import export
from spiral_jax.learner.logprobs import group_logprobs
from spiral_jax.model import hf
from spiral_jax.model.adapter import abstract_lora, load_adapter
from spiral_jax.model.architecture import read_architecture
from spiral_jax.model.transformer import ModelConfig
from spiral_jax.run.start import Trained, find_trained

PARTS = ("checkpoint", "run", "export", "reading")
MODEL = pathlib.Path(hf.__file__).parent.parent / "assets" / "architectures"
FIELDS = MODEL / "Qwen3-30B-A3B-Instruct-2507" / "config.json"
END = "<|im_end|>"
# Conversions stay in the loop that needs them, and each begins when the one before it has no use.
CPU_FLAGS = (
    "--xla_disable_hlo_passes=while-loop-invariant-code-motion,"
    "while-loop-expensive-invariant-code-motion",
    "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dir", type=pathlib.Path, required=True, help="all is written there")
    parser.add_argument("--layers", type=int, default=4, help="of the model's 48")
    parser.add_argument("--json", type=pathlib.Path, help="file that gets the report")
    parser.add_argument("--part", choices=PARTS, help="one part alone, as the program calls itself")
    given = parser.parse_args()
    if given.part:
        measure_part(given.part, given.dir, given.layers)
        return
    given.dir.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    if environment.get("JAX_PLATFORMS") == "cpu":
        environment["XLA_FLAGS"] = " ".join((environment.get("XLA_FLAGS", ""), *CPU_FLAGS))
    report: dict[str, Any] = {"machine": machine(), "commit": commit(), "layers": given.layers}
    for part in PARTS:
        module = [sys.executable, "-m", "benchmarks.experts_run", f"--part={part}"]
        if not (given.dir / f"{part}.json").exists():
            command = [*module, f"--dir={given.dir}", f"--layers={given.layers}"]
            subprocess.run(command, check=True, env=environment)
        report[part] = json.loads((given.dir / f"{part}.json").read_text())
        print(part, json.dumps(report[part]), flush=True)
    if given.json:
        given.json.write_text(json.dumps(report, indent=1) + "\n")


def measure_part(part: str, root: pathlib.Path, layers: int) -> None:
    """Does one part; writes what is to be known of it, its seconds and its peak of memory."""
    start = time.monotonic()
    facts = measure(part, root, json.loads(FIELDS.read_text()) | {"num_hidden_layers": layers})
    facts |= {"seconds": time.monotonic() - start, "peak_gb": memory("VmHWM")}
    (root / f"{part}.json").write_text(json.dumps(facts))


def measure(part: str, root: pathlib.Path, fields: dict[str, Any]) -> dict[str, Any]:
    """Does one part; what is to be known of it."""
    base, workdir, merged, adapter = (root / name for name in ("base", "run", "merged", "adapter"))
    if part == "checkpoint":
        files = make_checkpoint(base, fields)
        write_tokenizer(base, fields["vocab_size"])
        stored = sum(file.stat().st_size for file in files) / 1e9
        return {"files": len(files), "stored_gb": stored}
    if part == "run":
        library.train(library.set_up_training(configuration(base)), str(workdir))
        return last_row(workdir)
    trained = find_trained(workdir, None)
    if part == "export":
        files = [
            *export(trained, merged, adapter=False, max_shard_bytes=SHARD_BYTES),
            *export(trained, adapter, adapter=True, max_shard_bytes=SHARD_BYTES),
        ]
        return {"files": len(files)}
    return read_again(trained, merged, adapter)


def write_tokenizer(path: pathlib.Path, vocabulary: int) -> None:
    """A token for each byte, one that ends a turn, and as many more as the vocabulary has."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), END]
    tokens += [f"t{i}" for i in range(vocabulary - len(tokens))]
    made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, pad_token=END)
    tokenizer.save_pretrained(path)
    tokenizer_end = tokenizer.eos_token_id
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer_end}))


def configuration(base: pathlib.Path) -> ConfigDict:
    """One step of the smallest run that has a signal: GRPO, whose traces read no others."""
    c = tiny.get_config()
    c.model.hf_path = str(base)
    c.model.param_dtype = c.model.compute_dtype = "bfloat16"
    c.model.lora_rank, c.model.lora_alpha, c.model.remat = 32, 32.0, "layer"
    c.task.reward = "benchmarks.drill:reward"
    c.prompt.template = "plain"
    c.prompt.max_problem_tokens = 24  # bytes; a problem has 22
    c.loss.estimator = "grpo"
    c.search.traces, c.search.max_tokens = 4, 4
    c.sampling.rows, c.sampling.chunk, c.sampling.prefill_tokens = 4, 4, 24
    c.batch.problems, c.batch.search_groups = 1, 1
    c.batch.search_lengths = ((24, 4),)
    c.verifier.workers = 1
    c.train.steps, c.train.mismatch_limit, c.eval.problems = 1, 0.0, 0
    c.train.watchdog = 0.0  # a step takes minutes here
    c.optimizer.lr, c.optimizer.warmup_steps = 3e-2, 0  # so that one step is seen in bfloat16
    return c


def last_row(workdir: pathlib.Path) -> dict[str, Any]:
    """What the run's log says of its step."""
    row = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    names = ("time/", "mismatch/", "grad_norm", "tokens")
    return {name: row[name] for name in sorted(row) if name.startswith(names)}


def read_again(trained: Trained, merged: pathlib.Path, adapter: pathlib.Path) -> dict[str, Any]:
    """How far the two exports are from what was trained.

    Of the adapter: the largest difference of a number. Of the merged model: |log-prob - that of
    base and adapter|, nat, mean and largest over random tokens, beside how far training has moved
    them; merging rounds to bfloat16.
    """
    mesh = host_mesh()
    base = hf.resolve_path(trained.c.model.hf_path)
    model = hf.model_config(read_architecture(base), trained.c.model)
    lora = trained.load(abstract_lora(model), mesh)
    nothing = jax.tree.map(jnp.zeros_like, lora)
    gaps = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max()), lora, load_adapter(adapter, model, mesh)
    )

    forced = jax.jit(functools.partial(group_logprobs, model, temperature=1.0, chunk=8))
    ids = random_ids(model)

    def logprobs(params: Any, lora: Any) -> np.ndarray:
        return np.asarray(forced({"params": params, "lora": lora}, **ids)[0])

    params = hf.load_params(base, model, mesh)
    untrained, expected = logprobs(params, nothing), logprobs(params, lora)
    del params
    found = logprobs(hf.load_params(merged, model, mesh), nothing)
    return {
        "adapter_gap": max(jax.tree.leaves(gaps)),
        "moved": _sizes(expected - untrained),
        "merged_gap": _sizes(found - expected),
    }


def _sizes(gap: np.ndarray) -> dict[str, float]:
    return {"mean": float(np.abs(gap).mean()), "largest": float(np.abs(gap).max())}


def random_ids(model: ModelConfig) -> dict[str, np.ndarray]:
    """A group of two traces of 4 tokens behind a prompt of 8."""
    rng = np.random.default_rng(0)
    prompt, trace = (rng.integers(0, model.arch.V, n, np.int32) for n in ((1, 8), (1, 2, 4)))
    return {
        "prompt_UxP": prompt,
        "prompt_len_U": np.full(1, 8, np.int32),
        "trace_UxCxG": trace,
    }


if __name__ == "__main__":
    main()
