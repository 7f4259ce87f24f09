"""Checkpoints: (trained state, loop record) -> files -> the same state, on this mesh or another.

A thin layer over orbax's `CheckpointManager`, which writes in the background, commits by renaming
and deletes old ones. What it adds is a checksum for every array (`saved_arrays`). A damaged
checkpoint is set aside, never deleted, and what the machine refuses (`refusals`) is no damage; a
save that fails costs a checkpoint, not the run (`saver`).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from spiral_jax.core import faults
from spiral_jax.core.errors import UserError
from spiral_jax.core.mesh import path_name
from spiral_jax.run import orbax_noise, stacked_checkpoints
from spiral_jax.run.refusals import refusal
from spiral_jax.run.retention import Retention, manager_options
from spiral_jax.run.saved_arrays import (
    changed_arrays,
    describe,
    differences,
    few,
    header_crc32,
    named_leaves,
)


class CheckpointError(UserError):
    """A checkpoint that cannot be written or read; names the directory, the step and what to do."""


class Damaged(CheckpointError):
    """A checkpoint whose files are not what was written; `what` is the damage in short."""

    def __init__(self, message: str, what: str):
        super().__init__(message)
        self.what = what


class Checkpoints:
    """The checkpoints of one run, one directory a step.

    Every process of a multi-host run opens the same directory and makes the same calls. What a
    killed process left half written is never listed, and is deleted when the directory is next
    opened for writing.
    """

    def __init__(self, directory: str | os.PathLike, keep: int | Retention | None):
        """Opens `directory` for writing (it is created), or for reading only.

        Args:
          directory: local path, or an object-store address that orbax knows.
          keep: which checkpoints are kept; a number: so many newest ones. None: read only; nothing
            is ever created or deleted.

        Raises:
          CheckpointError: the directory cannot be created or read, or it is missing and `keep` is
          None.
        """
        orbax_noise.silence()
        name = os.fspath(directory)
        self._local = "://" not in name
        self.directory = os.path.abspath(name) if self._local else name
        with self._reported(
            "the directory cannot be opened. Is it there, is it a directory, may it be written?"
        ):
            if self._local:  # orbax notices only at the first save, after a timeout
                _check_directory(self.directory, writing=keep is not None)
            self._manager = ocp.CheckpointManager(
                self.directory, options=manager_options(keep), handler_registry=_handlers()
            )

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return max(self._manager.all_steps(), default=None)

    def has(self, step: int) -> bool:
        """Whether there is a checkpoint of `step`, one that is being written included."""
        return step in self._manager.all_steps()

    def save(self, step: int, state: Any, record: dict) -> None:
        """Starts saving; returns once `state` has been copied, so that its buffers may be donated.

        Args:
          step: steps done; above every saved one.
          state: pytree of jax arrays (no typed keys, none of size zero), sharded in any way.
          record: JSON types; what else a resumed loop needs.

        Raises:
          CheckpointError: `step` is not above `latest()`, the directory is read only, or this save
            or the one before it failed. The checkpoints that were complete still are, and the next
            save is tried as any other.
        """
        header = {
            "step": step,
            "record": json.loads(json.dumps(record, allow_nan=False)),
            "arrays": describe(state),
        }
        header["crc32"] = header_crc32(header)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(header)
        )
        failed = f"step {step} or the one saved before it could not be written."
        with self._cleaned(), self._reported(f"{failed} Free space? Permissions?"):
            saved = self._manager.save(step, args=args)
        faults.passed("checkpoint")
        if not saved:
            raise CheckpointError(
                f"{self.directory}: step {step} was not saved: the newest step is {self.latest()} "
                "and steps must ascend, or the directory was opened with keep=None, for reading "
                "only."
            )

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict]:
        """Reads a checkpoint and verifies every array.

        Args:
          abstract_state: pytree of `jax.ShapeDtypeStruct` with `sharding`, or of arrays: what to
            restore and where. The shardings need not be those of the saved state, nor the devices.
          step: None: the newest.

        Returns:
          (state with the structure, dtypes, shapes and shardings of `abstract_state`, the record
          that was saved).

        Raises:
          CheckpointError: no such checkpoint, or no longer; other arrays, shapes or dtypes than
            were saved; damaged files (`Damaged`); the machine has refused something.
          ValueError: a leaf of `abstract_state` has no sharding.
        """
        target = jax.tree_util.tree_map_with_path(_target, abstract_state)
        step = self.existing(step)

        def read(header: dict, target: Any) -> Any:
            self._check_structure(step, header["arrays"], target)
            return self._read(step, "state", ocp.args.StandardRestore(target))

        return self._read_and_verify(step, target, read)

    def restore_newest(self, abstract_state: Any) -> tuple[Any, dict]:
        """As `restore` of the newest checkpoint that is whole.

        Once it has been read, the damaged ones after it are moved to `DIRECTORY_damaged/STEP` (one
        line says so on the terminal), and the run goes on from it.

        Raises:
          CheckpointError: as `restore`, and nothing is moved; of damage only where no checkpoint is
            whole, or in an object store, which cannot rename.
        """
        self.existing(None)
        damage: dict[int, str] = {}  # in words: an error would hold the arrays that were read
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                restored = self.restore(abstract_state, step)
            except Damaged as error:
                if not self._local:
                    raise
                damage[step] = error.what
                continue
            for other, what in damage.items():
                print(
                    f"{self._damaged(other, what)}\nSet aside: {self._set_aside(other)}. The run "
                    f"goes on from step {step}.",
                    flush=True,
                )
            return restored
        raise self._all_damaged(damage)

    def _set_aside(self, step: int) -> str:
        """Moves the checkpoint of `step` out of the way; returns where to."""
        target = f"{self.directory}_damaged/{step}"
        if jax.process_index() == 0:
            number = 1
            while os.path.exists(target):
                number += 1
                target = f"{self.directory}_damaged/{step}.{number}"
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.rename(f"{self.directory}/{step}", target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"checkpoint {step} is set aside")
        self._manager.reload()
        return target

    def restore_part(self, abstract_part: Any, step: int | None = None) -> Any:
        """Reads some arrays of a checkpoint, such as its weights alone, and verifies them.

        Args:
          abstract_part: the saved pytree, as dicts, without what is not wanted: `{"trained": ...}`.
            Leaves as in `restore`.
          step: None: the newest.

        Raises:
          CheckpointError: as in `restore`, except that arrays of which `abstract_part` says nothing
            are not read.
        """
        target = jax.tree_util.tree_map_with_path(_target, abstract_part)
        step = self.existing(step)

        def read(header: dict, target: Any) -> Any:
            wanted = dict(named_leaves(target))
            saved = {name: a for name, a in header["arrays"].items() if name in wanted}
            self._check_structure(step, saved, target)
            where = ocp.checkpoint_utils.construct_restore_args(target)
            part = ocp.args.PyTreeRestore(target, restore_args=where, partial_restore=True)
            return self._read(step, "state", part)

        return self._read_and_verify(step, target, read)[0]

    def _read_and_verify(
        self, step: int, target: Any, read: Callable[[dict, Any], Any]
    ) -> tuple[Any, dict]:
        """(arrays of `target`, record), also of a checkpoint with all layers in one stack."""
        with self._not_taken_for_damage(step):
            header = self._read_header(step)
            saved = header["arrays"]
            stacked = stacked_checkpoints.is_stacked(saved, dict(named_leaves(target)))
            state = read(header, stacked_checkpoints.stack(target, saved) if stacked else target)
            changed = changed_arrays(state, saved)
            if changed:
                raise self._damaged(
                    step, f"the checksum of {few(changed)} is not the one that was saved"
                )
            state = stacked_checkpoints.split(state, target) if stacked else state
            return state, header["record"]

    @contextlib.contextmanager
    def _not_taken_for_damage(self, step: int) -> Iterator[None]:
        """Says what the machine has refused, or that the checkpoint is gone, where that is so."""
        try:
            yield
        except Exception as error:
            refused = refusal(error)
            if refused is not None:
                raise CheckpointError(
                    f"{self.directory}: the checkpoint of step {step} was not read: the machine "
                    f"refused it ({orbax_noise.in_short(refused)}). It may be whole, and stays "
                    "where it is. Look at memory, open files (ulimit -n), permissions, disk and "
                    "mounts; then give the same command again."
                ) from error
            if isinstance(error, Damaged):
                self._check_there(step)
            raise

    def _check_there(self, step: int) -> None:
        with self._reported("its checkpoints cannot be listed."):
            self._manager.reload()
        steps = sorted(self._manager.all_steps())
        if step not in steps:
            raise CheckpointError(
                f"{self.directory}: the checkpoint of step {step} is no longer there: its run has "
                f"deleted it (checkpoint.keep). There are {steps}; give the command again with one "
                "of them."
            )

    def arrays(self, step: int) -> dict[str, dict]:
        """`saved_arrays.describe` of a checkpoint's arrays, none of which is read.

        Raises:
          CheckpointError: no such checkpoint, or a damaged one.
        """
        return self._read_header(self.existing(step))["arrays"]

    def wait(self) -> None:
        """Returns when everything saved is on disk. Raises `CheckpointError` when a save failed."""
        with self._cleaned(), self._reported("the last save failed. Free space? Permissions?"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then releases the threads. Raises `CheckpointError` when a save failed."""
        with self._reported("the last save failed. Free space? Permissions?"):
            self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: Any) -> None:
        # After an error the other processes do not come to end a save together.
        if error_type is None or jax.process_count() == 1:
            self.close()

    @contextlib.contextmanager
    def _cleaned(self) -> Iterator[None]:
        """Removes what a failed save has left: a full disk needs its space for the next one."""
        try:
            yield
        except CheckpointError:
            self._manager.reload()
            if self._local and jax.process_index() == 0:
                for entry in os.scandir(self.directory):
                    if ".orbax-checkpoint-tmp" in entry.name:
                        shutil.rmtree(entry.path, ignore_errors=True)
            raise

    @contextlib.contextmanager
    def _reported(self, what: str) -> Iterator[None]:
        # Any exception: orbax, tensorstore and the file system each raise their own.
        try:
            yield
        except Exception as error:
            raise CheckpointError(
                f"{self.directory}: {what} ({orbax_noise.in_short(error)})"
            ) from error

    def existing(self, step: int | None) -> int:
        """`step` if there is a checkpoint of it, for None the newest.

        Raises:
          CheckpointError: there is none.
        """
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise CheckpointError(
                f"{self.directory} holds no complete checkpoint. Is it the run's directory?"
            )
        if step is not None and step not in steps:
            raise CheckpointError(
                f"{self.directory} holds no checkpoint of step {step}; it has {steps}."
            )
        return steps[-1] if step is None else step

    def _read(self, step: int, item: str, args: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]
        except Exception as error:  # damaged files end in every kind of exception
            raise self._damaged(
                step, f"its {item} cannot be read ({orbax_noise.in_short(error)})"
            ) from error

    def _read_header(self, step: int) -> dict:
        header = self._read(step, "record", ocp.args.JsonRestore())
        if not isinstance(header, dict) or header.get("crc32") != header_crc32(header):
            raise self._damaged(step, "its record has changed since it was saved")
        if header["step"] != step:
            raise self._damaged(
                step, f"its record is that of step {header['step']}: the directory was renamed"
            )
        return header

    def _check_structure(self, step: int, saved: dict[str, dict], target: Any) -> None:
        other = differences(saved, dict(named_leaves(target)))
        if other:
            raise CheckpointError(
                f"{self.directory}: the checkpoint of step {step} is not one of this model and "
                f"optimizer: {'; '.join(other)}. Use the configuration it was written with."
            )

    def _damaged(self, step: int, what: str) -> Damaged:
        older = [s for s in self._manager.all_steps() if s < step]
        go_on = f"go on from step {max(older)}" if older else "start again: there is no older one"
        return Damaged(
            f"{self.directory}: the checkpoint of step {step} is damaged or unreadable: {what}. "
            f"Put {self.directory}/{step} back from a copy, or delete it to {go_on}.",
            what,
        )

    def _all_damaged(self, damage: dict[int, str]) -> Damaged:
        if len(damage) == 1:
            return self._damaged(*damage.popitem())
        stated = "; ".join(f"step {step}: {what}" for step, what in damage.items())
        return Damaged(
            f"{self.directory}: no checkpoint is whole, so none is set aside. {stated}. Put one "
            "back from a copy, or start again in another directory.",
            stated,
        )


def _handlers() -> ocp.handlers.DefaultCheckpointHandlerRegistry:
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add("state", ocp.args.StandardSave)
    registry.add("state", ocp.args.StandardRestore)
    registry.add("state", ocp.args.PyTreeRestore)  # the one that can restore a part
    registry.add("record", ocp.args.JsonSave)
    registry.add("record", ocp.args.JsonRestore)
    return registry


def _check_directory(path: str, writing: bool) -> None:
    if writing:
        os.makedirs(path, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError("may not be written")
    os.listdir(path)


def _target(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
    if leaf.sharding is None:
        raise ValueError(
            f"{path_name(path)}: abstract_state must say where to restore to: give this leaf a "
            "sharding."
        )
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
