"""An evaluation as a stream: what comes out does not depend on what ends when, and nothing waits
for other problems.
"""

import dataclasses

import numpy as np
import pytest
from scripted_sampler import ReadingSampler, make_actor

from spiral_jax.core.config import for_evaluation
from spiral_jax.core.groups import Role
from spiral_jax.evaluation.wave import evaluate_wave

SIZES = {
    "eval__n": 9, "eval__population": 6, "eval__set_size": 2, "eval__rounds": 3, "eval__subsets": 3,
    "eval__traces": 2, "eval__subset_size": 3,
}  # fmt: skip
INDEX = np.array([4, 9, 2, 7])


def script(role, cursor, k, i):
    return f"\\boxed{{{(3 * i + cursor) % 10}}}"


@dataclasses.dataclass
class UnorderedSampler(ReadingSampler):
    """Groups end in any order, one in a unit of time."""

    seed: int = 0

    def stream(self, weights, feed):
        self.rng, self.running = np.random.default_rng(self.seed), []
        return super().stream(weights, feed)

    def advance(self, feed, now):
        while len(self.running) < self.at_once and (request := feed.next(now)) is not None:
            self.running.append(request)
            self.calls.append(request)
        group = self.write(self.running.pop(self.rng.integers(len(self.running))))
        feed.done(group, now)
        yield group


def evaluated(sampler):
    actor = make_actor(script, **SIZES)
    actor = dataclasses.replace(actor, c=for_evaluation(actor.c), sampler=sampler)
    return evaluate_wave(actor, None, [actor.task.held_out(i) for i in INDEX], INDEX)[:2]


@pytest.mark.parametrize("at_once, seed", [(2, 0), (7, 1), (100, 2)])
def test_records_and_counts_do_not_depend_on_what_ends_when(at_once, seed):
    one_by_one = evaluated(ReadingSampler(script, at_once=1))
    unordered = UnorderedSampler(script, at_once, seed=seed)
    assert evaluated(unordered) == one_by_one
    assert not unordered.running


def test_no_stage_waits_for_other_problems():
    sampler = ReadingSampler(script, at_once=1)
    evaluated(sampler)
    asked = [
        tuple(int(x) for x in call.id_Ux6[0, [2, 3, 4]]) for call in sampler.calls
    ]  # problem, round, role
    searches = [at for at, (*_, role) in enumerate(asked) if role == Role.SEARCH]
    assert [asked[at][0] for at in searches] == INDEX.tolist()
    for (start, end), index in zip(
        zip(searches, [*searches[1:], len(asked)], strict=True), INDEX, strict=True
    ):
        # all of a problem before the next one begins: 3 sets, then 3 rounds of 6
        assert [(i, round) for i, round, _ in asked[start + 1 : end]] == [
            (index, round) for round, sets in ((1, 3), (2, 6), (3, 6), (4, 6)) for _ in range(sets)
        ]
