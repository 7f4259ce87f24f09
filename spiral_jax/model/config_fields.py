"""Fields of a checkpoint's config.json, checked one by one: each error names file and field."""

from __future__ import annotations

import difflib
import math
from typing import Any

from spiral_jax.core.config import ConfigError


def positive(fields: dict[str, Any], name: str, where: str) -> int:
    """A positive integer."""
    value = _field(fields, name, where)
    if type(value) is not int or value < 1:  # a bool is an int to isinstance
        raise ConfigError(f"{where}: {name} = {value!r}: must be a positive integer.")
    return value


def number(fields: dict[str, Any], name: str, where: str) -> float:
    """A positive, finite number."""
    value = _field(fields, name, where)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ConfigError(f"{where}: {name} = {value!r}: must be a positive number.")
    return float(value)


def boolean(fields: dict[str, Any], name: str, where: str) -> bool:
    """true or false, not a string or a number."""
    value = _field(fields, name, where)
    if type(value) is not bool:
        raise ConfigError(f"{where}: {name} = {value!r}: must be true or false.")
    return value


def _field(fields: dict[str, Any], name: str, where: str) -> Any:
    if fields.get(name) is None:
        near = difflib.get_close_matches(name, fields, 1)
        raise ConfigError(
            f"{where}: {name} is missing{f'; did you mean {near[0]!r}?' if near else '.'}"
        )
    return fields[name]
