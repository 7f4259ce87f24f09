"""What does int8 change? SmolLM2's logits, and how far its sampler and trainer are apart.

    bash launch/fetch_smollm2.sh
    python -m benchmarks.int8_base [--model=DIR] [--json=docs/results/int8_base.json]
        [--only="int8, computed in bfloat16"]

Each base samples answers to the same questions, and its trainer reads them: the mismatch. Then all
read what the float32 base has written: the distance of their logits from its own. With pages in
int8 the sampler alone rounds: its keys and values. What --only does not name keeps its place in the
file.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

from benchmarks.machine import commit, machine
from benchmarks.markdown import table_lines
from configs import smollm2_135m
from spiral_jax.core.groups import GroupRequests, Groups, Purpose, Role, pad_rows
from spiral_jax.core.mesh import bytes_on_a_device, make_mesh
from spiral_jax.learner.logprobs import group_logprobs, length_mask, response_hidden
from spiral_jax.learner.settings import learner_settings
from spiral_jax.learner.state import init_state, variables
from spiral_jax.model import hf
from spiral_jax.model.architecture import read_architecture
from spiral_jax.model.products import with_matmul_precision
from spiral_jax.model.transformer import ModelConfig
from spiral_jax.prompts.prompts import search_prompt
from spiral_jax.prompts.scaffold import make_scaffold
from spiral_jax.prompts.settings import PromptSettings
from spiral_jax.prompts.tokenizer import load_tokenizer, stop_ids
from spiral_jax.sampling.engine import make_samplers
from spiral_jax.sampling.memory import Room, memory_of_a_device
from spiral_jax.sampling.protocol import sample
from spiral_jax.sampling.settings import GroupLimits

MODEL = flags.DEFINE_string("model", "models/SmolLM2-135M-Instruct", "directory of the model")
JSON = flags.DEFINE_string("json", "docs/results/int8_base.json", "file that gets the report")
ONLY = flags.DEFINE_string("only", "", "the one base that is measured; default: all")

QUESTIONS, TRACES, TOKENS = 8, 4, 64
ROWS = 16
REFERENCE = "float32"


class Base(NamedTuple):
    """Dtypes of a base, of what is computed with it, and of the sampler's pages."""

    param_dtype: str
    compute_dtype: str
    cache_dtype: str = "compute"


BASES = {
    REFERENCE: Base("float32", "float32"),
    "float32, pages in int8": Base("float32", "float32", "int8"),
    "int8": Base("int8", "float32"),
    "bfloat16, computed in bfloat16": Base("bfloat16", "bfloat16"),
    "int8, computed in bfloat16": Base("int8", "bfloat16"),
}


class Policy(NamedTuple):
    """A base with fresh adapters, and what its sampler has written."""

    model: ModelConfig
    variables: dict[str, Any]
    groups: Groups


def main(argv: list[str]) -> None:
    path, out = pathlib.Path(MODEL.value), pathlib.Path(JSON.value)
    report = json.loads(out.read_text()) if out.exists() else {"bases": {}}
    written, expected = None, None
    for name, base in BASES.items():
        if ONLY.value and name not in (REFERENCE, ONLY.value):
            continue
        policy = make_policy(path, base)
        written = written or policy.groups
        logits = logits_of(policy, written)
        expected = logits if expected is None else expected
        report["bases"][name] = {
            "machine": machine(),
            "commit": commit(),
            "model": path.name,
            "tokens": int(live(written).sum()),
            "bytes": bytes_on_a_device(policy.variables["params"]),
            "mismatch": mismatch(policy),
            "distance": distance(expected, logits, live(written)),
        }
        out.write_text(json.dumps(report, indent=1) + "\n")
        print(name, json.dumps(report["bases"][name]), flush=True)
    print("\n".join(table_lines(HEADS, [cells(*row) for row in report["bases"].items()])))


def make_policy(path: pathlib.Path, base: Base) -> Policy:
    c = smollm2_135m.get_config()
    c.model.hf_path = str(path)
    c.model.param_dtype, c.model.compute_dtype = base.param_dtype, base.compute_dtype
    c.sampling.cache_dtype = base.cache_dtype
    c.sampling.rows, c.sampling.prefill_tokens = ROWS, 1024
    mesh = make_mesh(c.mesh, jax.devices()[:1])
    model = hf.model_config(read_architecture(path), c.model)
    params = hf.load_params(path, model, mesh)
    frozen, state = init_state(learner_settings(c, groups={}), model, mesh, params)
    collections = variables(model, frozen, state.trained)

    requests, stops = questions(path, c)
    limits = [GroupLimits(requests.prompt_UxP.shape[1], TRACES, TOKENS)]
    room = Room(memory_of_a_device(mesh), resident=bytes_on_a_device(collections))
    sampler, _ = make_samplers(c, model, mesh, stops, limits, room)
    return Policy(model, collections, sample(sampler, sampler.prepare(collections), requests))


