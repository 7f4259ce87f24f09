"""A study's numbers against oracles, and what its configuration refuses."""

import pathlib

import numpy as np
import pytest

from spiral_jax.core.config import ConfigError
from spiral_jax.evaluation.measures import Column
from spiral_jax.evaluation.statistics import bootstrap_weights, ratios_and_intervals
from spiral_jax.studies import design as plan
from spiral_jax.studies import figures as plots
from spiral_jax.studies.cells import Cells, column_of, estimate, gap
from spiral_jax.studies.claims import judged
from spiral_jax.studies.optimum import optimum

FILE = "tests/study_small.py"
PROBLEMS = 40
WEIGHTS = bootstrap_weights(0, PROBLEMS, 2000)


def cells(shares, seeds=None, spread=0.0):
    """One column of 0/1 outcomes for each run: its share right, problems in the same order of
    difficulty.
    """
    rng = np.random.default_rng(0)
    hardness = rng.random(PROBLEMS)
    found = []
    for share in shares:
        right = (hardness + spread * rng.normal(size=PROBLEMS) < share).astype(float)
        found.append({"aggregated": Column(right[:, None], np.ones((PROBLEMS, 1)))})
    return Cells(list(seeds or range(len(shares))), found)


def test_one_run_has_the_bootstrap_interval_over_its_problems():
    of = cells([0.6])
    got = estimate(of.measure("aggregated", [0], WEIGHTS), 1)
    (expected,) = ratios_and_intervals(*of.columns[0]["aggregated"], WEIGHTS)
    np.testing.assert_allclose(
        [got["mean"], got["low"], got["high"]],
        [expected.mean, expected.low, expected.high],
        rtol=1e-12,
    )


def test_equal_runs_are_no_more_certain_than_one_since_their_problems_are_the_same():
    one, four = (
        estimate(cells([0.6] * n).measure("aggregated", range(n), WEIGHTS), n) for n in (1, 4)
    )
    np.testing.assert_allclose([one["low"], one["high"]], [four["low"], four["high"]], rtol=1e-12)


def test_runs_that_differ_widen_the_interval_by_their_own_spread():
    """Variance of a resample's mean = over seeds + over problems, each by its own formula, up to
    their product.
    """
    of = cells([0.2, 0.8, 0.4, 0.9])
    value_R = of.measure("aggregated", range(4), bootstrap_weights(0, PROBLEMS, 20_000))[1:]
    right_ZxB = np.stack([column["aggregated"].total_BxQ[:, 0] for column in of.columns])
    seeds, problems = right_ZxB.mean(axis=1), right_ZxB.mean(axis=0)
    both = (right_ZxB - seeds[:, None] - problems + right_ZxB.mean()).var() / (4 * PROBLEMS)
    assert value_R.var() == pytest.approx(
        seeds.var() / 4 + problems.var() / PROBLEMS + both, rel=0.05
    )


def test_a_ratio_weighs_runs_and_problems_by_their_counts():
    columns = [{"aggregated": Column(np.array([[1.0], [0.0]]), np.array([[1.0], [0.0]]))},
               {"aggregated": Column(np.array([[1.0], [3.0]]), np.array([[4.0], [5.0]]))}]  # fmt: skip
    assert (
        Cells([0, 1], columns).measure("aggregated", [0, 1], bootstrap_weights(0, 2, 10))[0]
        == 5 / 10
    )


def test_a_gap_is_paired_over_problems_and_over_the_seeds_that_both_have():
    a, b = cells([0.5, 0.7, 0.6], seeds=[0, 1, 2]), cells([0.6, 0.5], seeds=[1, 2])
    found = gap({"a": a, "b": b}, "a", "b", "aggregated", WEIGHTS)
    means = [
        np.mean([of.columns[of.seeds.index(s)]["aggregated"].total_BxQ.mean() for s in (1, 2)])
        for of in (a, b)
    ]
    assert found["mean"] == pytest.approx(means[0] - means[1]) and found["seeds"] == 2
    alone = [estimate(of.measure("aggregated", [1, 2], WEIGHTS), 2) for of in (a, b)]
    assert found["high"] - found["low"] < min(one["high"] - one["low"] for one in alone)
    assert (
        gap({"a": cells([0.5], [0]), "b": cells([0.5], [1])}, "a", "b", "aggregated", WEIGHTS)
        is None
    )
    assert gap({"a": a}, "a", "b", "aggregated", WEIGHTS) is None


