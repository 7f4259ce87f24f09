"""A run's directory -> what the report tells of it.

The run may be in progress, without evaluations, or be an evaluation. The directory may be an
address that etils' epath knows (gs://, s3://): it is only read, in whole files.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from etils import epath

from spiral_jax.core import config
from spiral_jax.evaluation.results import read_results
from spiral_jax.run.trace_log import trace_files
from spiral_jax.run.workdir import WorkdirError, read_config, read_log

_EVALUATIONS = "evaluations"


@dataclasses.dataclass(frozen=True)
class RecordedRun:
    """What is left of a run.

    Attributes:
      config: plain; fields that did not exist when it was started have their defaults.
      starts, metrics, evaluations: rows of these logs; None where a number was NaN.
      traces: trace file by step; the trace log keeps the newest ones.
      results: name -> content of a results.json: the evaluation, and what it is compared with (or
        nothing).
      checkpoints: results.json by step of the evaluations during training, with pass@k.
    """

    path: epath.Path
    config: dict[str, Any]
    starts: list[dict]
    metrics: list[dict]
    evaluations: list[dict]
    traces: dict[int, epath.Path]
    results: dict[str, dict]
    checkpoints: dict[int, dict]


def read_run(workdir: str, results: str | None = None, baseline: str | None = None) -> RecordedRun:
    """Reads a run.

    Args:
      results: results.json of the evaluation to show; None: that of `workdir`, else its newest one
        during training.
      baseline: results.json that it is compared with; None: if it is from training, the first one.

    Raises:
      WorkdirError: `workdir` holds no run, or something in it is damaged.
      ResultsError: a results.json cannot be read.
      ConfigError: the run's configuration is of another version.
    """
    path = epath.Path(workdir)
    plain = config.to_plain(config.from_plain(read_config(path)[0]))
    checkpoints = _checkpoints(path / _EVALUATIONS)
    return RecordedRun(
        path=path,
        config=plain,
        starts=read_log(path / "starts.jsonl"),
        metrics=read_log(path / "metrics.jsonl"),
        evaluations=read_log(path / "evaluations.jsonl"),
        traces=trace_files(path / "traces"),
        results=_results(path, checkpoints, results, baseline),
        checkpoints=checkpoints,
    )


def _results(
    path: epath.Path, checkpoints: dict[int, dict], results: str | None, baseline: str | None
) -> dict[str, dict]:
    """The evaluation that is shown and what it is compared with, by name."""
    shown: dict[str, dict] = {}
    own = path / "results.json"
    from_training = not results and not own.exists()
    if not from_training:
        shown["this evaluation"] = read_results(results or own)
    elif checkpoints:
        newest = max(checkpoints)
        shown[f"step {newest}"] = checkpoints[newest]
    if baseline:
        if not shown:
            raise WorkdirError(
                f"--baseline={baseline}: there is no evaluation to compare with it. Give --results "
                "too."
            )
        shown[f"baseline ({epath.Path(baseline).parent.name})"] = read_results(baseline)
    elif from_training and len(checkpoints) > 1:
        first = min(checkpoints)
        shown[f"step {first}"] = checkpoints[first]
    return shown


def _checkpoints(directory: epath.Path) -> dict[int, dict]:
    """The evaluations during training, by step in ascending order."""
    files = directory.glob("step_*/results.json") if directory.exists() else ()
    by_step = {int(file.parent.name.removeprefix("step_")): file for file in files}
    return {step: read_results(by_step[step]) for step in sorted(by_step)}


def changed_fields(plain: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(field, default, here) of every field that differs from `config.defaults()`, as JSON."""
    here, usual = _flat(plain), _flat(config.to_plain(config.defaults()))
    return [
        (name, _json(usual.get(name)), _json(value))
        for name, value in here.items()
        if usual.get(name) != value
    ]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _flat(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of all rooms by their full names."""
    flat: dict[str, Any] = {}
    for name, value in plain.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
