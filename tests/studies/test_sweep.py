"""Which arms a sweep tries and gives up, and what it says of the choices; nothing is trained."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from spiral_jax.core.config import ConfigError
from spiral_jax.studies import sweep
from spiral_jax.studies.design import load_study
from spiral_jax.studies.directory import StudyDirectory
from spiral_jax.studies.processes import Processes
from spiral_jax.studies.rungs import GIVEN_UP, RUNGS, rewards_of_rungs

FILE = "tests/study_small.py"


def test_an_arm_that_stays_behind_is_given_up_and_not_tried_again(tmp_path):
    study, directory = load_study(FILE), StudyDirectory(tmp_path)
    study.module.propose = lambda trial: f"N{trial.suggest_int('N', 5, 14)}"
    asked = {}

    def run(study, arm, gives_up):
        """The more traces, the better, from the first rung on."""
        asked[arm] = 0
        for rung in range(RUNGS):
            asked[arm] += 1
            if gives_up(rung, float(arm[1:])):
                return None
        return float(arm[1:])

    sweep.sweep(study, directory, 9, Processes(1), run)
    found = sweep.outcome(directory)
    arms = found["arms"]
    assert list(arms) == list(asked) and len(arms) == 9
    given_up = [arm for arm, row in arms.items() if row["state"] == GIVEN_UP]
    done = [arm for arm, row in arms.items() if row["state"] == "done"]
    assert given_up and sorted([*given_up, *done]) == sorted(arms)
    for arm in given_up:  # it stood below the median of those before it, after the first rungs
        before = [other for other in list(arms)[: list(arms).index(arm)] if asked[other] >= 4]
        assert len(before) >= 5 and asked[arm] == arms[arm]["rungs"] == 4
        assert int(arm[1:]) < np.median([int(other[1:]) for other in before])
        assert arms[arm]["value"] is None
    assert found["importance"] == {"N": 1.0} and found["direction"]["N"] == pytest.approx(1)

    asked.clear()
    sweep.sweep(study, directory, 9, Processes(1), run)
    assert asked == {}


def test_the_direction_of_a_choice_is_spearmans(tmp_path):
    study, directory = load_study(FILE), StudyDirectory(tmp_path)
    study.module.propose = lambda trial: (
        f"N{10 * trial.suggest_int('tens', 1, 3) + trial.suggest_int('ones', 2, 9)}"
    )
    rng = np.random.default_rng(0)
    sweep.sweep(study, directory, 6, Processes(1), lambda *_: float(rng.integers(4)))
    found = sweep.outcome(directory)
    values = [row["value"] for row in found["arms"].values()]
    for name in ("tens", "ones"):
        chosen = [row["chosen"][name] for row in found["arms"].values()]
        assert found["direction"][name] == pytest.approx(spearmanr(chosen, values).statistic)
    assert sum(found["importance"].values()) == pytest.approx(1)


def test_the_reward_of_a_rung_is_the_mean_of_its_steps():
    experiment = load_study(FILE).experiments["marginal_mean"]
    assert experiment.plain["train"]["steps"] == 3
    steps = [
        {"sampling/generated_tokens": 1.0, "reward/aggregated": reward} for reward in (1, 2, 6)
    ]
    assert rewards_of_rungs(experiment, []) == []
    none = [None] * 3
    assert rewards_of_rungs(experiment, steps[:1]) == none  # a third: in the fourth rung
    assert rewards_of_rungs(experiment, steps[:2]) == [*none, 1.0, None, None]
    whole = rewards_of_rungs(experiment, steps)
    assert whole == [*none, 1.0, None, None, 2.0, None, None, 6.0]


def test_a_study_without_a_proposal_is_not_swept(tmp_path):
    without = load_study("configs/study_two_halves.py")
    with pytest.raises(ConfigError, match=r"study_two_halves\.py: .*propose\(trial\)"):
        sweep.sweep(without, StudyDirectory(tmp_path), 1, Processes(1), lambda *_: None)
