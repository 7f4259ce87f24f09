"""Every estimator's advantages and keep rule against its definition, looped over in fractions.

Advantages are float32: they agree with exact ones to 1e-6 relative (an ulp is 6e-8; sums of few
terms).
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest

from spiral_jax.objective.advantages import FractionalRewards, compute_advantages
from spiral_jax.objective.estimators import ESTIMATORS
from spiral_jax.objective.rewards import Rewards
from spiral_jax.objective.subsets import Key, disjoint_subsets, draw_subsets
from spiral_jax.verifier.rewards import judge

NAN = float("nan")
ZERO = Fraction(0)
OVER_DRAWN_SETS = ("marginal_mean", "with_without", "disjoint_sets", "set_control_variate")
OVER_EVERY_SET = ("paragator", "pkpo", "polychromic")
WITH_AGGREGATION = [name for name, row in ESTIMATORS.items() if row.aggregates]
WITHOUT_AGGREGATION = [name for name, row in ESTIMATORS.items() if not row.aggregates]


# --- the oracle: definitions in exact arithmetic, NaN rewards left out --------------------------


@dataclasses.dataclass(frozen=True)
class Given:
    """What one problem's traces have earned, without what was lost to our failures.

    Attributes:
      n, s: traces; traces of a set.
      own: own reward by trace.
      aggregated: valid rewards of each drawn set.
      score: their mean by the set's members; sets without any are left out.
      strategy: of each trace.
      c: of the control variate.
    """

    n: int
    s: int
    own: dict[int, Fraction]
    aggregated: list[list[Fraction]]
    score: dict[tuple[int, ...], Fraction]
    strategy: list[int]
    c: Fraction

    @property
    def every_set(self):
        return list(itertools.combinations(self.own, self.s))


class Expected(NamedTuple):
    """Advantages of the traces that are read, and whether our failures left no signal."""

    advantage_N: list[Fraction | float]
    starved: bool


Oracle = Callable[[Given], Expected]


def mean(values):
    values = list(values)
    return sum(values, ZERO) / len(values)


def against_all(score, n):
    """For each of n traces: mean score of its sets - mean score of all."""
    overall = mean(score.values()) if score else ZERO
    advantage_N = []
    for i in range(n):
        inside = [f for members, f in score.items() if i in members]
        advantage_N.append(mean(inside) - overall if inside else ZERO)
    return advantage_N


def against_those_without(score, n):
    advantage_N = []
    for i in range(n):
        inside = [f for members, f in score.items() if i in members]
        outside = [f for members, f in score.items() if i not in members]
        advantage_N.append(mean(inside) - mean(outside) if inside and outside else ZERO)
    return advantage_N


def over_drawn_sets(compare) -> Oracle:
    def oracle(given):
        return Expected(compare(given.score, given.n), len(given.score) < 2)

    return oracle


def over_every_set(score_of) -> Oracle:
    def oracle(given):
        score = {members: score_of(given, members) for members in given.every_set}
        return Expected(against_all(score, given.n), len(score) < 2)

    return oracle


def best(given, members):
    return max((given.own[i] for i in members), default=ZERO)


def with_control_variate(given):
    """The definition, through every set and every draw of as many sets as are valid."""
    every_set, valid = list(itertools.combinations(range(given.n), given.s)), len(given.score)
    if valid < 2:
        return Expected([ZERO] * given.n, True)
    own = {i: given.own.get(i, ZERO) for i in range(given.n)}
    g = {members: max(own[i] for i in members) for members in every_set}
    rest = {members: f - given.c * g[members] for members, f in given.score.items()}
    every = against_those_without(g, given.n)
    with_it, draws = sum(0 in members for members in every_set), math.comb(len(every_set), valid)
    one_sided = math.comb(with_it, valid) + math.comb(len(every_set) - with_it, valid)
    q = 1 - Fraction(one_sided, draws)
    drawn = against_those_without(rest, given.n)
    return Expected([a / q + given.c * b for a, b in zip(drawn, every, strict=True)], False)


def right_and_different(given, members):
    strategies = len({given.strategy[i] for i in members} - {-1})
    right = mean(given.own[i] for i in members)
    return right * Fraction(strategies if strategies > 1 else 0, len(members))


def leave_one_out_of_the_best(given):
    every_set = given.every_set
    gain_N = [ZERO] * given.n
    for members in every_set:
        for i in members:
            gain_N[i] += best(given, members) - best(given, set(members) - {i})
    return Expected([gain / max(len(every_set), 1) for gain in gain_N], not every_set)


def against_the_mean(given):
    own = given.own
    advantage_N = [own[i] - mean(own.values()) if i in own else ZERO for i in range(given.n)]
    return Expected(advantage_N, len(own) < 2)


def against_the_others(given):
    advantage_N = [ZERO] * given.n
    for i, reward in given.own.items():
        others = [other for j, other in given.own.items() if j != i]
        advantage_N[i] = reward - mean(others) if others else ZERO
    return Expected(advantage_N, len(given.own) < 2)


def by_standard_deviation(given):
    centred_N, starved = against_the_mean(given)
    std = math.sqrt(mean(centred_N[i] ** 2 for i in given.own)) if given.own else 0.0
    return Expected([float(value) / (std + 1e-6) for value in centred_N], starved)


def nothing(given):
    return Expected([ZERO] * given.n, all(len(rewards) < 2 for rewards in given.aggregated))


ORACLES = {
    "marginal_mean": over_drawn_sets(against_all),
    "with_without": over_drawn_sets(against_those_without),
    "set_control_variate": with_control_variate,
    "disjoint_sets": over_drawn_sets(against_all),
    "aggregator_only": nothing,
    "polychromic": over_every_set(right_and_different),
    "online_multitask": against_the_mean,
    "paragator": over_every_set(best),
    "pkpo": leave_one_out_of_the_best,
    "grpo": by_standard_deviation,
    "grpo_nostd": against_the_mean,
    "rloo": against_the_others,
}


def valid(rewards):
    return [Fraction(reward) for reward in rewards if not math.isnan(reward)]


def given_of(rewards, b, c):
    """Problem `b` as the oracle sees it."""
    own_N = rewards.own_BxN[b]
    own = {i: Fraction(reward) for i, reward in enumerate(own_N) if not math.isnan(reward)}
    strategy = [] if rewards.strategy_BxN is None else rewards.strategy_BxN[b].tolist()
    if rewards.aggregated_BxKxM is None:
        return Given(len(own_N), 0, own, [], {}, strategy, Fraction(c))
    aggregated = [valid(rewards_M) for rewards_M in rewards.aggregated_BxKxM[b]]
    members = [tuple(member_S) for member_S in rewards.member_BxKxS[b].tolist()]
    scored = [k for k, rewards_M in enumerate(aggregated) if rewards_M]
    score = {members[k]: mean(aggregated[k]) for k in scored}
    return Given(len(own_N), len(members[0]), own, aggregated, score, strategy, Fraction(c))


def aggregation_oracle(reward_KxM):
    """r_km - f_k."""
    rows = []
    for reward_M in reward_KxM:
        score = mean(valid(reward_M)) if valid(reward_M) else None
        rows.append([ZERO if math.isnan(r) else Fraction(r) - score for r in reward_M])
    return rows


def check(estimator, rewards, c=0.0):
    """Compares `compute_advantages` with the oracle, problem by problem."""
    advantages = compute_advantages(estimator, [rewards], (c,))
    of_round = advantages.rounds[0]
    assert of_round.candidate_BxN.dtype == np.float32
    assert advantages.keep_B.dtype == advantages.starved_B.dtype == bool
    assert (of_round.aggregation_BxKxM is None) == (estimator in WITHOUT_AGGREGATION)
    for b in range(len(rewards.own_BxN)):
        given = given_of(rewards, b, c)
        expected = ORACLES[estimator](given)
        candidate_N = np.array(expected.advantage_N, float)
        np.testing.assert_allclose(of_round.candidate_BxN[b], candidate_N, rtol=1e-6, atol=0)
        informative = any(expected.advantage_N)
        if of_round.aggregation_BxKxM is not None:
            aggregation_KxM = aggregation_oracle(rewards.aggregated_BxKxM[b])
            np.testing.assert_allclose(
                of_round.aggregation_BxKxM[b], np.array(aggregation_KxM, float), rtol=1e-6, atol=0
            )
            informative = informative or any(any(row) for row in aggregation_KxM)
        assert advantages.starved_B[b] == expected.starved, given
        assert advantages.keep_B[b] == (informative and not expected.starved), given


def draw(estimator, seed, n, s, k, problems):
    """[B, K, S]: sets as this estimator draws them."""
    subsets = disjoint_subsets if ESTIMATORS[estimator].sets == "partition" else draw_subsets
    return np.stack([subsets(Key(seed, 0, s, b, 0), n, s, k) for b in range(problems)])


def sizes(estimator, n):
    """(S, K) that this estimator may have at N = n, the configuration says."""
    row = ESTIMATORS[estimator]
    for s in range(row.needs.set_size, n):
        total = n // s if row.sets == "partition" else math.comb(n, s)
        for k in sorted({2, 4, 11, total}):
            if 2 <= k <= total:
                yield s, k


def random_rewards(rng, shape, values):
    return rng.choice(np.array(values, np.float32), size=shape).astype(np.float64)


def advantage_of(estimator, rewards):
    """The advantages of the traces that are read, of the first problem."""
    return compute_advantages(estimator, [rewards]).rounds[0].candidate_BxN[0]


# --- against the oracle -------------------------------------------------------------------------


def test_every_row_of_the_table_has_an_oracle():
    assert set(ORACLES) == set(ESTIMATORS)


@pytest.mark.parametrize("estimator", WITH_AGGREGATION)
@pytest.mark.parametrize("n", range(2, 9))
def test_advantages_and_keep_rule_equal_the_definition_at_all_sizes(estimator, n):
    """atol 0: an advantage that is exactly zero must come out as exactly zero."""
    rng = np.random.default_rng(n)
    for s, k in sizes(estimator, n):
        for values in ([0, 1], [0, 1, 1, NAN], [NAN, NAN, 0, 1], [0.1, 0.7, 1 / 3]):
            problems = 4 if k <= 11 and n < 7 else 1
            fractional = 0.1 in values and ESTIMATORS[estimator].needs.bits
            own = random_rewards(rng, (problems, n), [0, 1, 1] if fractional else values)
            aggregated = random_rewards(rng, (problems, k, 3), values)
            strategy = rng.integers(-1, 3, size=(problems, n))
            member = draw(estimator, n, n, s, k, problems)
            check(estimator, Rewards(own, aggregated, member, strategy))


@pytest.mark.parametrize("estimator", WITHOUT_AGGREGATION)
def test_advantages_of_own_correctness_equal_the_definition(estimator):
    rng = np.random.default_rng(3)
    for n in range(2, 9):
        for values in ([0, 1], [0, 0, 0, 1, NAN], [NAN, NAN, NAN, 0, 1], [0.1, 0.7, 1 / 3], [0.1]):
            check(estimator, Rewards(random_rewards(rng, (20, n), values)))


@pytest.mark.parametrize(
    "estimator", [name for name, row in ESTIMATORS.items() if not row.needs.bits]
)
def test_the_keep_rule_is_exact_on_every_reward_that_a_verdict_can_have(estimator):
    """Neighbours on the grid of rewards, and tenths that add up to the same sums."""
    tenths = [judge(lambda text, problem, i=i: i / 10, "", None).reward for i in range(11)]
    close = [k * 2.0**-24 for k in (2**23 - 1, 2**23, 2**23 + 1)]
    rng = np.random.default_rng(8)
    for values in (tenths, close, [tenths[3]], [tenths[1], tenths[2], tenths[3], NAN]):
        own = random_rewards(rng, (60, 4), values)
        if estimator in WITHOUT_AGGREGATION:
            check(estimator, Rewards(own))
            continue
        sets = (2, 2) if estimator == "disjoint_sets" else (4, 2)
        member = draw(estimator, 8, 4, sets[1], sets[0], 60)
        of_sets = np.repeat(random_rewards(rng, (60, sets[0], 1), values), 2, axis=-1)
        check(estimator, Rewards(own, of_sets, member))
        check(estimator, Rewards(own, random_rewards(rng, (60, sets[0], 2), values), member))


@pytest.mark.parametrize("estimator", [*OVER_EVERY_SET, "online_multitask"])
def test_own_correctness_beside_aggregation_at_every_outcome(estimator):
    """All rewards of five traces with failures; all aggregations right, so search alone decides."""
    own = np.array(list(itertools.product([0.0, 1.0, NAN], repeat=5)))
    B = len(own)
    for s in (2, 3, 4):
        strategy = np.random.default_rng(s).integers(-1, 2, size=own.shape)
        member = draw(estimator, 0, 5, s, 2, B)
        check(estimator, Rewards(own, np.ones((B, 2, 2)), member, strategy))


@pytest.mark.parametrize("estimator", ["marginal_mean", "with_without", "aggregator_only"])
def test_keep_rule_on_sparse_rewards_and_cancelling_sets(estimator):
    """Here sets differ and still cancel at every trace, or have too few valid samples."""
    every_outcome = np.array(list(itertools.product([0.0, 1.0], repeat=4)))[:, :, None]
    for chosen in itertools.combinations(itertools.combinations(range(4), 2), 4):
        member = np.broadcast_to(np.array(chosen), (16, 4, 2))
        check(estimator, Rewards(np.zeros((16, 4)), every_outcome, member))
    sparse = random_rewards(np.random.default_rng(5), (400, 4, 2), [0, 1, NAN, NAN])
    check(estimator, Rewards(np.zeros((400, 4)), sparse, draw(estimator, 5, 4, 2, 4, 400)))


@pytest.mark.parametrize("c", [0.25, 0.7, 1.0, 1.9, -0.3])
@pytest.mark.parametrize("values", [[0, 1], [0, 1, NAN], [0.1, 0.7, 1 / 3], [0, 0.25, 0.5, NAN]])
def test_the_control_variate_and_its_keep_rule_equal_the_definition(values, c):
    """Flat aggregations too, so that own rewards alone may decide; many of them cancel."""
    rng = np.random.default_rng(9)
    for n in range(2, 6):
        for s, k in sizes("set_control_variate", n):
            own = random_rewards(rng, (3, n), values)
            member = draw("set_control_variate", n, n, s, k, 3)
            check("set_control_variate", Rewards(own, np.ones((3, k, 2)), member), c)
            aggregated = random_rewards(rng, (3, k, 2), values)
            check("set_control_variate", Rewards(own, aggregated, member), c)


def test_a_control_variate_that_cancels_the_scores_at_every_trace_is_dropped():
    """All sets are drawn, so A is f's own comparison, flat; floats would leave roundings of 0.1."""
    own = np.array([[0.1, 0.7, 0.3, 0.1]])
    member = np.array([list(itertools.combinations(range(4), 2))])
    rewards = Rewards(own, np.full((1, 6, 3), 0.1), member)
    advantages = compute_advantages("set_control_variate", [rewards], (1.0,))
    assert not advantages.by_stage()[0].any() and not advantages.keep_B[0]
    some = Rewards(own, np.full((1, 3, 3), 0.1), member[:, :3])
    assert compute_advantages("set_control_variate", [some], (1.0,)).keep_B[0]
    assert not compute_advantages("set_control_variate", [some], (0.0,)).keep_B[0]


