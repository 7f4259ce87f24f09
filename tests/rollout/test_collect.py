"""Dynamic sampling and the stages of a rollout, with a sampler that needs no model."""

import dataclasses
import threading
import time

import numpy as np
import pytest
from scripted_sampler import TOKENIZER, make_actor, number_task

from spiral_jax.core.config import ConfigError
from spiral_jax.core.groups import Purpose, Role, Stop
from spiral_jax.objective import estimators as advantages
from spiral_jax.objective import of_own_answers as own_advantages
from spiral_jax.objective.estimators import Rewards
from spiral_jax.prompts import prompts
from spiral_jax.rollout.collect import NoSignal, collect_batch
from spiral_jax.rollout.requests import aggregate, search, verify
from spiral_jax.verifier.pool import VerifierFailure


def answers(right_share):
    """Aggregation traces of a problem are right with the given pattern; search traces always wrong."""

    def script(role, cursor, k, i):
        if role is Role.SEARCH:
            return f"trace {i} \\boxed{{{i}1}}"
        return "\\boxed{7}" if right_share(cursor, k, i) else "\\boxed{8}"

    return script


def test_the_batch_is_the_first_kept_problems_in_cursor_order_and_the_cursor_stands_behind_the_last():
    # Odd cursors are informative (set 0 right only); even ones are flat.
    actor = make_actor(answers(lambda cursor, k, i: cursor % 2 == 1 and k == 0))
    batch = collect_batch(actor, None, step=0, cursor=10)
    assert batch.rollouts.cursor_B.tolist() == [11, 13, 15, 17]
    assert batch.next_cursor == 18
    counts = {
        name: batch.metrics[f"sampling/{name}"]
        for name in ("kept", "surplus", "starved", "undecided")
    }
    assert counts == {
        "kept": 4,
        "surplus": 0,
        "starved": 0,
        "undecided": batch.metrics["sampling/tried"] - 8,
    }


def test_the_batch_does_not_depend_on_how_many_groups_run_at_once_or_are_expected_to_be_kept():
    script = answers(lambda cursor, k, i: cursor % 3 != 0 and k == 0)
    batches = [
        collect_batch(make_actor(script, at_once=at_once, sampling__keep_rate=rate), None, 2, 5)
        for at_once in (1, 7, 40)
        for rate in (0.1, 1.0)
    ]
    assert len({batch.metrics["sampling/tried"] for batch in batches}) > 1
    for batch in batches[1:]:
        assert batch.rollouts.cursor_B.tolist() == batches[0].rollouts.cursor_B.tolist()
        assert batch.next_cursor == batches[0].next_cursor
        np.testing.assert_array_equal(batch.search_weight_UxC, batches[0].search_weight_UxC)
        np.testing.assert_array_equal(
            batch.aggregation_weight_UxC, batches[0].aggregation_weight_UxC
        )


def test_weights_are_those_of_the_objective_on_the_kept_problems():
    rng = np.random.default_rng(0)
    right = rng.random((200, 4, 4)) < 0.5
    actor = make_actor(answers(lambda cursor, k, i: right[cursor, k, i]))
    batch = collect_batch(actor, None, step=1, cursor=0)
    kept = batch.rollouts
    reward = right[kept.cursor_B].astype(np.float32)
    np.testing.assert_array_equal(kept.rounds[-1].reward_BxKxM, reward)
    found = advantages.compute(
        "marginal_mean", Rewards(np.zeros((4, 8)), reward, kept.rounds[0].member_BxKxS)
    )
    np.testing.assert_allclose(
        batch.search_weight_UxC, found.search_BxN / (4 * 0.886), rtol=1e-3
    )  # c to 3 digits
    weight_BxKxM = batch.aggregation_weight_UxC.reshape(4, 4, 4)
    np.testing.assert_allclose(weight_BxKxM, found.aggregation_BxKxM / (4 * 4 * 3), rtol=1e-6)


def test_a_short_batch_is_trained_on_when_the_cap_is_reached_with_a_quarter_kept():
    actor = make_actor(
        answers(lambda cursor, k, i: cursor == 9 and k == 0), sampling__max_ratio=4.0
    )
    batch = collect_batch(actor, None, step=0, cursor=0)
    assert batch.rollouts.cursor_B.tolist() == [9]
    assert batch.next_cursor == 16
    assert batch.metrics["sampling/tried"] == 16


@pytest.mark.parametrize("right", [False, True])
def test_a_task_without_signal_stops_the_run_with_the_histogram(right):
    actor = make_actor(answers(lambda cursor, k, i: right))
    with pytest.raises(NoSignal, match=f"only 0 of 16 problems.*{16 if right else 0} right: 16"):
        collect_batch(actor, None, step=0, cursor=0)


def test_problems_that_are_too_long_are_left_out_and_counted():
    task = number_task()
    long_text = "left=" + "1+" * 40
    longer = dataclasses.replace(
        task,
        train=lambda i: (
            dataclasses.replace(task.train(i), text=long_text) if i % 2 else task.train(i)
        ),
    )
    actor = make_actor(answers(lambda cursor, k, i: k == 0), longer)
    batch = collect_batch(actor, None, step=0, cursor=0)
    assert batch.rollouts.cursor_B.tolist() == [0, 2, 4, 6]
    assert batch.metrics["sampling/too_long"] == 5  # 1, 3, 5 ... before each of the problems tried


