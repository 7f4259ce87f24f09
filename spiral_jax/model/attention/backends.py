"""Which backend computes attention: by the devices' platform and the model's dtype, or by name."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from spiral_jax.core.config import ConfigError
from spiral_jax.core.mesh import GPU_PLATFORMS
from spiral_jax.model.attention import (
    gpu,
    pages_gpu,
    pages_gpu_write,
    pages_tpu,
    pages_tpu_write,
    tpu,
)
from spiral_jax.model.attention.groups import Backend
from spiral_jax.model.attention.kernels import Kernels
from spiral_jax.model.attention.pages import PageBackend
from spiral_jax.model.attention.pages_kernels import (
    KernelPages,
    empty_pages,
    scatter_pages,
    write_then_attend,
)
from spiral_jax.model.attention.pages_xla import XlaPages
from spiral_jax.model.attention.prompts import KernelPrompts, PromptBackend, XlaPrompts
from spiral_jax.model.attention.xla import Xla

XLA, GPU, TPU = "xla", "gpu", "tpu"
BACKENDS = (XLA, GPU, TPU)
_PLATFORMS = dict.fromkeys(GPU_PLATFORMS, GPU) | {"tpu": TPU}
# Which "auto" may take. The kernels for TPUs are compiled and interpreted in tests, and have not
# run on one.
_PROVEN = (XLA, GPU)


def make_backend(name: str, block: int) -> Backend:
    """The backend of that name; `block` is what `xla` takes at once."""
    if name == XLA:
        return Xla(block)
    kernels = {GPU: gpu, TPU: tpu}[name]
    return Kernels(kernels.forward, kernels.backward)


def make_prompt_backend(name: str) -> PromptBackend:
    """What prefill attends with; see `prompts`."""
    return XlaPrompts() if name == XLA else KernelPrompts(make_backend(name, block=0))


def make_page_backend(name: str) -> PageBackend:
    """What decoding reads and writes pages with; see `pages`."""
    if name == XLA:
        return XlaPages()
    if name == GPU:
        return KernelPages(empty_pages, pages_gpu_write.write_pages, pages_gpu.attend_newest)
    attend_newest = write_then_attend(pages_tpu_write.write_tokens, pages_tpu.attend_pages)
    return KernelPages(pages_tpu.empty_pages, scatter_pages, attend_newest)


def choose_page_backend(asked: str, device: jax.Device, E: int) -> str:
    """The name of the backend for pages: the devices' own kernels, unless loops are asked for.

    Loops need as much memory again, and read as many tokens as a sequence may have; so "auto"
    takes kernels here before they have run on every kind of device.

    Args:
      asked: config.model.attention.
      E: head width.
    """
    best = XLA if asked == XLA else _PLATFORMS.get(device.platform, XLA)
    if best == GPU and not pages_gpu.takes(E):
        _say_once(f"pages are read by {XLA} and not by {GPU}: heads of {E} are no power of 2")
        return XLA
    return best


def choose_backend(asked: str, device: jax.Device, dtype: jnp.dtype, E: int) -> str:
    """The name of the backend for devices of this kind.

    Args:
      asked: config.model.attention: "auto", or one of `BACKENDS`.
      dtype: of activations.
      E: head width.

    Raises:
      ConfigError: the one that is asked for cannot serve; the message says why, and which can.
    """
    if asked == "auto":
        best = _PLATFORMS.get(device.platform, XLA)
        if best not in _PROVEN:
            return XLA
        reason = refusal(best, device, dtype, E)
        if reason:
            _say_once(f"attention is computed by {XLA} and not by {best}: {reason}")
        return XLA if reason else best
    reason = refusal(asked, device, dtype, E)
    if reason:
        able = [name for name in BACKENDS if not refusal(name, device, dtype, E)]
        raise ConfigError(
            f"config.model.attention = {asked!r}: {reason}. On these devices it can be auto, "
            f"{', '.join(able)}."
        )
    return asked


def refusal(name: str, device: jax.Device, dtype: jnp.dtype, E: int) -> str | None:
    """Why a backend cannot serve, in one line; None if it can."""
    if name == XLA:
        return None
    if name not in BACKENDS:
        return f"must be one of auto, {', '.join(BACKENDS)}"
    if _PLATFORMS.get(device.platform) != name:
        return f"it is for another platform than {device.platform!r}"
    if jnp.dtype(dtype) == jnp.float32:
        return "a float32 model multiplies in float32, which its kernels do not"
    if name == TPU:
        return None
    major, _, minor = str(getattr(device, "compute_capability", "9.0")).partition(".")
    reason = gpu.unavailable() or gpu.refusal(dtype, E, (int(major), int(minor or 0)))
    runs_here = jax.default_backend() == "gpu"  # else it is planned for
    return reason or (gpu.missing_library() if runs_here else None)


@functools.cache
def _say_once(line: str) -> None:
    print(line, flush=True)
