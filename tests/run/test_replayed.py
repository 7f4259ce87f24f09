"""Stored populations of a run: read from its second step on, saved, gone on with bit for bit."""

import gzip
import json
import shutil

import pytest
from small_training import small_training

from benchmarks import drill
from spiral_jax.run.position import Position
from spiral_jax.run.setup import set_up_training
from spiral_jax.train import train

STEPS = 4


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(setup, directory of its uninterrupted run)."""
    folder = tmp_path_factory.mktemp("replayed")
    c = small_training(folder, STEPS)
    c.eval.problems, c.checkpoint.keep = 0, STEPS
    c.replay.problems, c.replay.uses, c.replay.max_age, c.replay.rounds = 2, 2, 3, 3
    setup = set_up_training(c)
    assert train(setup, str(folder / "run")) is None
    return setup, folder / "run"


def metrics_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def replayed_rows(workdir, step):
    with gzip.open(workdir / "traces" / f"step_{step:06d}.jsonl.gz", "rt") as file:
        return [row for row in map(json.loads, file) if "replay" in row]


def saved_position(setup, workdir, step):
    record = json.loads((workdir / "checkpoints" / str(step) / "record" / "metadata").read_text())
    return Position.from_plain(record["record"]["at"], Position.first(setup.training))


def test_a_step_reads_what_the_checkpoint_before_it_holds_and_the_log_shows_it(trained):
    setup, workdir = trained
    assert "replay/read" not in metrics_of(workdir)[0] and not replayed_rows(workdir, 0)
    uses, rounds = set(), set()
    for step in range(1, STEPS):
        stored = saved_position(setup, workdir, step).populations
        row = metrics_of(workdir)[step]
        assert row["replay/stored"] == len(stored.kept)
        expected = stored.drawn(step)
        rows = replayed_rows(workdir, step)
        assert {each["cursor"] for each in rows} == {each.cursor for each in expected}
        for each in expected:
            read = [r for r in rows if r["cursor"] == each.cursor and r["set"] is None]
            assert [r["reward"] for r in read] == each.reward_C.tolist()
            lengths = each.trace_len_C
            ids = [trace[:n].tolist() for trace, n in zip(each.trace_CxG, lengths, strict=True)]
            assert [r["ids"] for r in read] == ids
            uses.add(each.uses)
            rounds.add(each.round)
    assert uses == {0, 1} and rounds > {1}


def test_every_metric_of_it_has_a_meaning_in_the_docs(trained):
    page = (drill.ROOT / "docs" / "metrics.md").read_text()
    of_replay = {name for row in metrics_of(trained[1]) for name in row if "replay" in name}
    assert len(of_replay) == 8
    assert {name for name in of_replay if f"`{name}`" not in page} == set()


def test_a_resumed_run_goes_on_with_what_was_stored_bit_for_bit(trained, tmp_path):
    """Without it the next step would read nothing, and have other gradients."""
    setup, workdir = trained
    again = tmp_path / "run"
    shutil.copytree(workdir, again)
    for step in range(3, STEPS + 1):
        shutil.rmtree(again / "checkpoints" / str(step))
    assert train(setup, str(again)) is None
    assert drill.differences(workdir, again) == []
    ours, theirs = (replayed_rows(each, STEPS - 1) for each in (again, workdir))
    assert ours == theirs and ours


def test_a_run_that_replayed_nothing_until_now_begins_with_nothing_stored(trained):
    setup, _ = trained
    plain = {"step": 3, "cursor": 40, "sampled_tokens": 12_345}
    at = Position.from_plain(plain, Position.first(setup.training))
    assert at.populations.kept == () and at.step == 3
    assert Position.from_plain(plain, Position()).to_plain() == plain
