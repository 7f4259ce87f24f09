"""How matrix products of a float32 model are computed on accelerators: in float32, not faster."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from spiral_jax.core.mesh import GPU_PLATFORMS


def with_matmul_precision(compute_dtype: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the matrix products of a float32 model in float32; of others as it is.

    By default JAX multiplies float32 matrices in TF32 on GPUs and in bfloat16 on TPUs: sampler and
    trainer would part.
    """
    if jnp.dtype(compute_dtype) != jnp.float32:
        return function

    @functools.wraps(function)
    def traced(*args: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return function(*args)

    return traced


def product_options(compute_dtype: Any, platform: str) -> dict[str, Any]:
    """XLA's options for programs of such a model on a platform, for `compiler_options` of jit.

    XLA writes kernels of its own for products on GPUs, and tries many. In float32 the first train
    step of a bundled model took 90 s on an H100 with 16 cores, against 0.4 s without compilation,
    and XLA warned of such a kernel that it was slow to compile. cuBLAS has kernels for them.
    """
    if jnp.dtype(compute_dtype) == jnp.float32 and platform in GPU_PLATFORMS:
        return {"xla_gpu_enable_triton_gemm": False}
    return {}
