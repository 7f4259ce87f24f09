"""Population replay: what is stored and read, and what answers to stored populations earn."""

import dataclasses
import itertools
import json
import re

import numpy as np
import pytest
from scripted_sampler import (
    TOKENIZER,
    SamplerByRound,
    asked,
    prompt_text,
    scripted_config,
    scripted_training,
    scripted_writer,
)
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

from configs import tiny
from spiral_jax.core.config import ConfigError, to_plain
from spiral_jax.core.groups import Role
from spiral_jax.objective.advantages import compute_advantages
from spiral_jax.objective.settings import ObjectiveSettings
from spiral_jax.objective.subsets import Key, draw_subsets
from spiral_jax.reporting.logged_problem import split_problems
from spiral_jax.reporting.problem_page import PageSettings, problem_page
from spiral_jax.rollout.collect import NoSignal
from spiral_jax.rollout.credit import give_replay_credit
from spiral_jax.rollout.populations import Populations
from spiral_jax.rollout.settings import ReplaySettings, training_stages
from spiral_jax.rollout.stages import Stage
from spiral_jax.rollout.traces import Replayed, Round
from spiral_jax.run.setup import set_up_training

N, K, S, M = 8, 4, 4, 4

# --- what is kept and drawn ---------------------------------------------------------------------


def store(**changes):
    fields = {"seed": 0, "problems": 2, "max_age": 3, "uses": 1, "rounds": 4, "reads": 1}
    return Populations(ReplaySettings(**fields | {"answers": 2, "max_tokens": 9} | changes))


@pytest.mark.parametrize("uses", [1, 2])
@pytest.mark.parametrize("problems", [1, 3])
def test_no_population_is_read_too_old_too_often_or_too_deep_and_the_store_is_bounded(
    problems, uses
):
    """Sixty steps, with zero to four new problems each; half of the answers have earned less."""
    rng, cursor = np.random.default_rng(0), 0
    stored, times, deepest = store(problems=problems, uses=uses), {}, 0
    for step in range(60):
        read = stored.drawn(step)
        assert len(read) == min(problems, len(stored.kept)) and stored.drawn(step) == read
        assert [each.cursor for each in read] == sorted({each.cursor for each in read})
        for each in read:
            name = each.cursor, each.step
            assert 1 <= step - each.step <= 3 and each.mean_reward > 0 and each.round < 4
            assert times.get(name, 0) == each.uses < uses
            times[name] = times.get(name, 0) + 1
            deepest = max(deepest, each.round)
        fresh = []
        for _ in range(rng.integers(5)):
            fresh.append(population(cursor, step, rewards=(rng.integers(2), 0.0)))
            cursor += 1
        answers = [
            [population(each.cursor, step, each.round + 1, rewards=(rng.integers(2), 0.0))]
            for each in read
        ]
        stored = stored.after(step, fresh, answers)
        assert len(stored.kept) <= 3 * problems
        steps = [each.step for each in stored.kept]
        assert steps == sorted(steps)  # the oldest first, who go first
    assert deepest == 3 and max(times.values()) == uses


def test_new_problems_push_no_stored_population_out_and_take_the_room_that_is_left():
    """Twenty of them a step where six populations fit; rounds grow deeper all the same."""
    stored, entered, deepest = store(uses=2, rounds=6), set(), 0
    for step in range(40):
        read = stored.drawn(step)
        answers = [[population(each.cursor, step, each.round + 1)] for each in read]
        fresh = [population(20 * step + i, step) for i in range(20)]
        after = stored.after(step, fresh, answers)
        read_now = {each.cursor for each in read if each.round == 5}  # nothing reads round 6
        stay = {each.cursor for each in stored.kept if step + 1 - each.step <= 3} - read_now
        new = {each.cursor for each in after.kept} - {each.cursor for each in stored.kept}
        assert stay <= {each.cursor for each in after.kept} and len(after.kept) == 6
        entered |= {cursor % 20 for cursor in new}
        deepest = max([deepest, *(each.round for each in read)])
        stored = after
    assert deepest == 5
    assert len(entered) > 10  # by key, not those that came first


