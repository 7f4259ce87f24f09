"""Makes a bundled model: tokenizer, random weights, supervised demonstrations, a Hugging Face
directory.

    python -m spiral_jax.sft --config=configs/tiny_sft.py --out=DIR            # bundled:tiny, for two_halves
    python -m spiral_jax.sft --config=configs/end_digit_sft.py --out=DIR       # bundled:end_digit

One step: problems -> demonstrated search traces and aggregation traces, as groups -> mean negative
log-likelihood a token of both roles, added -> one Adam step.
"""

from __future__ import annotations

import functools
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from ml_collections import ConfigDict, config_flags
from transformers import PreTrainedTokenizerBase

from spiral_jax.core.config import parse_flags
from spiral_jax.core.groups import Stop, pad_rows
from spiral_jax.learner.logprobs import group_logprobs, length_mask
from spiral_jax.model import hf
from spiral_jax.model.architecture import Architecture
from spiral_jax.model.transformer import ModelConfig, with_matmul_precision, init_variables
from spiral_jax.prompts import prompts
from spiral_jax.tasks import end_digit, two_halves
from spiral_jax.tasks.problem import Task
from spiral_jax.tasks.tiny_tokenizer import train_tokenizer

TASKS = {"two_halves": two_halves, "end_digit": end_digit}  # modules with demonstrations
_TOKENIZER_PROBLEMS = 2000
_LOG_EVERY = 100


def define_flags() -> None:
    config_flags.DEFINE_config_file(
        "config", "configs/tiny_sft.py", "what to make", lock_config=True
    )
    flags.DEFINE_string("out", None, "directory that gets the model", required=True)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    c, out = flags.FLAGS.config, pathlib.Path(flags.FLAGS.out)
    if c.task not in TASKS:
        sys.exit(
            f"error: config.task={c.task!r}: only {' and '.join(TASKS)} have demonstrations; choose one of them."
        )
    task = TASKS[c.task].practice(c.task_seed)
    tokenizer = train_tokenizer(tokenizer_texts(c.task, task, c.seed), c.model.vocab_size, out)
    config = ModelConfig(_architecture(c.model, len(tokenizer)), remat="none")
    params = init_variables(config, jax.random.key(c.seed))["params"]
    params = fit(c, config, params, batches(c, task, tokenizer))
    hf.save_params(out, params, config, stop_ids=(tokenizer.eos_token_id,))
    print(f"{config.arch.parameters:,} parameters in {out}", flush=True)


def tokenizer_texts(name: str, task: Task, seed: int) -> Iterator[str]:
    """What the tokenizer is trained on: every kind of text that the task knows."""
    rng = np.random.default_rng([seed, 0])
    for cursor in range(_TOKENIZER_PROBLEMS):
        yield from TASKS[name].tokenizer_texts(task.train(cursor), rng)


def batches(
    c: ConfigDict, task: Task, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[dict, dict]]:
    """Endless (search, aggregation) batches of demonstrated groups: prompt, prompt_len, trace,
    trace_len.
    """
    scaffold = prompts.make_scaffold(tokenizer, c.prompt, (tokenizer.eos_token_id,))
    encode = lambda text: np.array(
        tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
    )  # noqa: E731
    rng, module, data = np.random.default_rng([c.seed, 1]), TASKS[c.task], c.data
    cursor = 0
    while True:
        search = []
        for _ in range(data.search_problems):
            problem, cursor = task.train(cursor), cursor + 1
            texts = [
                module.demonstrate_search(problem, **data.search, rng=rng)
                for _ in range(data.search_traces)
            ]
            traces = [encode(text) for text in texts]
            search.append((prompts.search_prompt(scaffold, problem.text), traces))
        sets = []
        for _ in range(data.sets):
            problem, cursor = task.train(cursor), cursor + 1
            texts, read = module.demonstrate_set(
                problem, data.set_size, **data.aggregation, rng=rng
            )
            candidates = [(encode(text), Stop.STOP) for text in texts]
            prompt = prompts.aggregation_prompt(
                scaffold, problem.text, candidates, np.arange(data.set_size)
            ).ids
            sets.append((prompt, [encode(read)]))
        yield _groups(search), _groups(sets)


def _groups(demonstrations: list[tuple[np.ndarray, list[np.ndarray]]]) -> dict[str, np.ndarray]:
    """(prompt ids, trace ids) of each group -> right-padded arrays; widths are rounded up so that
    few shapes occur.
    """
    prompt_UxP, prompt_len_U = _pad([prompt for prompt, _ in demonstrations])
    trace, trace_len = _pad([trace for _, traces in demonstrations for trace in traces])
    U = len(demonstrations)
    return {
        "prompt_UxP": prompt_UxP,
        "prompt_len_U": prompt_len_U,
        "trace_UxCxG": trace.reshape(U, -1, trace.shape[1]),
        "trace_len_UxC": trace_len.reshape(U, -1),
    }


def _pad(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return pad_rows(rows, width=-(-max(map(len, rows)) // 8) * 8)


def fit(c: ConfigDict, config: ModelConfig, params: Any, data: Iterator[tuple[dict, dict]]) -> Any:
    """Runs `c.optimizer.steps` Adam steps from `params`; returns the trained ones."""
    o = c.optimizer
    schedule = optax.warmup_cosine_decay_schedule(0.0, o.lr, o.warmup_steps, o.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(o.clip_norm), optax.adam(schedule, b2=o.b2))

    def nll(params: Any, groups: dict[str, jax.Array]) -> jax.Array:
        prompt, prompt_len, trace = (
            groups["prompt_UxP"],
            groups["prompt_len_U"],
            groups["trace_UxCxG"],
        )
        logprob, _ = group_logprobs(
            config, {"params": params}, prompt, prompt_len, trace, 1.0, trace.shape[-1]
        )
        mask = length_mask(groups["trace_len_UxC"], trace.shape[-1])
        return -jnp.sum(jnp.where(mask, logprob, 0.0)) / jnp.sum(mask)

    @jax.jit
    @functools.partial(with_matmul_precision, config)
    def step(
        params: Any, state: Any, search: dict, aggregation: dict
    ) -> tuple[Any, Any, jax.Array]:
        def loss(params: Any) -> tuple[jax.Array, jax.Array]:
            both = jnp.stack([nll(params, search), nll(params, aggregation)])
            return both.sum(), both

        (_, both), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, both

    state, start = optimizer.init(params), time.monotonic()
    for i, (search, aggregation) in zip(range(o.steps), data, strict=False):
        params, state, both = step(params, state, search, aggregation)
        if i % _LOG_EVERY == 0 or i + 1 == o.steps:
            search_nll, aggregation_nll = map(float, both)
            elapsed = time.monotonic() - start
            print(f"step {i:5d}  nat/token search {search_nll:.4f} aggregation {aggregation_nll:.4f}  {elapsed:.0f} s",
                  flush=True)  # fmt: skip
    return params


def _architecture(m: ConfigDict, vocab: int) -> Architecture:
    sizes = {name: m[name] for name in ("D", "F", "L", "H", "J", "E", "norm_eps", "rope_theta")}
    return Architecture(V=vocab, tied=True, **sizes)


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=parse_flags)
