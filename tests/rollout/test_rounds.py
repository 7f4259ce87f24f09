"""Several rounds of aggregation in one rollout: what they read, and what their traces earn."""

import re

import numpy as np
import pytest
from scripted_sampler import (
    CUT_OFF,
    TOKENIZER,
    SamplerByRound,
    ScriptedTraining,
    prompt_text,
    scripted_training,
)

from configs import tiny
from spiral_jax.core.config import ConfigError, to_plain
from spiral_jax.core.groups import Role
from spiral_jax.objective import of_sets
from spiral_jax.objective.subsets import Key, draw_subsets
from spiral_jax.reporting.logged_problem import split_problems
from spiral_jax.reporting.problem_page import PageSettings, problem_page
from spiral_jax.rollout.collect import NoSignal
from spiral_jax.run.setup import set_up_training
from spiral_jax.run.trace_log import TraceRows

N, K, S, M = 8, 4, 4, 4


def two_rounds(script, **overrides) -> ScriptedTraining:
    overrides = {"aggregation__rounds": 2} | overrides
    return scripted_training(script, sampler_class=SamplerByRound, **overrides)


def right_where(is_right):
    """Aggregations are right where `is_right(round, cursor, set, trace)`; digits name them."""

    def script(round, cursor, k, i):
        if round == 0:
            return f"left:{i}, \\boxed{{1}}"
        return f"{k}{i} \\boxed{{{7 if is_right(round, cursor, k, i) else 8}}}"

    return script


def at_random(seed):
    right = np.random.default_rng(seed).random((3, 40, K, M)) < 0.5
    return right, right_where(lambda *place: right[place])


def rows_of(training, batch):
    """The rows of the trace log."""
    c = training.c
    rows = TraceRows(TOKENIZER, 1.0, c.aggregation.order, c.seed, drops_truncated=False)
    return list(rows.make(batch))


def shown_names(requests, u):
    """The two digits that name each trace that a second round's prompt lists, in its order."""
    candidates = prompt_text(requests, u).split("#")[1:]
    return [re.sub(r"\s", "", candidate.split("\\")[0])[-2:] for candidate in candidates]


def name_of(place):
    return f"{place // M}{place % M}"


