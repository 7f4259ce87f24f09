"""Own correctness as a control variate: expectations and variances by enumeration, and its fit."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from enumerable_policy import arbitrary_set_function, score_gradient, tuples_and_probability

from spiral_jax.objective.advantages import compute_advantages
from spiral_jax.objective.control_variate import Slopes, c_metrics, logged_c
from spiral_jax.objective.of_own_answers import mean_best
from spiral_jax.objective.rewards import Rewards
from spiral_jax.objective.settings import ObjectiveSettings
from spiral_jax.objective.weights import candidate_weights

NAN = float("nan")
BITS, FRACTIONS = np.array([0.0, 1.0, 1.0]), np.array([0.0, 0.25, 1.0])  # own reward by outcome
SETTINGS = ObjectiveSettings("set_control_variate", "unbiased", 1.0, 1.0, length_gate=0.0)


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """Every outcome of a problem: traces of the policy, and drawn sets, which f scores.

    Attributes:
      rewards: of all outcomes; failures as asked.
      probability_B: of each.
      score_BxNx3: grad log pi of each trace.
    """

    rewards: Rewards
    probability_B: np.ndarray
    score_BxNx3: np.ndarray

    def gradient_Bx3(self, c: float) -> np.ndarray:
        """The search term's gradient in each outcome, with the weights of a batch of one."""
        (advantages,) = compute_advantages("set_control_variate", [self.rewards], (c,)).rounds
        length = np.ones(self.rewards.own_BxN.shape, int)
        weight = candidate_weights(SETTINGS, advantages.candidate_BxN, self.rewards, length)
        return np.einsum("bi,bid->bd", weight * len(weight), self.score_BxNx3)

    def mean(self, gradient_Bx3: np.ndarray) -> np.ndarray:
        return self.probability_B @ gradient_Bx3

    def variance(self, gradient_Bx3: np.ndarray) -> float:
        """Summed over the three parameters."""
        return float((self.probability_B @ (gradient_Bx3 - self.mean(gradient_Bx3)) ** 2).sum())


def outcomes(n, s, k, f, own, failed_sets=(), failed_traces=()):
    tuples, probability = tuples_and_probability(n)
    sets = list(itertools.combinations(range(n), s))
    # Their order matters to failures, which strike by number.
    ways = itertools.permutations if failed_sets else itertools.combinations
    draws = np.array(list(ways(sets, k)))
    tuple_of, draw_of = (index.ravel() for index in np.indices((len(tuples), len(draws))))
    tuples, member = tuples[tuple_of], draws[draw_of]
    aggregated = f(np.take_along_axis(tuples[:, None, :], member, axis=2))[..., None]
    aggregated[:, list(failed_sets)] = NAN
    own_BxN = own[tuples]
    own_BxN[:, list(failed_traces)] = NAN
    return Outcomes(
        Rewards(own_BxN, aggregated, member),
        probability[tuple_of] / len(draws),
        score_gradient(tuples),
    )


def true_gradient(s, f):
    """Of J = E f(S independent traces)."""
    chosen, probability = tuples_and_probability(s)
    return np.einsum("a,a,ad->d", probability, f(chosen), score_gradient(chosen).sum(axis=1))


def some_right(rows):
    """A reader that needs one right candidate, and does not always see it."""
    return 0.1 + 0.8 * BITS[rows].max(axis=-1)


# --- its expectation ----------------------------------------------------------------------------


@pytest.mark.parametrize("c", [0.0, 0.7, 2.0, -0.4])
@pytest.mark.parametrize("n, s, k, failed_sets, failed_traces", [
    (4, 2, 2, (), ()),
    (3, 2, 3, (1,), (0,)),
    (4, 3, 3, (2,), ()),
    (4, 3, 2, (), (1, 2)),
    (3, 1, 2, (), ()),
    (3, 2, 3, (), ()),  # all sets are drawn
])  # fmt: skip
@pytest.mark.parametrize("own", [BITS, FRACTIONS])
def test_any_constant_c_expects_the_true_gradient(n, s, k, failed_sets, failed_traces, own, c):
    """Whatever f is; also where sets or traces have failed, which rewards do not cause."""
    f = arbitrary_set_function(s, seed=n)
    every = outcomes(n, s, k, f, own, failed_sets, failed_traces)
    expected = every.mean(every.gradient_Bx3(c))
    truth = true_gradient(s, f)
    assert np.abs(truth).max() > 1e-3
    np.testing.assert_allclose(expected, truth, rtol=1e-6, atol=1e-8)  # weights are float32


def fitted(rewards):
    """c after a step of these problems."""
    return Slopes.unknown(1).after([rewards]).c_R[0]


def problems(rewards, index):
    return Rewards(
        rewards.own_BxN[index], rewards.aggregated_BxKxM[index], rewards.member_BxKxS[index]
    )


@pytest.mark.parametrize("own", [BITS, FRACTIONS])
def test_c_fitted_on_another_problem_expects_the_true_gradient_and_on_its_own_does_not(own):
    """Over every outcome of the other problem, of another f, as the step before would have it."""
    f = arbitrary_set_function(2, seed=1)
    here = outcomes(3, 2, 2, f, own)
    other = outcomes(4, 2, 2, arbitrary_set_function(2, seed=5), own)
    probability_of = {}
    for b, probability in enumerate(other.probability_B):
        c = fitted(problems(other.rewards, [b]))
        probability_of[c] = probability_of.get(c, 0.0) + probability
    assert len(probability_of) > 3 and np.ptp(list(probability_of)) > 0.05
    expected = sum(p * here.mean(here.gradient_Bx3(c)) for c, p in probability_of.items())
    truth = true_gradient(2, f)
    np.testing.assert_allclose(expected, truth, rtol=1e-6, atol=1e-8)

    gradient = []
    for b in range(len(here.probability_B)):
        gradient.append(here.gradient_Bx3(fitted(problems(here.rewards, [b])))[b])
    assert np.abs(here.mean(np.array(gradient)) - truth).max() > 1e-3


