"""Bad steps and spikes: flagged, counted alike after a resume; a bad batch can be read."""

import dataclasses
import math

import numpy as np
import pytest
from small_steps import random_groups

from spiral_jax.core.groups import Role
from spiral_jax.rollout.collect import Batch
from spiral_jax.rollout.credit import Credit
from spiral_jax.rollout.traces import Rollouts
from spiral_jax.run.guards import (
    BadSteps,
    Mismatch,
    NumericsGuard,
    check_mismatch,
    watched_metrics,
)
from spiral_jax.tasks.problem import Problem
from spiral_jax.verifier.rewards import Status, Verdict


def row(grad_norm=1.0, loss=0.0, skipped=0.0):
    return {"grad_norm": grad_norm, "loss/search": loss, "skipped_update": skipped}


def quiet_rows(count=20):
    rng = np.random.default_rng(0)
    return [row(1 + 0.1 * rng.uniform(), 0.01 * rng.normal()) for _ in range(count)]


def spikes(guard, *rows):
    """The metrics that are flagged in each row."""
    flagged = []
    for step, metrics in enumerate(rows):
        flags = guard.check(step, metrics)
        flagged.append({name.removeprefix("spike/") for name, flag in flags.items() if flag})
    return flagged


def test_a_value_far_from_the_last_ones_is_flagged_and_printed_and_the_usual_ones_are_not(capsys):
    guard = NumericsGuard(3, 12.0, [])
    assert spikes(guard, *quiet_rows()) == [set()] * 20 and capsys.readouterr().out == ""
    rows = [row(grad_norm=9.0), row(loss=-3.0), row(loss=3.0), row(grad_norm=0.0), row()]
    assert spikes(guard, *rows) == [{"grad_norm"}, {"loss/search"}, {"loss/search"}, set(), set()]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for part in ("step 0", "grad_norm = 9", "median", "1.0"):
        assert part in lines[0]


def test_every_watched_metric_of_a_step_has_a_flag():
    assert NumericsGuard(3, 12.0, quiet_rows()).check(0, row(grad_norm=9.0)) == {
        "spike/grad_norm": 1.0,
        "spike/loss/search": 0.0,
    }


def test_rounding_of_a_loss_that_is_zero_is_no_spike():
    rng = np.random.default_rng(0)
    rows = [row(1 + 0.1 * rng.uniform(), 1e-8 * rng.normal()) for _ in range(20)]
    guard = NumericsGuard(3, 12.0, rows)
    assert spikes(guard, row(loss=1.5e-7), row(loss=1e-3)) == [set(), {"loss/search"}]


def test_too_few_steps_constant_values_and_a_zero_setting_flag_nothing():
    assert spikes(NumericsGuard(3, 12.0, quiet_rows(7)), row(grad_norm=9.0)) == [set()]
    assert spikes(NumericsGuard(3, 12.0, [row()] * 20), row(grad_norm=9.0)) == [set()]
    assert spikes(NumericsGuard(3, 0.0, quiet_rows()), row(grad_norm=9.0)) == [set()]


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_what_is_not_finite_is_no_spike_and_no_part_of_the_median(value):
    guard = NumericsGuard(3, 12.0, quiet_rows())
    rows = [*[row(value, value)] * 40, row(grad_norm=9.0)]
    assert spikes(guard, *rows) == [set()] * 40 + [{"grad_norm"}]


def test_a_resumed_guard_is_that_of_the_uninterrupted_run():
    rows = [*quiet_rows(30), row(9.0), row(math.nan, math.nan, 1.0), *quiet_rows(30)]
    uninterrupted = NumericsGuard(3, 12.0, [])
    expected = [uninterrupted.check(i, r) for i, r in enumerate(rows)]

    def logged(metrics):  # as metrics.jsonl has it
        return {name: x if math.isfinite(x) else None for name, x in metrics.items()}

    for cut in range(0, len(rows), 7):
        resumed = NumericsGuard(3, 12.0, watched_metrics(map(logged, rows[:cut])))
        assert [resumed.check(i, r) for i, r in enumerate(rows[cut:])] == expected[cut:]
        assert resumed.bad_in_a_row == uninterrupted.bad_in_a_row


def batch():
    groups, weight_UxC = random_groups(0, Role.SEARCH, U=2)
    verdict_UxC = np.full(weight_UxC.shape, Verdict(0.0, Status.WRONG), object)
    verdict_UxC[0, 0] = Verdict(1.0, Status.CORRECT)
    groups = dataclasses.replace(groups, verdict_UxC=verdict_UxC)
    problems = [Problem("train:0", "?", "1"), Problem("train:é", "?", "2")]
    rollouts = Rollouts(problems, np.array([4, 5]), groups)
    credit = [Credit(np.zeros_like(weight_UxC), weight_UxC)]
    return Batch(rollouts, credit, rollouts.take(np.arange(0)), next_cursor=6, metrics={})


def test_bad_steps_in_a_row_end_the_run_with_their_batch_in_a_file_without_pickle(tmp_path):
    guard, bad = NumericsGuard(3, 12.0, [row(skipped=1.0)] * 2), row(math.nan, math.nan, 1.0)
    guard.check(2, row())  # a good one between
    for step in (3, 4):
        guard.check(step, bad)
        guard.check_bad_steps(tmp_path, step, batch())
    guard.check(5, bad)
    with pytest.raises(BadSteps) as raised:
        guard.check_bad_steps(tmp_path, 5, batch())
    file = tmp_path / "bad_step_000005.npz"
    for part in ("3 steps in a row", "step 5", str(file)):
        assert part in str(raised.value)

    with np.load(file, allow_pickle=False) as arrays:
        groups = batch().rollouts.search
        assert arrays["problem_B"].tolist() == ["train:0", "train:é"]
        assert arrays["cursor_B"].tolist() == [4, 5]
        np.testing.assert_array_equal(arrays["search/trace_UxCxG"], groups.trace_UxCxG)
        np.testing.assert_array_equal(arrays["search/prompt_UxP"], groups.requests.prompt_UxP)
        np.testing.assert_array_equal(arrays["search/weight_UxC"], batch().credit[0].weight_UxC)
        assert arrays["search/verdict_UxC"][0].tolist() == ["correct", "wrong", "wrong"]
        assert all(arrays[name].size for name in arrays.files)  # each can be read


def test_sampler_and_trainer_must_agree_at_the_first_step_alone():
    close, far = {"mismatch/max_abs_log_ratio": 1e-5}, {"mismatch/max_abs_log_ratio": 1e-2}
    check_mismatch(0, close, limit=1e-4)
    check_mismatch(1, far, limit=1e-4)
    check_mismatch(0, far, limit=0.0)
    for metrics in (far, {"mismatch/max_abs_log_ratio": math.nan}):
        with pytest.raises(Mismatch, match=r"config\.train\.mismatch_limit = 0\.0001"):
            check_mismatch(0, metrics, limit=1e-4)