# --- what holds of each estimator ---------------------------------------------------------------


def rewards_of_sets(aggregated, member, n):
    return Rewards(np.zeros((len(aggregated), n)), np.array(aggregated, float), np.array(member))


def test_sets_that_differ_but_cancel_at_every_trace_are_dropped():
    reward = np.array([1.0, 1.0, 0.0, 0.0]).reshape(1, 4, 1) * np.ones((1, 4, 3))
    rewards = rewards_of_sets(reward, [[[0, 1], [2, 3], [0, 2], [1, 3]]], 4)
    for estimator in ("marginal_mean", "with_without"):
        advantages = compute_advantages(estimator, [rewards])
        assert not any(advantage.any() for advantage in advantages.by_stage())
        assert not advantages.keep_B[0]


def test_equal_thirds_from_different_counts_give_exactly_no_search_advantage():
    reward = [[[1, 0, 0, NAN, NAN, NAN], [0, 1, 0, 1, 0, 0], [NAN, 0, NAN, 0, NAN, 1]]]
    member = [[[0, 1], [1, 2], [0, 3]]]
    for estimator in ("marginal_mean", "with_without"):
        advantages = compute_advantages(estimator, [rewards_of_sets(reward, member, 4)])
        candidate, aggregation = advantages.by_stage()
        assert not candidate.any() and aggregation.any() and advantages.keep_B[0]
    flat = np.full((1, 3, 3), np.float32(0.1))  # 0.1 + 0.1 + 0.1 != 3 * 0.1 in floats
    for estimator in ("marginal_mean", "with_without", "aggregator_only"):
        advantages = compute_advantages(estimator, [rewards_of_sets(flat, member, 4)])
        assert not any(advantage.any() for advantage in advantages.by_stage())
        assert not advantages.keep_B[0]


