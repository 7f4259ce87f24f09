"""What the sampler is told, frozen: model, draws, slots, schedule; and the checks of all that."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from spiral_jax.core.config import require
from spiral_jax.core.groups import GroupRequests
from spiral_jax.model.attention.backends import XLA
from spiral_jax.model.transformer import ModelConfig
from spiral_jax.sampling.draw import Draw

# Where kernels attend: prompt tokens at once, at least, and what their number is a multiple of.
KERNEL_CHUNK, KERNEL_TILE = 2048, 128


@dataclasses.dataclass(frozen=True)
class SlotClass:
    """Places for groups of up to C traces, with prompts of up to P and traces of up to G tokens.

    Attributes:
      slots: how many groups find a place.
    """

    slots: int
    C: int
    P: int
    G: int

    @property
    def rows(self) -> int:
        return self.slots * self.C

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(slots, C, P, G), as a configuration writes it."""
        return self.slots, self.C, self.P, self.G

    def can_move_to(self, other: SlotClass) -> bool:
        """Whether a group may go on in `other`: the same prompt length, no wider, no shorter."""
        differs = (other.C, other.G) != (self.C, self.G)
        return other.P == self.P and other.C <= self.C and other.G >= self.G and differs


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Static shape of the work.

    Attributes:
      classes: of slots; within one prompt length a group may move from class to class.
      chunk: decode steps a call, at most.
      exit_groups: a chunk ends early when this many groups can leave their slot.
      prefill_tokens: prompt tokens, padding included, of one call a shard.
      row_counts: rows of a shard, ascending, for which there are decode programs beside the one for
        all rows.
    """

    classes: tuple[SlotClass, ...]
    chunk: int
    exit_groups: int
    prefill_tokens: int
    row_counts: tuple[int, ...] = ()

    def widest_prompt(self, trace_tokens: int) -> int:
        """P of the widest class whose traces may have so many tokens; 0 where there is none."""
        return max((slots.P for slots in self.classes if trace_tokens <= slots.G), default=0)

    def entries(self) -> list[int]:
        """The class in which groups of each prompt length begin, the shortest prompts first.

        The widest class of that prompt length; among equally wide ones that of the shortest traces.
        """

        def widest_then_shortest(i: int) -> tuple[int, int]:
            return -self.classes[i].C, self.classes[i].G

        by_prompt: dict[int, list[int]] = {}
        for i, slots in enumerate(self.classes):
            by_prompt.setdefault(slots.P, []).append(i)
        return [min(by_prompt[P], key=widest_then_shortest) for P in sorted(by_prompt)]

    def entries_for(self, request: GroupRequests) -> list[int]:
        """Entry classes that can hold a request (U = 1), the shortest prompts first.

        Raises:
          ValueError: none can, or the request is for nothing.
        """
        P, G = int(request.prompt_len_U[0]), request.max_tokens
        if P < 1 or request.traces < 1:
            raise ValueError(
                f"a request with a prompt of {P} tokens and {request.traces} traces: "
                "both must be >= 1."
            )

        entries = [
            i
            for i in self.entries()
            if self.classes[i].P >= P and self.longest_trace(self.classes[i].P) >= G
        ]
        if not entries:
            sizes = [slots.sizes for slots in self.classes]
            raise ValueError(
                f"a prompt of {P} tokens with traces of up to {G} fits into none of "
                f"config.sampling.classes = {sizes} (slots, C, P, G): add a longer one."
            )
        return entries

    def longest_trace(self, P: int) -> int:
        """G of the longest class for prompts of up to P tokens: where every group may move."""
        return max(slots.G for slots in self.classes if slots.P == P)

    def targets(self, i: int) -> list[int]:
        """Classes that a group may move to from class i."""
        return [j for j, to in enumerate(self.classes) if self.classes[i].can_move_to(to)]

    def moves(self) -> list[tuple[int, int]]:
        """Pairs (from, to) of classes between which groups may move."""
        return [(i, j) for i in range(len(self.classes)) for j in self.targets(i)]

    def leave_at(self, i: int) -> int:
        """Running traces at which a group can move from class i to a narrower one.

        0 where there is no narrower one.
        """
        widths = [self.classes[j].C for j in self.targets(i)]
        return max((C for C in widths if C < self.classes[i].C), default=0)

    def decode_rows(self, shards: int) -> list[int]:
        """Rows of a shard that each decode program computes, ascending; the last computes all."""
        every_row = sum(slots.rows for slots in self.classes) // shards
        return [*(rows for rows in self.row_counts if rows < every_row), every_row]


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

    def cached_prompt(self, prompt: int) -> int:
        """Tokens of a prompt cache for prompts of up to `prompt` tokens: whole chunks."""
        chunk = self.chunk_of(prompt)
        return -(-prompt // chunk) * chunk


def kernel_chunk(prompt: int, least: int) -> int:
    """Tokens of a prefill chunk where kernels attend: even chunks of at least KERNEL_CHUNK.

    Even, so that the last one is not half empty.

    Args:
      prompt: tokens of the longest prompt; a shorter one than a chunk is one chunk.
      least: tokens that a chunk has at least, if that is more.
    """
    chunk = -(-prompt // max(1, prompt // max(least, KERNEL_CHUNK)))
    return min(chunk + -chunk % KERNEL_TILE, prompt)


def make_schedule(c: ConfigDict) -> Schedule:
    """The schedule that `config.sampling` describes."""
    s = c.sampling
    return Schedule(
        classes=tuple(SlotClass(*row) for row in s.classes),
        chunk=s.chunk,
        exit_groups=s.exit_groups,
        prefill_tokens=s.prefill_tokens,
        row_counts=tuple(s.row_counts),
    )


def make_decode_settings(
    c: ConfigDict, model: ModelConfig, mesh: Mesh, stop_ids: tuple[int, ...]
) -> DecodeSettings:
    """Training's settings: tokens are drawn as `config.sampling` says."""
    s = c.sampling
    return DecodeSettings(
        config=model,
        cache_dtype=jnp.int8 if s.cache_dtype == "int8" else model.compute_dtype,
        draw=Draw(temperature=s.temperature),
        seed=c.seed,
        stop_ids=stop_ids,
        prefill_chunk=s.prefill_chunk,
        mesh=mesh,
    )


