"""The run's directory: rows of plain numbers and text -> files that survive a kill and a resume.

    WORKDIR/lock.json                      while a process is at work there, see `lock`
    WORKDIR/config.json                    the configuration and `config_digest`
    WORKDIR/starts.jsonl                   one JSON object each time the run starts or resumes
    WORKDIR/metrics.jsonl                  one JSON object a step
    WORKDIR/evaluations.jsonl              one JSON object an evaluation
    WORKDIR/evaluations/                   a results.json of each
    WORKDIR/traces/                        see `trace_log`
    WORKDIR/checkpoints/                   see `checkpoint`

Row `step` = s belongs to the step that starts with s steps done, so a resume from the checkpoint of
step s first calls `cut_back(s)` on both logs. In a run of several processes only process 0 touches
the directory: what writes does nothing on the others, and what is read goes to them through
`distributed.from_first`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from etils import epath

from spiral_jax.core.config import as_current, compared, difference, digest_of
from spiral_jax.core.distributed import is_first
from spiral_jax.core.errors import UserError
from spiral_jax.run import lock

_CONFIG = "config.json"
_CHECKPOINTS = "checkpoints"


class WorkdirError(UserError):
    """A directory or a log in it that this run cannot use; names the path and what to do."""


@dataclasses.dataclass
class Workdir:
    """The directory of a run that is being started, or goes on.

    Attributes:
      begun: whether it has a config.json.
    """

    path: Path
    _config: dict | None  # what `begin` writes; None: nothing
    begun: bool

    def begin(self) -> None:
        """Writes config.json, or the one that may replace it: from here on this is a run."""
        if self._config is not None and is_first():
            with writing(self.path), replacing(self.path / _CONFIG) as file:
                file.write((json.dumps(self._config, indent=2, allow_nan=False) + "\n").encode())
        self._config, self.begun = None, True


@contextlib.contextmanager
def occupy_workdir(
    path: str | os.PathLike, config_plain: dict, digest: str, allow: Sequence[str] = ()
) -> Iterator[Workdir]:
    """Holds the directory of the run with this configuration, against all other runs.

    A collective where there are several processes. A start that fails before `Workdir.begin` leaves
    the directory as it was.

    Args:
      path: a directory that is missing, empty, or that of a run with the same configuration.
      config_plain: `config.to_plain(c)`.
      digest: `config.digest(c)`.
      allow: fields (`section.name`) and sections that may differ from the run's; they are printed,
        and config.json becomes the new one.

    Raises:
      LockError: another run is at work there.
      WorkdirError: `path` holds a run with another configuration (the message lists every field
        that differs) or other files, its config.json is damaged, or it is not a directory that can
        be written.
    """
    workdir = _mounted(path)
    is_new = not workdir.exists()
    with contextlib.ExitStack() as stack:
        with _usable(workdir):
            if is_first():
                workdir.mkdir(parents=True, exist_ok=True)
            if is_new:
                stack.callback(_remove_if_empty, workdir)
            stack.enter_context(lock.hold(workdir))
            held = Workdir(workdir, None, begun=True)
            if is_first():
                held = _check(workdir, config_plain, digest, allow)
        try:
            yield held
        finally:
            if not held.begun:
                _remove_if_empty(workdir / _CHECKPOINTS)


def open_workdir(path: str | os.PathLike, config_plain: dict, digest: str) -> Path:
    """Makes `path` the directory of what this configuration asks for, or returns to it.

    Against nobody, and at once: `occupy_workdir` for what has a lock of its own.

    Raises:
      WorkdirError: see `occupy_workdir`.
    """
    workdir = _mounted(path)
    with _usable(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        held = _check(workdir, config_plain, digest, allow=())
    held.begin()
    return workdir


def _mounted(path: str | os.PathLike) -> Path:
    if "://" in os.fspath(path):
        raise WorkdirError(
            f"--workdir={os.fspath(path)}: logs are appended to and replaced in place, which "
            "object stores cannot do. Give a path of a mounted file system."
        )
    return Path(path).absolute()


@contextlib.contextmanager
def _usable(workdir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WorkdirError(
            f"--workdir={workdir}: not a directory that can be written ({error}). Give another "
            "--workdir."
        ) from error


def _check(workdir: Path, config_plain: dict, digest: str, allow: Sequence[str]) -> Workdir:
    """What may be begun or gone on with in `workdir`; nothing is written."""
    entries = {entry.name for entry in workdir.iterdir()}
    if _CONFIG in entries:
        changed = _check_config(workdir, config_plain, digest, allow)
        config = {**config_plain, "config_digest": digest} if changed else None
        return Workdir(workdir, config, begun=True)
    entries -= {lock.FILE, _temporary(workdir / _CONFIG).name}  # of a start that was killed
    if not _files_below(workdir / _CHECKPOINTS):
        entries.discard(_CHECKPOINTS)
    if entries:
        names = sorted(entries)
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise WorkdirError(
            f"--workdir={workdir}: holds no run (no {_CONFIG}) but is not empty: "
            f"{', '.join(names[:5])}{more}. Give a new or an empty one."
        )
    return Workdir(workdir, {**config_plain, "config_digest": digest}, begun=False)


def _files_below(directory: Path) -> bool:
    return any(not path.is_dir() for path in directory.rglob("*"))


def _remove_if_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):
        directory.rmdir()


def _check_config(workdir: Path, config_plain: dict, digest: str, allow: Sequence[str]) -> bool:
    """Compares the configuration with the run's; returns whether it differs where it may."""
    held_config, held_digest = read_config(workdir)
    changed = difference(compared(held_config), compared(config_plain))
    refused = [line for line in changed if not _may_change(line.partition(": ")[0], allow)]
    if not changed and held_digest != digest:
        # Such as 1 and 1.0, equal in Python but not in a digest.
        refused = [f"config_digest: {held_digest!r} -> {digest!r}"]
    if refused:
        raise WorkdirError(
            f"--workdir={workdir}: holds a run with another config (there -> here):\n  "
            + "\n  ".join(refused)
            + "\nGive another --workdir, or the values that the run was started with, or name the "
            "fields that may change in --config.resume.allow."
        )
    if changed:
        announced = f"--workdir={workdir}: resumed with another config (there -> here):"
        print(announced, *changed, sep="\n  ", flush=True)
    return bool(changed)


