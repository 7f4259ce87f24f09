"""The training benchmark's work, and a process's memory.

Needs nothing but numpy: every peer imports it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import pathlib
import time
from typing import Any

import numpy as np

LEARNING_RATE, B1, B2, EPS = 1e-5, 0.9, 0.95, 1e-8
LORA_RANK, LORA_ALPHA = 32, 32.0


@dataclasses.dataclass(frozen=True)
class StepWork:
    """Groups to train on; the loss is -sum_i weight_i sum_t exp(logprob_it - recorded_it).

    Attributes:
      prompt_UxP, trace_UxCxG: int32 ids, no padding.
      recorded_UxCxG, weight_UxC: float32.
    """

    prompt_UxP: np.ndarray
    trace_UxCxG: np.ndarray
    recorded_UxCxG: np.ndarray
    weight_UxC: np.ndarray

    @property
    def trained_tokens(self) -> int:
        return self.trace_UxCxG.size

    def rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(prompt [R, P], trace, recorded [R, G], weight [R]): R = U C rows, without groups."""
        C, G = self.trace_UxCxG.shape[1:]
        prompt = np.repeat(self.prompt_UxP, C, axis=0)
        return (
            prompt,
            self.trace_UxCxG.reshape(-1, G),
            self.recorded_UxCxG.reshape(-1, G),
            self.weight_UxC.reshape(-1),
        )

    def save(self, path: pathlib.Path) -> None:
        np.savez(path, **vars(self))

    @staticmethod
    def load(path: str) -> StepWork:
        with np.load(path) as arrays:
            return StepWork(**arrays)


def resident_bytes(peak: bool = False) -> int:
    """What the process holds, or the most that it held since `forget_peak`."""
    name = "VmHWM:" if peak else "VmRSS:"
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(name))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """Gives free memory back and starts a new peak."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def measured(step: Any) -> dict[str, Any]:
    """Runs `step()`; its loss, its wall and CPU seconds and its peak memory."""
    forget_peak()
    started, cpu_started = time.perf_counter(), time.process_time()
    loss = float(step())
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    return {
        "loss": loss,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_bytes": resident_bytes(peak=True),
    }
