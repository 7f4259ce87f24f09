"""Two rounds that read a stored population: what they read, and what their answers earn."""

import itertools
import re

import numpy as np
import pytest
from scripted_sampler import SamplerByRound, prompt_text, scripted_training
from small_populations import (
    NAN,
    STORED,
    THETA,
    answers_with,
    chance,
    outcomes_of,
    population,
    probability,
    rows_of,
    script,
)

from spiral_jax.core.config import to_plain
from spiral_jax.core.groups import Role
from spiral_jax.objective import of_sets
from spiral_jax.objective.advantages import compute_advantages
from spiral_jax.objective.settings import ObjectiveSettings
from spiral_jax.objective.subsets import Key, draw_subsets
from spiral_jax.reporting.logged_problem import split_problems
from spiral_jax.reporting.problem_page import PageSettings, problem_page
from spiral_jax.rollout.credit import give_replay_credit
from spiral_jax.rollout.populations import Populations
from spiral_jax.rollout.traces import Replayed, Round

K, S, M = 4, 4, 4


@pytest.fixture(scope="module")
def read_twice():
    """The same where a step's problems have two rounds, and so have populations that it reads."""
    right = np.random.default_rng(4).random((5, 40, K, M)) < 0.5
    training = scripted_training(
        script(right), sampler_class=SamplerByRound, replay__problems=3, aggregation__rounds=2
    )
    first = training.collect(step=0)
    stored = Populations(training.actor.stages.replay).after(0, first.rollouts.answers(), [])
    read = stored.drawn(1)
    return training, training.collect(1, first.next_cursor, read), read, right


def test_with_two_rounds_answers_earn_their_own_success_and_that_of_the_sets_that_read_them(
    read_twice,
):
    _, batch, read, right = read_twice
    assert [each.round for each in read] == [1, 1, 1]  # the first of two
    first, second = batch.replay.credit
    member_of = [round.member_BxKxS for round in batch.replay.replayed.rounds]
    c = of_sets.marginal_mean_factor(K * M, S, K)
    for b, each in enumerate(read):
        reward_1, reward_2 = right[3:, each.cursor].astype(np.float64)
        score_1, score_2 = reward_1.mean(axis=1), reward_2.mean(axis=1)
        for k, m in np.ndindex(K, M):
            is_in_K = (member_of[1][b] == k * M + m).any(axis=1)
            above_K = (score_2 - score_2.mean())[is_in_K]
            by_being_read = above_K.mean() if is_in_K.any() else 0.0
            own_1 = (reward_1[k, m] - score_1[k]) / (K * (M - 1))
            own_2 = (reward_2[k, m] - score_2[k]) / (K * (M - 1))
            # of three populations; float32 of numbers below 0.2
            expected = (own_1 + by_being_read / c) / 3
            assert first.weight_UxC[b * K + k, m] == pytest.approx(expected, abs=1e-7)
            assert second.weight_UxC[b * K + k, m] == pytest.approx(own_2 / 3, abs=1e-7)
    assert batch.metrics["reward/replayed_round_1"].total == sum(
        right[3, each.cursor].sum() for each in read
    )
    assert batch.metrics["reward/replayed"].total == sum(
        right[4, each.cursor].sum() for each in read
    )


def test_logged_advantages_have_what_answers_earn_by_being_read(read_twice):
    training, batch, read, right = read_twice
    alone = training.collect(1, int(batch.rollouts.cursor_B[0]))
    name = "advantage/aggregation_abs"
    of_answers = []
    for b, each in enumerate(read):
        reward_1, reward_2 = right[3:, each.cursor].astype(np.float64)
        member_KxS = batch.replay.replayed.rounds[1].member_BxKxS[b]
        above_K = reward_2.mean(axis=1) - reward_2.mean()
        is_in_CxK = (member_KxS[None] == np.arange(K * M)[:, None, None]).any(axis=2)
        by_being_read = is_in_CxK @ above_K / np.maximum(is_in_CxK.sum(axis=1), 1)
        own = [reward - reward.mean(axis=1, keepdims=True) for reward in (reward_1, reward_2)]
        of_answers += [own[0] + by_being_read.reshape(K, M), own[1]]
    expected = alone.metrics[name].total + np.abs(of_answers).sum()
    assert batch.metrics[name].total == pytest.approx(expected, abs=1e-4)  # 1,000 float32 numbers


def test_the_second_replayed_round_reads_the_answers_of_the_first(read_twice):
    training, batch, read, _ = read_twice
    second = batch.replay.replayed.rounds[1]
    listed = [
        row["order"]
        for row in rows_of(training, batch)
        if "replay" in row and row["round"] == 3 and row["trace"] == 0
    ]
    for u, (each, k) in enumerate(itertools.product(read, range(K))):
        requests = second.groups.requests
        assert requests.id_Ux6[u].tolist() == [0, 1, each.cursor, 4, Role.AGGREGATION, k]
        shown = prompt_text(requests, u).split("#")[1:]
        names = [re.sub(r"\s", "", text.split("\\")[0])[-2:] for text in shown]
        assert names == [f"{place // M}{place % M}" for place in listed[u]]
        member_KxS = draw_subsets(Key(training.c.seed, 0, 1, each.cursor, 3), K * M, S, K)
        assert sorted(listed[u]) == sorted(member_KxS[k].tolist())


