"""docs/models.md and docs/models.json: which models run, and how far each family is from torch.

    python -m benchmarks.families [--plans | --table | --family=NAME]

Anew: all, the plans alone, models.md alone, or the row of one family.

Every family's random small checkpoint of `benchmarks.family_cases` runs here, in transformers and
in PEFT. Mismatch of sampler and trainer is of tokens that our engine drew in bfloat16 from the same
checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from benchmarks import family_cases as cases
from benchmarks.machine import commit, machine
from benchmarks.markdown import table_lines
from configs import llama32_1b, qwen3_30b_a3b, qwen25_1_5b
from spiral_jax.core.mesh import host_mesh
from spiral_jax.learner.logprobs import group_logprobs
from spiral_jax.model.families import MISSING
from spiral_jax.planning.shipped_models import planned_model
from spiral_jax.planning.text import plan
from spiral_jax.planning.work import Assumptions

DOCS = pathlib.Path(__file__).parent.parent / "docs"
EXPERTS_RUN = DOCS / "results" / "experts_run.json"  # of benchmarks.experts_run
MODELS = {
    "qwen3": "Qwen3 dense, 0.6B to 32B, and their 2507 versions",
    "qwen2": "Qwen2, Qwen2.5 with -Math and -Coder, 0.5B to 72B; DeepSeek-R1-Distill-Qwen",
    "llama": "Llama 2, 3, 3.1, 3.2 (text), SmolLM2, DeepSeek-R1-Distill-Llama",
    "mistral": "Mistral-7B v0.2 and v0.3 and their like without a window",
    "smollm3": "SmolLM3-3B",
    "qwen3_moe": "Qwen3-30B-A3B and 235B-A22B, and their 2507 versions",
}
DIFFERS = {
    "qwen3": "queries and keys normalised per head",
    "qwen2": "biases on q, k and v",
    "llama": "-",
    "mistral": "-",
    "smollm3": "no rope in the layers that `no_rope_layers` names",
    "qwen3_moe": "as qwen3, with experts; adapters on attention, and on experts if so configured",
}
INTRODUCTION = """# Models

Written by `python -m benchmarks.families`; the numbers are in `models.json`.

## What runs

`model.hf_path` is a Hugging Face directory of one of these families, or a Hub id. A family is a row
of `spiral_jax/model/families.py`. Each runs in the sampler and in the trainer, with LoRA or in
full; checkpoints and PEFT adapters are read and written.
"""
ROPE = """
Rope may be scaled in each of them as `linear`, `llama3` or `yarn` say, in the spellings of
transformers 4 and 5; SmolLM3 with `yarn` alone is refused, as its layers without rope would be
stretched too.

Weights are safetensors in bfloat16, float16 or float32, in one file or shards; embeddings are tied
or not. What else a config.json may ask for is refused by name before anything is loaded: windows,
`dynamic` and `longrope`, biases where the family has none, activations other than SiLU, quantised
weights. Of families that are not here, some and what they would need:
"""
EXPERTS = """
How gated delta nets and OLMo 3's window would fit is in [qwen3_5.md](qwen3_5.md).

### Experts

Each shard of the groups sorts its tokens by expert and multiplies the sorted rows with
`jax.lax.ragged_dot`. Every device holds all experts, cut along `mesh.tensor` in their columns, so
no device waits for another, whatever the router says. Sampler and trainer compute routes with
one function from the same weights, so they are not recorded and replayed. There is no auxiliary
loss: the router is frozen under LoRA, and trained by the policy gradient alone in full fine-tuning.

`model.lora_experts = True` gives gate, up and down of every expert an adapter of its own, beside
those of attention; the router has none. It is off by default. Of Qwen3-30B-A3B these are 1.66 G
weights at rank 32, where attention's are 26.7 M: float32, with two moments of Adam. A and B are cut
as the expert's columns are, so that a layer still has one sum over `mesh.tensor`.

