"""Every estimator's advantages and keep rule against its definition, looped over in fractions.

Outputs are float32, so values agree with exact ones to 1e-6 relative (an ulp is 6e-8; sums of few
terms).
"""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from spiral_jax.core.config import ESTIMATORS
from spiral_jax.core.groups import Stop
from spiral_jax.objective import estimators as adv
from spiral_jax.objective.estimators import Rewards
from spiral_jax.objective.subsets import disjoint_subsets, draw_subsets

NAN = float("nan")
OVER_DRAWN_SETS = ("marginal_mean", "with_without", "disjoint_sets")
OVER_EVERY_SET = ("paragator", "pkpo", "polychromic")
WITHOUT_AGGREGATION = [name for name, plan in ESTIMATORS.items() if plan == "search"]
WITH_AGGREGATION = [name for name in ESTIMATORS if name not in WITHOUT_AGGREGATION]


# ---- the oracle: definitions, looped over in exact arithmetic; NaN rewards are skipped


def mean(values):
    return sum(values, Fraction(0)) / len(values)


def over_sets(estimator, score, n):
    """Advantages from the scores of sets, {members: score}."""
    found = []
    for i in range(n):
        inside = [f for members, f in score.items() if i in members]
        outside = [f for members, f in score.items() if i not in members]
        if estimator == "with_without":
            found.append(mean(inside) - mean(outside) if inside and outside else Fraction(0))
        else:
            found.append(
                mean([f - mean(list(score.values())) for f in inside]) if inside else Fraction(0)
            )
    return found


def own_score(estimator, members, own, strategy):
    right = [own[i] for i in members]
    if estimator == "paragator":
        return max(right, default=Fraction(0))
    strategies = len({strategy[i] for i in members} - {-1})
    return mean(right) * Fraction(strategies if strategies > 1 else 0, len(members))


def search_oracle(estimator, own_N, score, strategy_N, s):
    """(search advantages, whether our own failures left none) of one problem."""
    n, own = len(own_N), {i: Fraction(r) for i, r in enumerate(own_N) if not math.isnan(r)}
    others = lambda i: [r for j, r in own.items() if j != i]  # noqa: E731
    every = list(itertools.combinations(own, s))
    zero = [Fraction(0)] * n
    if estimator in OVER_DRAWN_SETS:
        return over_sets(estimator, score, n), len(score) < 2
    if estimator in ("paragator", "polychromic"):
        scored = {members: own_score(estimator, members, own, strategy_N) for members in every}
        return (over_sets(estimator, scored, n) if scored else zero), len(every) < 2
    if estimator == "pkpo":
        best = lambda members: max((own[i] for i in members), default=Fraction(0))  # noqa: E731
        gains = lambda i: sum(best(I) - best(set(I) - {i}) for I in every if i in I)  # noqa: E731, E741
        return [
            gains(i) / Fraction(len(every)) if i in own and every else Fraction(0) for i in range(n)
        ], not every
    if estimator == "rloo":
        return [
            own[i] - mean(others(i)) if i in own and others(i) else Fraction(0) for i in range(n)
        ], len(own) < 2
    if estimator == "aggregator_only":
        return zero, None
    centred = [own[i] - mean(list(own.values())) if i in own else Fraction(0) for i in range(n)]
    if estimator == "grpo":
        std = math.sqrt(mean([r**2 for i, r in enumerate(centred) if i in own])) if own else 0.0
        centred = [float(r) / (std + 1e-6) for r in centred]
    return centred, len(own) < 2