def test_the_page_of_a_problem_that_was_read_twice_explains_every_logged_advantage(read_twice):
    training, batch, read, _ = read_twice
    settings = PageSettings.from_plain(to_plain(training.c))
    pages = [problem_page(1, rows, settings) for rows in split_problems(rows_of(training, batch))]
    replayed = [page for page in pages if page["replay"]]
    assert [page["cursor"] for page in replayed] == [each.cursor for each in read]
    for page in replayed:
        assert [of_set["round"] for of_set in page["sets"]] == [2] * K + [3] * K
        assert not any(trace["advantage"] for trace in page["search"])
        traces = page["search"] + [t for of_set in page["sets"] for t in of_set["traces"]]
        assert any(trace["advantage"] for trace in traces)
        assert not [trace["why"] for trace in traces if "was logged" in trace["why"]]
        assert sum("earlier step" in trace["why"] for trace in traces) == K * M


@pytest.mark.parametrize("estimator", ["marginal_mean", "with_without", "aggregator_only"])
def test_answers_that_are_read_again_climb_the_mean_reward_of_both_rounds(estimator):
    """Two rounds of one stored population: 2^8 rewards of each of 15 x 15 draws of sets."""
    member, reward, shown, draws = outcomes_of(STORED[0])
    first = member[:: len(reward) // draws]  # each draw once
    rewards = reward[: len(reward) // draws]  # each outcome of a round once
    place = np.indices((len(first), len(rewards), len(first), len(rewards))).reshape(4, -1)
    of_first, of_second = first[place[0]], first[place[2]]
    reward_1, reward_2 = rewards[place[1]], rewards[place[3]]
    B = place.shape[1]
    shown_1 = np.array(STORED[0])[of_first].sum(axis=-1)[..., None].repeat(2, axis=2)
    read = np.take_along_axis(reward_1.reshape(B, 1, 4).repeat(2, axis=1), of_second, axis=2)
    shown_2 = read.sum(axis=-1).astype(int)[..., None].repeat(2, axis=2)

    candidates = answers_with(np.tile(np.float64(STORED[0]), (B, 1)))
    rounds = tuple(
        Round(member, answers_with(reward.reshape(-1, 2)))
        for member, reward in ((of_first, reward_1), (of_second, reward_2))
    )
    replayed = Replayed([None] * B, [population(0)] * B, candidates, rounds)
    # answers have the weight of aggregation, also in what they earn by being read
    settings = ObjectiveSettings(estimator, "unbiased", 0.25, 1.0, 1.0)
    advantages = compute_advantages(estimator, replayed.rewards())
    assert not advantages.rounds[0].candidate_BxN.any()
    credit = give_replay_credit(replayed, advantages, settings)

    outcomes = ((reward_1, shown_1), (reward_2, shown_2))

    def chances(theta):
        return [probability(theta, reward, shown, draws) for reward, shown in outcomes]

    def objectives(theta):
        p_1, p_2 = chances(theta)
        return [(p_1 * p_2 * reward.mean(axis=(1, 2))).sum() for reward in (reward_1, reward_2)]

    p = np.prod(chances(THETA), axis=0)
    assert p.sum() == pytest.approx(1, abs=1e-12)
    update = np.zeros(3)
    for of_round, (reward, shown) in zip(credit, outcomes, strict=True):
        weight = of_round.weight_UxC.reshape(reward.shape) * B
        score = weight * (reward - chance(THETA[shown]))
        update += [(p[:, None, None] * np.where(shown == i, score, 0)).sum() for i in range(3)]
    moves = 1e-4 * np.eye(3)
    slopes = np.array(
        [np.subtract(objectives(THETA + move), objectives(THETA - move)) / 2e-4 for move in moves]
    )
    expected = slopes.sum(axis=1)
    if estimator == "aggregator_only":  # nobody earns by being read
        assert np.abs(update - expected).max() > 1e-3
    else:
        np.testing.assert_allclose(update, expected, atol=1e-6)  # float32


def test_a_population_that_our_failures_have_starved_is_left_out_of_the_mean():
    """Two sets of two answers in both rounds; of the first population nothing of the second is."""
    member = np.array([[[0, 1], [2, 3]]] * 2)
    first, second = (
        np.float64([[1, 0], [1, 1]] * 2),
        np.float64([[NAN, NAN]] * 2 + [[1, 0], [0, 0]]),
    )

    def credit_of(populations):
        rows = np.repeat(populations, 2) * 2 + np.tile([0, 1], len(populations))
        B = len(populations)
        rounds = tuple(
            Round(member[populations], answers_with(rewards[rows])) for rewards in (first, second)
        )
        candidates = answers_with(np.tile(np.float64(STORED[0]), (B, 1)))
        replayed = Replayed([None] * B, [population(0)] * B, candidates, rounds)
        advantages = compute_advantages("marginal_mean", replayed.rewards())
        settings = ObjectiveSettings("marginal_mean", "unbiased", 1.0, 1.0, 1.0)
        return [given.weight_UxC for given in give_replay_credit(replayed, advantages, settings)]

    for both, alone in zip(credit_of([0, 1]), credit_of([1]), strict=True):
        assert alone.any() and not both[:2].any()
        np.testing.assert_array_equal(both[2:], alone)
    assert not any(weight_UxC.any() for weight_UxC in credit_of([0]))
