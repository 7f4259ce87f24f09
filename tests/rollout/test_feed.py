"""One feed for the stages of training and of evaluation: who is asked for, when, and once only."""

from collections import Counter

import numpy as np
import pytest
from scripted_sampler import (
    TOKENIZER,
    ReadingSampler,
    ScriptedSampler,
    UnorderedSampler,
    asked,
    scripted_config,
    scripted_evaluator,
    scripted_training,
    scripted_writer,
)

from spiral_jax.core.groups import Role
from spiral_jax.rollout.feed import Feed
from spiral_jax.rollout.stages import Stage


def script(role, cursor, k, i):
    return f"\\boxed{{{(3 * i + cursor) % 10}}}"


def sets_of(*member):
    def sets(step, cursor):
        return np.array(member, np.int32)

    return sets


# A tree: two stages read search, and one of them is read again, by the first of its traces.
SEARCH = Stage("search", 0, traces=4, max_tokens=32)
PLAIN = Stage("plain", 1, 2, 12, SEARCH, 4, 2, sets_of([0, 1], [2, 3], [0, 3]))
CHAIN = Stage("chain/1", 2, 1, 12, SEARCH, 3, 2, sets_of([0, 1], [1, 2]))
NEXT = Stage("chain/2", 3, 1, 12, CHAIN, 2, 2, sets_of([0, 1]))
STAGES = [SEARCH, PLAIN, CHAIN, NEXT]


class Listed:
    """`feed.Problems` by cursor."""

    def __init__(self, *cursors):
        self._waiting = list(cursors)

    def next(self):
        return asked(self._waiting.pop(0)) if self._waiting else None

    @property
    def exhausted(self):
        return not self._waiting


def feed_of(*cursors, stages=STAGES):
    return Feed(stages, scripted_writer(scripted_config()), Listed(*cursors))


def place(group):
    """(cursor, round, set) of a group or of its request."""
    requests = getattr(group, "requests", group)
    return tuple(int(requests.id_Ux6[0, i]) for i in (2, 3, 5))


def take_all(feed, now=0):
    requests = []
    while (request := feed.next(now)) is not None:
        requests.append(request)
    return requests


def complete(feed, requests, now=0):
    """Ends these groups; returns the stages that it completed, as (cursor, name, now)."""
    for request in requests:
        feed.done(ScriptedSampler(script).write(request), now)
    completed = feed.take_completed()
    return [(each.course.asked.cursor, each.stage.name, each.now) for each in completed]


# --- the feed by itself -------------------------------------------------------------------------


def test_all_stages_that_read_a_completed_one_are_asked_for_in_order_and_before_new_problems():
    feed = feed_of(5, 6)
    search = feed.next(0)
    assert place(search) == (5, 0, 0)
    assert complete(feed, [search], now=2) == [(5, "search", 2)]
    expected = [(5, 1, 0), (5, 1, 1), (5, 1, 2), (5, 2, 0), (5, 2, 1), (6, 0, 0)]
    assert [place(request) for request in take_all(feed)] == expected


def test_a_stage_is_complete_with_its_last_group_whatever_the_order():
    feed = feed_of(5)
    complete(feed, [feed.next(0)])
    groups = {place(request): request for request in take_all(feed)}
    assert complete(feed, [groups[5, 1, 2], groups[5, 2, 1], groups[5, 1, 0]]) == []
    assert not feed.finished()
    assert complete(feed, [groups[5, 2, 0]], now=7) == [(5, "chain/1", 7)]
    (late,) = take_all(feed)
    assert place(late) == (5, 3, 0)
    assert complete(feed, [groups[5, 1, 1]], now=8) == [(5, "plain", 8)]
    assert not feed.finished()
    assert complete(feed, [late], now=9) == [(5, "chain/2", 9)]
    assert feed.finished() and feed.take_completed() == []

    course = feed.courses[5]
    for stage, sets in ((SEARCH, 1), (PLAIN, 3), (CHAIN, 2), (NEXT, 1)):
        order = [place(course.of_stage(stage).take([k])) for k in range(sets)]
        assert order == [(5, stage.round, k) for k in range(sets)]
    assert course.member["plain"].tolist() == [[0, 1], [2, 3], [0, 3]]


