"""What a run writes is cut back to where it goes on, and everything comes in once."""

import json

from spiral_jax.run.log import RunLog
from spiral_jax.run.trace_log import trace_files


def rows(path, name):
    return [json.loads(line) for line in (path / f"{name}.jsonl").read_text().splitlines()]


def open_log(path, step, keep_best=""):
    log = RunLog(path, keep_trace_files=50, keep_best=keep_best)
    log.cut_back(step)
    return log


def write_run(path, steps, evaluated):
    log = open_log(path, step=0)
    with log:
        log.note_start(0, writers=(), config_plain={})
        log.note_start_up_time()
        for step in range(steps):
            traces = [{"step": step}] if step % 2 == 0 else None
            log.add_step(step, {"reward/aggregated": 0.5}, traces)
        for step in evaluated:
            mean = {"mean": step / 10, "low": None, "high": None}
            log.add_evaluation(step, {"step": step, "aggregated": mean}, {"measures": step})
    return log


def test_all_logs_are_cut_back_to_the_checkpoint_that_a_run_goes_on_from(tmp_path):
    write_run(tmp_path, steps=6, evaluated=(0, 4, 6))
    again = open_log(tmp_path, step=4)
    again.note_start(4, writers=(), config_plain={})
    assert [row["step"] for row in rows(tmp_path, "metrics")] == [0, 1, 2, 3]
    assert [row["step"] for row in rows(tmp_path, "evaluations")] == [0, 4]
    assert list(trace_files(tmp_path / "traces")) == [0, 2]
    folders = {path.name for path in (tmp_path / "evaluations").iterdir()}
    assert folders == {"step_000000", "step_000004"}
    assert again.is_evaluated(4) and not again.is_evaluated(6)
    assert [row["step"] for row in rows(tmp_path, "starts")] == [0, 4]


def test_a_finished_run_keeps_its_last_evaluation_and_notes_no_start(tmp_path):
    write_run(tmp_path, steps=2, evaluated=(0, 2))
    open_log(tmp_path, step=2)
    assert [row["step"] for row in rows(tmp_path, "evaluations")] == [0, 2]
    assert (tmp_path / "evaluations" / "step_000002" / "results.json").exists()
    assert len(rows(tmp_path, "starts")) == 1


def test_a_start_notes_what_the_run_runs_on(tmp_path):
    write_run(tmp_path, steps=0, evaluated=())
    (start,) = rows(tmp_path, "starts")
    assert start["step"] == 0 and {"time", "devices", "versions", "commit"} <= start.keys()


def test_start_up_is_in_the_first_row_of_each_process_alone(tmp_path):
    write_run(tmp_path, steps=3, evaluated=())
    assert ["time/start_up" in row for row in rows(tmp_path, "metrics")] == [True, False, False]


def test_scores_are_the_means_of_the_measure_that_checkpoints_are_kept_by(tmp_path):
    assert write_run(tmp_path, steps=0, evaluated=(0, 3)).scores() == {}
    assert open_log(tmp_path, 3, keep_best="aggregated").scores() == {0: 0.0, 3: 0.3}
    assert open_log(tmp_path, 3, keep_best="single").scores() == {}


def test_a_resumed_run_with_another_reward_says_so(tmp_path, capsys):
    def start_at(step, source):
        open_log(tmp_path, step).note_start(step, (), {}, reward_source=source)
        return capsys.readouterr().out

    assert start_at(0, "a" * 64) == start_at(0, "a" * 64) == ""
    said = start_at(0, "b" * 64)
    assert "reward" in said and "aaaaaaaaaaaa" in said and "bbbbbbbbbbbb" in said
    assert start_at(0, "b" * 64) == ""
    assert [row["reward_source"][0] for row in rows(tmp_path, "starts")] == list("aabb")
