"""The numbers of a run's logs once more, in TensorBoard, Weights & Biases or trackio.

metrics.jsonl stays what a run resumes from and is reported from; a writer only shows. TensorBoard's
files lie in WORKDIR/tensorboard; Weights & Biases and trackio, optional packages, read their own
environment variables (WANDB_PROJECT, WANDB_MODE, ...).
"""

from __future__ import annotations

import importlib.util
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from spiral_jax.core.config import ConfigError

_PACKAGE = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
_PROJECT = "spiral_jax"


def check_installed(writers: Sequence[str]) -> None:
    """Raises `ConfigError` for a writer whose package is missing."""
    for name in writers:
        if importlib.util.find_spec(_PACKAGE[name]) is None:
            raise ConfigError(
                f"config.metrics.writers has {name!r}, which needs the package {_PACKAGE[name]}: "
                'pip install ".[writers]", or leave it out.'
            )


class MetricWriters:
    """All writers of a run; a context manager.

    Args:
      writers: `config.metrics.writers`.
      workdir: the run's directory.
      run: names the run where writers keep several; a resumed run has the same name.
      config_plain: `config.to_plain(c)`.
      step: where this start goes on; what a killed process has shown of later steps is replaced
        where that is possible.
    """

    def __init__(
        self, writers: Sequence[str], workdir: pathlib.Path, run: str, config_plain: dict, step: int
    ):
        make = {"tensorboard": _TensorBoard, "wandb": _Wandb, "trackio": _Trackio}
        self._writers = [make[name](workdir, run, config_plain, step) for name in writers]

    def __enter__(self) -> MetricWriters:
        return self

    def __exit__(self, *exception: object) -> None:
        for writer in self._writers:
            writer.close()

    def write(self, row: dict[str, Any], prefix: str = "") -> None:
        """Shows the finite numbers of a row at its step: of an estimate its mean, low, high."""
        numbers = _numbers(row, prefix)
        for writer in self._writers:
            writer.write(row["step"], numbers)


def _numbers(row: dict[str, Any], prefix: str) -> dict[str, float]:
    """The finite numbers of a row by name; `prefix` stands before each."""
    numbers = {}
    for name, value in row.items():
        if isinstance(value, dict):
            estimate = {part: value.get(part) for part in ("mean", "low", "high")}
            numbers |= _numbers(estimate, f"{prefix}{name}/")
        elif name != "step" and isinstance(value, int | float) and math.isfinite(value):
            numbers[prefix + name] = value
    return numbers


class _TensorBoard:
    """Event files; those of steps that are run again are hidden."""

    def __init__(self, workdir: pathlib.Path, run: str, config_plain: dict, step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=step)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """One W&B run, resumed under its id.

    W&B's own steps may not fall, so ours is a metric that charts are drawn over.
    """

    def __init__(self, workdir: pathlib.Path, run: str, config_plain: dict, step: int):
        import wandb

        self._run = wandb.init(
            project=_PROJECT,
            id=run,
            name=run,
            dir=str(workdir),
            config=config_plain,
            resume="allow",
        )
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log({"step": step} | numbers)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    """One trackio run, resumed under its name."""

    def __init__(self, workdir: pathlib.Path, run: str, config_plain: dict, step: int):
        import trackio

        self._run = trackio.init(project=_PROJECT, name=run, config=config_plain, resume="allow")

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()
