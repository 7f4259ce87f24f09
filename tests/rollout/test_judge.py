"""Verdicts in virtual time: when they count, and that nothing depends on how long they take."""

import threading
import time

import numpy as np
import pytest
from scripted_sampler import TOKENIZER, math_verifier, number_task, scripted_training

from spiral_jax.core.groups import GroupRequests, Groups, Role
from spiral_jax.rollout.feed import Completed, Course
from spiral_jax.rollout.judge import Judge, number_strategies
from spiral_jax.rollout.requests import Asked
from spiral_jax.rollout.stages import Stage
from spiral_jax.verifier.pool import VerifierFailure


def first_set_right(role, cursor, k, i):
    return "\\boxed{7}" if role is Role.AGGREGATION and k == 0 else "\\boxed{8}"


def first_set_of_odd_ones_right(role, cursor, k, i):
    return first_set_right(role, cursor, k, i) if cursor % 2 else "\\boxed{8}"


class SlowVerifier:
    """Answers late, and later for some than for others."""

    def __init__(self, verifier, seconds):
        self._verifier, self._seconds = verifier, seconds
        self.longest_s = verifier.longest_s

    def judge(self, items):
        time.sleep(self._seconds * (int(items[0][1].id[1:]) % 3))
        return self._verifier.judge(items)


class HangingVerifier:
    """Does not answer while a test waits for it."""

    def __init__(self, released):
        self._released = released

    def longest_s(self, items):
        return 0.01

    def judge(self, items):
        self._released.wait()


def test_how_long_the_verifier_takes_changes_nothing():
    outcomes = []
    for seconds in (0.0, 0.01):
        training = scripted_training(first_set_of_odd_ones_right, at_once=3)
        training = training.with_actor(verifier=SlowVerifier(math_verifier(), seconds))
        batch = training.collect()
        asked_for = [tuple(call.id_Ux6[0].tolist()) for call in training.sampler.calls]
        kept = batch.rollouts.cursor_B.tolist()
        outcomes.append((asked_for, batch.metrics, kept, batch.next_cursor))
    assert outcomes[0] == outcomes[1]


def test_verdicts_that_never_come_end_the_run_with_the_problem_that_waits():
    released = threading.Event()
    training = scripted_training(first_set_right, at_once=1)
    training = training.with_actor(verifier=HangingVerifier(released))
    threading.Timer(0.5, released.set).start()  # the thread is waited for
    with pytest.raises(VerifierFailure) as failure:
        training.collect()
    assert all(part in str(failure.value) for part in ("'p0'", "search", "verifier.timeout_s"))


def test_a_verdict_counts_only_after_its_delay():
    tried = []
    for delay in (0, 500):
        training = scripted_training(
            first_set_right, at_once=1, verdict_delay=delay, sampling__keep_rate=0.25
        )
        tried.append(training.collect().metrics["sampling/tried"])
    # With the long one nothing is known until all that may be tried, 4 / 0.25, are on their way.
    assert tried[0] < tried[1] == 16


# --- `Judge` by itself --------------------------------------------------------------------------

SEARCH = Stage("search", 0, traces=3, max_tokens=8)
READER = Stage("aggregation/1", 1, traces=2, max_tokens=8, reads=SEARCH)
MEMBER = np.array([[0, 1], [1, 2]])


def answers_of(stage, answers_UxC):
    """Groups of a stage whose traces are boxes with these answers."""
    U, C, G = *np.shape(answers_UxC), stage.max_tokens
    trace, length = np.zeros((U, C, G), np.int32), np.zeros((U, C), np.int32)
    for u, c in np.ndindex(U, C):
        ids = TOKENIZER.encode(f"\\boxed{{{answers_UxC[u][c]}}}", add_special_tokens=False)
        trace[u, c, : len(ids)], length[u, c] = ids, len(ids)
    requests = GroupRequests(
        np.ones((U, 1), np.int32), np.ones(U, np.int32), np.zeros((U, 6), np.int32), C, G
    )
    return Groups(requests, trace, length, np.zeros((U, C, G), np.float32), 0 * length)


def course_of(cursor, search, aggregation):
    """A problem, the answer is 7, whose stages have these answers."""
    asked = Asked(cursor, number_task().train(cursor), np.ones(1, np.int32))
    course = Course(asked, [SEARCH, READER])
    course.member[READER.name] = MEMBER
    course.groups[SEARCH.name] = {0: answers_of(SEARCH, [search])}
    sets = {k: answers_of(READER, [answers]) for k, answers in enumerate(aggregation)}
    course.groups[READER.name] = sets
    return course


@pytest.fixture
def judge():
    with Judge(math_verifier(), TOKENIZER, delay=3, strategy=None) as judge:
        yield judge


def test_the_delay_counts_from_the_last_stage_and_problems_are_given_once_in_cursor_order(judge):
    courses = {cursor: course_of(cursor, [7, 8, 9], [[7, 7], [8, 8]]) for cursor in (1, 2, 3)}
    judge.submit(Completed(courses[3], SEARCH, now=0))
    judge.submit(Completed(courses[1], SEARCH, now=0))
    judge.submit(Completed(courses[3], READER, now=10))
    judge.submit(Completed(courses[1], READER, now=11))
    judge.submit(Completed(courses[2], SEARCH, now=0))  # nothing has aggregated its traces yet
    given = {now: [int(each.cursor_B[0]) for each in judge.due(now)] for now in (9, 12, 14, 20)}
    assert given == {9: [], 12: [], 14: [1, 3], 20: []}
    judge.submit(Completed(courses[2], READER, now=20))
    assert [len(judge.due(now)) for now in (22, 23, 24)] == [0, 1, 0]


def test_rewards_and_verdicts_stay_with_their_problem_stage_and_trace(judge):
    rng = np.random.default_rng(0)
    answers = {cursor: rng.choice([7, 8], size=7) for cursor in range(6)}
    for cursor, of_problem in answers.items():
        course = course_of(cursor, of_problem[:3], of_problem[3:].reshape(2, 2))
        judge.submit(Completed(course, SEARCH, now=0))
        judge.submit(Completed(course, READER, now=0))
    rollouts = judge.due(3)
    assert [each.problems[0].id for each in rollouts] == [f"p{cursor}" for cursor in range(6)]
    for rollout, of_problem in zip(rollouts, answers.values(), strict=True):
        rewards = [groups.reward_UxC.ravel() for groups in rollout.stages]
        np.testing.assert_array_equal(np.concatenate(rewards), of_problem == 7)
        verdicts = [verdict for groups in rollout.stages for verdict in groups.verdict_UxC.flat]
        assert [verdict.reward for verdict in verdicts] == (of_problem == 7).tolist()
        np.testing.assert_array_equal(rollout.rounds[0].member_BxKxS, MEMBER[None])
        assert rollout.strategy_BxN is None


def test_equal_strategies_have_equal_numbers_and_none_has_minus_one():
    assert number_strategies(["b", None, "a", "b", None]).tolist() == [0, -1, 1, 0, -1]


def test_strategies_are_named_from_the_search_traces():
    def answer_of(text, problem):
        return text if "8" not in text else None

    with Judge(math_verifier(), TOKENIZER, delay=0, strategy=answer_of) as judge:
        course = course_of(5, [9, 8, 9], [[7, 7], [8, 8]])
        for stage in course.stages:
            judge.submit(Completed(course, stage, now=0))
        (rollout,) = judge.due(0)
    assert rollout.strategy_BxN.tolist() == [[0, -1, 0]]
