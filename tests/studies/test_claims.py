"""A study's numbers against oracles: intervals over seeds and problems, gaps, claims, optimum."""

import dataclasses

import numpy as np
import pytest

from spiral_jax.evaluation.measures import Column
from spiral_jax.evaluation.statistics import bootstrap_weights, ratios_and_intervals
from spiral_jax.studies.cells import Cells, estimate, gap, place_of
from spiral_jax.studies.claims import Evidence, judge_claim
from spiral_jax.studies.design import Claim, load_study
from spiral_jax.studies.figures import mean_over_runs
from spiral_jax.studies.optimum import optimum

PROBLEMS = 40
WEIGHTS = bootstrap_weights(0, PROBLEMS, 2000)


@pytest.fixture(scope="module")
def study():
    return load_study("tests/study_small.py")


def cells(shares, seeds=None):
    """A column of 0/1 outcomes for each run: its share right, problems in one order of hardness."""
    hardness = np.random.default_rng(0).random(PROBLEMS)
    columns = []
    for share in shares:
        right = (hardness < share).astype(float)
        columns.append({"aggregated": Column(right[:, None], np.ones((PROBLEMS, 1)))})
    return Cells(list(seeds or range(len(shares))), columns)


def mean_of(column):
    return column["aggregated"].total_BxQ.mean()


def test_one_run_has_the_bootstrap_interval_over_its_problems():
    of_run = cells([0.6])
    got = of_run.estimate("aggregated", WEIGHTS)
    (expected,) = ratios_and_intervals(*of_run.columns[0]["aggregated"], WEIGHTS)
    np.testing.assert_allclose(
        [got["mean"], got["low"], got["high"]],
        [expected.mean, expected.low, expected.high],
        rtol=1e-12,
    )


def test_equal_runs_are_no_more_certain_than_one_since_their_problems_are_the_same():
    one, four = (cells([0.6] * n).estimate("aggregated", WEIGHTS) for n in (1, 4))
    np.testing.assert_allclose([one["low"], one["high"]], [four["low"], four["high"]], rtol=1e-12)


def test_runs_that_differ_widen_the_interval_by_their_own_spread():
    """Variance of a resample's mean: over seeds + over problems + their product, by formula."""
    of_arm = cells([0.2, 0.8, 0.4, 0.9])
    value_R = of_arm.measure("aggregated", range(4), bootstrap_weights(0, PROBLEMS, 20_000))[1:]
    right_ZxB = np.stack([column["aggregated"].total_BxQ[:, 0] for column in of_arm.columns])
    seeds, problems = right_ZxB.mean(axis=1), right_ZxB.mean(axis=0)
    both = (right_ZxB - seeds[:, None] - problems + right_ZxB.mean()).var() / (4 * PROBLEMS)
    expected = seeds.var() / 4 + problems.var() / PROBLEMS + both
    assert value_R.var() == pytest.approx(expected, rel=0.05)


def test_a_ratio_weighs_runs_and_problems_by_their_counts():
    first = Column(np.array([[1.0], [0.0]]), np.array([[1.0], [0.0]]))
    second = Column(np.array([[1.0], [3.0]]), np.array([[4.0], [5.0]]))
    of_arm = Cells([0, 1], [{"aggregated": first}, {"aggregated": second}])
    value_R = of_arm.measure("aggregated", [0, 1], bootstrap_weights(0, 2, 10))
    assert value_R[0] == 5 / 10


def test_a_gap_is_paired_over_problems_and_over_the_seeds_that_both_have():
    a, b = cells([0.5, 0.7, 0.6], seeds=[0, 1, 2]), cells([0.6, 0.5], seeds=[1, 2])
    paired = gap({"a": a, "b": b}, "a", "b", "aggregated", WEIGHTS)
    means = [
        np.mean([mean_of(side.columns[side.seeds.index(seed)]) for seed in (1, 2)])
        for side in (a, b)
    ]
    assert paired["mean"] == pytest.approx(means[0] - means[1]) and paired["seeds"] == 2
    alone = [estimate(side.measure("aggregated", [1, 2], WEIGHTS), 2) for side in (a, b)]
    assert paired["high"] - paired["low"] < min(row["high"] - row["low"] for row in alone)
    no_seed = {"a": cells([0.5], [0]), "b": cells([0.5], [1])}
    assert gap(no_seed, "a", "b", "aggregated", WEIGHTS) is None
    assert gap({"a": a}, "a", "b", "aggregated", WEIGHTS) is None


@pytest.mark.parametrize(
    ("claim", "verdict"),
    [
        (("aggregated", "marginal_mean", "grpo", 0.0), "holds"),
        (("aggregated", "grpo", "marginal_mean", 0.0), "fails"),
        (("aggregated", "marginal_mean", "grpo", 0.4), "open"),
        (("aggregated", "marginal_mean", "grpo", 0.7), "fails"),
        (("aggregated", "marginal_mean", "", 0.6), "holds"),
        (("aggregated", "marginal_mean", "", 0.8), "open"),
        (("aggregated", "grpo", "", 0.8), "fails"),
        (("aggregated", "base", "", 0.0), "open"),
        (("aggregated", "base", "grpo", 0.0), "open"),
        (("aggregated", "marginal_mean", "optimum", -0.9), "open"),
        (("efficiency", "marginal_mean", "grpo", 3.0), "holds"),
        (("efficiency", "marginal_mean", "grpo", 9.0), "fails"),
        (("efficiency", "marginal_mean", "grpo", 5.0), "open"),
        (("efficiency", "base", "grpo", 1.0), "open"),
    ],
)
def test_a_claim_holds_or_fails_only_with_its_whole_interval(study, claim, verdict):
    arms = {"marginal_mean": cells([0.8, 0.85]), "grpo": cells([0.4, 0.42])}
    row = {"ratio": 5.0, "low": 4.0, "high": 6.0, "seeds": 2, "bound": None}
    efficiency = {"marginal_mean": row}
    evidence = Evidence(study, arms, [], efficiency, WEIGHTS)
    assert judge_claim(evidence, Claim(*claim))["verdict"] == verdict


