"""Bad steps in a row and spikes: flagged, counted alike after a resume, and the batch that ended a
run can be read.
"""

import math

import numpy as np
import pytest
from small_steps import random_groups

from spiral_jax.core.groups import Role
from spiral_jax.rollout.collect import Batch
from spiral_jax.rollout.requests import Rollouts
from spiral_jax.run.guards import BadSteps, NumericsGuard, watched
from spiral_jax.tasks.problem import Problem


def row(grad_norm=1.0, loss=0.0, skipped=0.0):
    return {"grad_norm": grad_norm, "loss/search": loss, "skipped_update": skipped}


def quiet_rows(count=20):
    rng = np.random.default_rng(0)
    return [row(1 + 0.1 * rng.uniform(), 0.01 * rng.normal()) for _ in range(count)]


def flags(guard, *rows):
    return [
        {name.removeprefix("spike/") for name, value in guard.check(i, r).items() if value}
        for i, r in enumerate(rows)
    ]


def test_a_value_far_from_the_last_ones_is_flagged_and_printed_and_the_usual_ones_are_not(capsys):
    guard = NumericsGuard(3, 12.0, [])
    assert flags(guard, *quiet_rows()) == [set()] * 20 and capsys.readouterr().out == ""
    spikes = [row(grad_norm=9.0), row(loss=-3.0), row(loss=3.0), row(grad_norm=0.0), row()]
    assert flags(guard, *spikes) == [{"grad_norm"}, {"loss/search"}, {"loss/search"}, set(), set()]
    out = capsys.readouterr().out
    assert out.count("warning") == 3 and "step 0: grad_norm = 9, the median is 1.0" in out


def test_rounding_of_a_loss_that_is_zero_is_no_spike():
    rng = np.random.default_rng(0)
    rows = [row(1 + 0.1 * rng.uniform(), 1e-8 * rng.normal()) for _ in range(20)]
    assert flags(NumericsGuard(3, 12.0, rows), row(loss=1.5e-7), row(loss=1e-3)) == [
        set(),
        {"loss/search"},
    ]


def test_too_few_steps_constant_values_and_a_zero_setting_flag_nothing():
    assert flags(NumericsGuard(3, 12.0, quiet_rows(7)), row(grad_norm=9.0)) == [set()]
    assert flags(NumericsGuard(3, 12.0, [row()] * 20), row(grad_norm=9.0)) == [set()]
    assert flags(NumericsGuard(3, 0.0, quiet_rows()), row(grad_norm=9.0)) == [set()]


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_what_is_not_finite_is_no_spike_and_no_part_of_the_median(value):
    guard = NumericsGuard(3, 12.0, quiet_rows())
    assert flags(guard, *[row(value, value)] * 40, row(grad_norm=9.0))[-2:] == [
        set(),
        {"grad_norm"},
    ]


def test_a_resumed_guard_is_that_of_the_uninterrupted_run():
    rows = [*quiet_rows(30), row(9.0), row(math.nan, math.nan, 1.0), *quiet_rows(30)]
    logged = [
        {k: None if not math.isfinite(v) else v for k, v in r.items()} for r in rows
    ]  # as metrics.jsonl has it
    whole = NumericsGuard(3, 12.0, [])
    expected = [whole.check(i, r) for i, r in enumerate(rows)]
    for cut in range(0, len(rows), 7):
        resumed = NumericsGuard(3, 12.0, watched(logged[:cut]))
        assert [resumed.check(i, r) for i, r in enumerate(rows[cut:])] == expected[cut:]
        assert resumed.bad_in_a_row == whole.bad_in_a_row


def batch():
    groups, weight = random_groups(0, Role.SEARCH, U=2)
    problems = [Problem("train:0", "?", "1"), Problem("train:é", "?", "2")]
    rollouts = Rollouts(problems, np.array([4, 5]), groups)
    return Batch(rollouts, rollouts.take(np.arange(0)), weight, None, 6, 10, {})


def test_bad_steps_in_a_row_end_the_run_with_their_batch_in_a_file_without_pickle(tmp_path):
    guard, bad = NumericsGuard(3, 12.0, [row(skipped=1.0)] * 2), row(math.nan, math.nan, 1.0)
    guard.check(2, row())  # a good one between
    for step in (3, 4):
        guard.check(step, bad)
        guard.check_bad_steps(tmp_path, step, batch())
    guard.check(5, bad)
    with pytest.raises(BadSteps, match=r"3 steps in a row.*step 5.*bad_step_000005\.npz"):
        guard.check_bad_steps(tmp_path, 5, batch())
    with np.load(tmp_path / "bad_step_000005.npz", allow_pickle=False) as file:
        assert file["problem_B"].tolist() == ["train:0", "train:é"] and file[
            "cursor_B"
        ].tolist() == [4, 5]
        groups = batch().rollouts.search
        np.testing.assert_array_equal(file["search/trace_UxCxG"], groups.trace_UxCxG)
        np.testing.assert_array_equal(file["search/prompt_UxP"], groups.requests.prompt_UxP)
        np.testing.assert_array_equal(file["search/weight_UxC"], batch().search_weight_UxC)
