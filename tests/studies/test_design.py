"""What a study's configuration says, and what it refuses."""

import pathlib

import optuna
import pytest

from spiral_jax.core.config import ConfigError
from spiral_jax.studies.design import load_study

FILE = "tests/study_small.py"
CHANGED = """
import study_small


def get_config(name=""):
    s = study_small.get_config(name)
    if not name:
        with s.unlocked():
            s.update({changes!r})
    return s
"""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arms": (("base", ()),)}, r"arms\.base = \[\]: .*different seeds"),
        ({"arms": (("grpo", (0, 0)),)}, r"arms\.grpo = \[0, 0\]: .*different seeds"),
        ({"arms": (("grpo", (0,)), ("grpo", (1,)))}, "baseline = .*each once"),
        ({"arms": (("evaluation", (0,)), ("grpo", (0,)))}, r"arms\.evaluation = .*reserved"),
        ({"arms": (("a+b", (0,)), ("grpo", (0,)))}, r'arms\.a\+b = .*without "\+" and "@"'),
        ({"arms": (("a@1", (0,)), ("grpo", (0,)))}, r'arms\.a@1 = .*without "\+" and "@"'),
        ({"baseline": "rloo"}, "baseline = 'rloo': .*'marginal_mean', 'grpo'"),
        ({"measures": ("pass@9",)}, r"measures: 'pass@9' .*eval\.n = 8"),
        ({"measures": ("rsa@2",)}, r"measures: 'rsa@2' .*eval\.rounds = 1"),
        ({"measures": ("accuracy",)}, "measures: 'accuracy' .*single, aggregated"),
        ({"strategies": 1}, "strategies = 1: .*at least 2"),
        (
            {"arms": (("grpo", (0,)),), "cross": (), "claims": ()},
            "strategies = 2: .*without the arm base",
        ),
        (
            {"cross": ("grpo", "rloo")},
            r"cross = \('grpo', 'rloo'\): .*base, marginal_mean, grpo",
        ),
        # of `aggregated` alone
        ({"claims": (("single", "grpo", "optimum", 0.0),)}, "claims: .*'optimum'"),
        (
            {"claims": (("aggregated", "rloo", "grpo", 0.0),)},
            "claims: .*'rloo'.*of base, marginal_mean, grpo, optimum",
        ),
        ({"claims": (("efficiency", "grpo", "marginal_mean", 3.0),)}, "claims: .*'efficiency'"),
        ({"claims": (("entropy", "grpo", "base", 0.0),)}, "claims: .*of two that are trained"),
        ({"claims": (("entropy", "grpo", "", 0.0),)}, "claims: .*of two that are trained"),
        # a side against itself, and the optimum against nothing, say nothing
        ({"claims": (("aggregated", "optimum", "", 0.5),)}, "claims: .*two different"),
        ({"claims": (("aggregated", "optimum", "optimum", 0.0),)}, "claims: .*two different"),
        ({"claims": (("aggregated", "grpo", "grpo", 0.0),)}, "claims: .*two different"),
        ({"claims": (("efficiency", "grpo", "grpo", 1.0),)}, "claims: .*two different"),
    ],
)
def test_a_study_that_cannot_be_is_refused(changes, words, tmp_path):
    file = tmp_path / "study_changed.py"
    file.write_text(CHANGED.format(changes=changes))
    with pytest.raises(ConfigError, match=words):
        load_study(str(file))


def test_an_arm_that_cannot_be_is_refused_by_name(tmp_path):
    file = tmp_path / "study_changed.py"
    arms = (("grpo", (0,)), ("gpro", (0,)))
    changes = {"arms": arms, "strategies": 0, "cross": (), "claims": ()}
    file.write_text(CHANGED.format(changes=changes))
    with pytest.raises(ConfigError, match="arm gpro: .*loss.estimator = 'gpro'"):
        load_study(str(file))


def test_equal_operations_need_checkpoints_on_the_way(tmp_path):
    file = tmp_path / "study_changed.py"
    text = CHANGED.format(changes={"equal_operations": True})
    file.write_text(text)
    assert load_study(str(file)).equal_operations
    without = "    else:\n        s.checkpoint.keep_every = 0\n    return s"
    file.write_text(text.replace("    return s", without))
    with pytest.raises(ConfigError, match="arm marginal_mean: checkpoint.*keep_every = 0: must be"):
        load_study(str(file))


@pytest.mark.parametrize(
    "path", ["configs/nothing.py", f"{FILE}:grpo", "tests/study_of_nothing.py"]
)
def test_a_file_that_is_no_study_is_refused(path):
    with pytest.raises(ConfigError, match=f"--config={path}: .*must"):
        load_study(path)


FILES = sorted(pathlib.Path("configs").glob("study_*.py"))
# output tokens a problem, and sampled tokens of a run; of studies on two halves that name no others
_BUDGETS = {
    "study_balance": (672, 400_000),
    "study_end_digit": (672, 800_000),
    "study_estimators_end_digit": (672, 800_000),
    "study_estimators_three_parts": (352, 300_000),
    "study_rounds": (400, 4_400_000),
    "study_rounds_three_parts": (352, 600_000),
    "study_smollm2": (768, 500_000),
}
_TWO_HALVES, _LONG = (400, 540_000), 1_400_000
# arms whose problems cost more, of which a step has fewer
_DEAR = {"study_rounds/replay": 592, "study_rounds_three_parts/replay": 544}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_studies_of_configs_are_whole(file):
    study = load_study(str(file))
    assert study.claims
    ceiling, tokens = _BUDGETS.get(file.stem, _TWO_HALVES)
    lr = 1e-4 if file.stem == "study_smollm2" else 3e-4
    for arm, experiment in study.experiments.items():
        budget = experiment.budget()
        of_arm = _DEAR.get(f"{file.stem}/{arm}", ceiling)
        assert of_arm <= budget["ceiling"] <= 1.04 * of_arm, arm
        assert budget["token budget"] == (_LONG if arm.endswith("_long") else tokens)
        assert budget["lr"] == lr and experiment.plain["eval"]["problems"] == 0


def test_every_balance_that_a_sweep_proposes_spends_what_the_listed_one_does():
    study = load_study("configs/study_balance.py")
    trials = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    asked = [study.module.propose(trials.ask()) for _ in range(30)]
    swept = study.with_proposed([arm for arm in asked if arm])
    assert len(swept.proposed) > 5
    for experiment in swept.experiments.values():
        assert 0.9 * 672 <= experiment.budget()["ceiling"] <= 672


def test_two_halves_leaves_no_arm_room_for_both_halves_and_its_aggregators_none_for_one():
    """16 tokens: the least that one half costs, see test_two_halves.py."""
    for experiment in load_study("configs/study_two_halves.py").experiments.values():
        assert experiment.plain["search"]["max_tokens"] < 2 * 16
        assert experiment.plain["aggregation"]["max_tokens"] < 16
