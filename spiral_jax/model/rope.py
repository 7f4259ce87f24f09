"""Rotary embedding, plain or scaled to contexts that are longer than a model was pretrained on.

Pair i of a head's E / 2 pairs turns by theta^(-2 i / E) radians a token. A scaling slows down the
pairs that never come round in the original context; the names of its fields are those of
config.json.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from spiral_jax.core.config import ConfigError
from spiral_jax.model.config_fields import boolean, number, positive


@dataclasses.dataclass(frozen=True)
class Linear:
    """All pairs turn `factor` times slower (position interpolation, arXiv 2306.15595)."""

    factor: float
    attention_factor = 1.0

    def scaled(self, frequency: jax.Array, theta: float) -> jax.Array:
        """Frequencies [E / 2] of the plain ones."""
        return frequency / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Llama 3.1's: by how often a pair comes round in the original context.

    Attributes:
      factor: pairs that come round less than `low_freq_factor` times turn this much slower.
      high_freq_factor: those that come round more often than this are as they were.
      original_max_position_embeddings: tokens of the original context.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    attention_factor = 1.0

    def scaled(self, frequency: jax.Array, theta: float) -> jax.Array:
        """Frequencies [E / 2] of the plain ones."""
        turns = frequency * (self.original_max_position_embeddings / (2 * math.pi))
        between = self.high_freq_factor - self.low_freq_factor
        kept = jnp.clip((turns - self.low_freq_factor) / between, 0, 1)
        return _blended(frequency, kept, self.factor)


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv 2309.00071): as Llama 3.1's, with a ramp over the pairs' numbers.

    Attributes:
      factor: pairs that come round less than `beta_slow` times turn this much slower.
      beta_fast: those that come round more often than this are as they were.
      attention_factor: of cosines and sines, and so the square root of that of the scores.
      truncate: the ramp begins and ends at whole pairs.
      original_max_position_embeddings: tokens of the original context.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def scaled(self, frequency: jax.Array, theta: float) -> jax.Array:
        """Frequencies [E / 2] of the plain ones."""
        half = frequency.shape[0]

        def pair_with(turns: float) -> float:
            of_one_turn = self.original_max_position_embeddings / (2 * math.pi * turns)
            return half * math.log(of_one_turn) / math.log(theta)

        first, last = pair_with(self.beta_fast), pair_with(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * half - 1)
        last = last if last != first else last + 0.001  # as transformers, against division by zero
        kept = 1 - jnp.clip((jnp.arange(half, dtype=jnp.float32) - first) / (last - first), 0, 1)
        return _blended(frequency, kept, self.factor)


Scaling = Linear | Llama3 | Yarn
SCALINGS = {"linear": Linear, "llama3": Llama3, "yarn": Yarn}


def _blended(frequency: jax.Array, kept: jax.Array, factor: float) -> jax.Array:
    """A share of each frequency as it is, the rest slowed down."""
    return frequency * kept + frequency / factor * (1 - kept)


def rope(
    x: jax.Array, position: jax.Array, theta: float, scaling: Scaling | None = None
) -> jax.Array:
    """Rotary embedding, halves rotated against each other; at position 0 x itself if unscaled.

    x [..., heads, E], position [...] int32.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling is not None:
        frequency = scaling.scaled(frequency, theta)
    angle = position[..., None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if scaling is not None and scaling.attention_factor != 1:
        cos, sin = cos * scaling.attention_factor, sin * scaling.attention_factor
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


_ROOMS = ("rope_parameters", "rope_scaling")  # in transformers 5, in 4
_TRAINED_LENGTH = "original_max_position_embeddings"


def read_rope(
    fields: dict[str, Any], where: str, unstated_theta: float | None
) -> tuple[float, Scaling | None]:
    """(theta, scaling) of a config.json, in the spellings of transformers 4 and 5.

    Args:
      unstated_theta: theta where the file has none; None: it must have one.

    Raises:
      ConfigError: another type of scaling; a field that is missing, has no meaning, or contradicts
        itself.
    """
    thetas, stated = set(), {}
    rooms = [_object(fields, room, where) for room in _ROOMS]
    for source in (fields, *rooms):
        if source.get("rope_theta") is not None:
            thetas.add(number(source, "rope_theta", where))
    for room, source in zip(_ROOMS, rooms, strict=True):
        for name, value in source.items():
            full = "rope_type" if name == "type" else name
            if name == "rope_theta" or value is None:
                continue
            if stated.setdefault(full, (room, value))[1] != value:
                raise ConfigError(
                    f"{where}: {room}.{full} = {value!r} contradicts {stated[full][1]!r}."
                )

    if not thetas and unstated_theta is not None:
        thetas = {unstated_theta}
    if len(thetas) != 1:
        what = f"contradicts itself: {sorted(thetas)}" if thetas else "is missing"
        raise ConfigError(
            f"{where}: rope_theta {what}. It must be given once, at the top or in rope_parameters."
        )
    return thetas.pop(), _read_scaling(stated, fields, where)


def _object(fields: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    rope = fields.get(name) or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"{where}: {name} = {rope!r}: must be an object or absent.")
    return rope


def _read_scaling(
    stated: dict[str, tuple[str, Any]], fields: dict[str, Any], where: str
) -> Scaling | None:
    """The scaling of what is stated: name -> (where in the file, value)."""
    room, kind = stated.pop("rope_type", ("rope_parameters", "default"))
    if kind not in ("default", *SCALINGS):
        raise ConfigError(
            f"{where}: {room}.rope_type = {kind!r} is not supported; supported: default, "
            f"{', '.join(SCALINGS)}."
        )
    room, part = stated.pop("partial_rotary_factor", (room, 1))
    if part != 1:
        raise ConfigError(
            f"{where}: {room}.partial_rotary_factor = {part!r} is not supported; must be 1."
        )
    values = {name: value for name, (_, value) in stated.items()}
    scaling = SCALINGS.get(kind)
    known = {field.name for field in dataclasses.fields(scaling)} if scaling else set()
    known |= {"mscale", "mscale_all_dim"} if scaling is Yarn else set()
    for name, (room, value) in stated.items():
        if name not in known:
            raise ConfigError(
                f"{where}: {room}.{name} = {value!r} is not supported with rope_type {kind!r}."
            )
    if scaling is None:
        return None
    if _TRAINED_LENGTH in known:
        values[_TRAINED_LENGTH] = _trained_length(values, fields, where)
    return _made(scaling, values, f"{where}: {room}")


def _trained_length(values: dict[str, Any], fields: dict[str, Any], where: str) -> Any:
    """Of the scaling or at the top of the file; else the model's longest position."""
    in_room, at_top = values.get(_TRAINED_LENGTH), fields.get(_TRAINED_LENGTH)
    if None not in (in_room, at_top) and in_room != at_top:
        raise ConfigError(
            f"{where}: {_TRAINED_LENGTH} contradicts itself: {in_room!r}, {at_top!r}."
        )
    if in_room is None:
        in_room = at_top
    return fields.get("max_position_embeddings") if in_room is None else in_room


_READ = {"truncate": boolean, _TRAINED_LENGTH: positive}  # others: numbers
# (lower, upper) of fields that bound a ramp.
_RAMPS = {Llama3: ("low_freq_factor", "high_freq_factor"), Yarn: ("beta_slow", "beta_fast")}


def _made(scaling: type[Scaling], values: dict[str, Any], where: str) -> Scaling:
    if scaling is Yarn:
        values = {"attention_factor": _attention_factor(values, where)} | values
    read = {}
    for field in dataclasses.fields(scaling):
        if field.name in values or field.default is dataclasses.MISSING:
            read[field.name] = _READ.get(field.name, number)(values, field.name, where)
    made = scaling(**read)
    if scaling in _RAMPS:
        low, high = (getattr(made, name) for name in _RAMPS[scaling])
        if low >= high:
            below, above = _RAMPS[scaling]
            raise ConfigError(f"{where}: {above} = {high}: must be more than {below} = {low}.")
    return made


def _attention_factor(values: dict[str, Any], where: str) -> float:
    """YaRN's where it is not stated: 0.1 ln(factor) + 1, or a quotient of two such."""
    log = math.log(max(number(values, "factor", where), 1.0))
    if values.get("mscale") and values.get("mscale_all_dim"):
        above, below = (number(values, n, where) for n in ("mscale", "mscale_all_dim"))
        return (0.1 * above * log + 1) / (0.1 * below * log + 1)
    return 0.1 * log + 1


def rope_fields(theta: float, scaling: Scaling | None) -> dict[str, Any]:
    """What `read_rope` reads back, in the spelling of transformers 4."""
    if scaling is None:
        return {"rope_theta": theta}
    kind = next(name for name, made in SCALINGS.items() if isinstance(scaling, made))
    return {"rope_theta": theta, "rope_scaling": {"rope_type": kind, **dataclasses.asdict(scaling)}}
