"""What a study makes of evaluations that are there; nothing is run."""

import json
import shutil

import pytest
from small_studies import a_study, make_study

from spiral_jax.evaluation.results import ResultsError
from spiral_jax.evaluation.tables import DASH
from spiral_jax.studies import figures, runner, text
from spiral_jax.studies.design import Claim
from spiral_jax.studies.gather import gather
from spiral_jax.studies.processes import Processes
from spiral_jax.studies.rungs import GIVEN_UP
from spiral_jax.studies.text import list_failures, write_study


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures are made and not drawn, which takes most of their time."""
    monkeypatch.setattr(figures, "save", lambda figure, path: None)


@pytest.mark.parametrize(
    ("name", "held", "said"),
    [
        ("temperature", 0.25, r"eval\.search_temperature: 0\.25 -> 1\.0"),
        ("aggregation_temperature", 0.25, r"eval\.aggregation_temperature: 0\.25 -> 1\.0"),
        ("search_max_tokens", 7, r"search\.max_tokens: 7 -> "),
        ("aggregation_max_tokens", 7, r"aggregation\.max_tokens: 7 -> "),
        ("subset_size", 3, r"eval\.subset_size: 3 -> 4"),
        ("limits", [6], r"eval\.limits: \[6\] -> \[\]"),
    ],
)
def test_an_evaluation_that_was_sampled_in_another_way_is_refused(tmp_path, name, held, said):
    def edit(arm, seed, results):
        if arm == "grpo":
            results["settings"][name] = held

    directory = make_study(tmp_path, a_study(), edit)
    with pytest.raises(ResultsError, match=rf"(?s)grpo.*results\.json.*{said}"):
        gather(a_study(), directory)


def test_an_evaluation_from_before_aggregation_had_a_temperature_is_read(tmp_path):
    def edit(arm, seed, results):
        del results["settings"]["aggregation_temperature"]

    assert gather(a_study(), make_study(tmp_path, a_study(), edit))["arms"]["grpo"]["measures"]


def test_curves_of_a_study_end_where_nearly_all_problems_have_as_many_traces(undrawn, tmp_path):
    """Four of five problems have lost one of six traces to an error of ours, in one run."""

    def edit(arm, seed, results):
        if (arm, seed) == ("marginal_mean", 1):
            for record in results["records"][1:]:
                record["search"]["answer"][-1] = -1

    claims = (Claim("efficiency", "marginal_mean", "grpo", 0.5), Claim("pass@6", "grpo", "", 0.1))
    study = a_study(measures=("aggregated", "pass@5", "pass@6"), claims=claims)
    found = gather(study, make_study(tmp_path / "w", study, edit))
    assert found["largest_k"] == 5
    for arm in study.arms:
        assert [row["k"] for row in found["curves"][arm]["pass_at_k"]] == [1, 2, 3, 4, 5]
        measures = found["arms"][arm]["measures"]
        assert measures["pass@5"]["mean"] is not None and measures["pass@6"]["mean"] is None
    assert found["efficiency"]["marginal_mean"]["samples_a"] <= 5
    assert found["claims"][1]["verdict"] == "open"
    said = write_study(study, found, tmp_path / "report")
    assert "k = 5" in said and "nan" not in said.lower() and "None" not in said


def all_left(*arms):
    """An edit: search of these arms has one strategy alone, so that no set is mixed."""

    def edit(arm, seed, results):
        if arm in arms:
            for record in results["records"]:
                record["search"]["strategy"] = ["left"] * len(record["search"]["answer"])

    return edit


@pytest.mark.parametrize(
    ("arms", "changes"),
    [
        (["base"], {}),
        (["base"], {"measures": ("aggregated", "mixed")}),
        (["grpo"], {"measures": ("right_if_mixed", "aggregated"), "claims": (), "strategies": 0}),
        (
            ["base", "grpo", "marginal_mean"],
            {"measures": ("right_if_mixed", "aggregated"), "claims": (), "strategies": 0},
        ),
    ],
)
def test_a_share_that_is_not_defined_is_a_dash_and_no_point(undrawn, tmp_path, arms, changes):
    study = a_study(**changes)
    found = gather(study, make_study(tmp_path / "w", study, all_left(*arms)))
    said = write_study(study, found, tmp_path / "report")
    assert DASH in said and "None" not in said and "nan" not in said.lower()
    assert json.loads((tmp_path / "report.json").read_text())["arms"].keys() == study.arms.keys()
    assert "report_pass_at_k.png" in said


def test_numbers_are_written_also_where_a_picture_cannot_be(tmp_path, monkeypatch):
    def broken(gathered, out):
        raise OSError("no room for pictures")

    monkeypatch.setattr(text, "plot_study", broken)
    study = a_study()
    found = gather(study, make_study(tmp_path / "w", study))
    with pytest.raises(OSError, match="no room for pictures"):
        write_study(study, found, tmp_path / "report")
    assert (tmp_path / "report.json").exists() and study.title in (
        tmp_path / "report.md"
    ).read_text()


@pytest.mark.parametrize("is_done", [False, True])
def test_entropy_at_the_end_is_that_of_runs_that_have_come_to_one(tmp_path, is_done):
    claim = Claim("entropy", "marginal_mean", "grpo", 0.0)
    study = a_study(claims=(claim,))
    unfinished = [] if is_done else [("marginal_mean", 0), ("marginal_mean", 1)]
    directory = make_study(tmp_path, study, unfinished=unfinished, entropy={"marginal_mean": 0.9})
    (judged,) = gather(study, directory)["claims"]
    assert judged["verdict"] == ("holds" if is_done else "open")
    assert bool(judged["gap"]) == is_done


def test_a_run_that_has_ended_and_was_not_evaluated_yet_counts_for_its_entropy(tmp_path):
    study = a_study(claims=(Claim("entropy", "marginal_mean", "grpo", 0.0),))
    directory = make_study(tmp_path, study, entropy={"marginal_mean": 0.9})
    shutil.rmtree(directory.evaluation("marginal_mean", 0, 3))
    (judged,) = gather(study, directory)["claims"]
    assert judged["verdict"] == "holds"


def test_an_arm_that_a_sweep_gave_up_and_the_file_lists_is_done_where_it_is_done(tmp_path):
    given_up = {"state": GIVEN_UP, "chosen": {}, "value": None, "rungs": 4}
    outcome = {"arms": {"marginal_mean": given_up}, "importance": {}, "direction": {}}
    directory = make_study(tmp_path, a_study(), unfinished=[("marginal_mean", 1)])
    found = gather(a_study(), directory, outcome)
    states = {(run["arm"], run["seed"]): run["state"] for run in found["runs"]}
    assert states["marginal_mean", 0] == "done"
    assert "not done: marginal_mean seed 1" in list_failures(found)


def with_partial_credit(*arms):
    """An edit: aggregations of these arms earn a half each, those of the others nothing."""

    def edit(arm, seed, results):
        for record in results["records"]:
            aggregation = record["aggregation"]
            aggregation["answer"] = [1] * len(aggregation["answer"])
            if arm in arms:
                aggregation["reward"] = [0.5] * len(aggregation["answer"])

    return edit


def test_an_arm_whose_answers_are_right_or_wrong_has_rewards_too(tmp_path):
    study = a_study(measures=("reward", "aggregated"), claims=(), strategies=0)
    arms = gather(study, make_study(tmp_path, study, with_partial_credit("base", "grpo")))["arms"]
    rewards = {arm: row["measures"]["reward"]["mean"] for arm, row in arms.items()}
    assert rewards == {"base": 0.5, "grpo": 0.5, "marginal_mean": 0.0}


def test_a_sweep_reads_the_reward_of_an_arm_whose_answers_are_right_or_wrong(tmp_path, monkeypatch):
    study = a_study(measures=("reward", "aggregated"), claims=(), strategies=0)
    directory = make_study(tmp_path, study, with_partial_credit("base"))
    monkeypatch.setattr(runner.Runner, "run_arm", lambda *arguments: None)  # has been run
    of_study = runner.Runner(study, directory, {}, None, "", {}, Processes(1), study.runs)
    assert of_study.value_of(study, "grpo", lambda rung, reward: False) == 0.0


def test_a_report_is_beside_others_whose_names_have_dots(undrawn, tmp_path):
    study = a_study()
    found = gather(study, make_study(tmp_path / "w", study))
    for name in ("lr_0.1", "lr_0.3"):
        write_study(study, found | {"title": name}, tmp_path / name)
    for name in ("lr_0.1", "lr_0.3"):
        assert json.loads((tmp_path / f"{name}.json").read_text())["title"] == name
        assert (tmp_path / f"{name}.md").exists()
