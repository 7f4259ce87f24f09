"""Groups are cut, joined and read back without losing, moving or inventing a token."""

import dataclasses

import numpy as np
import pytest

from spiral_jax.core.groups import (
    GroupRequests,
    Groups,
    Role,
    Stop,
    concat_groups,
    pad_rows,
)

C, G = 3, 5


def random_groups(U, P, seed=0, verified=True):
    rng = np.random.default_rng(seed)
    prompt_UxP, prompt_len_U = pad_rows(
        [rng.integers(0, 9, n) for n in rng.integers(1, P + 1, U)], P
    )
    requests = GroupRequests(
        prompt_UxP, prompt_len_U, rng.integers(0, 99, (U, 6)).astype(np.int32), C, G
    )
    trace_len_UxC = rng.integers(0, G + 1, (U, C)).astype(np.int32)
    live = np.arange(G) < trace_len_UxC[..., None]
    return Groups(
        requests,
        trace_UxCxG=np.where(live, rng.integers(0, 9, (U, C, G)), 0).astype(np.int32),
        trace_len_UxC=trace_len_UxC,
        logprob_UxCxG=np.where(live, rng.normal(size=(U, C, G)), 0).astype(np.float32),
        stop_UxC=rng.integers(0, 2, (U, C)).astype(np.int32),
        reward_UxC=rng.choice([0, 1, np.nan], (U, C)).astype(np.float32) if verified else None,
    )


def assert_same(found, expected):
    for field in dataclasses.fields(Groups):
        if field.name != "requests":
            compare(getattr(found, field.name), getattr(expected, field.name))
    for field in dataclasses.fields(GroupRequests):
        compare(getattr(found.requests, field.name), getattr(expected.requests, field.name))


def compare(found, expected):
    assert (found is None) == (expected is None)
    if expected is not None:
        np.testing.assert_array_equal(found, expected)
        assert np.asarray(found).dtype == np.asarray(expected).dtype