@pytest.mark.parametrize("value", [0.0, 1.0, NAN])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_all_correct_all_wrong_and_all_failed_problems_are_flat_and_dropped(estimator, value):
    rewards = Rewards(np.full((3, 8), value))
    if estimator in WITH_AGGREGATION:
        rewards = dataclasses.replace(
            rewards,
            aggregated_BxKxM=np.full((3, 2, 4), value),
            member_BxKxS=draw(estimator, 0, 8, 4, 2, 3),
            strategy_BxN=np.tile(np.arange(8), (3, 1)),
        )
    advantages = compute_advantages(estimator, [rewards])
    assert not any(advantage.any() for advantage in advantages.by_stage())
    assert not advantages.keep_B.any()
    assert advantages.starved_B.all() == math.isnan(value)


def test_a_problem_with_one_valid_set_is_starved_where_sets_are_compared():
    reward = np.full((1, 3, 2), NAN)
    reward[0, 1] = [0, 1]
    rewards = Rewards(np.array([[1.0, 0.0, 0.0]]), reward, np.array([[[0, 1], [1, 2], [0, 2]]]))
    for estimator in OVER_DRAWN_SETS:
        advantages = compute_advantages(estimator, [rewards])
        assert advantages.starved_B[0] and not advantages.keep_B[0]
        assert not advantages.rounds[0].candidate_BxN.any()
    for estimator in ("aggregator_only", "online_multitask", "paragator"):
        advantages = compute_advantages(estimator, [rewards])
        assert advantages.keep_B[0] and not advantages.starved_B[0]
        np.testing.assert_array_equal(advantages.rounds[0].aggregation_BxKxM[0, 1], [-0.5, 0.5])