`spiral_jax.export --adapter` writes `mlp.experts.3.gate_proj.lora_A.weight` and so on, a tensor for
each, with all seven projections in `target_modules`. transformers 5 holds all experts of a layer in
two parameters, and PEFT fuses such an adapter when it reads it: tried with PEFT 0.21 and
transformers 5.24; vLLM was not tried. What PEFT itself saves of these parameters
(`target_parameters`) is read where gate and up can part: at rank r both begin with the A that they
shared; at rank 2 r, as PEFT fuses two adapters, each has its half. Once PEFT has trained on at
rank 2 r gate reads up's half too, and such an adapter is refused.

On CPUs XLA multiplies every row with every expert, and converts experts to float32 for it. Left
alone it converts those of all layers before the loop over tokens: the decode program of 4 layers of
Qwen3-30B-A3B's widths then has 11.3 GB of temporaries beside 6.2 GB of weights, and 0.8 GB with the
flags that `benchmarks.experts_run` gives XLA. Nothing of this was timed on an accelerator.
"""
PARITY = """
## Parity with torch

Random checkpoints of 2 or 3 layers with every field off its default, and adapters that PEFT wrote,
those of `qwen3_moe` on experts too, in float32 on a CPU. Logits: largest difference from PEFT's
model, in rows that predict a token. Gradient: of a weighted sum of log-probs; the norm of the
difference over the norm of torch's, of the worst parameter and the worst adapter. Greedy: tokens of
our engine that transformers would have taken. Mismatch: |log-prob of the sampler - that of the
trainer|, nat, mean and largest over tokens that our engine drew at T = 1. Random weights whose
attention is peaked exaggerate it: compare rows.
`tests/model/test_families.py` holds all but the last two columns, and that a field of a row,
changed, is seen; logits and fields of `qwen3` are in `tests/model/test_parity.py`.
"""

PLANS = """
## Configs

Settings of the paper's run for these models, not tuned; the smaller two in traces of half its
length. Plans for one host of 8 H100 and for a slice of 64 TPU v5e, by arithmetic that no
measurement has confirmed; a step is at its best, every program at its roofline. GiB are of one
device. Where a config does not fit as it is, the plan's own changes are those below the table. On
v5e:8x8 arithmetic is 11 to 15 % below what the compiler says that training of the 4B model needs
(`results/scaling/v5e_8x8.json`): plan with libtpu before renting. The 30B model does not fit chips
of 16 GB: cut by its 4 key/value heads the decode weights alone take 15.3.

    python -m spiral_jax.plan --config=configs/qwen25_1_5b.py --topology=v5e:8x8
"""
CONFIGS = {"qwen25_1_5b": qwen25_1_5b, "llama32_1b": llama32_1b, "qwen3_30b_a3b": qwen3_30b_a3b}
TOPOLOGIES = ("h100:8", "v5e:8x8")
MOST_TRIES = 12
GIB = 2**30


def planned(module: Any, topology: str) -> dict[str, Any]:
    """What docs/models.md says of a config's plan."""
    c = module.get_config()
    report = plan(
        c, topology, Assumptions(), free=0.1, most_tries=MOST_TRIES, say=lambda text: None
    )
    needed = {name: row["needed_bytes"] for name, row in report["programs"].items()}
    facts = {
        "model": report["model"],
        "parameters": planned_model(c.model)[0].arch.parameters,
        "source": report["source"],
        "fits": report["fits"],
        **report["tried"][-1],
    }
    if not report["fits"]:
        return facts
    return facts | {
        "training_bytes": max(size for name, size in needed.items() if name.startswith("train")),
        "sampling_bytes": max(size for name, size in needed.items() if "train" not in name),
        "step_seconds": report["step"]["step_seconds"],
        "decoding_tokens_per_s": report["step"]["sampled_tokens_per_s_decoding"],
    }


