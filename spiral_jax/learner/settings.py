"""How the policy is updated: the config at the door of this room."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
from ml_collections import ConfigDict

from spiral_jax.core.config import require
from spiral_jax.core.groups import Role

SCHEDULES = ("constant", "linear", "cosine")

# of a derived micro-batch, on each shard of the groups: about what `qwen3_4b.py` has
_MICRO_TOKENS = 32_768
# Tokens of a prompt that no wording states: those of the chat template; and of a candidate, the
# mark that it was cut off, its number, and its fence. The exact prompts are checked when there is a
# tokenizer.
_TEMPLATE_TOKENS, _CANDIDATE_TOKENS = 256, 32
_FINE, _COARSE = 16, 128  # derived prompt lengths are multiples, coarse ones from 1,024 tokens on


@dataclasses.dataclass(frozen=True)
class RoleShapes:
    """Static shapes of one role's micro-batches.

    Attributes:
      lengths: ascending (P, G); a group goes into the first that holds it.
      micro_groups: U of a micro-batch.
      most_groups: of a step; fixes the arrays' size, whatever the lengths of today's groups.
      traces: C.
    """

    lengths: tuple[tuple[int, int], ...]
    micro_groups: int
    most_groups: int
    traces: int


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """Adam and its schedule over `steps`; the other fields are those of config.optimizer."""

    steps: int
    lr: float
    schedule: str
    warmup_steps: int
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float


@dataclasses.dataclass(frozen=True)
class LearnerSettings:
    """Attributes:
    seed: of fresh adapters.
    shapes: of each role that is trained.
    temperature: of each role in the sampler: log-probs are those of the distribution that was
      sampled from.
    tis_cap, kl_coef, logprob_chunk: fields of config.loss.
    """

    seed: int
    shapes: Mapping[Role, RoleShapes]
    optimizer: OptimizerSettings
    temperature: Mapping[Role, float]
    tis_cap: float
    kl_coef: float
    logprob_chunk: int


def learner_settings(c: ConfigDict, groups: Mapping[Role, int]) -> LearnerSettings:
    """Checks config.batch, config.optimizer and the rest of config.loss.

    Args:
      groups: how many groups of each role that is trained a step has, at most.

    Raises:
      ConfigError: a value that is not allowed.
    """
    for field in ("loss.tis_cap", "loss.kl_coef"):
        section, name = field.split(".")
        require(c[section][name] >= 0, field, c[section][name], ">= 0")
    require(c.loss.logprob_chunk >= 1, "loss.logprob_chunk", c.loss.logprob_chunk, ">= 1")
    return LearnerSettings(
        seed=c.seed,
        shapes={role: _role_shapes(c, role, count) for role, count in groups.items()},
        optimizer=optimizer_settings(c.optimizer, c.train.steps),
        temperature={role: c[role.label].temperature for role in groups},
        tis_cap=c.loss.tis_cap,
        kl_coef=c.loss.kl_coef,
        logprob_chunk=c.loss.logprob_chunk,
    )


def optimizer_settings(optimizer: ConfigDict, steps: int) -> OptimizerSettings:
    """Checks config.optimizer. Raises `ConfigError`."""
    o = optimizer
    require(o.lr > 0, "optimizer.lr", o.lr, "> 0")
    require(
        o.schedule in SCHEDULES, "optimizer.schedule", o.schedule, f"one of {', '.join(SCHEDULES)}"
    )
    for name in ("warmup_steps", "weight_decay", "clip_norm"):
        require(o[name] >= 0, f"optimizer.{name}", o[name], ">= 0")
    return OptimizerSettings(steps=steps, **o.to_dict())


def _role_shapes(c: ConfigDict, role: Role, groups: int) -> RoleShapes:
    micro_field, lengths_field = f"batch.{role.label}_groups", f"batch.{role.label}_lengths"
    given = tuple(tuple(pair) for pair in c.batch[f"{role.label}_lengths"])
    lengths = given or derived_lengths(c, role)
    micro = c.batch[f"{role.label}_groups"]
    require(micro >= 0, micro_field, micro, ">= 1, or 0 for what the lengths allow")
    if not micro:
        tokens = max(P + c[role.label].traces * G for P, G in lengths)
        micro = derived_groups(c.mesh, groups, tokens)
    require(
        groups % micro == 0,
        micro_field,
        micro,
        f"a divisor of the {groups} {role.label} groups of a step",
    )
    ascending = all(len(pair) == 2 for pair in lengths) and list(lengths) == sorted(lengths)
    require(ascending, lengths_field, lengths, "ascending (prompt, response) lengths")
    limit = c[role.label].max_tokens
    require(
        lengths[-1][1] >= limit,
        lengths_field,
        lengths,
        f"wide enough in its last entry for {role.label}.max_tokens = {limit}",
    )
    return RoleShapes(lengths, micro, groups, c[role.label].traces)


def derived_lengths(c: ConfigDict, role: Role) -> tuple[tuple[int, int], ...]:
    """(P, G) of micro-batches that hold what the limits allow, ascending; () in config.batch.

    A search prompt has at most prompt.max_problem_tokens. An aggregation prompt has the problem,
    the candidates and the wording, each of whose bytes may be a token; half and a quarter of that
    are lengths too where they are long, because most candidates end before their limit.
    """
    problem, limit = c.prompt.max_problem_tokens, c[role.label].max_tokens
    if role is Role.SEARCH:
        return ((problem, limit),)
    longest = c.search.max_tokens
    if c.aggregation.rounds > 1 or c.replay.problems:
        longest = max(longest, c.aggregation.max_tokens)
    words = c.prompt.candidate.encode()
    candidates = c.aggregation.subset_size * (longest + len(words) + _CANDIDATE_TOKENS)
    around = c.prompt.aggregation
    widest = len(around.encode()) + len(c.prompt.system.encode()) + _TEMPLATE_TOKENS
    widest += around.count("{problem}") * problem + around.count("{candidates}") * candidates
    parts = [part for part in (4, 2) if widest // part >= 8 * _COARSE] + [1]
    return tuple((_rounded(widest // part), limit) for part in parts)


def derived_groups(mesh: ConfigDict, groups: int, tokens: int) -> int:
    """U of a micro-batch: a divisor of a step's groups that the mesh divides.

    The largest with `_MICRO_TOKENS` a shard; the smallest where even that has more.

    Args:
      mesh: config.mesh.
      groups: of a step.
      tokens: of the longest group.

    Raises:
      ConfigError: there is none.
    """
    shards = mesh.data * mesh.fsdp
    if mesh.data < 0 or mesh.fsdp < 0:  # one of them is all the rest
        shards = max(1, jax.device_count() // mesh.tensor)
    able = [U for U in range(shards, groups + 1, shards) if groups % U == 0]
    require(
        bool(able),
        "batch.problems",
        groups,
        f"such that the mesh's data * fsdp = {shards} divides the groups of a step",
    )
    return max([U for U in able if U * tokens <= shards * _MICRO_TOKENS], default=able[0])


def _rounded(tokens: int) -> int:
    multiple = _COARSE if tokens >= 8 * _COARSE else _FINE
    return -(-tokens // multiple) * multiple
