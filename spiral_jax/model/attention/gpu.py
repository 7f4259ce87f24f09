"""Attention of one part on NVIDIA GPUs: cuDNN's fused kernels, forward and backward, through jax.

They read and write [B, T, H, E] as projections do, so nothing is transposed, take the lengths of
queries and keys at run time, and compute no block that lies behind them. The backward pass takes
(out, lse) as inputs, so that of several parts merged may be given (FlashAttention-2, arXiv
2307.08691, section 3.1). jax offers none of this in public: `_cudnn` is the one place that knows
its private names.

What cuDNN does at the ends (documentation and tests of NVIDIA/cudnn-frontend, 2026):

- Keys behind a length are masked, yet still multiplied where their block is not all behind it ("so
  must be finite"): 0 x NaN in p v would reach every row. In the backward pass so do queries,
  in d_score^T q and p^T d_out. So keys and values are set to 0 behind their length, and queries and
  `d_out` too in the backward pass. Forward, a query's row reaches nothing but its own row.
- Rows of results behind a length are not promised: out is whatever the kernel leaves, lse is -inf
  since cuDNN 9.14, and before 9.25 a length of 0 gave NaN. They are replaced.
- The backward pass on Hopper gave NaN where S = 64 (mod 128) and lse < -88, because keys that fill
  up the last block of 128 had score 0, not -inf (pytorch issue 196678), and at T = 1 without a
  padding mask (cudnn-frontend issue 1072). So T and S are filled up to multiples of 128 here, and
  there is always a padding mask.

The backward pass sums d_q in no fixed order, so that its last bits may differ from run to run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spiral_jax.model.attention.part import MASKED, Attended, Cotangents

BLOCK = 128  # T and S are filled up to multiples of it

HOPPER, BLACKWELL = 9, 10  # major compute capabilities of H100 and H200, and of B200


def forward(
    q_BxTxHxE: jax.Array,
    k_BxSxJxE: jax.Array,
    v_BxSxJxE: jax.Array,
    q_len_B: jax.Array,
    kv_len_B: jax.Array,
    *,
    causal: bool,
) -> Attended:
    """Attention of queries to the first `kv_len` keys; if causal, of query t to keys s <= t.

    Args:
      q_len_B, kv_len_B: int32. What is stored behind them reaches nothing.

    Returns:
      Behind `q_len`, and everywhere if `kv_len` is 0, out is 0 and lse is MASKED.
    """
    T = q_BxTxHxE.shape[1]
    out, lse = _cudnn().forward(
        _fill_up(q_BxTxHxE),
        _fill_up(_zero_behind(kv_len_B, k_BxSxJxE)),
        _fill_up(_zero_behind(kv_len_B, v_BxSxJxE)),
        q_len_B,
        kv_len_B,
        causal=causal,
    )
    seen_BxT = _before(jnp.where(kv_len_B > 0, q_len_B, 0), T)
    return Attended(
        jnp.where(seen_BxT[:, :, None, None], out[:, :T], 0),
        jnp.where(seen_BxT[:, None, :], lse[..., :T], MASKED),
    )


def backward(
    q_BxTxHxE: jax.Array,
    k_BxSxJxE: jax.Array,
    v_BxSxJxE: jax.Array,
    q_len_B: jax.Array,
    kv_len_B: jax.Array,
    attended: Attended,
    d_out_BxTxHxE: jax.Array,
    *,
    causal: bool,
) -> Cotangents:
    """Cotangents of a part's inputs; see `forward` for the arguments.

    Args:
      attended: of all parts together; finite behind `q_len`.
      d_out_BxTxHxE: cotangent of `attended.out_BxTxHxE`.
    """
    T, S = q_BxTxHxE.shape[1], k_BxSxJxE.shape[1]
    has_queries_BxT = _before(q_len_B, T)[:, None]
    lse = jnp.where(has_queries_BxT, attended.lse_BxHxT, 0)  # else exp(0 - lse) may overflow
    d_q, d_k, d_v = _cudnn().backward(
        _fill_up(_zero_behind(q_len_B, q_BxTxHxE)),
        _fill_up(_zero_behind(kv_len_B, k_BxSxJxE)),
        _fill_up(_zero_behind(kv_len_B, v_BxSxJxE)),
        q_len_B,
        kv_len_B,
        _fill_up(attended.out_BxTxHxE),
        _fill_up(lse, axis=2),
        _fill_up(_zero_behind(q_len_B, d_out_BxTxHxE)),
        causal=causal,
    )
    # where one length is 0 there is nothing to attend, or nobody who attends
    q_len_B, kv_len_B = jnp.where(kv_len_B > 0, q_len_B, 0), jnp.where(q_len_B > 0, kv_len_B, 0)
    return Cotangents(
        _zero_behind(q_len_B, d_q[:, :T]),
        _zero_behind(kv_len_B, d_k[:, :S]),
        _zero_behind(kv_len_B, d_v[:, :S]),
    )


def refusal(dtype: jax.typing.DTypeLike, E: int, capability: tuple[int, int]) -> str | None:
    """Why cuDNN cannot serve such queries, in one line; None where it can.

    Args:
      capability: the GPU's compute capability, such as (9, 0) of an H100.
    """
    name = np.dtype(dtype).name
    if name not in ("bfloat16", "float16"):
        return f"cuDNN attention takes bfloat16 and float16, not {name}"
    major, minor = capability
    largest = 256 if major == HOPPER else 128
    if E % 8 == 0 and (0 < E <= largest or (major == BLACKWELL and E == 256)):
        return None
    allowed = f"multiples of 8 up to {largest}" + (", and 256" if major == BLACKWELL else "")
    return f"cuDNN attention takes head sizes that are {allowed}, not {E}, on {major}.{minor} GPUs"


def unavailable() -> str | None:
    """Why this jax cannot serve, in one line: its private names have moved; None where it can."""
    try:
        _cudnn()
    except ImportError as error:
        return str(error)
    return None


def missing_library() -> str | None:
    """Why programs of this process cannot call cuDNN, in one line; None where nothing says so.

    Compiling for GPUs that are elsewhere does not need it.
    """
    try:
        from jax._src.cudnn.fused_attention_stablehlo import check_cudnn_version
    except ImportError:  # it has moved: a missing library shows when a program is compiled
        return None
    try:
        check_cudnn_version()
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        return f'jax finds no cuDNN ({reason}): pip install ".[gpu]"'
    return None


def _fill_up(array: jax.Array, axis: int = 1) -> jax.Array:
    """Zeros at the end of an axis, up to a multiple of BLOCK."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, -array.shape[axis] % BLOCK)
    return jnp.pad(array, widths)