def plan_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for topology, by_config in results["plans"].items():
        for name, row in by_config.items():
            first = f"`{name}`", f"{row['parameters'] / 1e9:.2f} G", f"`{topology}`"
            if not row["fits"]:
                rows.append((*first, "does not fit", *["-"] * 4))
                continue
            rows.append(
                (
                    *first,
                    "changed" if row["change"] else "as configured",
                    f"{row['training_bytes'] / GIB:.1f}",
                    f"{row['sampling_bytes'] / GIB:.1f}",
                    f"{row['step_seconds']:.0f}",
                    f"{row['decoding_tokens_per_s']:,.0f}",
                )
            )
    return rows


def plan_notes(results: dict[str, Any]) -> list[str]:
    """What the plans have changed, and why the last change does not fit."""
    lines = []
    for topology, by_config in results["plans"].items():
        for name, row in by_config.items():
            if row["fits"] and row["change"]:
                lines.append(f"- `{name}` on {topology}: `{row['change']}`")
            elif not row["fits"]:
                lines.append(f"- `{name}` on {topology}, at the last try: {row['verdict']}")
    return ["", *lines] if lines else []


def drawn(config: Any, dtype: Any, variables: Any, mesh: Mesh) -> np.ndarray:
    """|difference| of each drawn token's log-prob, nat: of the sampler, of the trainer."""
    config = dataclasses.replace(config, compute_dtype=dtype)
    groups = cases.draw(config, variables, mesh, temperature=1.0, seed=1)

    @functools.partial(jax.jit, static_argnums=0)
    def forced(config: Any, variables: Any, *ids: Any) -> jax.Array:
        return group_logprobs(config, variables, *ids, 1.0, cases.GREEDY_TOKENS)[0]

    requests = groups.requests
    ids = requests.prompt_UxP, requests.prompt_len_U, groups.trace_UxCxG
    with jax.set_mesh(mesh):
        return np.abs(np.asarray(forced(config, variables, *ids)) - groups.logprob_UxCxG)


def measure(model_type: str, directory: pathlib.Path, mesh: Mesh) -> dict[str, Any]:
    """One row of the parity table."""
    case = cases.make_case(model_type, directory)
    variables, expected = case.variables(mesh), cases.of_torch(case)
    found = cases.of_ours(case.config, variables, mesh)
    gaps = cases.gradient_gaps(found, expected)
    tokens = cases.greedy(case.config, variables, mesh)
    mismatch = {
        str(jnp.dtype(dtype)): drawn(case.config, dtype, variables, mesh)
        for dtype in (jnp.bfloat16, jnp.float32)
    }
    return {
        "largest_logit": float(np.abs(expected.logits).max()),
        "logits": cases.logit_gap(found.logits, expected),
        "gradient": {
            part: max(gap for name, gap in gaps.items() if name.startswith(part))
            for part in ("params", "lora")
        },
        "greedy": {"tokens": tokens.size, "others": len(cases.not_greedy(case, tokens))},
        "mismatch": {
            name: {"mean": float(gap.mean()), "largest": float(gap.max())}
            for name, gap in mismatch.items()
        },
    }


def report(results: dict[str, Any]) -> str:
    """docs/models.md."""
    lines = [INTRODUCTION]
    lines += table_lines(
        ("`model_type`", "models", "differs in"),
        [(f"`{name}`", MODELS[name], DIFFERS[name]) for name in results["families"]],
    )
    lines += [ROPE]
    lines += table_lines(
        ("`model_type`", "needs"), [(f"`{name}`", lacks) for name, lacks in MISSING.items()]
    )
    lines += [EXPERTS.rstrip()]
    if EXPERTS_RUN.exists():
        lines += ["", *experts_lines(json.loads(EXPERTS_RUN.read_text()))]
    lines += [PARITY]
    heads = "`model_type`", "logits", "gradient, parameters", "gradient, adapters", "greedy"
    lines += table_lines((*heads, "mismatch, bfloat16", "float32"), parity_rows(results))
    lines += [PLANS]
    heads = "config", "parameters", "topology", "fits", "training, GiB", "sampling, GiB"
    lines += table_lines((*heads, "step, s", "decoded tokens/s"), plan_rows(results))
    lines += plan_notes(results)
    measured = f"Measured at {results['commit']} on {results['machine']}"
    for name, row in results["families"].items():
        if "commit" in row:
            measured += f", `{name}` at {row['commit']}"
    lines += ["", f"{measured}; plans of {results['plans_commit']}."]
    return "\n".join(lines) + "\n"