def questions(path: pathlib.Path, c: ConfigDict) -> tuple[GroupRequests, tuple[int, ...]]:
    """(one group for each question, ids that end a trace)."""
    tokenizer = load_tokenizer(path)
    stops = stop_ids(tokenizer, path, c.prompt.stop)
    scaffold = make_scaffold(tokenizer, PromptSettings.from_config(c.prompt), stops)
    rng = np.random.default_rng(0)
    texts = [
        f"A baker fills {a} trays with {b} rolls each and sells {a + b} rolls. How many are left?"
        for a, b in rng.integers(4, 20, (QUESTIONS, 2))
    ]
    prompt_UxP, prompt_len_U = pad_rows([search_prompt(scaffold, text) for text in texts])
    id_Ux6 = np.zeros((QUESTIONS, 6), np.int32)
    id_Ux6[:] = (Purpose.EVALUATION, 0, 0, 0, Role.SEARCH, 0)
    id_Ux6[:, 2] = np.arange(QUESTIONS)
    return GroupRequests(prompt_UxP, prompt_len_U, id_Ux6, TRACES, TOKENS), stops


def live(groups: Groups) -> np.ndarray:
    """bool [U, C, G]: which places hold tokens."""
    return np.asarray(length_mask(groups.trace_len_UxC, groups.trace_UxCxG.shape[-1]))


def mismatch(policy: Policy) -> dict[str, float]:
    """Of the log-probs that the sampler recorded and its trainer's, nat a token."""
    model, groups = policy.model, policy.groups

    def logprobs(tree: dict[str, Any], *ids: np.ndarray) -> jax.Array:
        return group_logprobs(model, tree, *ids, 1.0, TOKENS)[0]

    program = jax.jit(with_matmul_precision(model.compute_dtype, logprobs))
    requests = groups.requests
    trained = program(
        policy.variables, requests.prompt_UxP, requests.prompt_len_U, groups.trace_UxCxG
    )
    log_ratio = (np.asarray(trained, np.float64) - groups.logprob_UxCxG)[live(groups)]
    return {
        "max_abs_log_ratio": float(np.abs(log_ratio).max()),
        "kl": float(np.mean(np.expm1(log_ratio) - log_ratio)),
    }


def logits_of(policy: Policy, groups: Groups) -> np.ndarray:
    """float32 [U, C, G, V] before each token that was written, of a model that ties its head."""
    model = policy.model

    def of_group(tree: dict[str, Any], *ids: np.ndarray) -> jax.Array:
        hidden = response_hidden(model, tree, *ids)
        return (hidden @ tree["params"]["embed"].T.astype(hidden.dtype)).astype(np.float32)

    program, requests = (
        jax.jit(with_matmul_precision(model.compute_dtype, of_group)),
        groups.requests,
    )
    parts = [
        program(
            policy.variables,
            requests.prompt_UxP[u : u + 1],
            requests.prompt_len_U[u : u + 1],
            groups.trace_UxCxG[u : u + 1],
        )
        for u in range(len(requests))
    ]
    return np.concatenate([np.asarray(part) for part in parts])


def distance(
    expected: np.ndarray, found: np.ndarray, is_token_UxCxG: np.ndarray
) -> dict[str, float]:
    """Of logits: the largest difference, KL(expected, found) in nat a token, equal best tokens."""
    expected, found = expected[is_token_UxCxG], found[is_token_UxCxG]
    p, q = (np.asarray(jax.nn.log_softmax(a, axis=-1), np.float64) for a in (expected, found))
    kl_N = np.sum(np.exp(p) * (p - q), axis=-1)
    return {
        "largest_logit": float(np.abs(expected).max()),
        "max_abs_logit": float(np.abs(expected - found).max()),
        "kl_mean": float(kl_N.mean()),
        "kl_max": float(kl_N.max()),
        "same_best": float(np.mean(expected.argmax(-1) == found.argmax(-1))),
    }


HEADS = (
    "base",
    "GB",
    "largest difference of a logit",
    "KL from float32, nat a token (largest)",
    "same best token",
    "sampler and trainer: largest log ratio",
    "KL",
)


def cells(name: str, result: dict[str, Any]) -> list[str]:
    mismatch, distance = result["mismatch"], result["distance"]
    return [
        name,
        f"{result['bytes'] / 1e9:.3f}",
        f"{distance['max_abs_logit']:.2g} of {distance['largest_logit']:.3g}",
        f"{distance['kl_mean']:.2g} ({distance['kl_max']:.2g})",
        f"{100 * distance['same_best']:.1f} %",
        f"{mismatch['max_abs_log_ratio']:.2g}",
        f"{mismatch['kl']:.2g}",
    ]


if __name__ == "__main__":
    app.run(main)