def test_a_task_of_nothing_but_too_long_problems_is_an_error_that_names_the_field():
    task = number_task()
    longer = dataclasses.replace(
        task, train=lambda i: dataclasses.replace(task.train(i), text="left=" + "1+" * 40)
    )
    with pytest.raises(ConfigError, match="prompt.max_problem_tokens = 16"):
        collect_batch(make_actor(answers(lambda *_: True), longer), None, step=0, cursor=0)


def test_aggregation_prompts_hold_the_sampled_ids_of_their_subset_in_the_keyed_order():
    actor = make_actor(answers(lambda cursor, k, i: k == 0))
    problems, cursor_B = [actor.task.train(i) for i in (3, 4)], np.array([3, 4])
    found = search(actor, None, problems, cursor_B, Purpose.TRAIN, step=6)
    member = np.array([[[0, 1, 2, 5], [2, 3, 4, 7]]] * 2)
    groups, cleaned = aggregate(actor, None, problems, found, member, traces=2)
    assert len(groups) == 4 and groups.trace_len_UxC.shape == (4, 2)
    marker = TOKENIZER.encode("#", add_special_tokens=False)
    for u in range(4):
        b, k = divmod(u, 2)
        id_6 = groups.requests.id_Ux6[u]
        order = prompts.listed_order("shuffled", actor.c.seed, id_6, 4)
        expected = [[*marker, *found.trace_ids(b, n)[:-1]] for n in member[b, k][order]]
        prompt = groups.requests.prompt_UxP[u, : groups.requests.prompt_len_U[u]].tolist()
        assert (
            sum(expected, []) == prompt[-2 - sum(map(len, expected)) : -2]
        )  # before <|end|><|assistant|>
        assert groups.requests.id_Ux6[u].tolist() == [
            Purpose.TRAIN,
            6,
            cursor_B[b],
            1,
            Role.AGGREGATION,
            k,
        ]
    assert cleaned["removed_special"] == 0


def test_rewards_stay_with_their_problem_and_trace():
    actor = make_actor(lambda role, cursor, k, i: f"\\boxed{{{7 if (cursor + i) % 3 == 0 else 9}}}")
    problems = [actor.task.train(i) for i in range(5)]
    found, texts, verdicts = verify(
        actor, problems, search(actor, None, problems, np.arange(5), Purpose.TRAIN, 0)
    )
    expected = (np.arange(5)[:, None] + np.arange(8)) % 3 == 0
    np.testing.assert_array_equal(found.reward_UxC, expected.astype(np.float32))
    assert len(texts) == len(verdicts) == 40


def test_cut_off_traces_keep_no_positive_advantage():
    def script(role, cursor, k, i):
        if role is Role.SEARCH:
            return "left=1" + ("..." if i % 2 else "")
        return "\\boxed{7}" if k == 0 else "\\boxed{8}"

    batch = collect_batch(make_actor(script), None, step=0, cursor=0)
    cut_off = batch.rollouts.search.stop_UxC == Stop.LENGTH
    assert cut_off.any() and not cut_off.all()
    assert (batch.search_weight_UxC[cut_off] <= 0).all() and (
        batch.search_weight_UxC[cut_off] < 0
    ).any()
    assert (batch.search_weight_UxC[~cut_off] > 0).any()


def test_grpo_uses_the_traces_own_rewards_and_no_aggregation():
    script = lambda role, cursor, k, i: f"\\boxed{{{7 if i < cursor % 3 else 8}}}"  # noqa: E731
    actor = make_actor(script, loss__estimator="grpo")
    batch = collect_batch(actor, None, step=0, cursor=0)
    assert batch.rollouts.aggregation is None and batch.aggregation_weight_UxC is None
    assert batch.rollouts.cursor_B.tolist() == [1, 2, 4, 5]  # cursor % 3 == 0: all wrong
    reward = batch.rollouts.search.reward_UxC
    tokens = batch.rollouts.search.trace_len_UxC.sum()
    np.testing.assert_allclose(
        batch.search_weight_UxC, own_advantages.grpo(reward) / tokens, rtol=1e-6
    )


OWN_RIGHT = lambda role, cursor, k, i: (  # noqa: E731  search is right with its first cursor % 4 traces
    f"{'left' if i % 2 else 'right'}=1 \\boxed{{{7 if role is Role.SEARCH and i < cursor % 4 else 8}}}"
)