def test_answers_take_the_place_of_what_they_have_read_once_they_have_earned_as_much():
    kept = [population(cursor, round=3 if cursor == 4 else 1) for cursor in range(1, 6)]
    first = store(problems=5, uses=2).after(0, kept, [])
    assert [each.cursor for each in first.drawn(1)] == [1, 2, 3, 4, 5]
    answers = [
        [population(1, 1, 2, rewards=(0.75, 0.25))],  # as much
        [population(2, 1, 2, rewards=(NAN, 1.0))],  # more: our failure is in no mean
        [population(3, 1, 2, rewards=(0.75, 0.0))],  # less
        [population(4, 1, 4)],  # nothing reads round 4
        [population(5, 1, 2, rewards=(NAN, NAN))],
    ]
    second = first.after(1, [], answers)
    places = [(each.cursor, each.step, each.round, each.uses) for each in second.kept]
    assert places == [(3, 0, 1, 1), (5, 0, 1, 1), (1, 1, 2, 0), (2, 1, 2, 0)]
    again = [[population(each.cursor, 2, each.round + 1, (0.1, 0.0))] for each in second.drawn(2)]
    third = second.after(2, [], again)
    assert [(each.cursor, each.uses) for each in third.kept] == [(1, 1), (2, 1)]


def test_of_several_rounds_the_first_takes_its_place_once_the_last_has_earned_as_much():
    kept = [population(cursor) for cursor in (1, 2, 3)]
    first = store(problems=5, uses=2, rounds=4, reads=2).after(0, kept, [])
    answers = [
        [population(1, 1, 2, (0.4, 0.4)), population(1, 1, 3, (0.5, 0.5))],
        [population(2, 1, 2, (0.9, 0.9)), population(2, 1, 3, (0.4, 0.5))],
        [population(3, 1, 2, (0.0, 0.0)), population(3, 1, 3, (0.5, 0.5))],
    ]
    second = first.after(1, [population(4, 1, 3)], answers)
    places = [(each.cursor, each.step, each.round, each.uses) for each in second.kept]
    # two rounds that read the third of problem 4 would be the fourth and the fifth
    assert places == [(2, 0, 1, 1), (1, 1, 2, 0)]


def test_what_has_earned_nothing_is_not_kept():
    kept = [population(1, rewards=(0.0, NAN)), population(2, rewards=(NAN, NAN)), population(3)]
    assert [each.cursor for each in store().after(0, kept, []).kept] == [3]


def test_each_population_is_as_likely_as_any_other_and_steps_and_seeds_differ():
    kept = tuple(population(cursor) for cursor in range(5))

    def cursors(stored, step):
        return [each.cursor for each in Populations(stored.settings, kept).drawn(step)]

    draws = [cursors(store(), step) for step in range(400)]
    assert draws != [cursors(store(seed=1), step) for step in range(400)]
    counts = np.bincount(np.ravel(draws), minlength=5)
    # 160 expected; a standard deviation is 9.8, and this is four of them
    assert np.abs(counts - 160).max() < 40


def test_what_is_saved_comes_back_with_every_bit():
    kept = (
        population(3, 5, 2, rewards=(1.0, NAN, 1 / 3)),
        population(2**20, 6, rewards=(1.0, 0.0, 1.0)),
    )
    stored = Populations(store(answers=3).settings, kept)
    plain = json.loads(json.dumps(stored.to_plain(), allow_nan=False))
    again = store(answers=3).restored(plain, step=7)
    assert again.to_plain() == plain
    search = scripted_writer(scripted_config()).search(Stage("search", 0, N, 9), asked(7))
    for one, other in zip(stored.kept, again.kept, strict=True):
        ours, theirs = one.as_group(search, 9), other.as_group(search, 9)
        for name in ("trace_UxCxG", "trace_len_UxC", "stop_UxC", "reward_UxC", "verdict_UxC"):
            before, after = getattr(ours, name), getattr(theirs, name)
            assert before.dtype == after.dtype
            if name == "verdict_UxC":
                assert str(before.tolist()) == str(after.tolist())  # NaN is not NaN
            else:
                np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ({}, [1, 2, 3]),
        ({"max_tokens": 2}, [1, 2, 3]),  # the longest have two tokens
        ({"max_tokens": 1}, []),
        ({"answers": 3}, []),  # more or fewer than a step's sets would be drawn from
        ({"answers": 1}, []),
        ({"rounds": 2}, [1, 3]),
        ({"reads": 3}, [1, 3]),
        ({"uses": 1}, [1, 2]),
        ({"max_age": 1}, [2, 3]),
    ],
)
def test_under_other_settings_what_does_not_fit_them_is_left_out(changes, left):
    used = dataclasses.replace(population(3, step=6), uses=1)
    kept = (population(1, step=5), population(2, step=6, round=2), used)
    plain = Populations(store(uses=2).settings, kept).to_plain()
    again = store(**{"uses": 2} | changes).restored(plain, step=7)
    assert [each.cursor for each in again.kept] == left


