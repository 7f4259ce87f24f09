"""Makes a bundled model: tokenizer, random weights, supervised demonstrations -> a directory.

    python -m spiral_jax.sft --config=configs/tiny_sft.py --out=DIR         # bundled:tiny
    python -m spiral_jax.sft --config=configs/end_digit_sft.py --out=DIR    # bundled:end_digit
    python -m spiral_jax.sft --config=configs/three_parts_sft.py --out=DIR  # bundled:three_parts

One step: problems -> demonstrated search traces and aggregation traces, as groups -> mean negative
log-likelihood a token of both roles, added -> one Adam step. The directory is a Hugging Face one.
"""

from __future__ import annotations

import functools
import itertools
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from ml_collections import ConfigDict, config_flags
from transformers import PreTrainedTokenizerBase

from spiral_jax.core.command import refuse_arguments, run_command
from spiral_jax.core.errors import UserError
from spiral_jax.core.groups import Stop, pad_rows
from spiral_jax.learner.logprobs import group_logprobs, length_mask
from spiral_jax.model import hf
from spiral_jax.model.architecture import Architecture
from spiral_jax.model.products import product_options, with_matmul_precision
from spiral_jax.model.transformer import ModelConfig, init_variables
from spiral_jax.prompts.prompts import aggregation_prompt, search_prompt
from spiral_jax.prompts.scaffold import Scaffold, make_scaffold
from spiral_jax.prompts.settings import PromptSettings
from spiral_jax.tasks.load import load_demonstrations
from spiral_jax.tasks.problem import Problem
from spiral_jax.tasks.tiny_tokenizer import train_tokenizer

_TOKENIZER_PROBLEMS = 2000
_LOG_EVERY = 100
_WIDTH_MULTIPLE = 8  # widths of arrays are rounded up to it, so that few shapes occur

Demonstration = tuple[np.ndarray, list[np.ndarray]]  # a prompt, and the traces that continue it


class Demonstrated(NamedTuple):
    """Demonstrated groups of one role, as `core.groups` names their arrays."""

    prompt_UxP: np.ndarray
    prompt_len_U: np.ndarray
    trace_UxCxG: np.ndarray
    trace_len_UxC: np.ndarray


def define_flags() -> None:
    config_flags.DEFINE_config_file(
        "config", "configs/tiny_sft.py", "what to make", lock_config=True
    )
    flags.DEFINE_string("out", None, "directory that gets the model", required=True)


def main(argv: list[str]) -> None:
    refuse_arguments(argv)
    try:
        make_model(flags.FLAGS.config, pathlib.Path(flags.FLAGS.out))
    except UserError as error:
        sys.exit(f"error: {error}")


def make_model(c: ConfigDict, out: pathlib.Path) -> None:
    """Writes the model that a file such as `configs/tiny_sft.py` describes.

    Raises:
      ConfigError: config.task names no task with demonstrations.
    """
    demonstrations = load_demonstrations(c.task)
    texts = tokenizer_texts(demonstrations, c.task_seed, c.seed)
    tokenizer = train_tokenizer(texts, c.model.vocab_size, out)
    stop_ids = (tokenizer.eos_token_id,)
    scaffold = make_scaffold(tokenizer, PromptSettings.from_config(c.prompt), stop_ids)

    config = ModelConfig(_architecture(c.model, len(tokenizer)), remat="none")
    params = init_variables(config, jax.random.key(c.seed))["params"]
    data = batches(demonstrations, c.data, scaffold, c.task_seed, c.seed)
    params = fit(config, params, data, c.optimizer)
    hf.save_params(out, params, config, stop_ids=stop_ids)
    print(f"{config.arch.parameters:,} parameters in {out}", flush=True)


def tokenizer_texts(demonstrations: ModuleType, task_seed: int, seed: int) -> Iterator[str]:
    """What the tokenizer is trained on: every kind of text that the task knows."""
    task, rng = demonstrations.practice(task_seed), np.random.default_rng([seed, 0])
    for cursor in range(_TOKENIZER_PROBLEMS):
        yield from demonstrations.tokenizer_texts(task.train(cursor), rng)


