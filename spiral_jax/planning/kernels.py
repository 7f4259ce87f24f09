"""Kernels that XLA did not write: operations and memory by formula.

Their insides are not in a program's text. Of cuBLAS's products and cuDNN's attention the shapes say
it; a Pallas kernel for TPUs states it, by its `pl.CostEstimate`.
"""

from __future__ import annotations

import math
import re

from spiral_jax.planning.hlo import Computation, Instruction, Module

CUBLAS = ("__cublas$gemm", "__cublas$lt$matmul")
ATTENTION = "__cudnn$fmhaSoftmax"
ATTENTION_BACKWARD = "__cudnn$fmhaSoftmaxBackward"
PALLAS = "tpu_custom_call"


def kernel_flops(call: Instruction, where: Computation) -> float | None:
    """Operations of a custom call; None where nothing says them."""
    if call.target == PALLAS:
        stated = re.search(r'"cost_estimate":\s*\{[^}]*"flops":\s*"?(\d+)', call.attributes)
        return float(stated[1]) if stated else None
    if call.target in CUBLAS:
        left = where.instructions[call.operands[0]].arrays[0].shape
        axes = _numbers(call, "lhs_contracting_dimensions")
        return 2.0 * math.prod(call.arrays[0].shape) * math.prod(left[axis] for axis in axes)
    products = {ATTENTION: 2, ATTENTION_BACKWARD: 5}.get(call.target, 0)
    if not products:
        return None
    B, H, T, S = _attention_sizes(call)
    E = call.arrays[0].shape[-1]
    keys = S / 2 if _is_causal(call) else S  # blocks above the diagonal are not computed
    return 2.0 * products * B * H * T * keys * E


def workspace_bytes(module: Module) -> int:
    """The most that cuDNN needs at once beside the arrays of a call, which it asks for on the GPU.

    The backward pass sums d_q, and each row's sum of out * d_out, in float32; where query heads
    share keys, d_k and d_v of every query head are made before they are added
    (NVIDIA/cudnn-frontend, scaled_dot_product_flash_attention.h).
    """
    most = 0
    for call in module.instructions():
        if call.target == ATTENTION_BACKWARD:
            B, H, T, S = _attention_sizes(call)
            d_q, d_k, *_ = call.arrays
            J, E = d_k.shape[1], d_q.shape[-1]
            of_query_heads = 2 * H // J * d_k.bytes if J < H else 0
            most = max(most, 4 * B * H * T * (E + 1) + of_query_heads)
    return most


def counted_by_formula(module: Module) -> list[str]:
    """Targets of the program's custom calls whose operations come from a formula."""
    return sorted(
        {
            call.target
            for computation in module.computations.values()
            for call in computation.instructions.values()
            if call.operation == "custom-call" and kernel_flops(call, computation) is not None
        }
    )


def _attention_sizes(call: Instruction) -> list[int]:
    """B, H, T, S: the scores' shape, which the call states as it is not among its arrays."""
    scores = call.attributes.partition('"intermediate_tensor_shape"')[2]
    return [int(size) for size in re.findall(r"\d+", _listed(scores, "dimensions"))]


def _is_causal(call: Instruction) -> bool:
    return '"PADDING_CAUSAL"' in call.attributes or '"CAUSAL"' in call.attributes


def _numbers(call: Instruction, field: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", _listed(call.attributes, field))]


def _listed(text: str, field: str) -> str:
    """What stands in the brackets of the first `"field": [...]` of JSON in a text."""
    match = re.search(rf'"{field}":\s*\[([^\]]*)\]', text)
    if match is None:
        raise ValueError(f"a library call without {field}: {text[:200]}")
    return match[1]
