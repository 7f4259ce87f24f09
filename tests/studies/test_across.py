"""Several studies compared: the field's measures against sums by hand and by SciPy."""

import json

import numpy as np
import pytest
from scipy import stats

from spiral_jax.core.config import ConfigError
from spiral_jax.studies import across

# runs of three arms on two tasks; "only" is an arm of one task
SCORES = {
    "one": {"base": [0.4, 0.5], "ours": [0.8, 0.9, 0.7], "other": [0.6, 0.8], "only": [1.0]},
    "two": {"base": [0.1], "ours": [0.3, 0.5], "other": [0.3, 0.2, 0.6]},
}


@pytest.fixture
def files(tmp_path):
    paths = []
    for title, arms in SCORES.items():
        runs = [
            {"arm": arm, "seed": seed, "measures": {"reward": score, "single": 0.0}}
            for arm, scores in arms.items()
            for seed, score in enumerate(scores)
        ]
        runs.append({"arm": "ours", "seed": 9})  # has not been evaluated
        paths.append(tmp_path / f"{title}.json")
        report = {"title": title, "measures": ["reward", "single"], "runs": runs}
        paths[-1].write_text(json.dumps(report))
    return paths


def test_the_middle_of_an_arms_scores_is_scipys_trimmed_mean_of_equally_many_of_each_task(files):
    compared = across.compare_across(files, "ours")
    for arm in ("base", "ours", "other"):
        first, second = SCORES["one"][arm], SCORES["two"][arm]
        # 24 copies of a task's runs, so that a quarter is a whole number of them
        scores = np.repeat(first, 24 // len(first)).tolist()
        scores += np.repeat(second, 24 // len(second)).tolist()
        middle = compared["arms"][arm]["interquartile mean"]
        assert middle["mean"] == pytest.approx(stats.trim_mean(scores, 0.25))
        assert min(scores) <= middle["low"] <= middle["high"] <= max(scores)
        assert middle["seeds"] == len(first) + len(second)
    assert compared["missing"] == ["only"]


def test_improvement_is_the_mean_of_mann_whitneys_statistic_over_tasks(files):
    chance = across.compare_across(files, "ours")["improvement"]
    expected = []
    for task in SCORES.values():
        u = stats.mannwhitneyu(task["ours"], task["other"]).statistic
        expected.append(u / (len(task["ours"]) * len(task["other"])))
    assert chance["other"]["mean"] == pytest.approx(np.mean(expected))
    assert set(chance) == {"other"}


def test_a_profile_falls_from_all_runs_to_none(files):
    profile = across.compare_across(files, "ours")["arms"]["ours"]["profile"]
    of_tasks = [np.array(task["ours"]) for task in SCORES.values()]
    above = [
        np.mean([(scores > threshold).mean() for scores in of_tasks])
        for threshold in across.THRESHOLDS
    ]
    np.testing.assert_allclose(profile["mean"], above)


def test_intervals_resample_runs_within_their_task(files):
    """An arm with one run a task has no spread; across tasks nothing is mixed."""
    drawn = across.resampled([np.array([0.25]), np.array([0.75, 0.5])], seed=0)
    assert (drawn[0] == 0.25).all() and set(np.unique(drawn[1])) == {0.5, 0.75}


def test_readings_at_equal_operations_are_compared_like_ends(files):
    """Taken as the readings of the same studies, the ends give the same numbers."""
    at_end = across.compare_across(files, "ours")
    assert at_end["operations"] is None
    for file in files:
        report = json.loads(file.read_text())
        trained = [run for run in report["runs"] if run["arm"] != "base"]
        ends = [run | {"measures": {"reward": 0.0}} for run in trained]
        base = [run for run in report["runs"] if run["arm"] == "base"]
        report |= {"runs": base + ends, "operations": {"runs": trained}}
        file.write_text(json.dumps(report))
    compared = across.compare_across(files, "ours")
    for name in ("arms", "improvement", "missing"):
        assert compared["operations"][name] == at_end[name]
    assert compared["arms"]["ours"]["interquartile mean"]["mean"] == 0.0
    _, after = across.markdown(compared, "x.png").split("## At equal operations")
    assert after.index("| ours |") < after.index("| other |") < after.index("| base |")


@pytest.mark.parametrize(
    "break_it, best, said",
    [
        (lambda file: file.write_text("{"), "ours", "is no report of a study"),
        (lambda file: file.write_text("{}"), "ours", "is no report of a study"),
        (lambda file: file.unlink(), "ours", "is no report of a study"),
        (lambda file: None, "only", "--best=only: must be an arm that every study has: base, ours"),
    ],
)
def test_what_cannot_be_compared_is_named(files, break_it, best, said):
    break_it(files[1])
    with pytest.raises(ConfigError, match=said):
        across.compare_across(files, best)


def test_the_report_orders_arms_and_has_a_picture(files, tmp_path):
    text = across.write_comparison(files, "ours", tmp_path / "out" / "lr_0.3")
    assert text.index("| ours |") < text.index("| other |") < text.index("| base |")
    assert (tmp_path / "out" / "lr_0.3_profile.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "out" / "lr_0.3.json").read_text())["best"] == "ours"
    assert (tmp_path / "out" / "lr_0.3.md").read_text() == text