@pytest.mark.parametrize(
    "f, c_best", [(some_right, 0.8), (arbitrary_set_function(2, seed=4), None)]
)
def test_the_variance_is_less_than_without_c_and_nearly_the_least_at_the_slope(f, c_best):
    every = outcomes(4, 2, 2, f, BITS)
    variance = {
        c: every.variance(every.gradient_Bx3(c)) for c in (-0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
    }
    # a step in which every outcome is as frequent as it is likely
    often_B = np.round(every.probability_B * 4000).astype(int)
    slope = fitted(problems(every.rewards, np.repeat(np.arange(len(often_B)), often_B)))
    if c_best is not None:
        assert slope == pytest.approx(c_best, rel=4e-3)  # the prior's share
    least, without = min(variance.values()), variance[0.0]
    at_slope = every.variance(every.gradient_Bx3(slope))
    assert at_slope < without and at_slope - least < 0.1 * (without - least) + 0.01 * least


def test_a_reader_that_needs_one_right_trace_gets_what_scoring_every_set_would_give():
    """f = g and c = 1: no noise of the draw is left, and A is that of all sets, ParaGator's."""
    n, s, k = 4, 2, 3
    every = outcomes(n, s, k, lambda rows: BITS[rows].max(axis=-1), BITS)
    (ours,) = compute_advantages("set_control_variate", [every.rewards], (1.0,)).rounds
    (paragator,) = compute_advantages("paragator", [every.rewards]).rounds
    # against all sets, not those without the trace: a share of s/n of them has it
    expected = paragator.candidate_BxN / (1 - s / n)
    np.testing.assert_allclose(ours.candidate_BxN, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("size", [0, 1, 2, 4])
def test_the_mean_best_of_all_sets_is_that_of_enumeration(size):
    rng = np.random.default_rng(size)
    for _ in range(20):
        rewards = rng.choice([0.0, 0.25, 0.5, 1.0], size=5).tolist()
        at_least = float(rng.choice([0.0, 0.3]))
        best = [max((*chosen, at_least)) for chosen in itertools.combinations(rewards, size)]
        assert float(mean_best(rewards, size, at_least)) == pytest.approx(np.mean(best), abs=1e-12)


# --- its fit ------------------------------------------------------------------------------------


def random_round(seed, problems=30, n=6, s=3, k=4, m=3):
    """Some sets without a valid sample, and some failed traces."""
    rng = np.random.default_rng(seed)
    own = rng.choice([0.0, 0.5, 1.0, NAN], size=(problems, n), p=[0.4, 0.2, 0.3, 0.1])
    aggregated = rng.choice([0.0, 0.25, 1.0, NAN], size=(problems, k, m), p=[0.3, 0.2, 0.2, 0.3])
    sets = np.array(list(itertools.combinations(range(n), s)))
    member = np.stack([sets[rng.permutation(len(sets))[:k]] for _ in range(problems)])
    return Rewards(own, aggregated, member)


def least_squares(steps):
    """Slope on g with a mean for each problem, steps weighted; a row of weight 1/4 that says 0."""
    rows, values, weights = [], [], []
    problems = sum(len(step.own_BxN) for step in steps)
    place = 0
    for age, step in enumerate(reversed(steps)):
        for own_N, reward_KxM, member_KxS in zip(
            step.own_BxN, step.aggregated_BxKxM, step.member_BxKxS, strict=True
        ):
            for reward_M, member_S in zip(reward_KxM, member_KxS, strict=True):
                valid = [reward for reward in reward_M if not math.isnan(reward)]
                if valid:
                    best = max(0.0 if math.isnan(own_N[i]) else own_N[i] for i in member_S)
                    rows.append([best, *np.eye(problems)[place]])
                    values.append(np.mean(valid))
                    weights.append(0.7**age)
            place += 1
    rows.append([1.0, *np.zeros(problems)])
    root = np.sqrt([*weights, 0.25])
    design, target = np.array(rows) * root[:, None], np.array([*values, 0.0]) * root
    return np.linalg.lstsq(design, target, rcond=None)[0][0]


def test_c_is_the_weighted_least_squares_slope_within_problems():
    steps, slopes = [], Slopes.unknown(1)
    for seed in range(4):
        steps.append(random_round(seed))
        slopes = slopes.after([steps[-1]])
        assert slopes.c_R[0] == pytest.approx(least_squares(steps), rel=1e-9)


def test_every_round_has_a_c_of_its_own_and_nothing_seen_is_0():
    first, second = random_round(0), random_round(1)
    both = Slopes.unknown(2).after([first, second])
    alone = [Slopes.unknown(1).after([each]).c_R[0] for each in (first, second)]
    assert both.c_R == tuple(alone) and alone[0] != alone[1]
    assert Slopes.unknown(3).c_R == (0.0, 0.0, 0.0)
    nothing = Rewards(np.zeros((0, 6)), np.zeros((0, 4, 3)), np.zeros((0, 4, 3), int))
    flat = Rewards(np.full((5, 6), NAN), np.full((5, 4, 3), NAN), random_round(2).member_BxKxS[:5])
    assert Slopes.unknown(1).after([nothing]).c_R == Slopes.unknown(1).after([flat]).c_R == (0.0,)


def test_its_metrics_are_read_back_as_they_were_written():
    for c_R in ((), (0.3,), (0.1, -0.2, 1 / 3)):
        row = json.loads(json.dumps({"reward/search": 0.1} | c_metrics(c_R)))
        assert logged_c(row) == c_R
