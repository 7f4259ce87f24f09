"""Several rounds of aggregation in one rollout: what they read, what their traces earn, and that it
is a gradient.
"""

import dataclasses
import itertools

import numpy as np
import pytest
from scripted_sampler import TOKENIZER, ScriptedSampler, make_actor

from configs import tiny
from spiral_jax.core.config import ConfigError, to_plain
from spiral_jax.core.groups import GroupRequests, Groups, Role
from spiral_jax.objective import subsets
from spiral_jax.reporting.logged_problem import split_problems
from spiral_jax.reporting.problem_page import PageSettings, problem_page
from spiral_jax.rollout.collect import NoSignal, collect_batch, find_advantages, weigh
from spiral_jax.rollout.requests import Rollouts, Round
from spiral_jax.run.setup import set_up
from spiral_jax.run.trace_log import trace_rows

N, K, S, M = 8, 4, 4, 4


class ByRound(ScriptedSampler):
    """Its script is told the round instead of the role."""

    def write(self, request):
        round = int(request.id_Ux6[0, 3])
        return ScriptedSampler(lambda _, cursor, k, i: self.script(round, cursor, k, i)).write(
            request
        )


def actor_of(script, **overrides):
    actor = make_actor(None, aggregation__rounds=2, batch__aggregation_groups=32, **overrides)
    return dataclasses.replace(actor, sampler=ByRound(script))


def right_where(pattern):
    """`pattern(round, cursor, set, trace)` says which aggregations are right; digits name every
    trace.
    """

    def script(round, cursor, k, i):
        if round == 0:
            return f"left:{i}, \\boxed{{1}}"
        return f"{k}{i} \\boxed{{{7 if pattern(round, cursor, k, i) else 8}}}"

    return script


