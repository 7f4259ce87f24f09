"""Groups -> blocks of micro-batches: nothing is lost, doubled or mixed up."""

import dataclasses

import jax
import numpy as np
import pytest

from spiral_jax.core.groups import GroupRequests, Groups, Role
from spiral_jax.learner.blocks import Block, abstract_blocks, empty_block, make_blocks
from spiral_jax.learner.settings import RoleShapes

FIELDS = {
    "prompt_AxUxP": lambda groups: groups.requests.prompt_UxP,
    "prompt_len_AxU": lambda groups: groups.requests.prompt_len_U,
    "trace_AxUxCxG": lambda groups: groups.trace_UxCxG,
    "trace_len_AxUxC": lambda groups: groups.trace_len_UxC,
    "logprob_AxUxCxG": lambda groups: groups.logprob_UxCxG,
}


def random_groups(seed, U, C=3, P=10, G=12):
    """Groups whose prompts begin with their own number, so that they can be told apart."""
    rng = np.random.default_rng(seed)
    prompt_len = rng.integers(1, P + 1, U).astype(np.int32)
    trace_len = rng.integers(0, rng.integers(1, G + 1, (U, 1)) + 1, (U, C)).astype(np.int32)
    prompt = rng.integers(1, 97, (U, P)) * (np.arange(P) < prompt_len[:, None])
    prompt[:, 0] = 100 + np.arange(U)
    mask = np.arange(G) < trace_len[..., None]
    requests = GroupRequests(prompt.astype(np.int32), prompt_len, np.zeros((U, 6), np.int32), C, G)
    groups = Groups(
        requests,
        trace_UxCxG=(rng.integers(1, 97, (U, C, G)) * mask).astype(np.int32),
        trace_len_UxC=trace_len,
        logprob_UxCxG=(rng.normal(size=(U, C, G)) * mask).astype(np.float32),
        stop_UxC=np.zeros((U, C), np.int32),
    )
    return groups, rng.normal(size=(U, C)).astype(np.float32)


def blocks_of(groups, weight_UxC, lengths, micro, most, role=Role.SEARCH):
    """The blocks of one role."""
    shapes = RoleShapes(tuple(lengths), micro, most, weight_UxC.shape[1])
    return make_blocks({role: (groups, weight_UxC)}, {role: shapes})


def rows(block):
    """The block's groups, padding included, one dict each, in (A, U) order."""
    names = [field.name for field in dataclasses.fields(Block) if "_Ax" in field.name]
    arrays = {name: np.asarray(getattr(block, name)) for name in names}
    return [
        {name: array[at] for name, array in arrays.items()}
        for at in np.ndindex(block.prompt_len_AxU.shape)
    ]


def shapes_and_dtypes(blocks):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), blocks)


def assert_padded_equal(got, expected):
    """Equal once the narrower is padded with zeros along the last axis."""
    got, expected = np.atleast_1d(got), np.atleast_1d(expected)
    width = max(got.shape[-1], expected.shape[-1])

    def pad(a):
        return np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, width - a.shape[-1])])

    np.testing.assert_array_equal(pad(got), pad(expected))


LENGTHS = {
    "one": [(10, 12)],
    "wider than the arrays": [(16, 20)],
    "several": [(4, 12), (6, 4), (10, 6), (10, 12)],
}


