"""What the sampler benchmark measures: (a) search, (b) aggregation, (c) a heavy tail of lengths."""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import numpy as np

from benchmarks import heavy_tail
from benchmarks.peers.contestant import Work
from spiral_jax.model import hf
from spiral_jax.model.architecture import Architecture
from spiral_jax.model.transformer import ModelConfig, init_variables

# theta is the one value with which tunix's Qwen3 computes the same function as the other two
ARCHITECTURE = Architecture(
    V=32_000, D=512, F=1536, L=8, H=8, J=4, E=64, norm_eps=1e-6, rope_theta=1_000_000.0, tied=True
)
MODEL_SEED, PROMPT_SEED = 0, 1
# with layers at init's 0.02 a tied model repeats its last token, and equal greedy tokens show
# nothing
KERNEL_SCALE = 8


@dataclasses.dataclass(frozen=True)
class Case:
    """One kind of work.

    Attributes:
      title: for the table.
      work: prompts and forced lengths.
      groups_per_batch: static batch sizes that each peer tries; its fastest one is what it is
        measured at.
      trial_groups: how many groups a try samples.
    """

    title: str
    work: Work
    groups_per_batch: tuple[int, ...]
    trial_groups: int


def make_case(name: str, groups_c: int) -> Case:
    """Case "a", "b" or "c"; (c) with its first `groups_c` groups."""
    if name == "a":
        title = "search: 4 prompts x 8 traces, 128 + 256 tokens"
        return Case(title, _even(4, 8, 128, 256), (1, 2, 4), trial_groups=4)
    if name == "b":
        title = "aggregation: 4 contexts x 4 traces, 1,024 + 128 tokens"
        return Case(title, _even(4, 4, 1024, 128), (1, 2, 4), trial_groups=4)
    limit_UxC = heavy_tail.limits()[:groups_c]
    groups, traces = limit_UxC.shape
    mean, longest = limit_UxC.mean(), limit_UxC.max()
    title = f"heavy tail: {groups} groups x {traces} traces, 128 + {mean:.0f} tokens"
    title += f" (longest {longest})"
    sizes = tuple(size for size in (1, 2, 4, 8) if size <= groups)
    return Case(title, Work(_prompts(groups, 128), limit_UxC), sizes, trial_groups=8)


def memory_work(traces: int) -> Work:
    """Case (b) with another number of traces."""
    return _even(4, traces, 1024, 128)


def bytes_per_trace(tokens: int) -> int:
    """Its own keys and values in fp32: what a trace should cost and no more."""
    return 2 * ARCHITECTURE.L * ARCHITECTURE.J * ARCHITECTURE.E * tokens * 4


def greedy_prompt() -> list[int]:
    return _prompts(1, 32)[0].tolist()


def write_model(path: pathlib.Path) -> None:
    """Random weights from a seed as a Hugging Face directory without stop ids, once."""
    if (path / "config.json").exists():  # the last file but one that save_params writes
        return
    config = ModelConfig(ARCHITECTURE)
    params = init_variables(config, jax.random.key(MODEL_SEED))["params"]

    for room, kernel_axes in (("layers", 3), ("last_layer", 2)):

        def scale(array: jax.Array, kernel_axes: int = kernel_axes) -> jax.Array:
            return KERNEL_SCALE * array if array.ndim == kernel_axes else array

        params[room] = jax.tree.map(scale, params[room])
    hf.save_params(path, params, config, stop_ids=())


def _even(groups: int, traces: int, prompt_tokens: int, tokens: int) -> Work:
    return Work(_prompts(groups, prompt_tokens), np.full((groups, traces), tokens, np.int32))


def _prompts(groups: int, tokens: int) -> np.ndarray:
    return np.random.default_rng(PROMPT_SEED).integers(
        1, ARCHITECTURE.V, (groups, tokens), np.int32
    )
