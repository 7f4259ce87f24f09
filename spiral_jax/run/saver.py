"""Saves of a run: one that fails costs a checkpoint, not the run."""

from __future__ import annotations

from typing import Any

from spiral_jax.run.checkpoint import CheckpointError, Checkpoints
from spiral_jax.run.watchdog import deadline


class Saver:
    """Saves to `checkpoints`, reports what fails, and gives up after so many failures in a row.

    Args:
      max_failures: of saves in a row, >= 1.
      wait_s: seconds that one save may make the run wait, the end of the one before included.

    Attributes:
      failures: saves that failed since this process started: the metric `checkpoint/failed_saves`.
    """

    def __init__(self, checkpoints: Checkpoints, max_failures: int, wait_s: float):
        self._checkpoints, self._max_failures, self._wait_s = checkpoints, max_failures, wait_s
        self.failures = self._in_a_row = 0
        self._pending = False  # whether a save goes on in the background

    def save(self, step: int, state: Any, record: dict) -> None:
        """Starts saving, as `Checkpoints.save`; the save before it has ended then, well or not.

        Raises:
          CheckpointError: `max_failures` saves in a row have failed.
        """
        self.settle()
        try:
            with deadline(f"the checkpoint of step {step} to be written", self._wait_s):
                self._checkpoints.save(step, state, record)
            self._pending = True
        except CheckpointError as error:
            self._failed(error)

    def save_if_missing(self, step: int, state: Any, record: dict) -> None:
        """The same, unless there is a checkpoint of `step`."""
        if not self._checkpoints.has(step):
            self.save(step, state, record)

    def settle(self) -> bool:
        """Waits for the save in the background; returns whether the last one is complete on disk.

        Raises:
          CheckpointError: `max_failures` saves in a row have failed.
        """
        if not self._pending:
            return not self._in_a_row
        self._pending = False
        try:
            with deadline("the last checkpoint to be written", self._wait_s):
                self._checkpoints.wait()
            self._in_a_row = 0
        except CheckpointError as error:
            self._failed(error)
        return not self._in_a_row

    def _failed(self, error: CheckpointError) -> None:
        self.failures += 1
        self._in_a_row += 1
        if self._in_a_row >= self._max_failures:
            raise CheckpointError(
                f"{error} This was save {self._in_a_row} in a row that failed; "
                f"config.checkpoint.max_failures = {self._max_failures}. Make room, then give the "
                "same command again."
            ) from error
        kept = self._checkpoints.latest()
        print(
            f"warning: {error}\nThe run goes on; the newest checkpoint is that of step {kept}.",
            flush=True,
        )