def oracle(estimator, own_N, aggregated_KxM, subsets, strategy_N):
    """(search advantages, aggregation advantages, kept) of one problem."""
    valid = [[Fraction(r) for r in row if not math.isnan(r)] for row in aggregated_KxM]
    scores = {k: mean(row) for k, row in enumerate(valid) if row}
    score = {tuple(subsets[k]): f for k, f in scores.items()}
    s = len(subsets[0]) if subsets else 0
    search, starved = search_oracle(estimator, own_N, score, strategy_N, s)
    if starved is None:
        starved = all(len(row) < 2 for row in valid)
    aggregation = [
        [Fraction(0) if math.isnan(r) else Fraction(r) - scores[k] for r in row]
        for k, row in enumerate(aggregated_KxM)
    ]
    return (
        search,
        aggregation,
        (any(search) or any(any(row) for row in aggregation)) and not starved,
        starved,
    )


def random_rewards(rng, shape, values):
    return rng.choice(np.array(values, np.float32), size=shape).astype(np.float64)


def check(estimator, rewards):
    got = adv.compute(estimator, rewards)
    assert got.search_BxN.dtype == np.float32 and got.keep_B.dtype == got.starved_B.dtype == bool
    assert (got.aggregation_BxKxM is None) == (estimator in WITHOUT_AGGREGATION)
    of = lambda a, b: [] if a is None else a[b].tolist()  # noqa: E731
    for b in range(len(rewards.own_BxN)):
        parts = (
            rewards.own_BxN,
            rewards.aggregated_BxKxM,
            rewards.member_BxKxS,
            rewards.strategy_BxN,
        )
        given = [of(a, b) for a in parts]
        search, aggregation, kept, starved = oracle(estimator, *given)
        np.testing.assert_allclose(
            got.search_BxN[b], np.array(search, float), rtol=1e-6, atol=0, err_msg=str(given)
        )
        if aggregation:
            np.testing.assert_allclose(
                got.aggregation_BxKxM[b], np.array(aggregation, float), rtol=1e-6, atol=0
            )
        assert (got.keep_B[b], got.starved_B[b]) == (kept, starved), (estimator, given)


def draw(estimator, seed, n, s, k, problems):
    """[B, K, S]: sets as this estimator draws them."""
    of = disjoint_subsets if ESTIMATORS[estimator] == "partition" else draw_subsets
    return np.stack([of(seed, 0, s, b, 0, n, s, k) for b in range(problems)])


def sizes(estimator, n):
    """(S, K) that config_checks lets this estimator have at N = n."""
    for s in range(1, n):
        total = n // s if ESTIMATORS[estimator] == "partition" else math.comb(n, s)
        if not (s < 2 and estimator in ("pkpo", "polychromic")):
            yield from ((s, k) for k in sorted({2, 4, 11, total}) if 2 <= k <= total)


# ---- against the oracle


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_there_is_a_rule_for_every_estimator(estimator):
    assert estimator in adv.RULES and len(adv.RULES) == len(ESTIMATORS)


@pytest.mark.parametrize("estimator", WITH_AGGREGATION)
@pytest.mark.parametrize("n", range(2, 9))
def test_advantages_and_keep_rule_equal_the_definition_at_all_sizes(estimator, n):
    """rtol 1e-6 with atol 0: an advantage that is exactly zero must come out as exactly zero."""
    rng = np.random.default_rng(n)
    exact_own = estimator in OVER_EVERY_SET
    for s, k in sizes(estimator, n):
        for values in ([0, 1], [0, 1, 1, NAN], [NAN, NAN, 0, 1], [0.1, 0.7, 1 / 3]):
            problems = 4 if k <= 11 and n < 7 else 1
            own = random_rewards(
                rng, (problems, n), [0, 1, 1] if exact_own and 0.1 in values else values
            )
            aggregated = random_rewards(rng, (problems, k, 3), values)
            strategy = rng.integers(-1, 3, size=(problems, n))
            check(
                estimator, Rewards(own, aggregated, draw(estimator, n, n, s, k, problems), strategy)
            )


@pytest.mark.parametrize("estimator", WITHOUT_AGGREGATION)
def test_advantages_of_own_correctness_equal_the_definition(estimator):
    rng = np.random.default_rng(3)
    for n in range(2, 9):
        for values in ([0, 1], [0, 0, 0, 1, NAN], [NAN, NAN, NAN, 0, 1], [0.1, 0.7, 1 / 3], [0.1]):
            check(estimator, Rewards(random_rewards(rng, (20, n), values)))