def test_a_store_that_a_resumed_run_has_made_smaller_takes_nothing_new_until_there_is_room():
    plain = Populations(store().settings, tuple(map(population, (1, 2, 3)))).to_plain()
    smaller = store(problems=1, max_age=2).restored(plain, step=1)
    read = smaller.drawn(1)
    answers = [[population(each.cursor, 1, 2)] for each in read]
    after = smaller.after(1, [population(4, 1)], answers)
    assert {each.cursor for each in after.kept} == {1, 2, 3}


# --- a step that reads them ---------------------------------------------------------------------

REPLAY = 2  # the round of the keys of what reads a population, behind the one after search


@pytest.fixture(scope="module")
def replaying():
    """(training, batch of its step 1, what that reads, which answers are right)."""
    right = np.random.default_rng(2).random((3, 40, K, M)) < 0.5
    training = scripted_training(
        script(right), sampler_class=SamplerByRound, replay__problems=3, replay__max_age=2
    )
    first = training.collect(step=0)
    stored = Populations(training.actor.stages.replay).after(0, first.rollouts.answers(), [])
    read = stored.drawn(1)
    batch = training.collect(1, first.next_cursor, read)
    return training, batch, read, right


def test_its_sets_are_drawn_by_key_and_read_the_stored_answers(replaying):
    training, batch, read, _ = replaying
    replayed = batch.replay.replayed
    assert replayed.cursor_B.tolist() == [each.cursor for each in read] and len(read) == 3
    assert set(replayed.cursor_B) & set(batch.rollouts.cursor_B) == set()
    (round,) = replayed.rounds
    requests = round.groups.requests
    listed = [
        row["order"]
        for row in rows_of(training, batch)
        if "replay" in row and row["trace"] == 0 and row["set"] is not None
    ]
    for b, cursor in enumerate(replayed.cursor_B.tolist()):
        member_KxS = draw_subsets(Key(training.c.seed, 0, 1, cursor, 1), K * M, S, K)
        np.testing.assert_array_equal(round.member_BxKxS[b], member_KxS)
        for k, member_S in enumerate(member_KxS):
            u = b * K + k
            shown = prompt_text(requests, u).split("#")
            assert f"left={cursor}" in shown[0].replace(" ", "")
            names = [re.sub(r"\s", "", text.split("\\")[0])[-2:] for text in shown[1:]]
            assert names == [f"{place // M}{place % M}" for place in listed[u]]
            assert sorted(listed[u]) == member_S.tolist()
            assert requests.id_Ux6[u].tolist() == [0, 1, cursor, REPLAY, Role.AGGREGATION, k]


def test_the_other_problems_of_the_step_are_what_they_are_without_it(replaying):
    training, batch, _, _ = replaying
    alone = training.collect(1, int(batch.rollouts.cursor_B[0]))
    assert alone.replay is None and alone.next_cursor == batch.next_cursor
    np.testing.assert_array_equal(alone.rollouts.cursor_B, batch.rollouts.cursor_B)
    for ours, theirs in zip(batch.rollouts.stages, alone.rollouts.stages, strict=True):
        np.testing.assert_array_equal(ours.trace_UxCxG, theirs.trace_UxCxG)
    for ours, theirs in zip(batch.credit, alone.credit, strict=True):
        np.testing.assert_array_equal(ours.weight_UxC, theirs.weight_UxC)
    assert batch.metrics["reward/aggregated"] == alone.metrics["reward/aggregated"]


def test_answers_earn_what_they_are_above_their_set_and_what_was_read_earns_nothing(replaying):
    _, batch, read, right = replaying
    groups, weight_UxC = batch.roles[Role.AGGREGATION]
    by_name = {tuple(id_6.tolist()): u for u, id_6 in enumerate(groups.requests.id_Ux6)}
    fresh = [u for name, u in by_name.items() if name[3] == 1]
    assert fresh == list(range(len(batch.rollouts) * K))
    of_fresh = batch.credit[1].weight_UxC
    np.testing.assert_array_equal(weight_UxC[fresh], of_fresh)
    trained = 0
    for each, k in itertools.product(read, range(K)):
        reward_M = right[REPLAY, each.cursor, k].astype(np.float64)
        # three populations with K sets of M samples
        expected = (reward_M - reward_M.mean()) / (3 * K * (M - 1))
        u = by_name.get((0, 1, each.cursor, REPLAY, int(Role.AGGREGATION), k))
        assert (u is None) == (not expected.any())
        if u is not None:
            trained += 1
            np.testing.assert_allclose(weight_UxC[u], expected, atol=1e-7)  # float32 below 0.1
            np.testing.assert_array_equal(groups.reward_UxC[u], reward_M)
    assert trained > 6 and len(groups) == len(fresh) + trained