@pytest.mark.parametrize("micro", [1, 4, 5])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("U", [0, 1, 9, 20])
def test_every_group_lands_once_with_its_weights_in_the_first_bucket_that_holds_it(
    U, lengths, micro
):
    groups, weight = random_groups(U + micro, U)
    blocks = blocks_of(groups, weight, lengths, micro, most=20)
    seen = []
    for i, ((P, G), block) in enumerate(zip(lengths, blocks, strict=True)):
        assert block.prompt_AxUxP.shape[-1] == P and block.trace_AxUxCxG.shape[-1] == G
        real = [row for row in rows(block) if row["prompt_AxUxP"][0]]
        assert int(block.count) == -(-len(real) // micro)
        # the groups come first: micro-batches beyond `count` hold none
        assert all(row["prompt_AxUxP"][0] for row in rows(block)[: len(real)])
        for row in real:
            u = int(row["prompt_AxUxP"][0]) - 100
            seen.append(u)
            for name, source in FIELDS.items():
                assert_padded_equal(row[name], source(groups)[u])
            np.testing.assert_array_equal(row["weight_AxUxC"], weight[u])
            need = groups.requests.prompt_len_U[u], groups.trace_len_UxC[u].max()
            assert need[0] <= P and need[1] <= G
            assert not any(need[0] <= p and need[1] <= g for p, g in lengths[:i])
    assert sorted(seen) == list(range(U))


@pytest.mark.parametrize("U", [0, 3, 8])
def test_padding_groups_are_one_token_prompts_without_traces_or_weight(U):
    groups, weight = random_groups(U, U)
    (block,) = blocks_of(groups, weight, [(10, 12)], micro=4, most=16, role=Role.AGGREGATION)
    assert block.role is Role.AGGREGATION
    padding = [row for row in rows(block) if not row["prompt_AxUxP"][0]]
    assert len(padding) == 16 - U
    for row in padding:
        assert row.pop("prompt_len_AxU") == 1
        assert not any(array.any() for array in row.values())


def test_shapes_depend_on_the_most_groups_alone():
    lengths = LENGTHS["several"]
    few = blocks_of(*random_groups(0, 2), lengths, micro=4, most=18)
    many = blocks_of(*random_groups(1, 18), lengths, micro=4, most=18)
    assert shapes_and_dtypes(few) == shapes_and_dtypes(many)
    assert few[0].prompt_len_AxU.shape == (5, 4)  # 18 groups take five micro-batches of four
    shapes = RoleShapes(tuple(lengths), micro_groups=4, most_groups=18, traces=3)
    assert shapes_and_dtypes(abstract_blocks({Role.SEARCH: shapes})) == shapes_and_dtypes(few)
    empty = [empty_block(Role.SEARCH, shapes, P, G) for P, G in lengths]
    assert shapes_and_dtypes(empty) == shapes_and_dtypes(few)


@pytest.mark.parametrize(
    ("prompt", "trace", "lengths"),
    [(7, 2, [(6, 12)]), (2, 9, [(10, 8)]), (7, 9, [(6, 12), (8, 8)])],
    ids=["prompt too long", "trace too long", "each fits somewhere, together nowhere"],
)
def test_a_group_that_fits_nowhere_is_an_error_that_names_lengths_and_field(prompt, trace, lengths):
    groups, weight = random_groups(0, 3)
    groups.requests.prompt_len_U[:] = groups.trace_len_UxC[:] = 1
    groups.requests.prompt_len_U[1], groups.trace_len_UxC[1, 2] = prompt, trace
    named = rf"prompt of {prompt} and traces of up to {trace} .*batch\.search_lengths"
    with pytest.raises(ValueError, match=named):
        blocks_of(groups, weight, lengths, micro=1, most=3)


def test_more_groups_than_fit_are_an_error_rather_than_dropped():
    groups, weight = random_groups(0, 9)
    with pytest.raises(ValueError):
        blocks_of(groups, weight, [(10, 12)], micro=4, most=8)


def test_micro_batch_is_the_slice_of_every_array_under_its_name_without_the_leading_axis():
    groups, weight = random_groups(3, 11)
    (block,) = blocks_of(groups, weight, [(10, 12)], micro=4, most=12)
    micro = jax.jit(Block.micro_batch)(block, 1)._asdict()
    np.testing.assert_array_equal(micro.pop("weight_UxC"), weight[4:8])
    assert set(micro) == {name.replace("_Ax", "_") for name in FIELDS}
    for name, source in FIELDS.items():
        np.testing.assert_array_equal(micro[name.replace("_Ax", "_")], source(groups)[4:8])
