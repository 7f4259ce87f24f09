"""Where runs had spent the same operations, against numbers worked out by hand."""

import json

import numpy as np
import pytest

from spiral_jax.studies.design import load_study
from spiral_jax.studies.directory import StudyDirectory
from spiral_jax.studies.operations import (
    Budget,
    Reading,
    Spending,
    State,
    find_budget,
    find_readings,
    kept_steps,
    read_within,
    spent_by_step,
)


def spending(arm, each, steps, state=State.ENDED, every=2):
    """A run whose steps cost the same, with a checkpoint every few steps and where it ended."""
    kept = set(range(every, steps + 1, every)) | ({steps} if state is State.ENDED else set())
    spent = None if each is None else each * np.arange(steps + 1.0)
    return Spending(arm, 0, state, spent, frozenset(kept))


LONG = spending("marginal_mean", 3.0, 11)
CHEAP = spending("grpo", 2.0, 7)
STARVED = spending("aggregator_only", 4.0, 3, State.FAILED)
OPEN = spending("pkpo", 1.0, 5, State.OPEN)
OLD = spending("rloo", None, 7)


def test_the_budget_is_the_least_that_a_run_spent_that_ended_where_it_should():
    assert find_budget([LONG, CHEAP, STARVED]) == (Budget(14.0, "grpo", 0), [])
    old_and_failed = OLD._replace(state=State.FAILED)
    assert find_budget([LONG, old_and_failed]) == (Budget(33.0, "marginal_mean", 0), [])


@pytest.mark.parametrize(
    ("runs", "waits_for"),
    [
        ([LONG, OPEN, CHEAP], "pkpo seed 0 is not over"),
        ([LONG, OLD], "rloo seed 0 has not counted its operations"),
        ([STARVED], "no run of the first seed has ended where its experiment does"),
    ],
)
def test_the_budget_is_known_once_it_can_change_no_more(runs, waits_for):
    assert find_budget(runs) == (None, [waits_for])


@pytest.mark.parametrize(
    ("run", "tflop", "step", "spent"),
    [
        (CHEAP, 14.0, 7, 14.0),  # its end, which is no multiple of 2
        (CHEAP, 20.0, 7, 14.0),
        (LONG, 14.0, 4, 12.0),
        (LONG, 12.0, 4, 12.0),  # all of the budget
        (LONG, 11.9, 2, 6.0),
        (STARVED, 14.0, 2, 8.0),  # its newest checkpoint
    ],
)
def test_a_run_is_read_at_its_newest_checkpoint_within_the_budget(run, tflop, step, spent):
    assert read_within(run, Budget(tflop, "x", 0)) == Reading(run.arm, 0, step, spent)


def test_a_run_that_cannot_be_read_says_why():
    assert read_within(OLD, Budget(14.0, "x", 0)).why_not == "it has not counted its operations"
    nowhere = read_within(LONG, Budget(5.0, "x", 0))
    assert nowhere.step is None and "no checkpoint" in nowhere.why_not


def row(step, tflop=None, tokens=100.0):
    """Of metrics; without operations as runs of an older version have it."""
    counted = {} if tflop is None else {"tflop/sampling": tflop / 4, "tflop/update": 3 * tflop / 4}
    return {"step": step, "sampling/generated_tokens": tokens} | counted


def test_what_a_run_had_spent_is_sampling_and_updates_of_all_steps_up_to_there():
    assert spent_by_step([row(0, 4.0), row(1, 8.0)]).tolist() == [0.0, 4.0, 12.0]
    assert spent_by_step([row(0), row(1, 8.0)]) is None  # it went on with a newer version
    assert spent_by_step([]).tolist() == [0.0]


@pytest.mark.parametrize(
    ("every", "keep_every", "steps"),
    [(2, 2, {2, 4, 6}), (2, 3, {6}), (1, 3, {3, 6}), (0, 2, set()), (2, 0, set())],
)
def test_checkpoints_that_stay_are_saved_and_kept(every, keep_every, steps):
    assert kept_steps({"every": every, "keep_every": keep_every}, 7) == steps


def test_readings_follow_from_what_lies_in_the_directory(tmp_path):
    """Three steps each, a checkpoint after every one; the arm of a sweep has spent least of all."""
    study = load_study("tests/study_small.py").with_proposed(["N5"])
    directory = StudyDirectory(tmp_path)

    def put(arm, seed, *tflop):
        path = directory.run(arm, seed)
        path.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row(step, each)) for step, each in enumerate(tflop)]
        (path / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))

    put("marginal_mean", 0, 4.0, 4.0, 4.0)
    put("N5", 0, 1.0, 1.0, 1.0)
    put("grpo", 0, 3.0, 3.0)
    found = find_readings(study, directory)
    assert found.budget is None and found.waits_for == ["grpo seed 0 is not over"]

    put("grpo", 0, 3.0, 3.0, 3.0)
    put("marginal_mean", 1, 2.0, 2.0)  # is not over
    found = find_readings(study, directory)
    assert found.budget == Budget(9.0, "grpo", 0)
    places = [(of.arm, of.seed, of.step, of.tflop) for of in found.rows]
    assert places == [("marginal_mean", 0, 2, 8.0), ("grpo", 0, 3, 9.0), ("N5", 0, 3, 3.0)]

    put("marginal_mean", 1, 2.0, 2.0, 2.0)  # a later seed that spends less: the budget stays
    failed = {"step": 0, "arm": "grpo", "seed": 0, "stage": "train", "returncode": 1, "error": "e"}
    directory.journal.append(failed)  # once: it has ended since
    found = find_readings(study, directory)
    assert found.budget == Budget(9.0, "grpo", 0)
    assert ("marginal_mean", 1, 3, 6.0) in [
        (of.arm, of.seed, of.step, of.tflop) for of in found.rows
    ]

    put("grpo", 0, 3.0, 3.0)  # failed for good after two steps
    found = find_readings(study, directory)
    assert found.budget == Budget(12.0, "marginal_mean", 0)
    assert ("grpo", 0, 2, 6.0) in [(of.arm, of.seed, of.step, of.tflop) for of in found.rows]
