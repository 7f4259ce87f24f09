"""What the sampler is told, frozen: model, draws, pages and rows; and the checks of all that."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from spiral_jax.core.config import require
from spiral_jax.core.groups import GroupRequests, Role
from spiral_jax.model.attention.backends import XLA
from spiral_jax.model.transformer import ModelConfig
from spiral_jax.sampling.draw import Draw

# Where kernels attend: prompt tokens at once, at least, and what their number is a multiple of.
KERNEL_CHUNK, KERNEL_TILE = 2048, 128


@dataclasses.dataclass(frozen=True)
class GroupLimits:
    """How large the groups of one stage can be.

    Attributes:
      prompt: tokens of the longest prompt.
      traces: of a group.
      tokens: of the longest trace.
    """

    prompt: int
    traces: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Static shape of the work on each shard.

    Attributes:
      page: tokens of a page.
      pages: of the pool, page 0 among them.
      rows: for which there are decode programs, ascending; the last are all that there are.
      width: W, rows of a bundle.
      together: traces of a group for which pages are kept free until they have ended.
      prompts: lengths P of the prefill programs, ascending, in whole chunks.
      trace: tokens of the longest trace.
      chunk: decode steps a call, at most.
      prefill_tokens: prompt tokens of one call, padding included.
      fill: rows that a bundle has on average when all bundles are taken; rows beyond them wait.
    """

    page: int
    pages: int
    rows: tuple[int, ...]
    width: int
    together: int
    prompts: tuple[int, ...]
    trace: int
    chunk: int
    prefill_tokens: int
    fill: int = 1

    @property
    def own_pages(self) -> int:
        """Pages of the longest trace."""
        return self.pages_of(self.trace)

    @property
    def prompt_pages(self) -> int:
        """Pages of the longest prompt."""
        return self.pages_of(self.prompts[-1])

    @property
    def least_pages(self) -> int:
        """With fewer the largest group could never end."""
        return 1 + self.prompt_pages + self.together * self.own_pages

    def pages_of(self, tokens: int) -> int:
        return -(-tokens // self.page)

    def bundles(self, rows: int) -> int:
        """U of a decode program for so many rows."""
        return -(-rows // self.fill)

    def prompts_of_a_call(self, P: int) -> int:
        """W of a prefill program: as many prompts as `prefill_tokens` pays for, at least one."""
        return max(1, min(self.prefill_tokens // P, self.rows[-1]))

    def check_request(self, request: GroupRequests) -> None:
        """Checks that a request (U = 1) is for something, and that it can be held.

        Raises:
          ValueError: it names what is wrong.
        """
        P, G = int(request.prompt_len_U[0]), request.max_tokens
        if P < 1 or request.traces < 1:
            raise ValueError(
                f"a request with a prompt of {P} tokens and {request.traces} traces: "
                "both must be >= 1."
            )
        if self.prompts[-1] < P - 1 or self.trace < G:
            raise ValueError(
                f"a prompt of {P} tokens with traces of up to {G}: the sampler was made for "
                f"prompts of up to {self.prompts[-1] + 1} with traces of up to {self.trace}."
            )


@dataclasses.dataclass(frozen=True)
class DecodeSettings:
    """What all programs of a sampler share, static.

    Attributes:
      config: the model.
      cache_dtype: of keys and values: the compute dtype or int8.
      draw: how tokens are drawn.
      seed: of the run.
      stop_ids: token ids that end a trace.
      prefill_chunk: prompt tokens whose activations exist at once.
      mesh: groups lie along its data and fsdp axes, heads along tensor.
    """

    config: ModelConfig
    cache_dtype: Any
    draw: Draw
    seed: int
    stop_ids: tuple[int, ...]
    prefill_chunk: int
    mesh: Mesh

    def chunk_of(self, prompt: int) -> int:
        """Tokens of a prefill chunk for prompts of up to `prompt` tokens.

        Kernels that attend want large ones: they hold no scores.
        """
        if self.config.attention == XLA:
            return min(self.prefill_chunk, prompt)
        return kernel_chunk(prompt, self.prefill_chunk)

    def in_chunks(self, prompt: int) -> int:
        """So many prompt tokens in whole chunks."""
        chunk = self.chunk_of(prompt)
        return -(-prompt // chunk) * chunk


def kernel_chunk(prompt: int, least: int) -> int:
    """Tokens of a prefill chunk where kernels attend: even chunks of at least KERNEL_CHUNK.

    Even, so that the last one is not half empty.

    Args:
      prompt: tokens of the longest prompt; a shorter one than a chunk is one chunk, rounded up to
        what kernels take, as they would pad it.
      least: tokens that a chunk has at least, if that is more.
    """
    chunk = -(-prompt // max(1, prompt // max(least, KERNEL_CHUNK)))
    return chunk if prompt < KERNEL_TILE else chunk + -chunk % KERNEL_TILE


def make_decode_settings(
    c: ConfigDict, model: ModelConfig, mesh: Mesh, stop_ids: tuple[int, ...]
) -> DecodeSettings:
    """Training's settings: tokens are drawn at the temperatures of search and aggregation."""
    s = c.sampling
    return DecodeSettings(
        config=model,
        cache_dtype=jnp.int8 if s.cache_dtype == "int8" else model.compute_dtype,
        draw=Draw(
            temperature=c.search.temperature,
            aggregation_temperature=c.aggregation.temperature,
        ),
        seed=c.seed,
        stop_ids=stop_ids,
        prefill_chunk=s.prefill_chunk,
        mesh=mesh,
    )


def make_eval_draw(c: ConfigDict) -> Draw:
    """How evaluation draws tokens: as `config.eval` says."""
    e = c.eval
    return Draw(
        temperature=e.search_temperature,
        top_k=e.top_k,
        top_p=e.top_p,
        min_p=e.min_p,
        aggregation_temperature=e.aggregation_temperature,
    )


def check_sampling(c: ConfigDict) -> None:
    """Checks what the sampler reads of `config.sampling`, and how tokens are drawn.

    Raises:
      ConfigError: a value that cannot be.
    """
    s, e = c.sampling, c.eval
    for name in ("chunk", "prefill_tokens", "prefill_chunk"):
        require(s[name] >= 1, f"sampling.{name}", s[name], ">= 1")
    require(
        s.memory > 0,
        "sampling.memory",
        s.memory,
        "above 0: at most 1, a share of a device's free memory, or above it, bytes",
    )
    require(s.rows >= 0, "sampling.rows", s.rows, ">= 0, where 0 means: as many as memory feeds")
    for role in Role:
        temperature = c[role.label].temperature
        require(temperature > 0, f"{role.label}.temperature", temperature, "> 0")
    require(
        s.cache_dtype in ("compute", "int8"),
        "sampling.cache_dtype",
        s.cache_dtype,
        "one of compute, int8",
    )
    for name in ("search_temperature", "aggregation_temperature", "top_k", "min_p"):
        require(e[name] >= 0, f"eval.{name}", e[name], ">= 0")
    require(0 < e.top_p <= 1, "eval.top_p", e.top_p, "above 0 and at most 1")
    require(e.min_p < 1, "eval.min_p", e.min_p, "below 1")
