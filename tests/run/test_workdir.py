"""The run's directory: what is refused, what a resume keeps, and which bytes are written."""

import json
import math
import os
import pathlib
import resource
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spiral_jax.core import config
from spiral_jax.run.lock import FILE as LOCK
from spiral_jax.run.trace_log import TraceLog
from spiral_jax.run.workdir import StepLog, WorkdirError, occupy_workdir, read_config


def settings(**changes):
    c = config.defaults()
    c.update_from_flattened_dict(changes)
    return config.to_plain(c), config.digest(c)


def open_workdir(path, plain, digest, allow=()):
    """A start that succeeds."""
    with occupy_workdir(path, plain, digest, allow) as workdir:
        workdir.begin()
    return workdir.path


def test_a_new_directory_holds_the_config_and_is_opened_again_by_the_same_one(tmp_path):
    plain, digest = settings()
    workdir = open_workdir(tmp_path / "a" / "b", plain, digest)
    assert workdir == tmp_path / "a" / "b"
    assert [path.name for path in workdir.iterdir()] == ["config.json"]
    before = (workdir / "config.json").read_bytes()
    (workdir / "metrics.jsonl").write_text("")
    assert open_workdir(str(workdir), plain, digest) == workdir
    assert (workdir / "config.json").read_bytes() == before
    assert read_config(workdir) == (plain, digest)
    content = json.loads(before)
    assert content["search"]["traces"] == 8 and content["config_digest"] == digest


def test_an_empty_directory_and_one_whose_first_start_was_killed_are_used(tmp_path):
    (tmp_path / ".config.json.tmp").write_text('{"seed"')
    open_workdir(tmp_path, *settings())
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_another_config_is_refused_with_every_field_and_both_values(tmp_path):
    open_workdir(tmp_path, *settings())
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(WorkdirError, match="holds a run with another config") as raised:
        open_workdir(tmp_path, *settings(**{"optimizer.lr": 0.125, "loss.estimator": "grpo"}))
    message = str(raised.value)
    for text in (
        str(tmp_path),
        "optimizer.lr: 2e-05 -> 0.125",
        "loss.estimator: 'marginal_mean' -> 'grpo'",
        "another --workdir",
    ):
        assert text in message
    assert "seed" not in message  # nor anything else that is the same
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_start_that_fails_leaves_nothing_and_another_config_may_follow(tmp_path):
    for workdir in (tmp_path / "new", tmp_path):
        with pytest.raises(KeyError), occupy_workdir(workdir, *settings()) as opened:
            assert (workdir / LOCK).exists() and not opened.begun
            (workdir / "checkpoints").mkdir()
            raise KeyError("no weights there")
        assert list(tmp_path.iterdir()) == []
    open_workdir(tmp_path, *settings(seed=3))
    with pytest.raises(KeyError), occupy_workdir(tmp_path, *settings(seed=3)):
        raise KeyError
    assert read_config(tmp_path)[0]["seed"] == 3


