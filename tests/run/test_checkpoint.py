"""Checkpoints: what is restored is bit for bit what was saved, or an error that says why not."""

import contextlib
import json
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from spiral_jax.run.checkpoint import CheckpointError, Checkpoints, Damaged, Retention
from spiral_jax.run.saver import Saver


def make_state(seed=0):
    rng = np.random.default_rng(seed)
    params = {
        "layers": {"q": {"a": jnp.asarray(rng.normal(size=(2, 8, 16)), jnp.float32)}},
        "head": jnp.asarray(rng.normal(size=(16, 8)), jnp.bfloat16),
        # Values that compare equal to zero, or to nothing, and still have their own bits.
        "odd": jnp.array([-0.0, 0.0, np.nan, np.inf, -np.inf, 1e-45], jnp.float32),
        "minus_zero": jnp.full((8,), -0.0),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    return {
        "params": params,
        "opt": optimizer.init(params),
        "step": jnp.int32(seed + 7),
        "done": jnp.array([True]),
    }


def same_bits(a, b):
    leaves_a, leaves_b = jax.tree.leaves(a), jax.tree.leaves(b)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype
        and x.shape == y.shape
        and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(leaves_a, leaves_b, strict=True)
    )


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def save(directory, *steps, keep=10, **record):
    with Checkpoints(directory, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {"cursor": 100 * step} | record)


def restore(directory, like, step=None):
    with Checkpoints(directory, None) as checkpoints:
        return checkpoints.restore(abstract(like), step)


def test_state_and_record_come_back_bit_for_bit(tmp_path):
    record = {"text": "é", "float": 0.1, "list": [1, None, True], "big": 2**60}
    save(tmp_path / "c", 3, 5, **record)
    for step in (3, 5):
        state, loop = restore(tmp_path / "c", make_state(), step)
        assert same_bits(state, make_state(step))
        assert loop == record | {"cursor": 100 * step}
    assert same_bits(restore(tmp_path / "c", make_state())[0], make_state(5))
    assert not same_bits(make_state(3), make_state(5))


def test_buffers_may_be_donated_as_soon_as_save_returns(tmp_path):
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = add(jnp.zeros((1 << 20,)))
    with Checkpoints(tmp_path / "c", 2) as checkpoints:
        checkpoints.save(1, {"x": x}, {})
        for _ in range(20):
            x = add(x)
        checkpoints.wait()
        restored, _ = checkpoints.restore({"x": x})
    np.testing.assert_array_equal(restored["x"], np.ones(1 << 20, np.float32))


def test_only_the_newest_are_kept(tmp_path):
    save(tmp_path / "c", 1, 2, 4, 7, keep=2)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["4", "7"]
    with Checkpoints(tmp_path / "c", None) as checkpoints:
        assert checkpoints.latest() == 7
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 2; it has \[4, 7\]"):
            checkpoints.restore(make_state(), 2)


def test_what_a_killed_process_left_is_ignored_and_removed_by_the_next_writer(tmp_path):
    save(tmp_path / "c", 2)
    leftovers = [
        tmp_path / "c" / name
        for name in ("9.orbax-checkpoint-tmp", "8.orbax-checkpoint-tmp-1700000000")
    ]
    for leftover in leftovers:
        shutil.copytree(tmp_path / "c" / "2", leftover)
    with Checkpoints(tmp_path / "c", None) as checkpoints:
        assert checkpoints.latest() == 2
        assert same_bits(checkpoints.restore(make_state())[0], make_state(2))
    assert all(leftover.exists() for leftover in leftovers)
    with Checkpoints(tmp_path / "c", 5) as checkpoints:
        checkpoints.save(9, make_state(9), {})
        checkpoints.wait()
        assert checkpoints.latest() == 9
        assert same_bits(checkpoints.restore(make_state())[0], make_state(9))
    assert not any(leftover.exists() for leftover in leftovers)


def test_one_changed_element_is_an_error_that_names_array_and_step(tmp_path):
    """The array files of another state, which orbax reads without complaint."""
    state = make_state()
    changed = state | {
        "params": state["params"] | {"head": state["params"]["head"].at[3, 2].add(0.5)}
    }
    for name, saved in (("c", state), ("other", changed)):
        with Checkpoints(tmp_path / name, 2) as checkpoints:
            checkpoints.save(4, saved, {})
    shutil.rmtree(tmp_path / "c" / "4" / "state")
    shutil.copytree(tmp_path / "other" / "4" / "state", tmp_path / "c" / "4" / "state")
    with pytest.raises(
        CheckpointError, match="step 4 is damaged.*checksum of params/head is not"
    ) as raised:
        restore(tmp_path / "c", state)
    assert "params/odd" not in str(raised.value)


