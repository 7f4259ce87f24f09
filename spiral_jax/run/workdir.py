"""The run's directory: rows of plain numbers and text -> files that survive a kill and a resume.

    WORKDIR/config.json                    the configuration and `config_digest`
    WORKDIR/starts.jsonl                   one JSON object each time the run starts or resumes
    WORKDIR/metrics.jsonl                  one JSON object a step
    WORKDIR/traces/                        see `trace_log`
    WORKDIR/checkpoints/                   see `checkpoint`

Row `step` = s belongs to the step that starts with s steps done, so a resume from the checkpoint of
step s first calls `cut_back(s)` on both logs. In a run of several processes only process 0 touches
the directory: what writes does nothing on the others, and what is read goes to them through
`distributed.from_first`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from etils import epath

from spiral_jax.core.config import compared, difference, digest_of, without_retired
from spiral_jax.core.distributed import is_first
from spiral_jax.core.errors import UserError

_CONFIG = "config.json"
_SHARED_WITHIN_S = (
    90.0  # network file systems remember for up to a minute that a file was not there
)


class WorkdirError(UserError):
    """A directory or a log in it that this run cannot use; the message names the path and what to
    do.
    """


def open_workdir(
    path: str | os.PathLike, config_plain: dict, digest: str, allow: Sequence[str] = ()
) -> Path:
    """Makes `path` the directory of the run with this configuration, or returns to it.

    Args:
      path: a directory that is missing, empty, or that of a run with the same configuration.
      config_plain: `config.to_plain(c)`.
      digest: `config.digest(c)`.
      allow: fields (`room.name`) and rooms that may differ from the run's; they are printed, and
        config.json becomes the new one.

    Raises:
      WorkdirError: `path` holds a run with another configuration (the message lists every field
        that differs) or other files, its config.json is damaged, or it is not a directory that can
        be written.
    """
    if "://" in os.fspath(path):
        raise WorkdirError(
            f"--workdir={os.fspath(path)}: logs are appended to and replaced in place, which object stores cannot do. "
            f"Give a path of a mounted file system."
        )
    workdir = Path(path).absolute()
    if not is_first():
        _wait_for_first(workdir)
        return workdir
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        entries = sorted(
            entry.name
            for entry in workdir.iterdir()
            if entry.name != _temporary(workdir / _CONFIG).name
        )
        if not entries:
            _write_config(workdir, config_plain, digest)
            return workdir
    except OSError as error:
        raise WorkdirError(
            f"--workdir={workdir}: not a directory that can be written ({error}). Give another --workdir."
        ) from error
    if _CONFIG not in entries:
        shown = ", ".join(entries[:5]) + (
            f" and {len(entries) - 5} more" if len(entries) > 5 else ""
        )
        raise WorkdirError(
            f"--workdir={workdir}: holds no run (no {_CONFIG}) but is not empty: {shown}. Give a new or an empty one."
        )
    held_config, held_digest = read_config(workdir)
    changed = difference(compared(held_config), compared(config_plain))
    lines = [line for line in changed if not _allowed(line.partition(": ")[0], allow)]
    if (
        not changed and held_digest != digest
    ):  # such as 1 and 1.0, equal in Python but not in a digest
        lines = [f"config_digest: {held_digest!r} -> {digest!r}"]
    if lines:
        raise WorkdirError(
            f"--workdir={workdir}: holds a run with another config (there -> here):\n  "
            + "\n  ".join(lines)
            + "\nGive another --workdir, or the values that the run was started with, or name the fields that may "
            "change in --config.resume.allow."
        )
    if changed:
        print(
            f"--workdir={workdir}: resumed with another config (there -> here):",
            *changed,
            sep="\n  ",
            flush=True,
        )
        with written(workdir):
            _write_config(workdir, config_plain, digest)
    return workdir


def _allowed(field: str, allow: Sequence[str]) -> bool:
    return any(field == name or field.startswith(f"{name}.") for name in allow)


def _write_config(workdir: Path, config_plain: dict, digest: str) -> None:
    with replacing(workdir / _CONFIG) as file:
        content = {**config_plain, "config_digest": digest}
        file.write((json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def _wait_for_first(workdir: Path) -> None:
    """Returns when this process sees what process 0 has made; a shared directory may show it
    seconds later.
    """
    end = time.monotonic() + _SHARED_WITHIN_S
    while not (workdir / _CONFIG).exists():
        if time.monotonic() > end:
            raise WorkdirError(
                f"--workdir={workdir}: process 0 has made it, this host does not see it after {_SHARED_WITHIN_S:g} s. "
                "All hosts write their part of the checkpoints: give a directory of a file system that they share."
            )
        time.sleep(0.2)


def read_config(workdir: str | os.PathLike) -> tuple[dict, str]:
    """(plain configuration, its digest) of the run in `workdir`.

    `workdir` may be an address that etils' epath knows (gs://, s3://), as for the other functions
    that only read. What an earlier version wrote is given as this one would have written it.

    Raises:
      WorkdirError: there is none, or it is damaged.
      ConfigError: a run of an earlier version, of which this one cannot do what it did.
    """
    path = epath.Path(workdir) / _CONFIG
    try:
        content = json.loads(path.read_bytes())
        digest = content.pop("config_digest")
    except OSError as error:
        raise WorkdirError(f"--workdir={workdir}: holds no run ({error}).") from error
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise WorkdirError(
            f"{path}: damaged, not the JSON object that a run writes ({type(error).__name__}: "
            f"{error}). Put it back from a copy, or give another --workdir."
        ) from error
    current = without_retired(content)
    return current, digest if current == content else digest_of(current)


def read_log(path: epath.Path) -> list[dict]:
    """All rows of a log that a run may be writing right now: none if it is not there, a torn last
    line left out.

    Raises:
      WorkdirError: a line before the last one is not a row.
    """
    return [json.loads(line) for line in _whole_lines(path)] if path.exists() else []


def _whole_lines(path: epath.Path) -> list[bytes]:
    """The lines that are rows. Raises `WorkdirError`: one before the last is not."""
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            _step_of(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                return lines[:-1]
            raise WorkdirError(
                f"{path}, line {number}: damaged ({error}). Repair or delete this line, then resume."
            ) from error
    return lines


class StepLog:
    """JSON lines, one object a step: strict JSON, so a NaN or infinity is written as null.

    Writing raises `WorkdirError` where the file system refuses: full, read only, gone.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    def append(self, row: dict) -> None:
        """Writes one line; `row["step"]` is an int. Values: JSON types and numpy or jax scalars and
        arrays.
        """
        _step_of(row)
        if is_first():
            with written(self.path), open(self.path, "ab") as file:
                file.write(json_line(row))

    def read(self) -> list[dict]:
        """All rows; none if nothing was written yet. Call `cut_back` first, which repairs a torn
        last line.
        """
        return (
            [json.loads(line) for line in self.path.read_bytes().splitlines()]
            if self.path.exists()
            else []
        )

    def cut_back(self, step: int) -> int:
        """Keeps only the rows below `step`; returns how many lines were dropped.

        A last line that a killed process left unfinished is dropped too.

        Raises:
          WorkdirError: a line before the last one is not a row.
        """
        if not is_first() or not self.path.exists():
            return 0
        kept = [
            line + b"\n" for line in _whole_lines(self.path) if _step_of(json.loads(line)) < step
        ]
        dropped = len(self.path.read_bytes().splitlines()) - len(kept)
        with written(self.path), replacing(self.path) as file:
            file.writelines(kept)
        return dropped


def _step_of(row: Any) -> int:
    step = row.get("step") if isinstance(row, dict) else None
    if not isinstance(step, int):
        raise ValueError(f'{row!r}: a row is an object with an integer "step"')
    return step


def json_line(row: dict) -> bytes:
    # ASCII: some readers of lines split at U+2028 too, and a lone surrogate in a decoded text has
    # no UTF-8 form.
    return (json.dumps(_plain(row), allow_nan=False) + "\n").encode("ascii")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


@contextlib.contextmanager
def written(path: Path) -> Iterator[None]:
    """Says of an `OSError` inside what could not be written and what to look at."""
    try:
        yield
    except OSError as error:
        raise WorkdirError(
            f"{path}: cannot be written ({error.strerror}). Is the disk full or read only, was the directory removed "
            "or unmounted? Nothing is lost up to the last checkpoint: mend it, and give the same command again."
        ) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block ends; nothing changes when it raises."""
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