@pytest.mark.parametrize("estimator", [*OVER_EVERY_SET, "online_multitask"])
def test_own_correctness_beside_aggregation_at_every_outcome(estimator):
    """All rewards of N = 5 traces with failures, all aggregations right: the search alone decides
    who is kept.
    """
    own = np.array(list(itertools.product([0.0, 1.0, NAN], repeat=5)))
    for s in (2, 3, 4):
        strategy = np.random.default_rng(s).integers(-1, 2, size=own.shape)
        check(
            estimator,
            Rewards(
                own, np.ones((len(own), 2, 2)), draw(estimator, 0, 5, s, 2, len(own)), strategy
            ),
        )


@pytest.mark.parametrize("estimator", ["marginal_mean", "with_without", "aggregator_only"])
def test_keep_rule_on_sparse_rewards_and_cancelling_sets(estimator):
    """One-sample sets and small N: here sets differ and still cancel at every trace, or have too
    few valid samples.
    """
    rng = np.random.default_rng(5)
    reward = np.array(list(itertools.product([0.0, 1.0], repeat=4)))[
        :, :, None
    ]  # every outcome of K = 4, M = 1
    for chosen in itertools.combinations(
        itertools.combinations(range(4), 2), 4
    ):  # every draw at N = 4, S = 2
        check(
            estimator,
            Rewards(np.zeros((16, 4)), reward, np.broadcast_to(np.array(chosen), (16, 4, 2))),
        )
    sparse = random_rewards(rng, (400, 4, 2), [0, 1, NAN, NAN])
    check(estimator, Rewards(np.zeros((400, 4)), sparse, draw(estimator, 5, 4, 2, 4, 400)))


# ---- what holds of each estimator


def of_sets(aggregated, member, n):
    return Rewards(np.zeros((len(aggregated), n)), np.array(aggregated, float), np.array(member))


def test_sets_that_differ_but_cancel_at_every_trace_are_dropped():
    reward = np.array([1.0, 1.0, 0.0, 0.0]).reshape(1, 4, 1) * np.ones((1, 4, 3))
    for estimator in ("marginal_mean", "with_without"):
        got = adv.compute(estimator, of_sets(reward, [[[0, 1], [2, 3], [0, 2], [1, 3]]], 4))
        assert not got.search_BxN.any() and not got.aggregation_BxKxM.any() and not got.keep_B[0]


def test_equal_thirds_from_different_counts_give_exactly_no_search_advantage():
    reward = [[[1, 0, 0, NAN, NAN, NAN], [0, 1, 0, 1, 0, 0], [NAN, 0, NAN, 0, NAN, 1]]]
    member = [[[0, 1], [1, 2], [0, 3]]]
    for estimator in ("marginal_mean", "with_without"):
        got = adv.compute(estimator, of_sets(reward, member, 4))
        assert not got.search_BxN.any() and got.aggregation_BxKxM.any() and got.keep_B[0]
    flat = np.full((1, 3, 3), np.float32(0.1))  # 0.1 + 0.1 + 0.1 != 3 * 0.1 in floats
    for estimator in ("marginal_mean", "with_without", "aggregator_only"):
        got = adv.compute(estimator, of_sets(flat, member, 4))
        assert not got.search_BxN.any() and not got.aggregation_BxKxM.any() and not got.keep_B[0]


@pytest.mark.parametrize("value", [0.0, 1.0, NAN])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_all_correct_all_wrong_and_all_failed_problems_are_flat_and_dropped(estimator, value):
    own, strategy = np.full((3, 8), value), np.tile(np.arange(8), (3, 1))
    with_sets = (np.full((3, 2, 4), value), draw(estimator, 0, 8, 4, 2, 3), strategy)
    got = adv.compute(
        estimator, Rewards(own, *(with_sets if estimator in WITH_AGGREGATION else ()))
    )
    assert not got.search_BxN.any() and not got.keep_B.any()
    assert estimator in WITHOUT_AGGREGATION or not got.aggregation_BxKxM.any()
    assert got.starved_B.all() == math.isnan(value)