def _may_change(field: str, allow: Sequence[str]) -> bool:
    return any(field == name or field.startswith(f"{name}.") for name in allow)


def read_config(workdir: str | os.PathLike) -> tuple[dict, str]:
    """(plain configuration, its digest) of the run in `workdir`.

    What an earlier version wrote is returned as this one would have written it.

    Args:
      workdir: may be an address that etils' epath knows (gs://, s3://), as for the other functions
        that only read.

    Raises:
      WorkdirError: there is none, or it is damaged.
      ConfigError: a run of an earlier version with a setting that this one no longer has.
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
    current = as_current(content)
    return current, digest if current == content else digest_of(current)


def read_log(path: epath.Path) -> list[dict]:
    """All rows of a log that a run may be writing right now, without a torn last line.

    None if it is not there.

    Raises:
      WorkdirError: a line before the last one is not a row.
    """
    return [json.loads(line) for line in _complete_lines(path)] if path.exists() else []


def _complete_lines(path: epath.Path) -> list[bytes]:
    """The lines that are rows. Raises `WorkdirError`: one before the last is not."""
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            _step_of(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                return lines[:-1]
            raise WorkdirError(
                f"{path}, line {number}: damaged ({error}). Repair or delete this line, then "
                "resume."
            ) from error
    return lines


class StepLog:
    """JSON lines, one object a step: strict JSON, so a NaN or infinity is written as null.

    Writing raises `WorkdirError` where the file system refuses: full, read only, gone.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    def append(self, row: dict) -> None:
        """Writes one line.

        Args:
          row: JSON types and numpy or jax scalars and arrays; `row["step"]` is an int.
        """
        _step_of(row)
        if is_first():
            with writing(self.path), open(self.path, "ab") as file:
                file.write(json_line(row))

    def read(self) -> list[dict]:
        """All rows, none before the first. Call `cut_back` first, which mends a torn line."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_bytes().splitlines()]

    def cut_back(self, step: int) -> int:
        """Keeps only the rows below `step`; returns how many lines were dropped.

        A last line that a killed process left unfinished is dropped too.

        Raises:
          WorkdirError: a line before the last one is not a row.
        """
        if not is_first() or not self.path.exists():
            return 0
        rows = _complete_lines(self.path)
        kept = [line + b"\n" for line in rows if _step_of(json.loads(line)) < step]
        dropped = len(self.path.read_bytes().splitlines()) - len(kept)
        with writing(self.path), replacing(self.path) as file:
            file.writelines(kept)
        return dropped


def _step_of(row: Any) -> int:
    """Raises `ValueError`: this is no row."""
    step = row.get("step") if isinstance(row, dict) else None
    if not isinstance(step, int):
        raise ValueError(f'{row!r}: a row is an object with an integer "step"')
    return step


def json_line(row: dict) -> bytes:
    """A row as a line of strict JSON."""
    # ASCII: some readers of lines split at U+2028 too, and a lone surrogate in a decoded text has
    # no UTF-8 form.
    return (json.dumps(_plain(row), allow_nan=False) + "\n").encode("ascii")


def _plain(value: Any) -> Any:
    """The same in JSON types."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy, jax
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says of an `OSError` inside what could not be written and what to look at."""
    try:
        yield
    except OSError as error:
        raise WorkdirError(
            f"{path}: cannot be written ({error.strerror}). Is the disk full or read only, was the "
            "directory removed or unmounted? Nothing is lost up to the last checkpoint: mend it, "
            "and give the same command again."
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


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")
