"""What a page says of an advantage, against the objective's own number: for random rewards and by
hand.
"""

import re

import numpy as np
import pytest
from spiral_jax.reporting.reasons import (
    OWN_CORRECTNESS,
    Score,
    explain_aggregation,
    explain_own,
    explain_search,
    set_name,
)

from spiral_jax.objective import estimators as advantages
from spiral_jax.objective import subsets

SETS = [[0, 1], [0, 2], [1, 2], [1, 3]]
NAMES = "ABCDEF"
SCORES = [Score(3, 4), Score(3, 4), Score(0, 4), Score(2, 4)]


def scores_of(reward_KxM):
    return [Score(int(np.nansum(row)), int((~np.isnan(row)).sum())) for row in reward_KxM]


def plain(reward):
    return None if np.isnan(reward) else float(reward)


@pytest.mark.parametrize(
    "estimator", ["marginal_mean", "with_without", "aggregator_only", "disjoint_sets"]
)
@pytest.mark.parametrize("failing", [0.0, 0.4])
def test_the_reason_of_every_set_advantage_ends_in_the_objectives_number(estimator, failing):
    rng = np.random.default_rng(0)
    for case in range(60):
        N, S, K, M = ((8, 4, 4, 4), (4, 2, 6, 3), (5, 1, 5, 2))[case % 3]
        draw = subsets.draw_subsets
        if estimator == "disjoint_sets":
            draw, (N, S, K, M) = (
                subsets.disjoint_subsets,
                ((8, 4, 2, 4), (4, 2, 2, 3), (5, 1, 5, 2))[case % 3],
            )
        member_KxS = draw(case, 0, 0, 0, 0, N, S, K)
        reward_KxM = np.where(rng.random((K, M)) < failing, np.nan, rng.integers(2, size=(K, M)))
        rewards = advantages.Rewards(np.zeros((1, N)), reward_KxM[None], member_KxS[None])
        found = advantages.compute(estimator, rewards)
        scores = scores_of(reward_KxM)
        for i in range(N):
            reason = explain_search(estimator, i, member_KxS.tolist(), scores, NAMES)
            assert reason.value == pytest.approx(found.search_BxN[0, i], abs=1e-6)  # float32
            said = re.search(r": ([+-][\d.]+|0)\.$", reason.words)
            assert reason.value == pytest.approx(
                float(said[1]) if said else 0.0, abs=5.01e-4
            )  # three decimals
        for k in range(K):
            for m in range(M):
                reason = explain_aggregation(plain(reward_KxM[k, m]), scores[k])
                assert reason.value == pytest.approx(found.aggregation_BxKxM[0, k, m], abs=1e-6)


@pytest.mark.parametrize("estimator", OWN_CORRECTNESS)
@pytest.mark.parametrize("failing", [0.0, 0.3, 0.7])
def test_the_reason_of_every_advantage_of_own_correctness_ends_in_the_objectives_number(
    estimator, failing
):
    rng = np.random.default_rng(1)
    for _ in range(60):
        own_N = np.where(rng.random(8) < failing, np.nan, rng.integers(2, size=8))
        of_sets = np.zeros((1, 2, 2)), np.array([[[0, 1, 2], [3, 4, 5]]])
        found = advantages.compute(estimator, advantages.Rewards(own_N[None], *of_sets))
        for i in range(8):
            reason = explain_own(estimator, plain(own_N[i]), scores_of(own_N[None])[0], 3)
            assert reason.value == pytest.approx(found.search_BxN[0, i], abs=1e-6)
            said = re.search(r"([+-][\d.]+|0)\.$", reason.words)
            assert reason.value == pytest.approx(float(said[1]) if said else 0.0, abs=5.01e-4)


def test_the_words_name_the_sets_with_their_counts():
    reason = explain_search("with_without", 0, SETS, SCORES, NAMES)
    assert reason.value == 0.5
    assert reason.words == ("Mean score of sets with it 0.750 (A 3/4, B 3/4), of sets without it 0.250 (C 0/4, D 2/4): "
                            "+0.500.")  # fmt: skip
    reason = explain_search("marginal_mean", 0, SETS, SCORES, NAMES)
    assert reason.words.endswith("of all sets 0.500 (A 3/4, B 3/4, C 0/4, D 2/4): +0.250.")
    assert explain_aggregation(1.0, SCORES[0]).words == (
        "3 of the set's 4 aggregations are right. Its reward 1 - their mean 0.750 = +0.250."
    )
    assert (
        "5 of 8 traces are right: mean 0.625, standard deviation 0.484"
        in explain_own("grpo", 1.0, Score(5, 8), 4).words
    )
    assert explain_own("paragator", 0.0, Score(2, 8), 4).words == (
        "2 of 8 traces are right: of all sets of 4 a share of 0.214 has no right one, of those with this trace 0.286: "
        "-0.071."
    )


def test_traces_without_a_comparison_say_so():
    assert "in no set" in explain_search("marginal_mean", 9, SETS, SCORES, NAMES).words
    assert "in every set" in explain_search("with_without", 0, SETS[:2], SCORES[:2], NAMES).words
    assert (
        "in no set"
        in explain_search("with_without", 3, SETS, [*SCORES[:3], Score(0, 0)], NAMES).words
    )
    assert "our failure" in explain_aggregation(None, Score(0, 0)).words
    assert "our failure" in explain_own("grpo", None, Score(2, 4), 4).words
    assert (
        "no traces for being read"
        in explain_search("aggregator_only", 0, SETS, SCORES, NAMES).words
    )


def test_an_estimator_that_is_not_explained_claims_no_number():
    reason = explain_search("polychromic", 0, SETS, SCORES, NAMES)
    assert reason.value is None and "loss.estimator = polychromic" in reason.words


def test_sets_have_letters_and_then_numbers_too():
    assert [set_name(k) for k in (0, 25, 26, 52)] == ["A", "Z", "A1", "A2"]
    assert [set_name(k, round=3) for k in (1, 26)] == ["B''", "A1''"]