def test_a_failed_own_verdict_is_nothing_to_estimators_over_drawn_sets():
    reward, member = np.array([[[1.0, 0.0], [0.0, 0.0]]]), np.array([[[0, 1], [2, 3]]])
    for estimator in OVER_DRAWN_SETS:
        of_wrong = compute_advantages(estimator, [Rewards(np.zeros((1, 4)), reward, member)])
        of_failed = compute_advantages(estimator, [Rewards(np.full((1, 4), NAN), reward, member)])
        np.testing.assert_array_equal(
            of_wrong.rounds[0].candidate_BxN, of_failed.rounds[0].candidate_BxN
        )
        assert of_failed.keep_B[0]


def first_c_right(estimator, n, c, k):
    """One problem whose first c of n traces are right; all of its aggregations are."""
    member = draw(estimator, 0, n, k, 2, 1)
    return Rewards(np.arange(n)[None] < c, np.ones((1, 2, 2)), member)


@pytest.mark.parametrize("n, c, k, right", [  # loo-1 of the published test vectors; wrong: 0
    (4, 2, 2, 1 / 3),
    (8, 1, 2, 0.25),
    (8, 1, 4, 0.5),
    (8, 7, 2, 1 / 28),
])  # fmt: skip
def test_pkpo_gives_the_published_leave_one_out_minus_one_vectors(n, c, k, right):
    advantage_N = advantage_of("pkpo", first_c_right("pkpo", n, c, k))
    np.testing.assert_allclose(advantage_N, [right] * c + [0] * (n - c), rtol=1e-6)