def test_padded_rows_are_the_rows_with_zeros_to_their_right():
    rows = [np.array([5, 0, 7]), np.array([], np.int64), np.array([0])]
    padded, lengths = pad_rows(rows)
    np.testing.assert_array_equal(padded, [[5, 0, 7], [0, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(lengths, [3, 0, 1])  # only lengths tell a real zero from padding
    assert padded.dtype == lengths.dtype == np.int32
    wide, same = pad_rows(rows, 6)
    assert wide.shape == (3, 6) and not wide[:, 3:].any()
    np.testing.assert_array_equal(wide[:, :3], padded)
    np.testing.assert_array_equal(same, lengths)


@pytest.mark.parametrize("width, shape", [(None, (0, 1)), (4, (0, 4))])
def test_no_rows_make_an_empty_array(width, shape):
    padded, lengths = pad_rows([], width)
    assert (
        padded.shape == shape
        and lengths.shape == (0,)
        and padded.dtype == lengths.dtype == np.int32
    )


def test_empty_rows_still_have_one_column():
    padded, lengths = pad_rows([np.array([], np.int32)] * 2)
    assert padded.shape == (2, 1) and not lengths.any()


def test_a_row_longer_than_the_width_is_an_error_and_never_cut():
    with pytest.raises(ValueError):
        pad_rows([np.arange(5)], 4)


def test_padding_keeps_every_row():
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 1000, n) for n in rng.integers(0, 20, 50)]
    padded, lengths = pad_rows(rows)
    for row, line, length in zip(rows, padded, lengths, strict=True):
        np.testing.assert_array_equal(line[:length], row)


def test_a_traces_ids_are_its_tokens_without_padding_even_where_they_are_zero():
    groups = random_groups(4, 6)
    for u, c in np.ndindex(4, C):
        ids = groups.trace_ids(u, c)
        np.testing.assert_array_equal(
            ids, groups.trace_UxCxG[u, c].tolist()[: groups.trace_len_UxC[u, c]]
        )
        assert ids.dtype == np.int32
    assert groups.sampled_tokens == sum(len(groups.trace_ids(u, c)) for u, c in np.ndindex(4, C))
    assert len(groups) == len(groups.requests) == 4


@pytest.mark.parametrize("verified", [True, False])
def test_taking_groups_moves_every_array_alike(verified):
    groups = random_groups(5, 6, verified=verified)
    taken = groups.take(np.array([3, 0, 3]))
    assert len(taken) == 3 and taken.requests.traces == C and taken.requests.max_tokens == G
    for new, old in enumerate([3, 0, 3]):
        assert_same(taken.take(np.array([new])), groups.take(np.array([old])))
        np.testing.assert_array_equal(taken.requests.id_Ux6[new], groups.requests.id_Ux6[old])
        np.testing.assert_array_equal(taken.trace_UxCxG[new], groups.trace_UxCxG[old])
    assert (taken.reward_UxC is None) == (not verified) and taken.advantage_UxC is None


def test_taking_all_groups_or_a_permutation_and_back_changes_nothing():
    groups = random_groups(7, 6)
    assert_same(groups.take(np.arange(7)), groups)
    order = np.random.default_rng(1).permutation(7)
    assert_same(groups.take(order).take(np.argsort(order)), groups)


def test_taking_no_groups_leaves_empty_arrays_of_the_same_kind():
    taken = random_groups(3, 6).take(np.array([], np.int64))
    assert len(taken) == 0 and taken.sampled_tokens == 0
    assert taken.trace_UxCxG.shape == (0, C, G) and taken.reward_UxC.shape == (0, C)


def test_joining_the_parts_of_a_cut_gives_the_whole():
    groups = random_groups(7, 6)
    for cuts in ([3], [1, 2, 6], [0, 7]):  # the last: with empty parts
        parts = [groups.take(index) for index in np.split(np.arange(7), cuts)]
        assert_same(concat_groups(parts), groups)
    assert_same(concat_groups([groups]), groups)


def test_joined_groups_have_prompts_padded_to_the_widest():
    narrow, wide = random_groups(2, 3, seed=1), random_groups(4, 8, seed=2)
    for parts in ([narrow, wide], [wide, narrow]):
        joined = concat_groups(parts)
        assert (
            joined.requests.prompt_UxP.shape == (6, 8)
            and joined.requests.prompt_UxP.dtype == np.int32
        )
        at = 0
        for part in parts:
            width = part.requests.prompt_UxP.shape[1]
            again = joined.take(np.arange(at, at + len(part)))
            assert not again.requests.prompt_UxP[:, width:].any()
            cut = dataclasses.replace(
                again.requests, prompt_UxP=again.requests.prompt_UxP[:, :width]
            )
            assert_same(dataclasses.replace(again, requests=cut), part)
            at += len(part)


def test_joining_groups_of_unequal_trace_shapes_is_an_error():
    groups = random_groups(2, 3)
    fewer = dataclasses.replace(groups, trace_UxCxG=groups.trace_UxCxG[:, :, :-1])
    with pytest.raises(ValueError):
        concat_groups([groups, fewer])


def with_limits(groups, seed=0):
    limit_UxC = np.random.default_rng(seed).integers(1, G + 1, (len(groups), C)).astype(np.int32)
    requests = dataclasses.replace(groups.requests, limit_UxC=limit_UxC)
    return dataclasses.replace(groups, requests=requests)


def test_limits_go_where_their_traces_go():
    groups = with_limits(random_groups(4, 6))
    limit_UxC = groups.requests.limit_UxC
    np.testing.assert_array_equal(groups.take([2, 0]).requests.limit_UxC, limit_UxC[[2, 0]])
    np.testing.assert_array_equal(groups.first(2).requests.limit_UxC, limit_UxC[:, :2])
    np.testing.assert_array_equal(groups.cut_at(3).requests.limit_UxC, np.minimum(limit_UxC, 3))
    search = with_limits(random_groups(2, 3, seed=5)).requests
    assert random_groups(4, 6).as_population(search).requests.limit_UxC is None
    population = groups.as_population(search)
    np.testing.assert_array_equal(population.requests.limit_UxC, limit_UxC.reshape(2, 2 * C))
    assert_same(concat_groups([groups.take([0]), groups.take([1, 2, 3])]), groups)


@pytest.mark.parametrize("n", [1, 2, C])
def test_the_first_traces_of_each_group_are_those_with_the_lowest_numbers(n):
    groups = random_groups(4, 6)
    first = groups.first(n)
    assert len(first) == 4 and first.requests.traces == n and first.requests.max_tokens == G
    for u, c in np.ndindex(4, n):
        np.testing.assert_array_equal(first.trace_ids(u, c), groups.trace_ids(u, c))
    np.testing.assert_array_equal(first.reward_UxC, groups.reward_UxC[:, :n])
    np.testing.assert_array_equal(first.requests.prompt_UxP, groups.requests.prompt_UxP)
    if n == C:
        assert_same(first, groups)


@pytest.mark.parametrize("verified", [True, False])
def test_a_population_is_all_traces_of_a_problem_set_by_set_behind_its_search_prompt(verified):
    B, K = 2, 3
    groups = random_groups(B * K, 6, verified=verified)
    search = random_groups(B, 4, seed=1).requests
    population = groups.as_population(search)
    assert len(population) == B and population.requests.traces == K * C
    assert population.requests.max_tokens == G
    np.testing.assert_array_equal(population.requests.prompt_UxP, search.prompt_UxP)
    np.testing.assert_array_equal(population.requests.id_Ux6, search.id_Ux6)
    for b, k, c in np.ndindex(B, K, C):
        u, n = b * K + k, k * C + c
        np.testing.assert_array_equal(population.trace_ids(b, n), groups.trace_ids(u, c))
        np.testing.assert_array_equal(population.logprob_UxCxG[b, n], groups.logprob_UxCxG[u, c])
        assert population.stop_UxC[b, n] == groups.stop_UxC[u, c]
    assert (population.reward_UxC is not None) == verified


def test_a_cut_keeps_the_beginning_of_long_traces_and_the_stop_of_those_that_fit():
    groups = random_groups(5, 6)
    for limit in range(1, G + 1):
        cut = groups.cut_at(limit)
        assert cut.requests.max_tokens == limit and cut.reward_UxC is None
        assert cut.trace_UxCxG.shape == cut.logprob_UxCxG.shape == (5, C, limit)
        for u, c in np.ndindex(5, C):
            whole, stop = groups.trace_ids(u, c), groups.stop_UxC[u, c]
            np.testing.assert_array_equal(cut.trace_ids(u, c), whole[:limit])
            assert cut.stop_UxC[u, c] == (Stop.LENGTH if len(whole) > limit else stop)
    unverified = random_groups(5, 6, verified=False)
    assert_same(unverified.cut_at(G), unverified)


def test_values_that_are_part_of_random_keys_and_logs_are_fixed():
    assert (Role.SEARCH, Role.AGGREGATION) == (0, 1) and Role.AGGREGATION.label == "aggregation"
    assert (Stop.STOP, Stop.LENGTH) == (0, 1)


@pytest.mark.parametrize("change", ["reward", "limit"])
def test_groups_of_several_kinds_are_not_joined_in_silence(change):
    requests = GroupRequests(
        np.zeros((1, 2), np.int32), np.ones(1, np.int32), np.zeros((1, 6), np.int32), 2, 3
    )
    arrays = (
        np.zeros((1, 2, 3), np.int32),
        np.ones((1, 2), np.int32),
        np.zeros((1, 2, 3), np.float32),
    )
    plain = Groups(requests, *arrays, np.zeros((1, 2), np.int32))
    assert len(concat_groups([plain, plain])) == 2
    if change == "reward":
        other = dataclasses.replace(plain, reward_UxC=np.zeros((1, 2), np.float32))
    else:
        other = dataclasses.replace(plain, requests=dataclasses.replace(requests, max_tokens=4))
    with pytest.raises(ValueError, match="several kinds"):
        concat_groups([plain, other])