def _before(len_B: jax.Array, T: int) -> jax.Array:
    """bool[B, T]: t < len."""
    return jnp.arange(T) < len_B[:, None]


def _zero_behind(len_B: jax.Array, array_BxTxHxE: jax.Array) -> jax.Array:
    """A select, not a product: 0 x NaN is no 0."""
    kept_BxT = _before(len_B, array_BxTxHxE.shape[1])
    return jnp.where(kept_BxT[:, :, None, None], array_BxTxHxE, 0)


class _Cudnn(NamedTuple):
    """cuDNN's two calls, over T and S that are multiples of BLOCK.

    Attributes:
      forward: (q, k, v, q_len, kv_len, *, causal) -> out, lse.
      backward: (q, k, v, q_len, kv_len, out, lse, d_out, *, causal) -> d_q, d_k, d_v.
    """

    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


_INPUTS = (
    "query", "key", "value", "bias", "q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets",
    "page_table_k", "page_table_v",
)  # fmt: skip
_RESULTS = ("activation", "fwd_output", "grad_output")
_SETTINGS = (
    "scale", "seed", "dropout_rate", "variadic_args", "mask_type", "layout",
    "sliding_window_length",
)  # fmt: skip
_SCORE_MOD = {"score_mod_args", "score_mod"}  # jax 0.12 has them


def _cudnn() -> _Cudnn:
    """jax's private primitives, looked up and compared with how they are called here.

    Known are jax 0.10.2, 0.11.2 and 0.12.0.

    Raises:
      ImportError: jax has no such names, or they take other arguments.
    """
    try:
        from jax._src.cudnn import fused_attention_stablehlo as private

        forward_p = private._dot_product_attention_fwd_p_wrapper
        backward_p = private._dot_product_attention_bwd_p_wrapper
        forward_takes = _names(private._dot_product_attention_fwd_impl)
        backward_takes = _names(private._dot_product_attention_bwd_impl)
        masks = {False: private.MaskType.PADDING, True: private.MaskType.PADDING_CAUSAL}
        layout = private.AttentionLayout.BTNH.value
    except (ImportError, AttributeError) as error:
        raise ImportError(f"cuDNN attention has moved in jax {jax.__version__}: {error}") from error
    _check_names("forward", forward_takes, (*_INPUTS, *_SETTINGS, "is_training"))
    _check_names("backward", backward_takes, (*_INPUTS, *_RESULTS, *_SETTINGS))
    plain_score = {"score_mod": None} if "score_mod" in forward_takes else {}

    def settings(q: jax.Array, causal: bool) -> dict[str, Any]:
        return plain_score | {
            "scale": q.shape[-1] ** -0.5,
            "seed": 0,
            "dropout_rate": 0.0,
            "variadic_args": (False, False),  # no bias, no cotangent of one
            "mask_type": masks[causal],
            "layout": layout,
            "sliding_window_length": None,
        }

    def inputs(q, k, v, q_len, kv_len) -> list[jax.Array]:
        none = jnp.zeros(0, q.dtype)
        return [q, k, v, none, q_len, kv_len, none, none, none, none]

    def forward(q, k, v, q_len, kv_len, *, causal):
        given = inputs(q, k, v, q_len, kv_len)
        return forward_p.bind(*given, is_training=True, **settings(q, causal))

    def backward(q, k, v, q_len, kv_len, out, lse, d_out, *, causal):
        given = inputs(q, k, v, q_len, kv_len)
        return backward_p.bind(*given, lse, out, d_out, **settings(q, causal))

    return _Cudnn(forward, backward)


def _names(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def _check_names(which: str, takes: list[str], passed: tuple[str, ...]) -> None:
    known = [name for name in takes if name not in _SCORE_MOD]
    if known != list(passed):
        others = sorted(set(known) ^ set(passed)) or "their order"
        raise ImportError(
            f"cuDNN attention takes other arguments {which} in jax {jax.__version__}: {others}"
        )