def test_the_second_round_reads_the_traces_of_the_first_in_the_keyed_order():
    training = two_rounds(right_where(lambda round, cursor, k, i: i < 2))
    batch = training.collect(step=3)
    first, second = batch.rollouts.rounds
    requests = second.groups.requests
    for b, cursor in enumerate(batch.rollouts.cursor_B):
        member_KxS = draw_subsets(Key(training.c.seed, 0, 3, int(cursor), 1), K * M, S, K)
        np.testing.assert_array_equal(second.member_BxKxS[b], member_KxS)
        assert (first.member_BxKxS[b] < N).all() and len(np.unique(member_KxS)) > S
        for k, member_S in enumerate(member_KxS):
            u = b * K + k
            assert sorted(shown_names(requests, u)) == sorted(map(name_of, member_S))
            assert requests.id_Ux6[u].tolist() == [0, 3, cursor, 2, Role.AGGREGATION, k]

    rows = rows_of(training, batch)
    assert len(rows) % (N + 2 * K * M) == 0
    of_second = [row for row in rows if row["round"] == 2 and row["trace"] == 0 and row["kept"]]
    for u, row in enumerate(of_second):
        assert row["subset"] == second.member_BxKxS[u // K, u % K].tolist()
        assert row["set"] == u % K
        # the log says what the prompt lists
        assert shown_names(requests, u) == [name_of(place) for place in row["order"]]


def mean_above_average(score_K, has_trace_K):
    """Mean of f - mean(f) over the sets that have a trace; 0 if none has."""
    above_K = score_K - score_K.mean()
    return above_K[has_trace_K].mean() if has_trace_K.any() else 0.0


def test_traces_of_the_first_round_earn_their_own_success_and_that_of_the_sets_that_read_them():
    right, script = at_random(0)
    batch = two_rounds(script).collect()
    kept = batch.rollouts
    search, first, second = (credit.weight_UxC for credit in batch.credit)
    B = len(kept)
    c_search = of_sets.marginal_mean_factor(N, S, K)
    c_read = of_sets.marginal_mean_factor(K * M, S, K)
    member_of = [round.member_BxKxS for round in kept.rounds]
    for b, cursor in enumerate(kept.cursor_B):
        reward_1, reward_2 = right[1:, cursor].astype(np.float64)
        score_1, score_2 = reward_1.mean(axis=1), reward_2.mean(axis=1)
        for n in range(N):
            advantage = mean_above_average(score_1, (member_of[0][b] == n).any(axis=1))
            assert search[b, n] == pytest.approx(advantage / (B * c_search), abs=1e-7)
        for k, m in np.ndindex(K, M):
            read = mean_above_average(score_2, (member_of[1][b] == k * M + m).any(axis=1))
            own_1 = (reward_1[k, m] - score_1[k]) / (B * K * (M - 1))
            own_2 = (reward_2[k, m] - score_2[k]) / (B * K * (M - 1))
            # float32 of numbers below 0.2
            assert first[b * K + k, m] == pytest.approx(own_1 + read / (B * c_read), abs=1e-7)
            assert second[b * K + k, m] == pytest.approx(own_2, abs=1e-7)
    groups, weight_UxC = batch.roles[Role.AGGREGATION]
    assert len(groups) == 2 * B * K
    np.testing.assert_array_equal(weight_UxC, np.concatenate([first, second]))
    last, before = batch.metrics["reward/aggregated"], batch.metrics["reward/aggregated_round_1"]
    assert last.count == before.count > 0


@pytest.mark.parametrize("informative", [1, 2])
def test_a_problem_is_kept_if_some_round_has_a_signal(informative):
    def is_right(round, cursor, k, i):
        return round == informative and cursor % 2 and i == 0

    batch = two_rounds(right_where(is_right)).collect()
    assert batch.rollouts.cursor_B.tolist() == [1, 3, 5, 7]
    search, *rounds = (credit.weight_UxC for credit in batch.credit)
    assert not search.any()  # every set of the first round has the same score
    assert rounds[informative - 1].any() and not rounds[2 - informative].any()


def test_the_histogram_of_a_run_without_signal_counts_the_last_round():
    with pytest.raises(NoSignal, match="of 16: 16 right: 16"):
        two_rounds(right_where(lambda round, *_: round == 2)).collect()


def test_aggregator_only_gives_nothing_for_being_read():
    script = right_where(lambda round, cursor, k, i: (i + k) % 4 < round)
    search, first, _ = two_rounds(script, loss__estimator="aggregator_only").collect().credit
    assert not search.weight_UxC.any() and first.weight_UxC.any()
    np.testing.assert_allclose(first.weight_UxC.sum(axis=-1), 0, atol=1e-8)  # r - f alone


@pytest.mark.parametrize("estimator", ["marginal_mean", "with_without"])
@pytest.mark.parametrize("gate", [0.0, 0.4])
def test_the_page_of_a_problem_explains_every_logged_advantage_of_two_rounds(estimator, gate):
    _, script = at_random(1)

    def first_ones_cut_off(round, cursor, k, i):
        return script(round, cursor, k, i) + CUT_OFF * (i == 0)

    training = two_rounds(first_ones_cut_off, loss__estimator=estimator, loss__length_gate=gate)
    settings = PageSettings.from_plain(to_plain(training.c))
    read = gated = 0
    for rows in split_problems(rows_of(training, training.collect())):
        page = problem_page(0, rows, settings)
        sets = page["sets"]
        names = [of_set["name"] for of_set in sets]
        assert names == ["A", "B", "C", "D", "A'", "B'", "C'", "D'"]
        traces = page["search"] + [trace for of_set in sets for trace in of_set["traces"]]
        assert [trace["advantage"] for trace in traces] == [row["advantage"] for row in rows]
        assert not any("was logged" in trace["why"] for trace in traces)
        gated += sum("length gate takes it" in trace["why"] for trace in traces)
        for k, m in np.ndindex(K, M):
            trace = sets[k]["traces"][m]
            inside = [place for place in range(K, 2 * K) if k * M + m in sets[place]["members"]]
            assert trace["name"] == f"{'ABCD'[k]}.{m}" and trace["sets"] == inside
            read += bool(inside)
    assert read > 20 and gated > 0


def test_prompts_have_room_for_candidates_that_are_aggregations():
    c = tiny.get_config()
    c.aggregation.max_tokens = 30  # search traces have 26
    c.batch.aggregation_lengths = ((124, 30),)
    set_up_training(c)
    c.aggregation.rounds = 2
    with pytest.raises(ConfigError) as refused:
        set_up_training(c)
    parts = ("batch.aggregation_lengths", "30 tokens", "124", "140", "prompt.keep_tail_tokens")
    assert [part for part in parts if part not in str(refused.value)] == []
    c.batch.aggregation_lengths = ((140, 30),)
    assert set_up_training(c).sampler.schedule.prompts[-1] >= 139  # all but the last of 140