def test_paragator_is_the_formula_of_its_paper():
    """A(right) = 1 - mu, A(wrong) = 1 - mu - C(w - 1, k - 1) / C(N - 1, k - 1), mu = pass@k."""
    n, k = 8, 4
    for c in range(1, n):
        missed = math.comb(n - c, k) / math.comb(n, k)
        wrong = missed - math.comb(n - c - 1, k - 1) / math.comb(n - 1, k - 1)
        advantage_N = advantage_of("paragator", first_c_right("paragator", n, c, k))
        expected = [missed] * c + [wrong] * (n - c)
        np.testing.assert_allclose(advantage_N, expected, rtol=1e-6, atol=1e-16)


def test_polychromic_wants_right_traces_of_different_strategies():
    """Of two right traces the one with the rarer strategy is worth more."""
    own, aggregated = np.array([[1.0, 1, 0, 0]]), np.ones((1, 2, 2))
    member = draw("polychromic", 0, 4, 2, 2, 1)
    advantage_N = advantage_of(
        "polychromic", Rewards(own, aggregated, member, np.array([[0, 1, 0, 0]]))
    )
    # f_poly of {0,1}: 1 * 1; of {1,2}, {1,3}: 1/2; of the others, one strategy each, 0; mean 1/3
    mean_with = np.array([1 / 3, 2 / 3, 1 / 6, 1 / 6])
    np.testing.assert_allclose(advantage_N, mean_with - 1 / 3, rtol=1e-6, atol=1e-16)

    without_strategies = Rewards(own, aggregated, member, np.full((1, 4), -1))
    assert not compute_advantages("polychromic", [without_strategies]).keep_B[0]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_empty_batch_stays_empty(estimator):
    rewards = Rewards(np.zeros((0, 8)))
    if estimator in WITH_AGGREGATION:
        member, strategy = np.zeros((0, 4, 2), int), np.zeros((0, 8), int)
        rewards = Rewards(np.zeros((0, 8)), np.zeros((0, 4, 2)), member, strategy)
    advantages = compute_advantages(estimator, [rewards])
    candidate, *aggregations = advantages.by_stage()
    assert candidate.shape == (0, 8)
    assert advantages.keep_B.shape == advantages.starved_B.shape == (0,)
    assert [of_round.shape for of_round in aggregations] == (
        [(0, 4, 2)] if estimator in WITH_AGGREGATION else []
    )