@pytest.mark.parametrize(
    ("bound", "least", "verdict"),
    [
        (None, 3.0, "holds"),
        ("at least", 3.0, "holds"),
        ("at most", 3.0, "open"),
        (None, 9.0, "fails"),
        ("at least", 9.0, "open"),
        ("at most", 9.0, "fails"),
    ],
)
def test_a_bounded_ratio_decides_a_claim_only_in_its_own_direction(study, bound, least, verdict):
    row = {"ratio": 5.0, "low": 4.0, "high": 6.0, "seeds": 2, "bound": bound}
    evidence = Evidence(study, {}, [], {"marginal_mean": row}, WEIGHTS)
    judged = judge_claim(evidence, Claim("efficiency", "marginal_mean", "grpo", least))
    assert judged["verdict"] == verdict and judged["gap"]["bound"] == bound


@pytest.mark.parametrize(
    ("claim", "verdict"),
    [
        (("entropy", "marginal_mean", "grpo", 0.0), "holds"),
        (("entropy", "grpo", "marginal_mean", 0.0), "fails"),
        (("entropy", "marginal_mean", "grpo", 0.11), "open"),
        (("entropy", "grpo", "rloo", 0.0), "open"),
    ],
)
def test_a_claim_of_entropy_is_paired_over_the_seeds_that_both_arms_have(study, claim, verdict):
    ends = {
        "marginal_mean": (0.30, 0.34, 0.9),
        "grpo": (0.20, 0.22),
        "rloo": (None,),
    }
    runs = [
        {"arm": arm, "seed": seed, "entropy_end": end}
        for arm, by_seed in ends.items()
        for seed, end in enumerate(by_seed)
    ]
    runs.append({"arm": "rloo", "seed": 1})  # it has not begun
    judged = judge_claim(Evidence(study, {}, runs, {}, WEIGHTS), Claim(*claim))
    assert judged["verdict"] == verdict and judged["unit"] == "nat"
    if verdict == "holds":  # two seeds: a resample holds one twice in half of all cases
        assert judged["gap"] == pytest.approx({"mean": 0.11, "low": 0.10, "high": 0.12, "seeds": 2})


def test_the_optimum_is_the_best_share_of_mixed_sets_read_as_well_as_the_base_reads(study):
    rng = np.random.default_rng(1)
    count_mixed, count_alike = rng.integers(1, 9, size=(2, PROBLEMS, 1))
    mixed = Column(rng.integers(0, count_mixed + 1).astype(float), count_mixed.astype(float))
    alike = Column(rng.integers(0, count_alike + 1).astype(float), count_alike.astype(float))
    base = cells([0.3])
    base.columns[0].update(right_if_mixed=mixed, right_if_alike=alike)
    arms = {"base": base, "marginal_mean": cells([0.8, 0.85]), "grpo": cells([0.4, 0.42])}

    best = optimum(study, arms, WEIGHTS)
    by_hand = (1 - 2 / 16) * mixed.total_BxQ.sum() / mixed.count_BxQ.sum()
    by_hand += 2 / 16 * alike.total_BxQ.sum() / alike.count_BxQ.sum()
    assert best["aggregated"]["mean"] == pytest.approx(by_hand) and best["mixed"] == 0.875

    evidence = Evidence(study, arms, [], {}, WEIGHTS)
    above = judge_claim(evidence, Claim("aggregated", "grpo", "optimum", 0.0))["gap"]
    grpo = np.mean([mean_of(column) for column in arms["grpo"].columns])
    assert above["mean"] == pytest.approx(grpo - by_hand)
    below = judge_claim(evidence, Claim("aggregated", "optimum", "grpo", 0.0))["gap"]
    mirrored = [-above[end] for end in ("mean", "high", "low")]
    assert [below[end] for end in ("mean", "low", "high")] == pytest.approx(mirrored)
    assert optimum(dataclasses.replace(study, strategies=0), arms, WEIGHTS) is None


def test_an_arms_training_curve_is_the_mean_of_its_runs_at_equal_tokens_while_all_of_them_run():
    runs = [
        {"sampled_tokens": [10, 20, 30], "x": [1.0, None, 1.0]},
        {"sampled_tokens": [5, 30, 50], "x": [2.0] * 3},
    ]
    tokens, value = mean_over_runs(runs, "x")
    assert tokens[0] == 10 and tokens[-1] == 30
    np.testing.assert_allclose(value, 1.5)


def test_measures_are_columns_of_the_evaluation():
    assert place_of("single") == ("single", 0) and place_of("pass@32") == ("pass_at_k", 31)
    assert place_of("maj@1") == ("majority_at_k", 0) and place_of("rsa@2") == ("rsa/single", 2)
    assert place_of("mixed") == ("mixed", 0)
