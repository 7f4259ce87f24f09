"""What a run writes is cut back to where it goes on, and everything comes in once."""

import json

from configs import tiny
from spiral_jax.run.log import RunLog
from spiral_jax.run.trace_log import trace_files


def rows(path, name):
    return [json.loads(line) for line in (path / f"{name}.jsonl").read_text().splitlines()]


def written(path, c, steps, evaluated):
    log = RunLog(path, c)
    log.go_on(0, finished=False)
    with log:
        log.started()
        for step in range(steps):
            log.step(step, {"reward/aggregated": 0.5}, [{"step": step}] if step % 2 == 0 else None)
        for step in evaluated:
            mean = {
                "mean": step / 10,
                "low": None,
                "high": None,
                "standard_error": None,
                "count": 1,
            }
            log.evaluation(step, {"step": step, "aggregated": mean}, {"measures": step})
    return log


def test_all_logs_are_cut_back_to_the_checkpoint_that_a_run_goes_on_from(tmp_path):
    c = tiny.get_config()
    written(tmp_path, c, steps=6, evaluated=(0, 4, 6))
    again = RunLog(tmp_path, c)
    again.go_on(4, finished=False)
    assert [row["step"] for row in rows(tmp_path, "metrics")] == [0, 1, 2, 3]
    assert [row["step"] for row in rows(tmp_path, "evaluations")] == [0, 4]
    assert list(trace_files(tmp_path / "traces")) == [0, 2]
    assert sorted(p.name for p in (tmp_path / "evaluations").iterdir()) == [
        "step_000000",
        "step_000004",
    ]
    assert again.is_evaluated(4) and not again.is_evaluated(6)
    assert [row["step"] for row in rows(tmp_path, "starts")] == [0, 4]


def test_a_finished_run_notes_no_start_and_keeps_its_last_evaluation(tmp_path):
    c = tiny.get_config()
    written(tmp_path, c, steps=2, evaluated=(0, 2))
    RunLog(tmp_path, c).go_on(2, finished=True)
    assert (
        len(rows(tmp_path, "starts")) == 1
        and (tmp_path / "evaluations" / "step_000002" / "results.json").exists()
    )


def test_start_up_is_in_the_first_row_of_each_process_alone(tmp_path):
    written(tmp_path, tiny.get_config(), steps=3, evaluated=())
    assert ["time/start_up" in row for row in rows(tmp_path, "metrics")] == [True, False, False]


def test_scores_are_the_means_of_the_measure_that_checkpoints_are_kept_by(tmp_path):
    c = tiny.get_config()
    assert written(tmp_path, c, steps=0, evaluated=(0, 3)).scores() == {}
    c.checkpoint.keep_best = "aggregated"
    assert RunLog(tmp_path, c).scores() == {0: 0.0, 3: 0.3}
