"""Some hundred answers made to break the verifier; `benchmarks.verifier_soak` has thousands."""

import concurrent.futures
import multiprocessing

import pytest

from benchmarks.adversarial import KINDS, answers
from benchmarks.orphans import workers_left
from benchmarks.verifier_soak import Outcome, soak


@pytest.mark.slow
def test_adversarial_answers_are_bounded_counted_and_leave_nothing_behind():
    # this process has had larger children than verifiers
    fresh = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, fresh) as process:
        outcome = process.submit(
            soak, 300, seed=1, workers=2, timeout_s=5.0, memory_gb=2.0
        ).result()
    assert outcome.not_allowed == []
    assert sum(sum(of_kind.values()) for of_kind in outcome.counts.values()) == 300
    assert workers_left() == 0 and not outcome.canary
    assert outcome.peak_worker_bytes < 2e9
    timeouts = sum(of_kind["timeout"] for of_kind in outcome.counts.values())
    errors = sum(count for detail, count in outcome.errors.items() if "worker died" in detail)
    assert outcome.replaced >= 2 * (timeouts + errors)
    total = Outcome()
    total.add(outcome)
    total.add(outcome)
    assert total.answers == 600 and total.replaced == 2 * outcome.replaced
    assert sum(sum(of_kind.values()) for of_kind in total.counts.values()) == 600


def test_a_seed_gives_the_same_answers_and_all_kinds_come():
    first, again, other = (answers(2000, seed, "/tmp/canary") for seed in (0, 0, 1))
    assert first == again != other
    assert {kind for kind, *_ in first} == set(KINDS)
