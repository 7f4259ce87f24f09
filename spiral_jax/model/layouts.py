"""Layouts that XLA's CPU backend needs to be fast, each behind a function that changes no number.

Found on two CPU cores; compiled for an H100, programs are the same without them or nearly so. Each
may go by itself: its docstring says how, and `benchmarks/layouts.py` says what a train step then
takes.
"""

from __future__ import annotations

import jax


def token_rows(x: jax.Array) -> jax.Array:
    """x [..., D] as [N, D], before it is multiplied with a weight.

    To sum a weight's gradient over two axes, the CPU backend would transpose x or its cotangent: a
    step takes a third longer.
    To remove: `Linear` multiplies x as it is; adapters' products over rows (`_adapters_backward`)
    then sum over all leading axes.
    """
    return x.reshape(-1, x.shape[-1])


def merged_leading_axes(x: jax.Array) -> jax.Array:
    """x [U, T, ...] as [U * T, ...], before a norm over its last axis.

    Of a single group the CPU backend would take 4 times as long for it, and 7 to 24 percent longer
    for a step.
    To remove: `rms_norm` takes x as it is, and its last reshape goes.
    """
    return x.reshape(-1, *x.shape[2:]) if x.ndim > 2 else x