# --- what is refused ----------------------------------------------------------------------------


def test_an_unknown_estimator_is_refused_with_the_names_that_there_are():
    with pytest.raises(ValueError) as refused:
        compute_advantages("reinforce", [Rewards(np.zeros((1, 4)))])
    assert all(name in str(refused.value) for name in ("reinforce", *ESTIMATORS))


def test_partly_right_own_rewards_are_refused_where_right_traces_are_counted():
    sets = np.zeros((1, 2, 2)), np.zeros((1, 2, 3), int)
    with pytest.raises(FractionalRewards, match="polychromic.* 0.5.*marginal_mean"):
        compute_advantages("polychromic", [Rewards(np.full((1, 4), 0.5), *sets, np.zeros((1, 4)))])


@pytest.mark.parametrize("own, aggregated, member", [
    ((1, 2, 2), None,      None),
    ((1, 4),    (1, 2, 2), None),
    ((1, 4),    None,      (1, 2, 3)),
    ((1, 4),    (1, 3, 2), (1, 2, 4)),
    ((2, 4),    (1, 2, 2), (1, 2, 3)),
])  # fmt: skip
def test_rewards_of_shapes_that_do_not_fit_are_refused_with_the_shapes(own, aggregated, member):
    shapes = (own, aggregated, member)
    arrays = [None if shape is None else np.zeros(shape, int) for shape in shapes]
    with pytest.raises(ValueError) as refused:
        Rewards(*arrays)
    assert all(str(shape) in str(refused.value) for shape in shapes if shape)
