"""Groups wider than their class are cut into pieces, which all enter from one prefill."""

import collections
import dataclasses
import itertools
import weakref

import numpy as np
import pytest
from plain_sampler import plain_sample
from small_sampler import (
    ONE_LAYER,
    C,
    G,
    ListFeed,
    V,
    make_engine,
    make_settings,
    random_variables,
    requests_of,
    run_to_end,
)

from spiral_jax.core import mesh as meshes

LENGTHS = np.array([5, 16, 8, 11, 3, 9])  # tokens; those above 8 fit into one class alone
WIDEST = 31
ROWS = [np.random.default_rng(length).integers(0, V, length) for length in LENGTHS]


@pytest.fixture(scope="module")
def variables(mesh):
    return random_variables(ONE_LAYER, mesh)


@pytest.fixture(scope="module")
def endless(mesh, variables):
    """What the definition draws for all prompts, without stop ids and limits."""
    settings = make_settings(mesh, config=ONE_LAYER)
    return plain_sample(settings, variables, requests_of(ROWS, traces=WIDEST))


@pytest.fixture(scope="module")
def engine(mesh):
    """Two slots a shard in each class; a prefill has two short prompts a shard, or one long."""
    slots = 2 * meshes.group_count_multiple(mesh)
    classes = ((slots, C, 8, G), (slots, 2, 16, G))
    return make_engine(mesh, (), classes, prefill_tokens=16, config=ONE_LAYER)


@pytest.fixture
def prefills(engine, monkeypatch):
    """By class: a weak reference to the logits of every prefill.

    Fails if two of a class are there at once.
    """
    logits = collections.defaultdict(list)

    def watch(i, run):
        def prefill(*arguments):
            kept = [earlier for earlier in logits[i] if earlier() is not None]
            assert not kept, "the prompts of an earlier call are still kept"
            ready = run(*arguments)
            logits[i].append(weakref.ref(ready.logits_ZxWxV))
            return ready

        return prefill

    for i in engine.schedule.entries():
        program = engine.programs["prefill", i]
        watched = dataclasses.replace(program, run=watch(i, program.run))
        monkeypatch.setitem(engine.programs, ("prefill", i), watched)
    return logits


def sample_widths(engine, variables, endless, widths):
    """Metrics of sampling the prompts in so many traces of random lengths; checks every token."""
    rng, requests = np.random.default_rng(0), []
    for u, width in enumerate(widths):
        limit_1xC = rng.integers(1, G + 1, (1, width)).astype(np.int32)
        if width:
            requests.append(requests_of([ROWS[u]], cursor=u, traces=width, limit_UxC=limit_1xC))

    feed = ListFeed(requests)
    metrics = run_to_end(engine.stream(engine.prepare(variables), feed))
    for group in feed.groups:
        u, limit_C = group.requests.id_Ux6[0, 2], group.requests.limit_UxC[0]
        inside_CxG = np.arange(G) < limit_C[:, None]
        expected_CxG = np.where(inside_CxG, endless.trace_UxCxG[u, : widths[u]], 0)
        np.testing.assert_array_equal(group.trace_UxCxG[0], expected_CxG)
        np.testing.assert_array_equal(group.trace_len_UxC[0], limit_C)
    return metrics


@pytest.mark.devices8
def test_a_wide_groups_prompt_is_prefilled_once_however_many_admissions_it_takes(
    engine, mesh, variables, endless, prefills
):
    """Three groups of twice as many pieces as slots: most enter when another has ended."""
    shards = meshes.group_count_multiple(mesh)
    traces = 2 * 2 * (2 * shards) - 1
    metrics = sample_widths(engine, variables, endless, np.where(LENGTHS > 8, traces, 0))

    prompts = int(LENGTHS[LENGTHS > 8].sum())
    assert list(prefills) == [1] and len(prefills[1]) == 3 and metrics["sampling/chunks"] > 5
    assert metrics["sampling/prefilled_tokens"] == prompts
    assert metrics["sampling/shared_prompt_tokens"] == prompts * (traces - 1)

    padding = metrics["sampling/prefill_padding"]  # two chunks of 8 tokens, one prompt a shard
    assert (padding.total, padding.count) == (3 * 16 * shards - prompts, 3 * 16 * shards)
    assert not any(logits() for logits in prefills[1])


@pytest.mark.devices8
def test_groups_of_all_widths_and_lengths_share_their_prompts_side_by_side(
    engine, variables, endless, prefills
):
    widths = np.array([13, 20, 1, 5, 31, 3])
    metrics = sample_widths(engine, variables, endless, widths)

    prefilled = metrics["sampling/prefilled_tokens"]
    assert prefilled + metrics["sampling/shared_prompt_tokens"] == LENGTHS @ widths
    # once, or once for each class where the pieces of a short one have found slots in both
    assert LENGTHS.sum() <= prefilled <= LENGTHS.sum() + LENGTHS[LENGTHS <= 8].sum()
    assert prefills and not any(logits() for logits in itertools.chain(*prefills.values()))