@pytest.mark.parametrize("claim, verdict", [
    (("aggregated", "marginal_mean", "grpo", 0.0), "holds"), (("aggregated", "grpo", "marginal_mean", 0.0), "fails"),
    (("aggregated", "marginal_mean", "grpo", 0.4), "open"), (("aggregated", "marginal_mean", "grpo", 0.7), "fails"),
    (("aggregated", "marginal_mean", "", 0.6), "holds"), (("aggregated", "marginal_mean", "", 0.8), "open"),
    (("aggregated", "grpo", "", 0.8), "fails"), (("aggregated", "base", "", 0.0), "open"),
    (("aggregated", "base", "grpo", 0.0), "open"), (("aggregated", "marginal_mean", "optimum", -0.9), "open"),
    (("efficiency", "marginal_mean", "grpo", 3.0), "holds"), (("efficiency", "marginal_mean", "grpo", 9.0), "fails"),
    (("efficiency", "marginal_mean", "grpo", 5.0), "open"), (("efficiency", "base", "grpo", 1.0), "open"),
])  # fmt: skip
def test_a_claim_holds_or_fails_only_with_its_whole_interval(claim, verdict):
    study = plan.load_study(FILE)
    done = {"marginal_mean": cells([0.8, 0.85]), "grpo": cells([0.4, 0.42])}
    efficiency = {"marginal_mean": {"ratio": 5.0, "low": 4.0, "high": 6.0, "seeds": 2}}
    assert judged(study, done, [], efficiency, claim, WEIGHTS)["verdict"] == verdict


ENDS = {("marginal_mean", 0): 0.30, ("marginal_mean", 1): 0.34, ("marginal_mean", 2): 0.9, ("grpo", 0): 0.20,
        ("grpo", 1): 0.22, ("rloo", 0): None}  # fmt: skip


@pytest.mark.parametrize("claim, verdict", [
    (("entropy", "marginal_mean", "grpo", 0.0), "holds"), (("entropy", "grpo", "marginal_mean", 0.0), "fails"),
    (("entropy", "marginal_mean", "grpo", 0.11), "open"), (("entropy", "grpo", "rloo", 0.0), "open"),
])  # fmt: skip
def test_a_claim_of_entropy_is_paired_over_the_seeds_that_both_arms_have(claim, verdict):
    runs = [{"arm": arm, "seed": seed, "entropy_end": end} for (arm, seed), end in ENDS.items()]
    runs.append({"arm": "rloo", "seed": 1})  # it has not begun
    found = judged(plan.load_study(FILE), {}, runs, {}, claim, WEIGHTS)
    assert found["verdict"] == verdict and found["unit"] == "nat"
    if verdict == "holds":  # two seeds: a resample holds one twice in half of all cases
        assert found["gap"] == pytest.approx({"mean": 0.11, "low": 0.10, "high": 0.12, "seeds": 2})


def test_the_optimum_is_the_best_share_of_mixed_sets_read_as_well_as_the_base_reads():
    study = plan.load_study(FILE)
    rng = np.random.default_rng(1)
    mixed, alike = (Column(rng.integers(0, count + 1).astype(float), count.astype(float)) for count in
                    rng.integers(1, 9, size=(2, PROBLEMS, 1)))  # fmt: skip
    base = cells([0.3])
    base.columns[0].update(right_if_mixed=mixed, right_if_alike=alike)
    done = {"base": base, "marginal_mean": cells([0.8, 0.85]), "grpo": cells([0.4, 0.42])}
    best = optimum(study, done, WEIGHTS)
    by_hand = (1 - 2 / 16) * mixed.total_BxQ.sum() / mixed.count_BxQ.sum()
    by_hand += 2 / 16 * alike.total_BxQ.sum() / alike.count_BxQ.sum()
    assert best["aggregated"]["mean"] == pytest.approx(by_hand) and best["mixed"] == 0.875
    found = judged(study, done, [], {}, ("aggregated", "grpo", "optimum", 0.0), WEIGHTS)["gap"]
    grpo = np.mean([column["aggregated"].total_BxQ.mean() for column in done["grpo"].columns])
    assert found["mean"] == pytest.approx(grpo - by_hand)
    other_way = judged(study, done, [], {}, ("aggregated", "optimum", "grpo", 0.0), WEIGHTS)["gap"]
    assert [other_way[end] for end in ("mean", "low", "high")] == pytest.approx(
        [-found[end] for end in ("mean", "high", "low")]
    )
    with study.s.unlocked():
        study.s.strategies = 0
    assert optimum(study, done, WEIGHTS) is None