def test_a_problem_with_one_valid_set_is_starved_where_sets_are_compared():
    reward = np.full((1, 3, 2), NAN)
    reward[0, 1] = [0, 1]
    rewards = Rewards(np.array([[1.0, 0.0, 0.0]]), reward, np.array([[[0, 1], [1, 2], [0, 2]]]))
    for estimator in OVER_DRAWN_SETS:
        got = adv.compute(estimator, rewards)
        assert got.starved_B[0] and not got.keep_B[0] and not got.search_BxN.any()
    for estimator in ("aggregator_only", "online_multitask", "paragator"):
        got = adv.compute(estimator, rewards)
        assert got.keep_B[0] and not got.starved_B[0]
        np.testing.assert_array_equal(got.aggregation_BxKxM[0, 1], [-0.5, 0.5])


def test_a_failed_own_verdict_is_nothing_to_estimators_over_drawn_sets():
    reward = np.array([[[1.0, 0.0], [0.0, 0.0]]])
    member = np.array([[[0, 1], [2, 3]]])
    for estimator in OVER_DRAWN_SETS:
        given = [
            adv.compute(estimator, Rewards(np.full((1, 4), own), reward, member))
            for own in (0.0, NAN)
        ]
        np.testing.assert_array_equal(given[0].search_BxN, given[1].search_BxN)
        assert given[1].keep_B[0]


@pytest.mark.parametrize("n, c, k, right, wrong", [  # loo-1 of the published test vectors
    (4, 2, 2, 1 / 3, 0), (8, 1, 2, 0.25, 0), (8, 1, 4, 0.5, 0), (8, 7, 2, 1 / 28, 0),
])  # fmt: skip
def test_pkpo_gives_the_published_leave_one_out_minus_one_vectors(n, c, k, right, wrong):
    rewards = Rewards(np.arange(n)[None] < c, np.ones((1, 2, 2)), draw("pkpo", 0, n, k, 2, 1))
    np.testing.assert_allclose(
        adv.compute("pkpo", rewards).search_BxN[0], [right] * c + [wrong] * (n - c), rtol=1e-6
    )


def test_paragator_is_the_formula_of_its_paper():
    """A(right) = 1 - mu, A(wrong) = 1 - mu - C(wrong - 1, k - 1) / C(N - 1, k - 1), mu = pass@k of
    the N traces.
    """
    n, k = 8, 4
    for c in range(1, n):
        mu = 1 - math.comb(n - c, k) / math.comb(n, k)
        wrong = 1 - mu - math.comb(n - c - 1, k - 1) / math.comb(n - 1, k - 1)
        rewards = Rewards(
            np.arange(n)[None] < c, np.ones((1, 2, 2)), draw("paragator", 0, n, k, 2, 1)
        )
        got = adv.compute("paragator", rewards).search_BxN[0]
        np.testing.assert_allclose(got, [1 - mu] * c + [wrong] * (n - c), rtol=1e-6, atol=1e-16)


def test_polychromic_wants_right_traces_of_different_strategies():
    """Of two right traces the one with the rarer strategy is worth more; sets of one strategy score
    nothing.
    """
    own, strategy = np.array([[1.0, 1, 0, 0]]), np.array([[0, 1, 0, 0]])
    rewards = Rewards(own, np.ones((1, 2, 2)), draw("polychromic", 0, 4, 2, 2, 1), strategy)
    got = adv.compute("polychromic", rewards).search_BxN[0]
    # f_poly of {0,1}: 1 * 1; of {1,2}, {1,3}: 1/2; of the others, one strategy each, 0; mean 1/3
    np.testing.assert_allclose(
        got, [1 / 3 - 1 / 3, 2 / 3 - 1 / 3, 1 / 6 - 1 / 3, 1 / 6 - 1 / 3], rtol=1e-6
    )
    rewards = Rewards(
        own, np.ones((1, 2, 2)), draw("polychromic", 0, 4, 2, 2, 1), np.full((1, 4), -1)
    )
    assert not adv.compute("polychromic", rewards).keep_B[0]


