"""What a plan says of rows at a random moment, against traces that are drawn and run."""

import dataclasses

import numpy as np
import pytest

from spiral_jax.core.groups import Role
from spiral_jax.planning.usage import usage_of
from spiral_jax.planning.work import Work
from spiral_jax.sampling.settings import Schedule

LIMIT, TRACES, PROMPT, PAGE = 400, 6, 96, 16
SCHEDULE = Schedule(
    page=PAGE,
    pages=10**6,
    rows=(64,),
    width=3,
    together=8,
    prompts=(128,),
    trace=LIMIT,
    chunk=1,
    prefill_tokens=1024,
)


def work(response):
    return Work(Role.SEARCH, 100, 100, TRACES, PROMPT, response, LIMIT)


@pytest.mark.parametrize("response", [100, 200, 320, LIMIT])
def test_means_are_those_of_traces_that_run(response):
    """10,000 groups, whose means are within 2 % of those of infinitely many."""
    half = min(response, LIMIT - response)
    draws = np.random.default_rng(0).uniform(response - half, response + half, (10_000, TRACES))
    length_UxC = np.ceil(draws).astype(int)
    rows = own = bundles = pages = 0
    for step in range(LIMIT):  # all groups begin together: sums over time are the same
        runs_UxC = step < length_UxC
        rows += runs_UxC.sum()
        own += step * runs_UxC.sum()
        bundles += runs_UxC.reshape(-1, SCHEDULE.width).any(axis=1).sum()
        pages += -(-(step + 1) // PAGE) * runs_UxC.sum()
        pages += PROMPT // PAGE * runs_UxC.any(axis=1).sum()

    usage = usage_of([work(response)], SCHEDULE, row_occupancy=0.5)
    assert usage.own == pytest.approx(own / rows, rel=0.02)
    assert usage.bundles_a_row == pytest.approx(bundles / rows, rel=0.02)
    assert usage.prompt_read == pytest.approx(PROMPT * bundles / rows, rel=0.02)
    assert usage.pages_a_row == pytest.approx(pages / rows, rel=0.02)
    assert usage.rows == 32 and usage.bound == "rows"


def test_few_pages_bound_the_rows_that_run():
    few = dataclasses.replace(SCHEDULE, pages=500)
    usage = usage_of([work(200)], few, row_occupancy=1.0)
    assert usage.bound == "pages" and 1 < usage.rows < 500 / usage.pages_a_row < 64
    fewer = usage_of([work(200)], dataclasses.replace(few, pages=400), row_occupancy=1.0)
    assert fewer.rows < usage.rows


def test_roles_count_by_the_tokens_that_they_sample():
    other = Work(Role.AGGREGATION, 300, 300, TRACES, 10 * PROMPT, 200, LIMIT)
    usage = usage_of([work(200), other], SCHEDULE, row_occupancy=1.0)
    assert usage.prompt == pytest.approx(PROMPT / 4 + 10 * PROMPT * 3 / 4)
    assert usage.longest_prompt == 10 * PROMPT
