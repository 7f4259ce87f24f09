"""Groups wider than their class: cut into pieces, which all enter from one prefill of their prompt."""

import collections
import dataclasses
import weakref

import numpy as np
import pytest
from plain_sampler import plain_sample
from small_sampler import ARCH, C, G, V, make_engine, make_settings, random_variables, requests_of

from spiral_jax.core import mesh as meshes
from spiral_jax.model.architecture import Architecture
from spiral_jax.model.transformer import ModelConfig
from spiral_jax.sampling.seating import Job, Piece, plan_prefills

MODEL = ModelConfig(Architecture(**(vars(ARCH) | {"L": 1})))  # compiles in half the time
LENGTHS = np.array([5, 16, 8, 11, 3, 9])  # tokens; those above 8 fit into one class alone
WIDEST = 31
ROWS = [np.random.default_rng(length).integers(0, V, length) for length in LENGTHS]


class Listed:
    """A feed of groups of any widths, all there from the start."""

    def __init__(self, groups):
        self.waiting, self.expected, self.found = list(groups), len(groups), []

    def next(self, now):
        return self.waiting.pop(0) if self.waiting else None

    def done(self, group, now):
        self.found.append(group)

    def finished(self):
        return len(self.found) == self.expected


@pytest.fixture(scope="module")
def variables(mesh):
    return random_variables(MODEL, mesh)


@pytest.fixture(scope="module")
def endless(mesh, variables):
    """What the definition draws for all prompts, without stop ids and limits."""
    return plain_sample(
        make_settings(mesh, config=MODEL), variables, requests_of(ROWS, traces=WIDEST)
    )


@pytest.fixture(scope="module")
def engine(mesh):
    """Two slots a shard in each class; a prefill has two short prompts a shard, or one long."""
    slots = 2 * meshes.group_count_multiple(mesh)
    return make_engine(
        mesh, (), ((slots, C, 8, G), (slots, 2, 16, G)), prefill_tokens=16, config=MODEL
    )


@pytest.fixture
def made(engine, monkeypatch):
    """By class: a weak reference to the logits of every prefill. Fails if two of a class are there
    at once.
    """
    made = collections.defaultdict(list)

    def watched(i, run):
        def prefill(*arguments):
            assert all(earlier() is None for earlier in made[i]), (
                "the prompts of an earlier call are still kept"
            )
            ready = run(*arguments)
            made[i].append(weakref.ref(ready.logits_ZxWxV))
            return ready

        return prefill

    for i in engine.entries:
        program = engine.programs["prefill", i]
        watching = dataclasses.replace(program, run=watched(i, program.run))
        monkeypatch.setitem(engine.programs, ("prefill", i), watching)
    return made


def sampled(engine, variables, endless, widths):
    """Metrics of sampling the prompts in so many traces of random lengths each; checks every token."""
    rng, asked = np.random.default_rng(0), []
    for u, width in enumerate(widths):
        limit_1xC = rng.integers(1, G + 1, (1, width)).astype(np.int32)
        asked += (
            [requests_of([ROWS[u]], cursor=u, traces=width, limit_UxC=limit_1xC)] if width else []
        )
    feed = Listed(asked)
    sampling = engine.stream(engine.prepare(variables), feed)
    for _ in sampling:
        pass
    metrics = sampling.metrics()
    for group in feed.found:
        u, limit_C = group.requests.id_Ux6[0, 2], group.requests.limit_UxC[0]
        expected_CxG = np.where(
            np.arange(G) < limit_C[:, None], endless.trace_UxCxG[u, : widths[u]], 0
        )
        np.testing.assert_array_equal(group.trace_UxCxG[0], expected_CxG)
        np.testing.assert_array_equal(group.trace_len_UxC[0], limit_C)
    return metrics


@pytest.mark.devices8
def test_a_wide_groups_prompt_is_prefilled_once_however_many_admissions_it_takes(
    engine, mesh, variables, endless, made
):
    """Three groups of twice as many pieces as there are slots: most enter one by one, when another
    has ended.
    """
    shards = meshes.group_count_multiple(mesh)
    traces = 2 * 2 * (2 * shards) - 1
    metrics = sampled(engine, variables, endless, np.where(LENGTHS > 8, traces, 0))
    prompts = int(LENGTHS[LENGTHS > 8].sum())
    assert list(made) == [1] and len(made[1]) == 3 and metrics["sampling/chunks"] > 5
    assert metrics["sampling/prefilled_tokens"] == prompts
    assert metrics["sampling/shared_prompt_tokens"] == prompts * (traces - 1)
    padding = metrics["sampling/prefill_padding"]  # two chunks of 8 tokens, one prompt a shard
    assert (padding.total, padding.count) == (3 * 16 * shards - prompts, 3 * 16 * shards)
    assert not any(ready() for ready in made[1])


@pytest.mark.devices8
def test_groups_of_all_widths_and_lengths_share_their_prompts_side_by_side(
    engine, variables, endless, made
):
    widths = np.array([13, 20, 1, 5, 31, 3])
    metrics = sampled(engine, variables, endless, widths)
    prefilled = metrics["sampling/prefilled_tokens"]
    assert prefilled + metrics["sampling/shared_prompt_tokens"] == LENGTHS @ widths
    # once, or once for each class where the pieces of a short one have found slots in both
    assert LENGTHS.sum() <= prefilled <= LENGTHS.sum() + LENGTHS[LENGTHS <= 8].sum()
    assert list(made) and not any(ready() for of_class in made.values() for ready in of_class)


def test_prompts_share_calls_first_fit_and_those_that_are_waited_for_are_on_every_shard():
    jobs = [Job(requests_of([[1]]), ()) for _ in range(4)]
    pieces = [
        Piece(jobs[u], [0], (0, shard, 0))
        for u, shard in ((0, 0), (1, 1), (0, 0), (2, 1), (0, 1), (3, 0))
    ]
    a, b, c, d = jobs
    assert plan_prefills(pieces, set(), shards=2, W=1) == [[[a], [a]], [[d], [b]], [[], [c]]]
    assert plan_prefills(pieces, set(), shards=2, W=2) == [[[a, d], [a, b]], [[], [c]]]
    assert plan_prefills(pieces, {d}, shards=2, W=2) == [[[a], [a, b]], [[d], [c, d]]]
    assert plan_prefills([], {d}, shards=2, W=2) == []