def test_its_metrics_count_what_was_read_and_made_of_it(replaying):
    _, batch, read, right = replaying
    metrics = batch.metrics
    rewards = np.array([right[REPLAY, each.cursor] for each in read], np.float64)
    stored = np.array([right[1, each.cursor] for each in read], np.float64)
    assert metrics["replay/read"] == 3
    for name, values in (("reward/replayed", rewards), ("reward/replay_candidates", stored)):
        assert (metrics[name].total, metrics[name].count) == (values.sum(), values.size)
    share = metrics["replay/group_share"]
    decided = metrics["sampling/tried"] - metrics["sampling/undecided"]
    assert share.total == 3 * K and share.count == 3 * K + decided * K
    assert (metrics["replay/age"].total, metrics["replay/round"].total) == (3, 6)


def test_the_page_of_a_replayed_problem_explains_every_logged_advantage(replaying):
    training, batch, read, _ = replaying
    settings = PageSettings.from_plain(to_plain(training.c))
    pages = [problem_page(1, rows, settings) for rows in split_problems(rows_of(training, batch))]
    replayed = [page for page in pages if page["replay"]]
    assert [page["cursor"] for page in replayed] == [each.cursor for each in read]
    assert len(pages) > len(replayed)
    for page in replayed:
        assert page["replay"] == {"step": 0, "round": 1, "uses": 0} and "replayed" in page["flags"]
        assert {of_set["round"] for of_set in page["sets"]} == {2}
        assert len(page["search"]) == K * M and not any(t["advantage"] for t in page["search"])
        traces = page["search"] + [t for of_set in page["sets"] for t in of_set["traces"]]
        assert not [trace["why"] for trace in traces if "was logged" in trace["why"]]
        assert all("earlier step" in trace["why"] for trace in page["search"])


def test_a_step_ends_only_when_all_that_it_read_is_judged():
    """The populations' answers come last: the sampler takes one group at a time, newest first."""
    right = np.random.default_rng(3).random((3, 40, K, M)) < 0.5

    class PopulationsLast(SamplerByRound):
        def advance(self, feed, now):
            self.waiting = [*getattr(self, "waiting", []), *iter(lambda: feed.next(now), None)]
            self.waiting.sort(key=lambda request: -request.id_Ux6[0, 2])
            if self.waiting:
                group = self.write(self.waiting.pop(0))
                feed.done(group, now)
                yield group

    training = scripted_training(script(right), sampler_class=PopulationsLast, replay__problems=2)
    first = training.collect()
    stored = Populations(training.actor.stages.replay).after(0, first.rollouts.answers(), [])
    batch = training.collect(1, first.next_cursor, stored.drawn(1))
    assert len(batch.replay.replayed) == 2 and len(batch.rollouts) == 4


def test_a_step_whose_own_problems_teach_nothing_learns_from_the_populations_that_do(replaying):
    """Where nearly all problems are solved a small batch may have no signal by chance."""
    right = replaying[-1].copy()
    training = scripted_training(script(right), sampler_class=SamplerByRound, replay__problems=3)
    first = training.collect(step=0)
    read = Populations(training.actor.stages.replay).after(0, first.rollouts.answers(), []).drawn(1)
    right[1, first.next_cursor :] = True  # all that is sampled of search is solved
    batch = training.collect(1, first.next_cursor, read)
    tried = training.c.batch.problems * int(training.c.sampling.max_ratio)
    assert len(batch.rollouts) == 0 and batch.metrics["sampling/tried"] == tried
    assert batch.next_cursor == first.next_cursor + tried
    groups, weight_UxC = batch.roles[Role.AGGREGATION]
    assert len(groups) > 0 and weight_UxC.any(axis=1).all()
    assert len(batch.roles[Role.SEARCH][0]) == 0 and not batch.rollouts.answers()
    rows = rows_of(training, batch)
    assert {row["cursor"] for row in rows if "replay" in row} == {each.cursor for each in read}
    assert not any(row["kept"] for row in rows if "replay" not in row)
    right[2] = True  # and nothing is left to learn
    with pytest.raises(NoSignal, match="only 0 of 16 problems"):
        training.collect(1, first.next_cursor, read)


