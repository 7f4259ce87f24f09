"""Checkpoints that cannot be read though nothing is wrong with them: they stay where they are."""

import errno
import os

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from spiral_jax.run.checkpoint import CheckpointError, Checkpoints, Damaged

REFUSALS = {
    "device memory": jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: 8589934592"),
    "memory": MemoryError("Unable to allocate 8 GiB"),
    "open files": OSError(errno.EMFILE, "Too many open files"),
    "disk": OSError(errno.EIO, "Input/output error"),
    "mount": OSError(errno.ESTALE, "Stale file handle"),
    "rights": PermissionError(errno.EACCES, "Permission denied"),
    # TensorStore's, which has no errno
    "TensorStore": ValueError("RESOURCE_EXHAUSTED: Too many open files [os_error_code='24']"),
}


def state_of(step):
    return {"a": jnp.arange(100.0) + step, "b": {"c": jnp.full((30, 30), step)}}


@pytest.fixture
def three(tmp_path):
    """A directory with checkpoints of steps 1, 2 and 3."""
    with Checkpoints(tmp_path / "c", 3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state_of(step), {"step": step})
    return tmp_path / "c"


def restored_step(directory):
    with Checkpoints(directory, 3) as checkpoints:
        state, record = checkpoints.restore_newest(state_of(0))
    jax.tree.map(np.testing.assert_array_equal, state, state_of(record["step"]))
    return record["step"]


def steps_in(directory):
    return sorted(int(path.name) for path in directory.iterdir())


def refuse(monkeypatch, error, steps):
    """From now on the arrays of these steps cannot be read."""
    read = ocp.CheckpointManager.restore

    def refusing(manager, step, args):
        if step in steps and "state" in args.keys():  # noqa: SIM118 - orbax's own kind of mapping
            raise RuntimeError("orbax cannot go on") from error
        return read(manager, step, args=args)

    monkeypatch.setattr(ocp.CheckpointManager, "restore", refusing)


@pytest.mark.parametrize("name", REFUSALS)
def test_what_the_machine_refuses_ends_the_start_and_no_checkpoint_is_set_aside(
    name, three, monkeypatch
):
    with monkeypatch.context() as patched:
        refuse(patched, REFUSALS[name], steps=(2, 3))
        with pytest.raises(CheckpointError) as raised:
            restored_step(three)
    assert not isinstance(raised.value, Damaged)
    for part in (str(three), "step 3", type(REFUSALS[name]).__name__):
        assert part in str(raised.value)
    assert steps_in(three) == [1, 2, 3] and not (three.parent / "c_damaged").exists()
    assert restored_step(three) == 3


def test_a_damaged_checkpoint_stays_until_an_older_one_has_been_read(three, monkeypatch):
    (three / "3" / "record" / "metadata").unlink()
    with monkeypatch.context() as patched:
        refuse(patched, REFUSALS["disk"], steps=(2,))
        with pytest.raises(CheckpointError, match="step 2.*Input/output error"):
            restored_step(three)
    assert steps_in(three) == [1, 2, 3]
    assert restored_step(three) == 2
    assert steps_in(three) == [1, 2] and os.listdir(three.parent / "c_damaged") == ["3"]


def test_a_reader_is_told_that_the_run_has_deleted_a_checkpoint_meanwhile(tmp_path):
    with Checkpoints(tmp_path / "c", 2) as written:
        written.save(1, state_of(1), {})
        written.wait()
        with Checkpoints(tmp_path / "c", None) as read:
            step = read.existing(None)
            for later in (2, 3):
                written.save(later, state_of(later), {})
                written.wait()
            with pytest.raises(CheckpointError, match=r"step 1 is no longer.*\[2, 3\]") as raised:
                read.restore_part({"a": state_of(0)["a"]}, step)
    assert not isinstance(raised.value, Damaged) and "checkpoint.keep" in str(raised.value)