@pytest.mark.parametrize("estimator", ["online_multitask", "paragator", "pkpo", "polychromic"])
def test_own_correctness_decides_where_the_aggregations_are_flat(estimator):
    actor = make_actor(
        OWN_RIGHT, loss__estimator=estimator, task__strategy="test_collect:first_word"
    )
    batch = collect_batch(actor, None, step=0, cursor=0)
    assert batch.rollouts.cursor_B.tolist() == [1, 2, 3, 5]  # cursor % 4 == 0: all wrong
    found = advantages.compute(estimator, *batch.rollouts.rewards())
    assert found.search_BxN.any(axis=1).all() and not batch.aggregation_weight_UxC.any()
    scale = batch.search_weight_UxC[0, 0] / found.search_BxN[0, 0]
    np.testing.assert_allclose(batch.search_weight_UxC, scale * found.search_BxN, rtol=1e-6)
    if estimator == "polychromic":
        np.testing.assert_array_equal(batch.rollouts.strategy_BxN, np.tile([0, 1], (4, 4)))


def first_word(text, problem):
    return text.split("=")[0]


def test_polychromic_without_a_name_for_strategies_is_an_error_that_names_the_field():
    with pytest.raises(ConfigError, match="config.task.strategy = ''.*polychromic"):
        collect_batch(make_actor(OWN_RIGHT, loss__estimator="polychromic"), None, step=0, cursor=0)


@pytest.mark.parametrize("estimator", ["grpo_nostd", "rloo"])
def test_relatives_of_grpo_have_no_aggregation(estimator):
    batch = collect_batch(make_actor(OWN_RIGHT, loss__estimator=estimator), None, step=0, cursor=0)
    assert batch.rollouts.aggregation is None and batch.aggregation_weight_UxC is None
    assert batch.rollouts.cursor_B.tolist() == [1, 2, 3, 5]


def test_disjoint_sets_partition_the_traces_and_their_members_share_a_weight():
    actor = make_actor(
        answers(lambda cursor, k, i: k == 0),
        loss__estimator="disjoint_sets",
        aggregation__subsets=2,
    )
    batch = collect_batch(actor, None, step=0, cursor=0)
    for b, member_KxS in enumerate(batch.rollouts.rounds[0].member_BxKxS):
        assert sorted(member_KxS.ravel().tolist()) == list(range(8))
        np.testing.assert_allclose(
            batch.search_weight_UxC[b, member_KxS], [[0.5 / 4] * 4, [-0.5 / 4] * 4]
        )


# Virtual time


class SlowVerifier:
    """Answers late, and later for some than for others."""

    def __init__(self, verifier, seconds):
        self.verifier, self.seconds = verifier, seconds
        self.longest_s = verifier.longest_s

    def judge(self, items):
        time.sleep(self.seconds * (int(items[0][1].id[1:]) % 3))
        return self.verifier.judge(items)


def test_how_long_the_verifier_takes_changes_nothing():
    script = answers(lambda cursor, k, i: cursor % 2 == 1 and k == 0)
    found = []
    for seconds in (0.0, 0.02):
        actor = make_actor(script, at_once=3)
        actor = dataclasses.replace(actor, verifier=SlowVerifier(actor.verifier, seconds))
        batch = collect_batch(actor, None, step=0, cursor=0)
        asked = [tuple(call.id_Ux6[0].tolist()) for call in actor.sampler.calls]
        found.append((asked, batch.metrics, batch.rollouts.cursor_B.tolist(), batch.next_cursor))
    assert found[0] == found[1]


def test_verdicts_that_never_come_end_the_run_with_the_problem_that_waits():
    never = threading.Event()

    class HangingVerifier:
        longest_s = staticmethod(lambda items: 0.01)

        def judge(self, items):
            never.wait()

    actor = dataclasses.replace(
        make_actor(answers(lambda *_: True), at_once=1), verifier=HangingVerifier()
    )
    threading.Timer(1.0, never.set).start()  # the thread is waited for
    with pytest.raises(
        VerifierFailure, match=r"waited 0 s for the verdicts on the search traces of problem 'p0'"
    ):
        collect_batch(actor, None, step=0, cursor=0)


def test_a_verdict_counts_only_after_its_delay():
    script = answers(lambda cursor, k, i: k == 0)
    tried = []
    for delay in (0, 500):
        actor = make_actor(
            script, at_once=1, sampling__verdict_delay=delay, sampling__keep_rate=0.25
        )
        tried.append(collect_batch(actor, None, step=0, cursor=0).metrics["sampling/tried"])
    assert (
        tried[0] < tried[1] == 16
    )  # nothing is known until all that may be tried, 4 / 0.25, are on their way


def test_what_still_runs_when_the_batch_is_full_is_abandoned_and_counted():
    actor = make_actor(answers(lambda cursor, k, i: k == 0), at_once=1, sampling__keep_rate=0.25)
    batch = collect_batch(actor, None, step=0, cursor=0)
    assert batch.rollouts.cursor_B.tolist() == [0, 1, 2, 3] and batch.next_cursor == 4
    assert batch.metrics["sampling/undecided"] == batch.metrics["sampling/tried"] - 4 > 0


def test_aggregation_groups_enter_before_new_problems():
    actor = make_actor(answers(lambda cursor, k, i: k == 0), at_once=1)
    collect_batch(actor, None, step=0, cursor=0)
    roles = [int(call.id_Ux6[0, 4]) for call in actor.sampler.calls]
    assert roles[:10] == [Role.SEARCH, *[Role.AGGREGATION] * 4] * 2
