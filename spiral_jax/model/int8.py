"""Matrices of a frozen base in int8: weights alone, one scale for each output channel.

    scale_F = max over D of |W_DxF| / 127        W ~ int8(W / scale) * scale

The scale multiplies the product, in float32. So whatever the dtype of activations, which all hold
the integers up to 127 exactly, sampler and trainer multiply with the very same weights.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_LARGEST = 127  # not -128: the range is symmetric


def scale_of(w_DxF: np.ndarray) -> np.ndarray:
    """float32 [F]; 0 for a column of zeros. A matrix of any float dtype."""
    w_DxF = w_DxF.astype(np.float32, copy=False)  # numpy is slow in bfloat16
    return np.max(np.abs(w_DxF), axis=0) / np.float32(_LARGEST)


def quantise(w_DxF: np.ndarray) -> np.ndarray:
    """int8 [D, F], rounded to nearest; a column of zeros stays one."""
    w_DxF = w_DxF.astype(np.float32)
    scale_F = scale_of(w_DxF)
    w_DxF /= np.where(scale_F > 0, scale_F, np.float32(1))
    return np.rint(w_DxF, out=w_DxF).astype(np.int8)


def zeros_for(linear: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The parameters of a float `Linear` with its kernel in int8, as zeros."""
    kernel = linear["kernel"]
    scale = jnp.zeros(kernel.shape[1:], jnp.float32)
    return linear | {"kernel": jnp.zeros(kernel.shape, jnp.int8), "scale": scale}


@jax.custom_vjp
def multiply(x_NxD: jax.Array, kernel_DxF: jax.Array, scale_F: jax.Array) -> jax.Array:
    """x W [N, F] in x's dtype; gradients go to x alone."""
    y_NxF = jnp.matmul(x_NxD, kernel_DxF.astype(x_NxD.dtype), preferred_element_type=jnp.float32)
    return (y_NxF * scale_F).astype(x_NxD.dtype)


def _forward(x_NxD: jax.Array, kernel_DxF: jax.Array, scale_F: jax.Array) -> tuple[jax.Array, Any]:
    return multiply(x_NxD, kernel_DxF, scale_F), (kernel_DxF, scale_F)


def _backward(kept: Any, d_y_NxF: jax.Array) -> tuple[jax.Array, None, None]:
    # By default the cotangent would be multiplied in float32, whatever x's dtype.
    kernel_DxF, scale_F = kept
    scaled_NxF = (d_y_NxF * scale_F).astype(d_y_NxF.dtype)
    return scaled_NxF @ kernel_DxF.astype(d_y_NxF.dtype).T, None, None


multiply.defvjp(_forward, _backward)