def test_nothing_is_asked_for_twice():
    feed, sampler = feed_of(3, 4, 5), UnorderedSampler(script, at_once=4)
    for _ in sampler.stream(None, feed):
        pass
    times = Counter(place(request) for request in sampler.calls)
    sets = [(0, 0), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (3, 0)]
    assert times == Counter((cursor, *of_stage) for cursor in (3, 4, 5) for of_stage in sets)


def test_a_stage_reads_the_first_of_the_candidates_in_the_order_of_their_sets():
    feed, sampler = feed_of(8), ReadingSampler(lambda role, cursor, k, i: f"\\boxed{{{i}}}")
    for _ in sampler.stream(None, feed):
        pass
    answers = {}
    for stage in (PLAIN, CHAIN, NEXT):
        groups = feed.courses[8].of_stage(stage)
        texts = [TOKENIZER.decode(groups.trace_ids(u, 0)) for u in range(len(groups))]
        answers[stage.name] = [int(text.split("{")[1][0]) for text in texts]
    assert answers == {"plain": [1, 3, 3], "chain/1": [1, 2], "chain/2": [2]}
    assert feed.cleaned["plain_candidates"] == 6 and feed.cleaned["chain_candidates"] == 4 + 2


def test_a_problem_may_begin_with_a_search_group_that_other_weights_have_drawn():
    own = feed_of(5)
    group = ScriptedSampler(script).write(own.next(0))
    own.done(group, 0)
    feed = feed_of()
    feed.begin_with(asked(5), group)
    assert not feed.finished()
    requests, expected = take_all(feed), take_all(own)
    assert [place(request) for request in requests] == [place(request) for request in expected]
    for request, of_own in zip(requests, expected, strict=True):
        np.testing.assert_array_equal(request.prompt_UxP, of_own.prompt_UxP)
    complete(feed, requests)
    complete(feed, take_all(feed))
    assert feed.finished() and list(feed.courses) == [5]


def test_with_search_alone_a_problem_ends_with_it():
    feed = feed_of(5, stages=[SEARCH])
    assert complete(feed, [feed.next(0)]) == [(5, "search", 0)]
    assert feed.next(0) is None and feed.finished()


# --- training -----------------------------------------------------------------------------------


def test_aggregation_groups_enter_before_new_problems():
    def first_set_right(role, cursor, k, i):
        return "\\boxed{7}" if role is Role.AGGREGATION and k == 0 else "\\boxed{8}"

    training = scripted_training(first_set_right, at_once=1)
    training.collect()
    roles = [int(call.id_Ux6[0, 4]) for call in training.sampler.calls]
    assert roles[:10] == [Role.SEARCH, *[Role.AGGREGATION] * 4] * 2


# --- evaluation ---------------------------------------------------------------------------------

SIZES = {
    "eval__n": 9,
    "eval__population": 6,
    "eval__set_size": 2,
    "eval__rounds": 3,
    "eval__subsets": 3,
    "eval__traces": 2,
    "eval__subset_size": 3,
}
INDICES = (4, 9, 2, 7)


def evaluate(sampler):
    """Records and counts of the problems at `INDICES`."""
    wave = scripted_evaluator(sampler, **SIZES).wave(None, [asked(index) for index in INDICES])
    return wave.records, wave.counts


@pytest.fixture(scope="module")
def one_by_one():
    return evaluate(ReadingSampler(script, at_once=1))


@pytest.mark.parametrize("at_once, seed", [(2, 0), (7, 1), (100, 2)])
def test_records_and_counts_do_not_depend_on_what_ends_when(at_once, seed, one_by_one):
    unordered = UnorderedSampler(script, at_once, seed=seed)
    assert evaluate(unordered) == one_by_one
    assert not unordered.running


def test_no_stage_waits_for_other_problems():
    sampler = ReadingSampler(script, at_once=1)
    evaluate(sampler)
    sets_of_round = {0: 1, 1: 3, 2: 6, 3: 6, 4: 6}
    expected = []
    for index in INDICES:  # all of a problem before the next one begins
        for round, sets in sets_of_round.items():
            expected += [(index, round, k) for k in range(sets)]
    assert [place(call) for call in sampler.calls] == expected
