"""What an estimator fits from step to step: logged, saved, and gone on with bit for bit."""

import json
import shutil

import pytest
from etils import epath
from small_training import small_training

from benchmarks import drill
from spiral_jax.objective.advantages import compute_advantages
from spiral_jax.objective.control_variate import Slopes, c_metrics
from spiral_jax.reporting.pages import write_pages
from spiral_jax.reporting.read_run import read_run
from spiral_jax.run.position import Position
from spiral_jax.run.setup import set_up_training
from spiral_jax.train import train

ROUNDS, STEPS = 2, 3
C = ("advantage/control_c_round_1", "advantage/control_c")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(setup, directory of its uninterrupted run, slopes that a step began with, by step)."""
    folder = tmp_path_factory.mktemp("fitted")
    c = small_training(folder, STEPS)
    c.loss.estimator, c.aggregation.rounds, c.eval.problems = "set_control_variate", ROUNDS, 0
    c.batch.aggregation_groups, c.checkpoint.keep = 12, STEPS
    setup = set_up_training(c)
    assert train(setup, str(folder / "run")) is None
    return setup, folder / "run"


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_step_is_trained_with_the_c_of_the_steps_before_it(trained):
    _, workdir = trained
    first, *later = ([row[name] for name in C] for row in rows_of(workdir))
    assert first == [0.0, 0.0]
    assert all(0 not in row and row[0] != row[1] for row in later) and later[0] != later[1]


def test_a_resumed_run_goes_on_with_what_was_fitted_bit_for_bit(trained, tmp_path):
    """Without it the second step would have c = 0, other advantages and other weights."""
    setup, workdir = trained
    again = tmp_path / "run"
    shutil.copytree(workdir, again)
    for step in range(2, STEPS + 1):
        shutil.rmtree(again / "checkpoints" / str(step))
    assert train(setup, str(again)) is None
    assert drill.differences(workdir, again) == []
    ours, theirs = rows_of(again)[1:], rows_of(workdir)[1:]
    assert [[row[name] for name in C] for row in ours] == [
        [row[name] for name in C] for row in theirs
    ]


def test_the_report_explains_every_logged_advantage_with_the_steps_own_c(trained, tmp_path):
    _, workdir = trained
    sample = write_pages(read_run(str(workdir)), epath.Path(tmp_path), 2**24).sample
    words = []
    for page in (json.loads(sampled.text) for sampled in sample):
        traces = [
            *page["search"],
            *(trace for of_set in page["sets"] for trace in of_set["traces"]),
        ]
        words += [trace["why"] for trace in traces if page["kept"]]
    assert any("With c = 0.000" in each for each in words)
    assert any("With c" in each and "With c = 0.000" not in each for each in words)
    assert not [each for each in words if "was logged" in each or "not logged" in each]


# --- the record of a checkpoint -----------------------------------------------------------------

SLOPES = Slopes((0.1, 1 / 3), (2.0, 0.7))


def test_a_position_comes_back_from_json_with_every_bit():
    at = Position(3, 40, 12_345, SLOPES)
    plain = json.loads(json.dumps(at.to_plain()))
    assert Position.from_plain(plain, Position(slopes=Slopes.unknown(2))) == at


def test_where_nothing_is_fitted_the_record_is_that_of_earlier_versions():
    plain = {"step": 3, "cursor": 40, "sampled_tokens": 12_345}
    assert Position(3, 40, 12_345).to_plain() == plain
    assert Position.from_plain(plain, Position()) == Position(3, 40, 12_345)
    assert Position(3, 40, 12_345).c_R == () == tuple(c_metrics(()))
    assert Position.from_plain(plain | {"slopes": SLOPES.__dict__}, Position()).slopes is None


@pytest.mark.parametrize("saved", [{}, {"slopes": {"product_R": [1.0], "square_R": [2.0]}}])
def test_a_fit_that_was_not_saved_or_of_other_rounds_begins_anew(saved):
    plain = {"step": 3, "cursor": 40, "sampled_tokens": 12_345} | saved
    unknown = Slopes.unknown(2)
    assert Position.from_plain(plain, Position(slopes=unknown)).slopes == unknown


def test_more_or_fewer_c_than_rounds_are_refused():
    with pytest.raises(ValueError):
        compute_advantages("set_control_variate", [], (0.5,))