def experts_lines(run: dict[str, Any]) -> list[str]:
    """What `benchmarks.experts_run` found; see its JSON."""
    step, reading = run["run"], run["reading"]
    moved, merged = reading["moved"], reading["merged_gap"]
    words = {
        "checkpoint": f"random weights written: {run['checkpoint']['stored_gb']:.1f} GB",
        "run": f"{step['time/step']:.0f} s of it the step with its compilation; "
        f"log-probs of sampler and trainer at most {step['mismatch/max_abs_log_ratio']:.3f} apart",
        "export": "merged weights, and the adapter",
        "reading": f"adapter off by {reading['adapter_gap']:g}; merged log-probs by "
        f"{merged['mean']:.3f} in the mean, where the step had moved them by {moved['mean']:.3f}",
    }
    return [
        "A random checkpoint of Qwen3-30B-A3B's widths went from file to file: `python -m "
        "benchmarks.experts_run`,",
        f"layers: {run['layers']}; commit {run['commit']}, {run['machine']}, at low priority",
        "while other work ran, which its seconds show.",
        "",
        *table_lines(
            ("part", "seconds", "peak, GB", "what"),
            [
                (part, f"{run[part]['seconds']:.0f}", f"{run[part]['peak_gb']:.1f}", words[part])
                for part in words
            ],
        ),
    ]


def parity_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for name, row in results["families"].items():
        greedy = row["greedy"]
        mismatch = [
            f"{row['mismatch'][dtype]['mean']:.1e}, {row['mismatch'][dtype]['largest']:.1e}"
            for dtype in ("bfloat16", "float32")
        ]
        rows.append(
            (
                f"`{name}`",
                f"{row['logits']:.1e} of {row['largest_logit']:.1f}",
                f"{row['gradient']['params']:.1e}",
                f"{row['gradient']['lora']:.1e}",
                f"{greedy['tokens'] - greedy['others']} of {greedy['tokens']}",
                *mismatch,
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--table", action="store_true", help="models.md anew from models.json")
    parser.add_argument("--plans", action="store_true", help="the plans anew, and models.md")
    parser.add_argument("--family", choices=cases.CASES, help="its row anew, and models.md")
    given, file = parser.parse_args(), DOCS / "models.json"
    results = {"machine": machine(), "commit": commit(), "families": {}}
    if given.table or given.plans or given.family:
        results = json.loads(file.read_text())
    measured = [given.family] if given.family else [*cases.CASES]
    for model_type in [] if given.table or given.plans else measured:
        with tempfile.TemporaryDirectory() as directory:
            row = measure(model_type, pathlib.Path(directory), host_mesh())
        results["families"][model_type] = row | ({"commit": commit()} if given.family else {})
        print(model_type, json.dumps(row), flush=True)
    if given.family:
        file.write_text(json.dumps(results, indent=1) + "\n")
    elif not given.table:
        results["plans"] = {
            topology: {name: planned(module, topology) for name, module in CONFIGS.items()}
            for topology in TOPOLOGIES
        }
        results["plans_commit"] = commit()
        file.write_text(json.dumps(results, indent=1) + "\n")
    (DOCS / "models.md").write_text(report(results))


if __name__ == "__main__":
    main()
