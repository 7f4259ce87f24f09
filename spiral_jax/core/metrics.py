"""Metrics as mergeable pairs: per-part sums and counts -> one number, divided last.

Because parts are added before anything is divided, micro-batch size, padding and host count do not
change the result. `empty` is for the device, `divide` for the host; `merge` takes either and stays
where its inputs are.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Scalar = jax.Array | np.ndarray | np.generic | float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean in the making: the sum of some values, and how many (or how much weight) they are."""

    total: Scalar
    count: Scalar

    def merge(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Max:
    """A maximum in the making, scalar; -inf where there is no value yet. NaN stays NaN."""

    value: Scalar

    def merge(self, other: Max) -> Max:
        maximum = jnp.maximum if isinstance(self.value, jax.Array) else np.maximum
        return Max(maximum(self.value, other.value))


Metric = TypeVar("Metric", Mean, Max)


def merge(a: dict[str, Metric], b: dict[str, Metric]) -> dict[str, Metric]:
    """The metrics of both parts together; a name that only one part has is kept as it is.

    Works inside jit.

    Raises:
      TypeError: a name is a `Mean` in one part and a `Max` in the other.
    """
    for name in a.keys() & b.keys():
        if type(a[name]) is not type(b[name]):
            kinds = f"{type(a[name]).__name__} and {type(b[name]).__name__}"
            raise TypeError(f"metric {name!r} is {kinds}: it must have one type in all parts.")
    return {**a, **b, **{name: a[name].merge(b[name]) for name in a if name in b}}


def empty(like: dict[str, Metric]) -> dict[str, Metric]:
    """What `merge` leaves unchanged: a loop's first carry.

    Args:
      like: metrics of jax arrays, or of shapes as `jax.eval_shape` returns them, whose structure,
        shapes and dtypes the result has.
    """

    def fill(metric: Metric) -> Metric:
        value = -jnp.inf if isinstance(metric, Max) else 0
        return jax.tree.map(lambda leaf: jnp.full(leaf.shape, value, leaf.dtype), metric)

    return {name: fill(metric) for name, metric in like.items()}


def divide(metrics: dict[str, Mean | Max | float]) -> dict[str, float | None]:
    """Plain numbers for the log, on the host (after `jax.device_get`).

    Numbers pass through as floats. None where there was nothing to average or to compare. A NaN
    total stays NaN: it is a finding, not a gap.
    """

    def number(metric: Mean | Max | float) -> float | None:
        if isinstance(metric, Mean):
            return float(metric.total) / float(metric.count) if metric.count != 0 else None
        if isinstance(metric, Max):
            return float(metric.value) if metric.value != -np.inf else None
        return float(metric)

    return {name: number(metric) for name, metric in metrics.items()}