def batches(
    demonstrations: ModuleType, data: ConfigDict, scaffold: Scaffold, task_seed: int, seed: int
) -> Iterator[tuple[Demonstrated, Demonstrated]]:
    """Endless (search, aggregation) batches of demonstrated groups; `data` is config.data."""
    task, rng = demonstrations.practice(task_seed), np.random.default_rng([seed, 1])
    problems = map(task.train, itertools.count())

    def demonstrate_search(problem: Problem) -> Demonstration:
        texts = [
            demonstrations.demonstrate_search(problem, **data.search, rng=rng)
            for _ in range(data.search_traces)
        ]
        return search_prompt(scaffold, problem.text), _encode(scaffold.tokenizer, texts)

    def demonstrate_aggregation(problem: Problem) -> Demonstration:
        texts, read = demonstrations.demonstrate_set(
            problem, data.set_size, **data.aggregation, rng=rng
        )
        candidates = [(ids, Stop.STOP) for ids in _encode(scaffold.tokenizer, texts)]
        prompt = aggregation_prompt(scaffold, problem.text, candidates, np.arange(data.set_size))
        return prompt.ids, _encode(scaffold.tokenizer, [read])

    while True:
        search = [demonstrate_search(next(problems)) for _ in range(data.search_problems)]
        aggregation = [demonstrate_aggregation(next(problems)) for _ in range(data.sets)]
        yield _pad(search), _pad(aggregation)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[np.ndarray]:
    """The ids of traces, their stop id included."""
    end = [tokenizer.eos_token_id]
    return [np.array(tokenizer.encode(text, add_special_tokens=False) + end) for text in texts]


def _pad(demonstrations: Sequence[Demonstration]) -> Demonstrated:
    prompt_UxP, prompt_len_U = _pad_rows([prompt for prompt, _ in demonstrations])
    traces = [trace for _, traces in demonstrations for trace in traces]
    trace, trace_len = _pad_rows(traces)
    U = len(demonstrations)
    return Demonstrated(
        prompt_UxP,
        prompt_len_U,
        trace_UxCxG=trace.reshape(U, -1, trace.shape[1]),
        trace_len_UxC=trace_len.reshape(U, -1),
    )


def _pad_rows(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    longest = max(map(len, rows))
    return pad_rows(rows, width=-(-longest // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE)


def fit(
    config: ModelConfig,
    params: Any,
    data: Iterator[tuple[Demonstrated, Demonstrated]],
    settings: ConfigDict,
) -> Any:
    """Runs the Adam steps that config.optimizer asks for; returns the trained parameters."""
    steps = settings.steps
    schedule = optax.warmup_cosine_decay_schedule(0.0, settings.lr, settings.warmup_steps, steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(settings.clip_norm), optax.adam(schedule, b2=settings.b2)
    )

    options = product_options(config.compute_dtype, jax.default_backend())

    @functools.partial(jax.jit, compiler_options=options)
    @functools.partial(with_matmul_precision, config.compute_dtype)
    def step(
        params: Any, state: Any, search: Demonstrated, aggregation: Demonstrated
    ) -> tuple[Any, Any, jax.Array]:
        def loss(params: Any) -> tuple[jax.Array, jax.Array]:
            both = jnp.stack([_nll(config, params, search), _nll(config, params, aggregation)])
            return both.sum(), both

        (_, both), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, both

    state, start = optimizer.init(params), time.monotonic()
    for i, (search, aggregation) in zip(range(steps), data, strict=False):
        params, state, both = step(params, state, search, aggregation)
        if i % _LOG_EVERY == 0 or i + 1 == steps:
            search_nll, aggregation_nll = map(float, both)
            print(
                f"step {i:5d}  nat/token search {search_nll:.4f} "
                f"aggregation {aggregation_nll:.4f}  {time.monotonic() - start:.0f} s",
                flush=True,
            )
    return params


def _nll(config: ModelConfig, params: Any, groups: Demonstrated) -> jax.Array:
    """Mean negative log-likelihood of the traces' tokens, nat a token."""
    G = groups.trace_UxCxG.shape[-1]
    logprob_UxCxG, _ = group_logprobs(
        config,
        {"params": params},
        groups.prompt_UxP,
        groups.prompt_len_U,
        groups.trace_UxCxG,
        1.0,
        G,
    )
    mask_UxCxG = length_mask(groups.trace_len_UxC, G)
    return -jnp.sum(jnp.where(mask_UxCxG, logprob_UxCxG, 0.0)) / jnp.sum(mask_UxCxG)


def _architecture(m: ConfigDict, vocab: int) -> Architecture:
    sizes = {name: m[name] for name in ("D", "F", "L", "H", "J", "E", "norm_eps", "rope_theta")}
    return Architecture(V=vocab, tied=True, **sizes)


if __name__ == "__main__":
    define_flags()
    run_command(main)