def test_answers_are_the_population_of_one_round_more(replaying):
    _, batch, read, right = replaying
    deeper = [rounds[0] for rounds in batch.replay.replayed.answers()]
    assert [(each.cursor, each.step, each.round) for each in deeper] == [
        (each.cursor, 1, 2) for each in read
    ]
    for each in deeper:
        np.testing.assert_array_equal(each.reward_C, right[REPLAY, each.cursor].ravel())
    fresh = batch.rollouts.answers()
    assert [(each.cursor, each.step, each.round) for each in fresh] == [
        (cursor, 1, 1) for cursor in batch.rollouts.cursor_B
    ]
    texts = [TOKENIZER.decode(row) for row in fresh[0].trace_CxG]
    names = [re.sub(r"\s", "", text)[:2] for text in texts]
    assert names == [f"{k}{m}" for k, m in np.ndindex(K, M)]


# --- its gradient, by enumeration ---------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["marginal_mean", "set_control_variate", "paragator"])
def test_the_expected_update_is_the_gradient_of_the_mean_reward_over_stored_populations(estimator):
    """The exact mean of weight * grad log pi, whatever search is rewarded by; 1e-6: float32."""
    update, objective = np.zeros(3), np.zeros((3, 2))
    moves = 1e-4 * np.eye(3)
    for stored in STORED:
        member, reward, shown, draws = outcomes_of(stored)
        B = len(reward)
        candidates = answers_with(np.tile(np.float64(stored), (B, 1)))
        round = Round(member, answers_with(reward.reshape(-1, 2)))
        replayed = Replayed([None] * B, [population(0)] * B, candidates, (round,))
        settings = ObjectiveSettings(estimator, "unbiased", 1.0, 1.0, 1.0)
        advantages = compute_advantages(estimator, replayed.rewards(), (0.5,))
        assert not advantages.rounds[0].candidate_BxN.any()
        (credit,) = give_replay_credit(replayed, advantages, settings)
        weight = credit.weight_UxC.reshape(reward.shape) * B / len(STORED)
        p = probability(THETA, reward, shown, draws)
        assert p.sum() == pytest.approx(1, abs=1e-12)
        score = reward - chance(THETA[shown])
        for i in range(3):
            score_i = np.where(shown == i, score, 0.0)
            update[i] += (p[:, None, None] * weight * score_i).sum()
            for side, sign in enumerate((1, -1)):
                moved = probability(THETA + sign * moves[i], reward, shown, draws)
                objective[i, side] += (moved * reward.mean(axis=(1, 2))).sum() / len(STORED)
    slope = (objective[:, 0] - objective[:, 1]) / 2e-4
    assert (np.abs(slope) > 1e-3).all()
    np.testing.assert_allclose(update, slope, atol=1e-6)


# --- its configuration --------------------------------------------------------------------------


def test_what_cannot_be_replayed_is_refused_with_the_field():
    for field, changes in {
        "replay.problems": {"replay__problems": -1},
        "replay.max_age": {"replay__max_age": 0},
        "replay.uses": {"replay__problems": 2, "replay__uses": 0},
        "replay.rounds": {"replay__problems": 2, "replay__rounds": 1},
        "grpo": {"replay__problems": 2, "loss__estimator": "grpo"},
        "4 traces a round": {
            "replay__problems": 2,
            "aggregation__subsets": 2,
            "aggregation__traces": 2,
        },
    }.items():
        with pytest.raises(ConfigError, match=field):
            training_stages(scripted_config(**changes))


def test_without_replay_nothing_is_sampled_or_trained_for_it():
    stages = training_stages(scripted_config())
    assert stages.replay is None
    assert [stage.name for stage in stages.sampled()] == ["search", "aggregation/1"]
    with_replay = training_stages(scripted_config(replay__problems=5))
    most = [each.groups(4)[Role.AGGREGATION] for each in (stages, with_replay)]
    assert most == [4 * K, (4 + 5) * K]


def test_prompts_have_room_for_stored_answers():
    c = tiny.get_config()
    c.aggregation.max_tokens = 30  # search traces have 26
    c.batch.aggregation_lengths = ((124, 30),)
    c.replay.problems = 16
    with pytest.raises(ConfigError, match="aggregation/replay"):
        set_up_training(c)
    c.batch.aggregation_lengths = ((140, 30),)
    assert set_up_training(c).sampler.schedule.prompts[-1] >= 139  # all but the last of 140