def test_the_second_round_reads_the_traces_of_the_first_in_the_keyed_order():
    actor = actor_of(right_where(lambda round, cursor, k, i: i < 2))
    batch = collect_batch(actor, None, step=3, cursor=0)
    first, second = batch.rollouts.rounds
    for b, cursor in enumerate(batch.rollouts.cursor_B):
        drawn = subsets.draw_subsets(actor.c.seed, 0, 3, int(cursor), 1, K * M, S, K)
        np.testing.assert_array_equal(second.member_BxKxS[b], drawn)
        assert (first.member_BxKxS[b] < N).all() and len(np.unique(drawn)) > S
        for k in range(K):
            u = b * K + k
            text = TOKENIZER.decode(
                second.groups.requests.prompt_UxP[u, : second.groups.requests.prompt_len_U[u]]
            )
            shown = [part.split("\\")[0].replace(" ", "")[-2:] for part in text.split("#")[1:]]
            assert sorted(shown) == sorted(f"{n // M}{n % M}" for n in drawn[k])
            assert second.groups.requests.id_Ux6[u].tolist() == [
                0,
                3,
                cursor,
                2,
                Role.AGGREGATION,
                k,
            ]
    rows = list(trace_rows(actor.c, batch, TOKENIZER))
    assert len(rows) % (N + 2 * K * M) == 0
    of_second = [row for row in rows if row["round"] == 2 and row["trace"] == 0 and row["kept"]]
    for u, row in enumerate(of_second):
        assert row["subset"] == second.member_BxKxS[u // K, u % K].tolist() and row["set"] == u % K
        text = TOKENIZER.decode(
            second.groups.requests.prompt_UxP[u, : second.groups.requests.prompt_len_U[u]]
        )
        shown = [part.split("\\")[0].replace(" ", "")[-2:] for part in text.split("#")[1:]]
        assert shown == [
            f"{n // M}{n % M}" for n in row["order"]
        ]  # the log says what the prompt lists


def test_traces_of_the_first_round_earn_their_own_success_and_that_of_the_sets_that_read_them():
    rng = np.random.default_rng(0)
    right = rng.random((3, 40, K, M)) < 0.5
    actor = actor_of(right_where(lambda round, cursor, k, i: right[round, cursor, k, i]))
    batch = collect_batch(actor, None, step=0, cursor=0)
    kept = batch.rollouts
    reward = right[:, kept.cursor_B].astype(np.float64)
    weight = batch.aggregation_weight_UxC.reshape(2, -1, K, M)
    c_search, c_read = (
        subsets.bias_factor("marginal_mean", N, S, K),
        subsets.bias_factor("marginal_mean", K * M, S, K),
    )
    B = len(kept)
    for b in range(B):
        f1, f2 = reward[1, b].mean(axis=1), reward[2, b].mean(axis=1)
        for n in range(N):
            of_sets = [
                f1[k] - f1.mean() for k in range(K) if n in kept.rounds[0].member_BxKxS[b, k]
            ]
            expected = sum(of_sets) / len(of_sets) if of_sets else 0.0
            assert batch.search_weight_UxC[b, n] == pytest.approx(
                expected / (B * c_search), abs=1e-7
            )
        for k, m in np.ndindex(K, M):
            own = (reward[1, b, k, m] - f1[k]) / (B * K * (M - 1))
            of_sets = [
                f2[j] - f2.mean()
                for j in range(K)
                if k * M + m in kept.rounds[1].member_BxKxS[b, j]
            ]
            read = sum(of_sets) / len(of_sets) / (B * c_read) if of_sets else 0.0
            assert weight[0, b, k, m] == pytest.approx(
                own + read, abs=1e-7
            )  # float32 of numbers below 0.2
            assert weight[1, b, k, m] == pytest.approx(
                (reward[2, b, k, m] - f2[k]) / (B * K * (M - 1)), abs=1e-7
            )
    assert (
        batch.metrics["reward/aggregated"].count
        == batch.metrics["reward/aggregated_round_1"].count
        > 0
    )


@pytest.mark.parametrize("informative", [1, 2])
def test_a_problem_is_kept_if_some_round_has_a_signal(informative):
    pattern = lambda round, cursor, k, i: round == informative and cursor % 2 and i == 0  # noqa: E731
    batch = collect_batch(actor_of(right_where(pattern)), None, step=0, cursor=0)
    assert batch.rollouts.cursor_B.tolist() == [1, 3, 5, 7]
    assert not batch.search_weight_UxC.any()  # every set of the first round has the same score
    weight = batch.aggregation_weight_UxC.reshape(2, -1)
    assert weight[informative - 1].any() and not weight[2 - informative].any()
    with pytest.raises(NoSignal, match="Right answers a problem, of 16: 16 right: 16"):
        collect_batch(actor_of(right_where(lambda round, *_: round == 2)), None, step=0, cursor=0)


def test_aggregator_only_gives_nothing_for_being_read():
    pattern = lambda round, cursor, k, i: (i + k) % 4 < round  # noqa: E731
    batch = collect_batch(
        actor_of(right_where(pattern), loss__estimator="aggregator_only"), None, step=0, cursor=0
    )
    weight = batch.aggregation_weight_UxC.reshape(2, -1, K, M)
    assert not batch.search_weight_UxC.any() and weight[0].any()
    np.testing.assert_allclose(weight.sum(axis=-1), 0, atol=1e-8)  # r - f alone


def test_a_problem_whose_second_round_was_lost_to_our_failures_is_not_kept():
    actor = actor_of(None)
    reward = np.zeros((2, K, M))
    reward[:, 0] = 1
    lost = np.where(np.arange(K)[:, None] > 0, np.nan, reward[1])  # one set is left
    for second, starved in ((reward[1], False), (lost, True)):
        found = find_advantages(
            actor.c, rollouts_of(np.zeros((1, N)), [reward[0][None], second[None]])
        )
        assert found.starved_B.tolist() == [starved] and found.keep_B.tolist() == [not starved]


@pytest.mark.parametrize("estimator", ["marginal_mean", "with_without"])
@pytest.mark.parametrize("gate", [0.0, 0.4])
def test_the_page_of_a_problem_explains_every_logged_advantage_of_two_rounds(estimator, gate):
    right = np.random.default_rng(1).random((3, 40, K, M)) < 0.5
    script = right_where(lambda round, cursor, k, i: right[round, cursor, k, i])
    long = lambda round, cursor, k, i: script(round, cursor, k, i) + "..." * (i == 0)  # noqa: E731
    actor = actor_of(long, loss__estimator=estimator, loss__length_gate=gate)
    batch = collect_batch(actor, None, step=0, cursor=0)
    seen, gated = 0, 0
    for rows in split_problems(trace_rows(actor.c, batch, TOKENIZER)):
        page = problem_page(0, rows, PageSettings.from_plain(to_plain(actor.c)))
        assert [one["name"] for one in page["sets"]] == ["A", "B", "C", "D", "A'", "B'", "C'", "D'"]
        traces = [*page["search"], *(trace for one in page["sets"] for trace in one["traces"])]
        assert [trace["advantage"] for trace in traces] == [row["advantage"] for row in rows]
        assert not any("was logged" in trace["why"] for trace in traces)
        gated += sum("length gate takes it" in trace["why"] for trace in traces)
        for k, one in enumerate(page["sets"][:K]):
            for m, trace in enumerate(one["traces"]):
                assert trace["name"] == f"{'ABCD'[k]}.{m}"
                inside = [
                    K + j
                    for j, other in enumerate(page["sets"][K:])
                    if k * M + m in other["members"]
                ]
                assert trace["sets"] == inside
                seen += bool(inside)
    assert seen > 20 and gated > 0


def test_prompts_have_room_for_candidates_that_are_aggregations():
    c = tiny.get_config()
    c.aggregation.max_tokens = 30  # search traces have 26
    c.sampling.classes, c.batch.aggregation_lengths = (
        ((32, 8, 16, 26), (128, 4, 124, 30)),
        ((124, 30),),
    )
    set_up(c)
    c.aggregation.rounds = 2
    with pytest.raises(
        ConfigError, match="widest prompt with traces of 30 tokens is 124, but .* up to 140"
    ):
        set_up(c)


# An enumerable policy of two rounds: bits, whose chances depend on how many ones the prompt shows.

SEARCH, FIRST, SECOND = np.array([0.4]), np.array([-0.7, 0.2, 0.9]), np.array([0.5, -0.3, 1.1])
n, k, s, m = 3, 2, 2, 2


def rollouts_of(own_BxN, reward_BxKxM, member=None):
    """Rollouts with these rewards and traces of one token; `member` of each round, else any."""
    B = len(own_BxN)

    def groups(reward_UxC):
        U, C = reward_UxC.shape
        requests = GroupRequests(
            np.ones((U, 1), np.int32), np.ones(U, np.int32), np.zeros((U, 6), np.int32), C, 1
        )
        ones = np.ones((U, C), np.int32)
        return Groups(
            requests, ones[..., None], ones, np.zeros((U, C, 1), np.float32), 0 * ones, reward_UxC
        )

    rounds = []
    for r, reward in enumerate(reward_BxKxM):
        sets = np.arange(reward.shape[1])[:, None] + np.arange(S) if member is None else member[r]
        rounds.append(
            Round(
                np.broadcast_to(sets, (B, *sets.shape[-2:])),
                groups(reward.reshape(-1, reward.shape[2])),
            )
        )
    return Rollouts([None] * B, np.arange(B), groups(own_BxN), tuple(rounds))


def chance(logits, shown, bit):
    one = 1 / (1 + np.exp(-logits[shown]))
    return np.where(bit == 1, one, 1 - one)


def outcomes():
    """Every rollout of one problem: bits of each stage, the drawn sets of each round, and shown
    ones of each trace.
    """
    draws = [
        np.array(list(itertools.combinations(itertools.combinations(range(size), s), k)))
        for size in (n, k * m)
    ]
    index = [np.arange(2**n), np.arange(len(draws[0])), np.arange(2 ** (k * m)), np.arange(len(draws[1])),
             np.arange(2 ** (k * m))]  # fmt: skip
    grid = [axis.ravel() for axis in np.meshgrid(*index, indexing="ij")]
    bits = lambda number, size: (number[:, None] >> np.arange(size)) & 1  # noqa: E731
    search, first, second = bits(grid[0], n), bits(grid[2], k * m), bits(grid[4], k * m)
    member = [draws[0][grid[1]], draws[1][grid[3]]]
    each = np.arange(len(search))[:, None, None]
    shown = [np.repeat(candidates[each, sets].sum(axis=-1), m, axis=-1)
             for candidates, sets in ((search, member[0]), (first, member[1]))]  # fmt: skip
    return search, first, second, member, shown, len(draws[0]) * len(draws[1])


def probability(theta, search, first, second, shown, draws):
    found = chance(theta[0], np.zeros_like(search), search).prod(axis=1) / draws
    return (
        found
        * chance(theta[1], shown[0], first).prod(axis=1)
        * chance(theta[2], shown[1], second).prod(axis=1)
    )


@pytest.mark.parametrize("estimator", ["marginal_mean", "with_without"])
def test_the_expected_update_is_the_gradient_of_the_sum_of_both_rounds_and_of_the_first_alone_for_search(
    estimator,
):
    """Central differences of the exact objective, and the exact mean of weight * grad log pi; 1e-6:
    float32 weights.
    """
    search, first, second, member, shown, draws = outcomes()
    c = tiny.get_config()
    c.loss.estimator, c.loss.length_gate = estimator, 1.0
    rollouts = rollouts_of(search, [first.reshape(-1, k, m), second.reshape(-1, k, m)], member)
    _, weight = weigh(c, rollouts, find_advantages(c, rollouts))
    theta = [SEARCH, FIRST, SECOND]
    p = probability(theta, search, first, second, shown, draws)
    assert p.sum() == pytest.approx(1, abs=1e-12)
    ones = [np.zeros_like(search), *shown]
    for stage, bits in enumerate((search, first, second)):
        of_trace = len(p) * weight[stage].reshape(
            bits.shape
        )  # the weights are of a batch of all outcomes
        for i in range(len(theta[stage])):
            one = 1 / (1 + np.exp(-theta[stage][i]))
            score = np.where(ones[stage] == i, bits - one, 0.0)  # d log pi / d theta_i
            found = float((p[:, None] * of_trace * score).sum())

            def objective(step, stage=stage, i=i):
                moved = [part.copy() for part in theta]
                moved[stage][i] += step
                value = first.mean(axis=1) + (second.mean(axis=1) if stage else 0.0)
                return float(
                    (probability(moved, search, first, second, shown, draws) * value).sum()
                )

            expected = (objective(1e-4) - objective(-1e-4)) / 2e-4
            assert abs(expected) > 1e-3 and found == pytest.approx(expected, abs=1e-6)
