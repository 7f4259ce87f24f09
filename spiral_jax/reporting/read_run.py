"""A run's directory -> what the report tells of it; also of a run in progress, one without
evaluations, an evaluation.

The directory may be an address that etils' epath knows (gs://, s3://): it is only read, in whole
files.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from etils import epath

from spiral_jax.core import config
from spiral_jax.evaluation.results import read_results
from spiral_jax.run.workdir import WorkdirError, read_config, read_log, trace_files

_EVALUATIONS = "evaluations"


@dataclasses.dataclass(frozen=True)
class Run:
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


def read_run(workdir: str, results: str | None = None, baseline: str | None = None) -> Run:
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
    shown: dict[str, dict] = {}
    if results or (path / "results.json").exists():
        shown["this evaluation"] = read_results(results or path / "results.json")
    elif checkpoints:
        shown[f"step {max(checkpoints)}"] = checkpoints[max(checkpoints)]
    if baseline and not shown:
        raise WorkdirError(
            f"--baseline={baseline}: there is no evaluation to compare with it. Give --results too."
        )
    if baseline:
        shown[f"baseline ({epath.Path(baseline).parent.name})"] = read_results(baseline)
    elif not results and not (path / "results.json").exists() and len(checkpoints) > 1:
        shown[f"step {min(checkpoints)}"] = checkpoints[min(checkpoints)]
    logs = {name: read_log(path / f"{name}.jsonl") for name in ("starts", "metrics", "evaluations")}
    return Run(
        path=path,
        config=plain,
        traces=trace_files(path / "traces"),
        results=shown,
        checkpoints=checkpoints,
        **logs,
    )


def _checkpoints(directory: epath.Path) -> dict[int, dict]:
    found = directory.glob("step_*/results.json") if directory.exists() else ()
    return dict(
        sorted((int(file.parent.name.removeprefix("step_")), read_results(file)) for file in found)
    )


def changed_fields(plain: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(field, default, here) of every field that is not as in `config.defaults()`, values as JSON."""
    here, usual = _flat(plain), _flat(config.to_plain(config.defaults()))
    changed = [
        (name, usual.get(name), value) for name, value in here.items() if usual.get(name) != value
    ]
    return [
        (name, *(json.dumps(value, ensure_ascii=False) for value in values))
        for name, *values in changed
    ]


def _flat(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in plain.items():
        found |= (
            _flat(value, f"{prefix}{name}.")
            if isinstance(value, dict) and value
            else {prefix + name: value}
        )
    return found
