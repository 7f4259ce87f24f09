"""How well a step used its devices: speed, FLOPs utilisation, memory; profiles of chosen steps."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence

import jax

from spiral_jax.core import distributed
from spiral_jax.core.groups import Groups
from spiral_jax.model.flops import PEAK_FLOPS_PER_S, sampling_flops, train_flops
from spiral_jax.model.transformer import ModelConfig


def update_metrics(model: ModelConfig, trained: list[Groups], seconds: float) -> dict[str, float]:
    """Speed of one update.

    Args:
      trained: the groups of the update.
      seconds: from its start until the next step's weights are there.

    Returns:
      `tokens_per_s/update`, and `tokens_per_s/update_device` for each device: trained tokens, those
      of traces. `tflop/update`: 10^12 operations that the trained groups need, nothing counted
      twice (`flops.train_flops` without a remat policy). `mfu`: these over seconds x devices x
      peak; no entry where a device's peak is unknown.
    """
    devices = jax.devices()
    speed = sum(groups.sampled_tokens for groups in trained) / seconds
    needed = sum(
        train_flops(
            model.arch,
            model.lora_rank,
            None,
            groups.requests.prompt_len_U,
            groups.trace_len_UxC,
            model.lora_experts,
        )
        for groups in trained
    )
    metrics = {
        "tokens_per_s/update": speed,
        "tokens_per_s/update_device": speed / len(devices),
        "tflop/update": needed / 1e12,
    }
    peak = PEAK_FLOPS_PER_S.get(devices[0].device_kind)
    if peak:
        metrics["mfu"] = needed / (seconds * len(devices) * peak)
    return metrics


def sampling_metrics(model: ModelConfig, metrics: Mapping[str, float]) -> dict[str, float]:
    """`tflop/sampling`: `flops.sampling_flops` of the tokens that a step's metrics count."""
    prefilled, drawn = (
        int(metrics[f"sampling/{name}_tokens"]) for name in ("prefilled", "generated")
    )
    flops = sampling_flops(model.arch, model.lora_rank, prefilled, drawn, model.lora_experts)
    return {"tflop/sampling": flops / 1e12}


def memory_metrics() -> dict[str, float]:
    """`memory/device_peak`: bytes, the most that a local device has held so far.

    Nothing where none reports it.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stat["peak_bytes_in_use"] for stat in stats if "peak_bytes_in_use" in stat]
    return {"memory/device_peak": float(max(peaks))} if peaks else {}


class StepProfile:
    """Traces chosen steps with JAX's profiler into WORKDIR/profile, for xprof or Perfetto.

    Of several processes, those of the first. A context manager.

    Args:
      steps: config.profile.steps: () or (first, end).
      path: the run's directory.
    """

    def __init__(self, steps: Sequence[int], path: pathlib.Path) -> None:
        self._first, self._end = steps or (0, 0)
        self._path = path / "profile"
        self._running = False

    def begin(self, step: int) -> None:
        """Called at the beginning of every step: starts or ends the profile where it is due."""
        if self._running and step >= self._end:
            self._stop()
        elif not self._running and self._first <= step < self._end and distributed.is_first():
            jax.profiler.start_trace(str(self._path))
            self._running = True

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._running = False

    def __enter__(self) -> StepProfile:
        return self

    def __exit__(self, *error: object) -> None:
        if self._running:
            self._stop()