def test_a_start_that_was_killed_before_it_began_is_in_nobodys_way(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / LOCK).write_text(json.dumps({"pid": 2**22 + 1, "host": "x", "machine": "y"}))
    os.utime(tmp_path / LOCK, (0, 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spiral_jax.run.lock.socket.gethostname", lambda: "x")
        patch.setattr("spiral_jax.run.lock._machine", lambda: "y")
        open_workdir(tmp_path, *settings())
    (tmp_path / "config.json").unlink()
    (tmp_path / "checkpoints" / "4").mkdir()
    (tmp_path / "checkpoints" / "4" / "array").write_text("a run's, whose config.json is lost")
    with pytest.raises(WorkdirError, match="not empty: checkpoints"):
        open_workdir(tmp_path, *settings())


def test_a_changed_config_is_written_only_when_the_start_has_succeeded(tmp_path):
    open_workdir(tmp_path, *settings())
    changed = settings(**{"train.steps": 7})
    with pytest.raises(KeyError), occupy_workdir(tmp_path, *changed, allow=("train",)):
        raise KeyError
    assert read_config(tmp_path)[0]["train"]["steps"] == 250


def test_another_process_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    log, traces = StepLog(tmp_path / "metrics.jsonl"), TraceLog(tmp_path / "traces", 1)
    log.append({"step": 0})
    traces.write(0, [{"step": 0}])
    log.path.with_name("evaluations.jsonl").write_text('{"step": 5}\n')
    assert StepLog(tmp_path / "evaluations.jsonl").cut_back(0) == 0 == traces.cut_back(0)
    assert {path.name for path in tmp_path.iterdir()} == {"evaluations.jsonl"}
    assert (tmp_path / "evaluations.jsonl").read_text() == '{"step": 5}\n'


def test_another_digest_of_equal_values_is_refused(tmp_path):
    plain, digest = settings()
    open_workdir(tmp_path, plain, digest)
    with pytest.raises(WorkdirError, match=f"{digest}.* -> 'other'"):
        open_workdir(tmp_path, plain, "other")


def test_a_directory_with_other_files_is_refused_and_left_alone(tmp_path):
    for number in range(7):
        (tmp_path / f"file{number}").write_text("")
    with pytest.raises(WorkdirError, match="not empty: file0, file1, .*2 more"):
        open_workdir(tmp_path, *settings())
    assert len(list(tmp_path.iterdir())) == 7


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", "\xff"])
def test_a_damaged_config_is_an_error_that_names_the_file(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(WorkdirError, match=r"config\.json: damaged"):
        open_workdir(tmp_path, *settings())


def test_paths_that_cannot_be_a_directory_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below", "/proc/none"):
        with pytest.raises(WorkdirError, match="not a directory that can be written"):
            open_workdir(path, *settings())
    with pytest.raises(WorkdirError, match="mounted file system"):
        open_workdir("gs://bucket/run", *settings())
    with pytest.raises(WorkdirError, match="holds no run"):
        read_config(tmp_path)


def rows_of(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_metrics_are_strict_json_lines_whatever_number_type_comes_in(tmp_path):
    log = StepLog(tmp_path / "metrics.jsonl")
    not_finite = {"nan": math.nan, "inf": -math.inf, "np": np.float32(np.nan)}
    log.append({"step": 0} | not_finite | {"list": [np.inf, 1.5]})
    numbers = {"jax": jnp.float32(0.5), "bf16": jnp.bfloat16(2.5), "n": np.int64(3)}
    log.append({"step": 1} | numbers | {"a": np.arange(2)})
    rest = {"text": "x\ny\u2028\udc80", "nested": {"b": jnp.nan}, "flag": np.bool_(True)}
    log.append({"step": 2} | rest)
    assert rows_of(log.path) == [
        {"step": 0, "nan": None, "inf": None, "np": None, "list": [None, 1.5]},
        {"step": 1, "jax": 0.5, "bf16": 2.5, "n": 3, "a": [0, 1]},
        {"step": 2, "text": "x\ny\u2028\udc80", "nested": {"b": None}, "flag": True},
    ]
    with pytest.raises(ValueError, match='integer "step"'):
        log.append({"loss": 1.0})


@pytest.mark.parametrize("step", range(6))
@pytest.mark.parametrize("torn", [b"", b'{"step": 1', b'{"step": 3, "a": "\xc3', b"\0\0\0\0", b"7"])
def test_cutting_back_keeps_the_rows_below_the_step_and_drops_a_torn_line(tmp_path, step, torn):
    log = StepLog(tmp_path / "metrics.jsonl")
    for number in range(5):
        log.append({"step": number, "loss": number / 2})
    complete = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(b"".join(complete) + torn)
    assert log.cut_back(step) == 5 - min(step, 5) + bool(torn)
    assert log.path.read_bytes() == b"".join(complete[:step])
    log.append({"step": step})
    assert rows_of(log.path)[-1] == {"step": step}
    kept = [{"step": number, "loss": number / 2} for number in range(min(step, 5))]
    assert log.read() == [*kept, {"step": step}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_complete_last_row_without_its_newline_is_kept(tmp_path):
    log = StepLog(tmp_path / "metrics.jsonl")
    log.path.write_text('{"step": 0}\n{"step": 1}')
    assert log.cut_back(2) == 0
    log.append({"step": 2})
    assert rows_of(log.path) == [{"step": 0}, {"step": 1}, {"step": 2}]


def test_a_damaged_line_in_the_middle_is_an_error_and_nothing_changes(tmp_path):
    log = StepLog(tmp_path / "metrics.jsonl")
    log.path.write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    before = log.path.read_bytes()
    with pytest.raises(WorkdirError, match=r"metrics\.jsonl, line 2: damaged"):
        log.cut_back(3)
    assert log.path.read_bytes() == before


def test_cutting_back_what_is_not_there_does_nothing(tmp_path):
    assert StepLog(tmp_path / "metrics.jsonl").cut_back(3) == 0
    assert StepLog(tmp_path / "metrics.jsonl").read() == []
    assert TraceLog(tmp_path / "traces", 3).cut_back(3) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_changed_field_is_accepted_where_it_is_named_and_the_config_becomes_the_new_one(
    tmp_path, capsys
):
    open_workdir(tmp_path, *settings())
    changed = settings(**{"train.steps": 7, "verifier.workers": 5})
    with pytest.raises(WorkdirError, match=r"(?s)train\.steps: 250 -> 7\n.*resume\.allow"):
        open_workdir(tmp_path, *changed, allow=("verifier", "train.step"))
    open_workdir(tmp_path, *changed, allow=("verifier", "train.steps"))
    assert "train.steps: 250 -> 7" in capsys.readouterr().out
    assert read_config(tmp_path)[0]["train"]["steps"] == 7
    open_workdir(tmp_path, *changed)  # the permission need not be given again
    with pytest.raises(WorkdirError, match="train.steps: 7 -> 250"):
        open_workdir(tmp_path, *settings())


def test_permission_to_change_is_itself_no_change(tmp_path):
    open_workdir(tmp_path, *settings(**{"resume.allow": ("train",)}))
    open_workdir(tmp_path, *settings())


# --- runs of earlier versions ---------------------------------------------------------------------


def rewrite_config(workdir, **fields):
    """Adds fields of the section `loss`, and the digest that an earlier version gave."""
    content = json.loads((workdir / "config.json").read_bytes())
    content["loss"] |= fields
    content["config_digest"] = "that of an earlier version"
    (workdir / "config.json").write_text(json.dumps(content))


def test_a_run_of_an_earlier_version_goes_on_where_its_retired_fields_meant_nothing(tmp_path):
    plain, digest = settings()
    open_workdir(tmp_path, plain, digest)
    rewrite_config(tmp_path, clip_low=0.0, clip_high=0.0, dual_clip=0.0)
    assert read_config(tmp_path) == (plain, digest)
    open_workdir(tmp_path, plain, digest)
    with pytest.raises(WorkdirError) as raised:
        open_workdir(tmp_path, *settings(seed=3))
    assert "seed: 0 -> 3" in str(raised.value) and "clip" not in str(raised.value)


def test_a_run_of_an_earlier_version_is_refused_where_a_retired_field_meant_something(tmp_path):
    open_workdir(tmp_path, *settings())
    rewrite_config(tmp_path, dual_clip=3.0)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(config.ConfigError, match=r"loss\.dual_clip = 3\.0"):
        open_workdir(tmp_path, *settings())
    assert (tmp_path / "config.json").read_bytes() == before


# --- file systems that refuse ---------------------------------------------------------------------


def limit_file_size(folder):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def remove_directory(folder):
    shutil.rmtree(folder)
    return lambda: None


def forbid_writing(folder):
    """Root may write anywhere, so it becomes nobody for a while."""
    user = os.geteuid()
    for path in (folder, *folder.iterdir()):
        path.chmod(0o555)
    if user == 0:
        os.seteuid(65534)

    def undo():
        os.seteuid(user)
        folder.chmod(0o755)

    return undo


@pytest.fixture
def open_folder():
    """A directory that every user can reach, unlike pytest's."""
    folder = pathlib.Path(tempfile.mkdtemp())
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("break_it", [limit_file_size, remove_directory, forbid_writing])
def test_a_full_a_vanished_and_a_read_only_directory_are_clear_errors(break_it, open_folder):
    log, traces = StepLog(open_folder / "metrics.jsonl"), TraceLog(open_folder / "traces", 3)
    log.append({"step": 0})
    undo = break_it(open_folder)
    try:
        writes = [lambda: log.append({"step": 1}), lambda: traces.write(1, [{"text": "x"}])]
        if break_it is not remove_directory:  # there is nothing to cut back then
            writes.append(lambda: log.cut_back(1))
        for write in writes:
            with pytest.raises(WorkdirError, match=f"{open_folder}.*cannot be written.*full"):
                write()
    finally:
        undo()
    if break_it is not remove_directory:
        assert log.read() == [{"step": 0}]
