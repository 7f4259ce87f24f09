"""Layouts that XLA's CPU backend needs to be fast, each behind a function that changes no number.

All were found on two CPU cores, and none has been measured on an accelerator. Each may go by
itself: its docstring says how, and `benchmarks/layouts.py` says what a train step then takes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


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


def columns(x_NxE: jax.Array) -> jax.Array:
    """x [..., N, E] as [..., E, N]: queries, and cotangents of their outputs, in a backward pass.

    Made once for all blocks of keys; two factors that both have their rows first cost the CPU
    backend more. To remove: `_cotangents_of` multiplies "...ne,...nt->...et" with the rows.
    """
    return jnp.swapaxes(x_NxE, -1, -2)