def make_eval_draw(c: ConfigDict) -> Draw:
    """How evaluation draws tokens: as `config.eval` says."""
    e = c.eval
    return Draw(e.temperature, e.top_k, e.top_p, e.min_p)


def check_sampling(c: ConfigDict) -> None:
    """Checks what the sampler reads of `config.sampling`, and how `config.eval` draws tokens.

    Raises:
      ConfigError: a value that cannot be.
    """
    s, e = c.sampling, c.eval
    for name in ("chunk", "exit_groups", "prefill_tokens", "prefill_chunk"):
        require(s[name] >= 1, f"sampling.{name}", s[name], ">= 1")
    require(s.temperature > 0, "sampling.temperature", s.temperature, "> 0")
    require(
        s.cache_dtype in ("compute", "int8"),
        "sampling.cache_dtype",
        s.cache_dtype,
        "one of compute, int8",
    )
    _check_classes([tuple(row) for row in s.classes])

    counts = list(s.row_counts)
    ascending = all(_is_count(n) for n in counts) and counts == sorted(set(counts))
    require(ascending, "sampling.row_counts", counts, "ascending whole numbers >= 1")

    for name in ("temperature", "top_k", "min_p"):
        require(e[name] >= 0, f"eval.{name}", e[name], ">= 0")
    require(0 < e.top_p <= 1, "eval.top_p", e.top_p, "above 0 and at most 1")
    require(e.min_p < 1, "eval.min_p", e.min_p, "below 1")


def _check_classes(rows: list[tuple[int, ...]]) -> None:
    """Checks the table of classes, and that groups of each prompt length can go on to the end."""
    complete = all(len(row) == 4 and all(_is_count(n) for n in row) for row in rows)
    require(
        bool(rows) and complete and len(set(rows)) == len(rows),
        "sampling.classes",
        rows,
        "different rows (slots, C, P, G) of whole numbers >= 1",
    )

    for prompt in sorted({P for _, _, P, _ in rows}):
        sizes = [(C, G) for _, C, P, G in rows if prompt == P]
        widest, longest = max(C for C, _ in sizes), max(G for _, G in sizes)
        require(
            (widest, longest) in sizes,
            "sampling.classes",
            rows,
            f"with a class of C = {widest} and G = {longest} for P = {prompt}",
            "Else a group that stays wide has nowhere to go on.",
        )


def _is_count(n: Any) -> bool:
    return type(n) is int and n >= 1
