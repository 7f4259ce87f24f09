"""The host's side of the pages, alone: nothing is lost, nobody waits forever, by 100,000 events."""

import numpy as np
import pytest
from small_sampler import make_schedule, requests_of

from spiral_jax.core.groups import Stop
from spiral_jax.sampling.jobs import Job
from spiral_jax.sampling.shard import Shard

STOP = 7
EVENTS = 100_000


def random_job(rng, cursor, schedule):
    """Of any width, with prompts and traces of any length that the schedule allows."""
    traces = int(rng.integers(1, 3 * schedule.together + 1))
    prompt = rng.integers(20, 30, int(rng.integers(1, schedule.prompts[-1] + 2)))
    limits = rng.integers(1, schedule.trace + 1, (1, traces)).astype(np.int32)
    request = requests_of([prompt], cursor, traces=traces, limit_UxC=limits)
    return Job(request), rng.integers(1, 2 * schedule.trace, traces)  # and where each one stops


def check_pages(shard, jobs, schedule):
    """Every page is in one place: free, a row's, or a prompt's; page 0 in none."""
    rows = [shard.own_table_RxT[s, : shard.held_R[s]].tolist() for s in shard.order]
    prompts = [job.pages for job in jobs]
    held = [page for pages in rows + prompts for page in pages]
    assert len(held) == len(set(held)) and 0 not in held
    assert len(held) + shard.free_pages == schedule.pages - 1
    assert len(shard.order) + shard.free_seats == schedule.rows[-1]


def draw(rng, shard, running, stops, chunk):
    """Tokens [T, N] of a chunk, -1 from where on a row draws nothing; it may end early."""
    token_TxN = np.full((chunk, len(running.seat_N)), -1, np.int32)
    steps = int(rng.integers(1, chunk + 1))
    for n, seat in enumerate(running.seat_N):
        job, drawn = shard.job[seat], shard.drawn_R[seat]
        stop = stops[job][shard.trace_R[seat]]
        until = min(shard.may_have(np.array([seat]))[0], stop, drawn + steps)
        token_TxN[: until - drawn, n] = 50 + np.arange(drawn, until)
        if until == stop:
            token_TxN[until - drawn - 1, n] = STOP
    return token_TxN


def check_job(job, stops):
    for trace, (limit, stop) in enumerate(zip(job.limit_C, stops, strict=True)):
        length = min(limit, stop)
        assert job.length_C[trace] == length
        expected = 50 + np.arange(length)
        if stop <= limit:
            expected[-1] = STOP
        np.testing.assert_array_equal(job.trace_CxG[trace, :length], expected)
        assert job.stop_C[trace] == (Stop.STOP if stop <= limit else Stop.LENGTH)


SCHEDULES = {
    "the fewest pages": {"pages": 1 + 4 + 2 * 6, "together": 2},
    "one by one": {"pages": 1 + 4 + 6, "together": 1, "rows": (5,)},
    "more": {"pages": 60, "together": 3, "width": 3},
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_no_page_is_lost_or_given_twice_and_every_group_ends(kind):
    options = {"page": 2, "rows": (8,), "width": 2, "prompts": (8,), "chunk": 3, "fill": 2}
    schedule = make_schedule(**options | SCHEDULES[kind])
    rng, shard = np.random.default_rng(0), Shard(schedule, (STOP,))
    stops, jobs, waiting, events, paused = {}, [], None, 0, 0
    while events < EVENTS // len(SCHEDULES):
        shard.grow()
        shard.begin()
        while True:
            if waiting is None:
                waiting, stops_C = random_job(rng, events, schedule)
                stops[waiting] = stops_C
            if not shard.has_room(waiting):
                break
            shard.admit(waiting)
            shard.begin()
            jobs.append(waiting)
            waiting, events = None, events + 1
        check_pages(shard, jobs, schedule)

        running = shard.running()
        oldest = shard.order[: min(schedule.together, schedule.bundles(schedule.rows[-1]))]
        assert oldest and set(oldest) <= set(running.seat_N.tolist())  # they never wait
        assert len(set(zip(running.bundle_N, running.place_N, strict=True))) == len(running.seat_N)
        assert running.place_N.max() < schedule.width
        for u in range(running.bundles):  # the rows of one group
            assert len({shard.job[seat] for seat in running.seat_N[running.bundle_N == u]}) == 1

        token_TxN = draw(rng, shard, running, stops, schedule.chunk)
        done = shard.collect(running.seat_N, token_TxN, np.zeros(token_TxN.shape, np.float32))
        events, paused = events + int((token_TxN >= 0).sum()), paused + running.paused
        for job in done:
            check_job(job, stops.pop(job))
            jobs.remove(job)
    assert paused > 0


def test_a_pool_that_could_never_hold_the_largest_group_is_refused():
    with pytest.raises(ValueError, match="pages"):
        Shard(make_schedule(pages=1 + 4 + 3 * 3 - 1, together=3), ())
