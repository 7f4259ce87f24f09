"""Does a checkpoint of Qwen3-4B's size load on a small host, and what does bfloat16 cost?

    python -m benchmarks.qwen3_4b_weights --dir=/tmp/qwen3_4b \
        --json=docs/results/qwen3_4b_weights.json

1. Random weights in bfloat16 are streamed into three shards (8 GB of disk) and loaded: seconds and
   peak memory.
2. The same weights cut to four layers: KL of our bfloat16 logits to those of transformers, beside
   the KL of its own bfloat16 to its float32.

Each program runs in a process of its own, one after the other.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.machine import machine, memory
from benchmarks.random_checkpoint import make_checkpoint
from spiral_jax.core.mesh import host_mesh
from spiral_jax.model import hf
from spiral_jax.model.architecture import read_architecture
from spiral_jax.model.transformer import ModelConfig, Transformer, head_kernel

DIR = flags.DEFINE_string("dir", None, "where the checkpoints and logits go: 10 GB", required=True)
JSON = flags.DEFINE_string("json", None, "file that gets the report")
PART = flags.DEFINE_enum(
    "part", None, ["load", "ours", "theirs"], "one part alone, as the program calls itself"
)

FIELDS = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5e6,
    "tie_word_embeddings": True,
}
CUT = 4  # layers of the second checkpoint
ROWS, TOKENS = 2, 64


def main(argv: list[str]) -> None:
    root = pathlib.Path(DIR.value)
    whole, cut = root / "whole", root / f"cut_{CUT}"
    if PART.value == "load":
        print(json.dumps(load(whole)))
    elif PART.value == "ours":
        np.save(root / "ours.npy", our_logits(cut))
    elif PART.value == "theirs":
        for dtype in ("bfloat16", "float32"):
            np.save(root / f"theirs_{dtype}.npy", their_logits(cut, dtype))
    else:
        report = {"machine": machine()} | measure(whole, cut)
        print(json.dumps(report, indent=1), flush=True)
        if JSON.value:
            pathlib.Path(JSON.value).write_text(json.dumps(report, indent=1) + "\n")


def measure(whole: pathlib.Path, cut: pathlib.Path) -> dict:
    root = whole.parent
    shards = make_checkpoint(whole, FIELDS)
    make_checkpoint(cut, FIELDS | {"num_hidden_layers": CUT})
    loading = json.loads(run("load"))
    run("ours")
    run("theirs")
    ours = np.load(root / "ours.npy")
    theirs = np.load(root / "theirs_bfloat16.npy")
    exact = np.load(root / "theirs_float32.npy")
    return {
        "shards": len(shards),
        "stored_gb": sum(shard.stat().st_size for shard in shards) / 1e9,
        **loading,
        "kl_ours_to_transformers_bfloat16": kl(theirs, ours),
        "kl_transformers_bfloat16_to_float32": kl(exact, theirs),
        "kl_ours_to_transformers_float32": kl(exact, ours),
        "layers": CUT,
        "positions": ROWS * TOKENS,
    }


def run(part: str) -> str:
    """One part in a process of its own; what it prints."""
    module = [sys.executable, "-m", "benchmarks.qwen3_4b_weights"]
    command = [*module, f"--dir={DIR.value}", f"--part={part}"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def load(path: pathlib.Path) -> dict:
    """Seconds, GB of the arrays, and the peak of all other memory that is not the mapped files."""
    config = ModelConfig(read_architecture(path), jnp.bfloat16)
    peak, done = 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, memory("RssAnon"))

    jax.block_until_ready(jnp.zeros(4))
    before, start = memory("RssAnon"), time.monotonic()
    threading.Thread(target=watch, daemon=True).start()
    params = jax.block_until_ready(hf.load_params(path, config, host_mesh()))
    done.set()
    sizes = [leaf.nbytes / 1e9 for leaf in jax.tree.leaves(params)]
    return {
        "load_seconds": time.monotonic() - start,
        "arrays_gb": sum(sizes),
        "largest_array_gb": max(sizes),
        "peak_beside_arrays_gb": peak - before - sum(sizes),
        "peak_with_mapped_files_gb": memory("VmHWM"),
    }


def token_ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, FIELDS["vocab_size"], (ROWS, TOKENS), np.int32)


def our_logits(path: pathlib.Path) -> np.ndarray:
    config = ModelConfig(read_architecture(path), jnp.bfloat16, jnp.bfloat16, remat=False)
    params = hf.load_params(path, config, host_mesh())
    lengths = jnp.full((ROWS,), TOKENS, jnp.int32)

    @jax.jit
    def logits(params: dict) -> jax.Array:
        hidden = Transformer(config).apply(
            {"params": params}, jnp.asarray(token_ids()), lengths, None
        )
        return jnp.einsum(
            "utd,dv->utv", hidden, head_kernel(config, params), preferred_element_type=jnp.float32
        )

    return np.asarray(logits(params))


def their_logits(path: pathlib.Path, dtype: str) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    with torch.no_grad():
        return model(torch.tensor(token_ids(), dtype=torch.long)).logits.float().numpy()


def kl(p: np.ndarray, q: np.ndarray) -> float:
    """Mean over positions of KL(p | q), both logits, in nats."""
    V, total = p.shape[-1], 0.0
    for row_p, row_q in zip(p.reshape(-1, V), q.reshape(-1, V), strict=True):
        a, b = log_softmax(row_p), log_softmax(row_q)
        total += float(np.sum(np.exp(a) * (a - b)))
    return total / (p.size // V)


def log_softmax(logits_V: np.ndarray) -> np.ndarray:
    wide = logits_V.astype(np.float64)
    return wide - np.logaddexp.reduce(wide)


if __name__ == "__main__":
    app.run(main)