def test_no_flipped_bit_in_any_file_restores_something_else(tmp_path):
    state = {
        "a": {"w": make_state()["params"]["layers"]["q"]["a"]},
        "b": jnp.arange(40, dtype=jnp.bfloat16),
    }
    with Checkpoints(tmp_path / "c", 2) as checkpoints:
        checkpoints.save(1, state, {"cursor": 12345})
    rng = np.random.default_rng(0)
    files = sorted(
        path.relative_to(tmp_path / "c") for path in (tmp_path / "c").rglob("*") if path.is_file()
    )
    outcomes = []
    for file in files:
        for _ in range(4):
            shutil.rmtree(tmp_path / "copy", ignore_errors=True)
            shutil.copytree(tmp_path / "c", tmp_path / "copy")
            content = bytearray((tmp_path / "copy" / file).read_bytes())
            bit = int(rng.integers(8 * len(content)))
            content[bit // 8] ^= 1 << bit % 8
            (tmp_path / "copy" / file).write_bytes(content)
            try:
                restored, record = restore(tmp_path / "copy", state)
            except CheckpointError as error:
                assert "step 1" in str(error) and str(tmp_path / "copy") in str(error)
                outcomes.append("error")
            else:
                assert same_bits(restored, state) and record == {"cursor": 12345}, (
                    f"{file}, bit {bit}"
                )
                outcomes.append("same")
    assert outcomes.count("error") >= 4 and outcomes.count("same") >= 4


def test_a_part_is_restored_alone_and_verified(tmp_path):
    part = {"params": {"layers": make_state(1)["params"]["layers"]}}
    save(tmp_path / "c", 1)

    def restored():
        with Checkpoints(tmp_path / "c", None) as checkpoints:
            return checkpoints.restore_part(abstract(part))

    assert same_bits(restored(), part)
    refused = 0
    for file in [path for path in (tmp_path / "c" / "1" / "state").rglob("*") if path.is_file()]:
        whole = file.read_bytes()
        content = bytearray(whole)
        content[len(content) // 2] ^= 16
        file.write_bytes(content)
        try:
            assert same_bits(restored(), part), file
        except CheckpointError:
            refused += 1
        file.write_bytes(whole)
    assert refused and same_bits(restored(), part)


def test_no_missing_file_restores_something_else(tmp_path):
    save(tmp_path / "c", 1)
    files = sorted(
        path.relative_to(tmp_path / "c") for path in (tmp_path / "c").rglob("*") if path.is_file()
    )
    errors = 0
    for file in files:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(tmp_path / "c", tmp_path / "copy")
        (tmp_path / "copy" / file).unlink()
        try:
            restored, record = restore(tmp_path / "copy", make_state())
        except CheckpointError:
            errors += 1
        else:
            assert same_bits(restored, make_state(1)) and record == {"cursor": 100}, file
    assert errors >= 2


def test_damage_advises_the_older_step(tmp_path):
    save(tmp_path / "c", 1, 2)
    record = tmp_path / "c" / "2" / "record" / "metadata"
    header = json.loads(record.read_text())
    header["record"]["cursor"] += 1
    record.write_text(json.dumps(header))
    with pytest.raises(
        CheckpointError,
        match="step 2 is damaged.*record has changed.*delete it to go on from step 1",
    ):
        restore(tmp_path / "c", make_state())
    assert restore(tmp_path / "c", make_state(), 1)[1] == {"cursor": 100}


def test_a_renamed_step_is_an_error(tmp_path):
    save(tmp_path / "c", 1)
    (tmp_path / "c" / "1").rename(tmp_path / "c" / "6")
    with pytest.raises(CheckpointError, match="step 6.*that of step 1"):
        restore(tmp_path / "c", make_state())


def test_another_structure_is_an_error_that_names_the_difference(tmp_path):
    save(tmp_path / "c", 1)
    other = make_state()
    other["params"]["extra"] = other["params"].pop("head")
    other["params"]["layers"]["q"]["a"] = jnp.zeros((2, 8, 4))
    other["step"] = jnp.float32(1)
    with pytest.raises(CheckpointError) as raised:
        restore(tmp_path / "c", other)
    for text in (
        "step 1",
        "lacks params/extra",
        "has params/head, for which",
        "params/layers/q/a is float32[2, 8, 16] there and float32[2, 8, 4] here",
        "step is int32[] there and float32[] here",
    ):
        assert text in str(raised.value)


def test_a_target_without_sharding_is_refused(tmp_path):
    save(tmp_path / "c", 1)
    with (
        Checkpoints(tmp_path / "c", None) as checkpoints,
        pytest.raises(ValueError, match="params/head: .*give this leaf a sharding"),
    ):
        state = make_state()
        state["params"]["head"] = jax.ShapeDtypeStruct((16, 8), jnp.bfloat16)
        checkpoints.restore(state)


def test_a_save_that_would_be_skipped_is_an_error(tmp_path):
    save(tmp_path / "c", 5)
    with Checkpoints(tmp_path / "c", 2) as checkpoints:
        for step in (5, 4):
            with pytest.raises(
                CheckpointError, match=f"step {step} was not saved: the newest step is 5"
            ):
                checkpoints.save(step, make_state(), {})
    with (
        Checkpoints(tmp_path / "c", None) as checkpoints,
        pytest.raises(CheckpointError, match="for reading only"),
    ):
        checkpoints.save(6, make_state(), {})
    assert same_bits(restore(tmp_path / "c", make_state())[0], make_state(5))


def test_directories_that_hold_nothing_or_cannot_be_used(tmp_path):
    with Checkpoints(tmp_path / "new", 2) as checkpoints:
        assert checkpoints.latest() is None
        with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
            checkpoints.restore(make_state())
    (tmp_path / "file").write_text("")
    for path, keep in (
        (tmp_path / "missing", None),
        (tmp_path / "file", None),
        (tmp_path / "file", 2),
    ):
        with pytest.raises(CheckpointError, match=f"{path}: the directory cannot be opened"):
            Checkpoints(path, keep)
    assert not (tmp_path / "missing").exists()


@contextlib.contextmanager
def full_disk(most_bytes):
    """A limit on the size of a file stands in for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def big(seed):
    return {"x": jnp.asarray(np.random.default_rng(seed).normal(size=(1 << 20,)), jnp.float32)}


def test_a_save_that_the_disk_refuses_is_reported_and_leaves_the_older_one(tmp_path):
    with Checkpoints(tmp_path / "c", 2) as checkpoints:
        checkpoints.save(1, make_state(1), {"cursor": 100})
        checkpoints.wait()
        with full_disk(1 << 20):
            checkpoints.save(2, big(0), {})
            with pytest.raises(CheckpointError, match="last save failed. Free space"):
                checkpoints.wait()
    assert same_bits(restore(tmp_path / "c", make_state())[0], make_state(1))


def test_a_run_goes_on_when_the_disk_is_full_and_saves_again_when_it_is_not(tmp_path, capsys):
    with Checkpoints(tmp_path / "c", 2) as checkpoints:
        saver = Saver(checkpoints, max_failures=3, wait_s=60)
        saver.save(1, big(1), {})
        assert saver.settle() and saver.failures == 0
        with full_disk(1 << 20):
            saver.save(2, big(2), {})
            saver.save(3, big(3), {})  # meets the failure of 2, and is tried all the same
            assert not saver.settle()
        assert saver.failures == 2 and checkpoints.latest() == 1
        # nothing takes the space of the next
        assert [path.name for path in (tmp_path / "c").iterdir()] == ["1"]
        saver.save(4, big(4), {})
        assert saver.settle() and saver.failures == 2 and checkpoints.latest() == 4
    assert same_bits(restore(tmp_path / "c", big(0))[0], big(4)) and same_bits(
        restore(tmp_path / "c", big(0), 1)[0], big(1)
    )
    out = capsys.readouterr().out
    assert out.count("warning: ") == 2 and "the newest checkpoint is that of step 1" in out


def test_failures_in_a_row_end_the_run_and_those_with_a_success_between_do_not(tmp_path):
    with Checkpoints(tmp_path / "c", 2) as checkpoints:
        saver = Saver(checkpoints, max_failures=2, wait_s=60)
        for step in (1, 3, 5):
            with full_disk(1 << 20):
                saver.save(step, big(step), {})
                assert not saver.settle()
            saver.save(step + 1, big(step), {})
            assert saver.settle()
        with (
            full_disk(1 << 20),
            pytest.raises(CheckpointError, match="save 2 in a row.*max_failures = 2"),
        ):
            saver.save(7, big(7), {})
            saver.save(8, big(8), {})
            saver.settle()
        assert checkpoints.latest() == 6


def truncate(folder):
    """Cuts the largest file of a checkpoint in half."""
    file = max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    with open(file, "r+b") as opened:
        opened.truncate(file.stat().st_size // 2)


def remove_a_file(folder):
    (folder / "record" / "metadata").unlink()


@pytest.mark.parametrize("damage", [truncate, remove_a_file])
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_is_used(
    damage, tmp_path, capsys
):
    save(tmp_path / "c", 1, 2, 3)
    damage(tmp_path / "c" / "3")
    for again in ("3", "3.2"):
        with Checkpoints(tmp_path / "c", 10) as checkpoints:
            state, record = checkpoints.restore_newest(abstract(make_state()))
            assert same_bits(state, make_state(2)) and record == {"cursor": 200}
            checkpoints.save(3, make_state(3), {"cursor": 300})  # the step may be done again
        assert (tmp_path / "c_damaged" / again).is_dir()
        assert f"Set aside: {tmp_path / 'c_damaged' / again}" in capsys.readouterr().out
        assert same_bits(restore(tmp_path / "c", make_state())[0], make_state(3))
        damage(tmp_path / "c" / "3")


def test_a_damaged_only_checkpoint_is_an_error_and_stays_where_it_is(tmp_path):
    save(tmp_path / "c", 1)
    truncate(tmp_path / "c" / "1")
    with Checkpoints(tmp_path / "c", 10) as checkpoints:
        with pytest.raises(Damaged, match="step 1 is damaged.*there is no older one"):
            checkpoints.restore_newest(abstract(make_state()))
        assert checkpoints.latest() == 1 and not (tmp_path / "c_damaged").exists()


def test_of_checkpoints_that_are_all_damaged_none_is_set_aside(tmp_path):
    save(tmp_path / "c", 1, 2)
    truncate(tmp_path / "c" / "1")
    remove_a_file(tmp_path / "c" / "2")
    with Checkpoints(tmp_path / "c", 10) as checkpoints:
        with pytest.raises(Damaged, match="step 2: its record.*step 1: its state"):
            checkpoints.restore_newest(abstract(make_state()))
        assert checkpoints.latest() == 2 and not (tmp_path / "c_damaged").exists()


def test_a_checkpoint_of_another_model_is_never_set_aside(tmp_path):
    save(tmp_path / "c", 1, 2)
    with Checkpoints(tmp_path / "c", 10) as checkpoints:
        with pytest.raises(CheckpointError, match="not one of this model"):
            checkpoints.restore_newest({"x": jnp.zeros(3)})
        assert checkpoints.latest() == 2 and not (tmp_path / "c_damaged").exists()


def test_the_newest_every_nth_and_the_best_are_kept(tmp_path):
    scores = {}
    with Checkpoints(tmp_path / "c", Retention(2, every=4, scores=lambda: scores)) as checkpoints:
        for step in range(1, 11):
            checkpoints.save(step, {"x": jnp.zeros(3)}, {})
            checkpoints.wait()
            scores[step] = {3: 0.9, 7: 0.9}.get(step, 0.1)  # of two equal ones the later
    assert sorted(int(path.name) for path in (tmp_path / "c").iterdir()) == [4, 7, 8, 9, 10]


@pytest.mark.devices8
def test_restoring_onto_other_meshes_changes_no_bit(tmp_path):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8")
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    flat = jax.make_mesh((8, 1, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    cut = NamedSharding(mesh, P("fsdp", "tensor"))
    whole = NamedSharding(mesh, P())
    host = {"w": np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32), "n": np.int32(3)}
    targets = {
        "cut": {"w": cut, "n": whole},
        "flat": {"w": NamedSharding(flat, P(None, "data")), "n": NamedSharding(flat, P())},
        "one": dict.fromkeys(host, SingleDeviceSharding(jax.devices()[5])),
    }
    headers = []
    for name, shardings in targets.items():
        with Checkpoints(tmp_path / name, 2) as checkpoints:
            checkpoints.save(1, jax.device_put(host, shardings), {})
            checkpoints.wait()
            for wanted in targets.values():
                target = {
                    k: jax.ShapeDtypeStruct(host[k].shape, host[k].dtype, sharding=wanted[k])
                    for k in host
                }
                restored, _ = checkpoints.restore(target)
                assert same_bits(restored, host)
                assert all(restored[k].sharding == wanted[k] for k in host)
        headers.append(json.loads((tmp_path / name / "1" / "record" / "metadata").read_text()))
    assert headers[0] == headers[1] == headers[2]