def test_an_arms_training_curve_is_the_mean_of_its_runs_at_equal_tokens_while_all_of_them_run():
    runs = [
        {"sampled_tokens": [10, 20, 30], "x": [1.0, None, 1.0]},
        {"sampled_tokens": [5, 30, 50], "x": [2.0] * 3},
    ]
    tokens, value = plots._mean_curve(runs, "x")
    assert tokens[0] == 10 and tokens[-1] == 30
    np.testing.assert_allclose(value, 1.5)


def test_measures_are_columns_of_the_evaluation():
    assert column_of("single") == ("single", 0) and column_of("pass@32") == ("pass_at_k", 31)
    assert column_of("maj@1") == ("majority_at_k", 0) and column_of("rsa@2") == ("rsa/single", 2)
    assert column_of("mixed") == ("mixed", 0)


# ---- the configuration


@pytest.mark.parametrize("changes, words", [
    ({"arms": (("base", ()),)}, r"arms.base = \[\]: must be different seeds"),
    ({"arms": (("grpo", (0, 0)),)}, "different seeds"),
    ({"arms": (("grpo", (0,)), ("grpo", (1,)))}, "each once"),
    ({"arms": (("evaluation", (0,)), ("grpo", (0,)))}, "reserved name"),
    ({"baseline": "rloo"}, "baseline = 'rloo': must be one of the arms"),
    ({"measures": ("pass@9",)}, "'pass@9' must be .*eval.n = 8"),
    ({"measures": ("rsa@2",)}, "eval.rounds = 1"),
    ({"measures": ("accuracy",)}, "'accuracy' must be"),
    # of `aggregated` alone
    ({"claims": (("single", "grpo", "optimum", 0.0),)}, "claims: .*'optimum'"),
    ({"strategies": 1}, "strategies = 1: must be 0 or at least 2"),
    ({"arms": (("grpo", (0,)),), "cross": (), "claims": ()}, "strategies = 2: .*without the arm base"),
    ({"cross": ("grpo", "rloo")}, r"cross = \('grpo', 'rloo'\): must be of the arms base, marginal_mean, grpo"),
    ({"arms": (("a+b", (0,)), ("grpo", (0,)))}, "without"),
    ({"claims": (("aggregated", "rloo", "grpo", 0.0),)}, "of base, marginal_mean, grpo, optimum"),
    ({"claims": (("efficiency", "grpo", "marginal_mean", 3.0),)}, "efficiency"),
    ({"claims": (("entropy", "grpo", "base", 0.0),)}, "of two that are trained"),
    ({"claims": (("entropy", "grpo", "", 0.0),)}, "of two that are trained"),
])  # fmt: skip
def test_a_study_that_cannot_be_is_refused(changes, words, monkeypatch):
    study = plan.load_study(FILE)
    with study.s.unlocked():
        study.s.update(changes)
    with pytest.raises(ConfigError, match=words):
        plan._check(study)


@pytest.mark.parametrize("path", ["configs/nothing.py", f"{FILE}:grpo"])
def test_a_file_that_is_no_study_is_refused(path):
    with pytest.raises(ConfigError, match="must be a file of configs/"):
        plan.load_study(path)
    with pytest.raises(ConfigError, match="plan.defaults"):
        plan.load_study("tests/study_of_nothing.py")


@pytest.mark.parametrize(
    "file", sorted(pathlib.Path("configs").glob("study_*.py")), ids=lambda file: file.stem
)
def test_the_studies_of_configs_are_whole(file):
    study = plan.load_study(str(file))
    assert study.s.claims
    ceiling, budget = (672, 800_000) if file.stem == "study_end_digit" else (400, 540_000)
    for arm, c in study.experiments.items():
        row = plan.arm_row(c)
        assert ceiling <= row["ceiling"] <= 1.04 * ceiling, arm
        of_arm = 1_400_000 if arm.endswith("_long") else budget
        assert row["token budget"] == of_arm and row["lr"] == 3e-4 and c.eval.problems == 0


def test_two_halves_leaves_no_arm_room_for_both_halves_and_its_aggregators_none_for_one():
    """16 tokens: the least that one half costs, see test_two_halves.py."""
    for c in plan.load_study("configs/study_two_halves.py").experiments.values():
        assert c.search.max_tokens < 2 * 16 and c.aggregation.max_tokens < 16