@pytest.mark.parametrize("gate, kept", [
    # only what the limit cut off; a stop id as the last allowed token is no cut
    (0.0, [1, 1, 1, 0]),
    (0.5, [1, 1, 0, 0]), (0.49, [1, 0, 0, 0]), (1.0, [1, 1, 1, 1]),
    (50, [1, 1, 0, 0]), (51, [1, 1, 0, 0]), (49.5, [1, 0, 0, 0]), (10, [1, 0, 0, 0]), (9, [0, 0, 0, 0]),
    (100, [1, 1, 1, 1]), (1000, [1, 1, 1, 1]),
])  # fmt: skip
def test_length_gate_zeroes_only_positive_advantages_of_longer_traces(gate, kept):
    length = np.array([10, 50, 100, 100])
    stop = np.array([Stop.STOP, Stop.STOP, Stop.STOP, Stop.LENGTH])
    advantage = np.array([[0.5] * 4, [-0.5] * 4, [0.0] * 4], np.float32)
    got = adv.length_gate(advantage, np.tile(length, (3, 1)), np.tile(stop, (3, 1)), 100, gate)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, [0.5 * np.array(kept), [-0.5] * 4, [0.0] * 4])


def test_a_trace_at_exactly_its_share_of_the_limit_passes_the_gate():
    for percent in range(1, 101):  # 0.57 * 100 < 57 in floats
        length = np.array([percent, percent + 1])
        got = adv.length_gate(np.ones(2), length, np.zeros(2, int), 100, percent / 100)
        assert got.tolist() == [1, 0]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_empty_batch_stays_empty(estimator):
    with_sets = (np.zeros((0, 4, 2)), np.zeros((0, 4, 2), int), np.zeros((0, 8), int))
    got = adv.compute(
        estimator, Rewards(np.zeros((0, 8)), *(with_sets if estimator in WITH_AGGREGATION else ()))
    )
    assert got.search_BxN.shape == (0, 8) and got.keep_B.shape == got.starved_B.shape == (0,)
    assert estimator in WITHOUT_AGGREGATION or got.aggregation_BxKxM.shape == (0, 4, 2)


SETS = (np.zeros((1, 2, 2)), np.zeros((1, 2, 3), int))


@pytest.mark.parametrize("call, words", [
    (lambda: adv.compute("reinforce", Rewards(np.zeros((1, 4)))), "'reinforce': must be one of marginal_mean"),
    (lambda: adv.compute("pkpo", Rewards(np.full((1, 4), 0.5), *SETS)), "must be 0, 1 or NaN"),
    (lambda: adv.compute("polychromic", Rewards(np.full((1, 4), 2.0), *SETS, np.zeros((1, 4)))), "must be 0, 1 or NaN"),
    (lambda: Rewards(np.zeros((1, 2, 2))), r"own \[B, N\]"),
    (lambda: Rewards(np.zeros((1, 4)), np.zeros((1, 2, 2))), r"\(1, 4\), \(1, 2, 2\), None"),
    (lambda: Rewards(np.zeros((1, 4)), np.zeros((1, 3, 2)), np.zeros((1, 2, 4), int)), "got"),
    (lambda: Rewards(np.zeros((2, 4)), *SETS), "got"),
    (lambda: adv.length_gate(np.zeros(1), np.ones(1), np.zeros(1), 9, -0.5), "length_gate = -0.5"),
    (lambda: adv.length_gate(np.zeros(1), np.ones(1), np.zeros(1), 9, NAN), "length_gate = nan"),
])  # fmt: skip
def test_bad_input_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
