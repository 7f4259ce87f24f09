"""The static sampler: what it records is what it sampled from, and a trace depends on its request alone."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from scipy import stats

from spiral_jax import mesh as meshes
from spiral_jax.config import ConfigError
from spiral_jax.groups import GroupRequests, Groups, Role, Stop, pad_rows, take_groups
from spiral_jax.model.architecture import Architecture
from spiral_jax.model.qwen3 import ModelConfig, init_variables
from spiral_jax.objective.logprobs import group_logprobs, length_mask
from spiral_jax.sampling import static
from spiral_jax.sampling.static import StaticSampler

C, G, V = 3, 12, 97
TEMPERATURE = 0.7
ARCH = Architecture(V=V, D=32, F=48, L=2, H=4, J=2, E=8, norm_eps=1e-3, rope_theta=777.0, tied=False)
MODEL = ModelConfig(ARCH, lora_rank=4)
OTHER_PROGRAM = 1e-5  # nat; float32 sums in another order, log-probs down to about -10


def random_variables(config, mesh):
    """Parameters and adapters far from their initial values: entropy of the next token about 3 of log(97) = 4.6 nat."""

    def make(path, leaf):
        name = meshes.path_name(path)
        rng = np.random.default_rng([*name.encode()])
        values = rng.uniform(0.5, 1.5, leaf.shape) if "norm" in name else rng.normal(0, 0.2, leaf.shape)
        return values.astype(leaf.dtype)

    tree = jax.tree_util.tree_map_with_path(make, jax.eval_shape(lambda: init_variables(config, jax.random.key(0))))
    return jax.device_put(tree, meshes.weight_shardings(tree, mesh))


def one_device():
    return jax.make_mesh((1, 1, 1), meshes.AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1])


def make_sampler(mesh, stop_ids, buckets=(8, 16), size=4, config=MODEL, **other):
    sizes = {Role.SEARCH: size, Role.AGGREGATION: size}
    return StaticSampler(config, mesh, other.pop("seed", 0), stop_ids, TEMPERATURE, buckets, sizes)


def requests_of(rows, cursor=0, step=0, traces=C, max_tokens=G):
    prompt_UxP, prompt_len_U = pad_rows([np.asarray(row) for row in rows])
    id_Ux6 = np.zeros((len(rows), 6), np.int32)
    id_Ux6[:, 1], id_Ux6[:, 2] = step, cursor + np.arange(len(rows))
    return GroupRequests(prompt_UxP, prompt_len_U, id_Ux6, traces, max_tokens)


def take_requests(requests, index):
    nothing = np.zeros((len(requests), 1, 1), np.int32)
    return take_groups(Groups(requests, nothing, nothing, nothing, nothing), np.asarray(index)).requests


def mixed_requests(**which):
    """Nine prompts of both buckets, out of order; some end with the id 0, which is also what pads them."""
    rng = np.random.default_rng(5)
    rows = [rng.integers(0, V, n) for n in (3, 16, 8, 9, 1, 12, 7, 2, 5)]
    for u in (0, 3, 4):
        rows[u][-1] = 0
    rows[7][:] = 0
    return requests_of(rows, **which)


def assert_bit_equal(found, expected):
    for name in ("trace_UxCxG", "trace_len_UxC", "logprob_UxCxG", "stop_UxC"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


def assert_same_up_to_rounding(found, expected):
    for name in ("trace_UxCxG", "trace_len_UxC", "stop_UxC"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    np.testing.assert_allclose(found.logprob_UxCxG, expected.logprob_UxCxG, rtol=0, atol=OTHER_PROGRAM)


def truncated(groups, stop_ids):
    """What sampling with stop ids must give, from the same traces sampled without any."""
    trace_UxCxG, logprob_UxCxG = groups.trace_UxCxG.copy(), groups.logprob_UxCxG.copy()
    length_UxC, stop_UxC = groups.trace_len_UxC.copy(), np.full_like(groups.stop_UxC, Stop.LENGTH)
    for u, c in np.ndindex(length_UxC.shape):
        stops = np.flatnonzero(np.isin(trace_UxCxG[u, c], stop_ids))
        if len(stops):
            length_UxC[u, c], stop_UxC[u, c] = stops[0] + 1, Stop.STOP
            trace_UxCxG[u, c, stops[0] + 1 :] = logprob_UxCxG[u, c, stops[0] + 1 :] = 0
    return Groups(groups.requests, trace_UxCxG, length_UxC, logprob_UxCxG, stop_UxC)


@pytest.fixture(scope="module")
def weights(mesh):
    return make_sampler(mesh, ()).prepare(random_variables(MODEL, mesh))


@pytest.fixture(scope="module")
def endless(mesh, weights):
    """The mixed requests sampled without stop ids, all in the wide bucket."""
    return make_sampler(mesh, (), buckets=(16,)).sample(weights, mixed_requests())


@pytest.fixture(scope="module")
def stop_ids(endless):
    """The padding id, and two that end some trace early and some trace at its very last token."""
    chosen = [0]
    for at in (G - 1, 4):
        rest = [trace for trace in endless.trace_UxCxG.reshape(-1, G) if not np.isin(trace[: at + 1], chosen).any()]
        chosen.append(next(int(trace[at]) for trace in rest if trace[at] not in trace[:at]))
    return tuple(chosen)


@pytest.fixture(scope="module")
def sampler(mesh, stop_ids):
    return make_sampler(mesh, stop_ids)


@pytest.fixture(scope="module")
def sampled(sampler, weights):
    return sampler.sample(weights, mixed_requests())


@functools.partial(jax.jit, static_argnums=(0, 5))
def teacher_forced(config, variables, prompt, prompt_len, trace, temperature):
    return group_logprobs(config, variables, prompt, prompt_len, trace, temperature, 5)[0]


# What is recorded


@pytest.mark.devices8
def test_recorded_logprobs_are_those_of_teacher_forcing(mesh, sampled):
    with jax.set_mesh(mesh):
        index = np.arange(12) % 9  # a multiple of the mesh's groups
        arrays = (sampled.requests.prompt_UxP, sampled.requests.prompt_len_U, sampled.trace_UxCxG)
        placed = jax.device_put(tuple(a[index] for a in arrays), meshes.group_sharding(mesh))
        expected = teacher_forced(MODEL, random_variables(MODEL, mesh), *placed, TEMPERATURE)
    live = np.asarray(length_mask(sampled.trace_len_UxC, G))
    np.testing.assert_allclose(sampled.logprob_UxCxG[live], np.asarray(expected)[:9][live], rtol=0, atol=1e-5)
    assert sampled.logprob_UxCxG[live].std() > 1 and len(np.unique(sampled.trace_UxCxG[live])) > 30


@pytest.mark.devices8
def test_without_stop_ids_every_trace_ends_at_its_limit(endless):
    assert (endless.trace_len_UxC == G).all() and (endless.stop_UxC == Stop.LENGTH).all()
    assert [a.dtype for a in (endless.trace_UxCxG, endless.trace_len_UxC, endless.stop_UxC)] == [np.int32] * 3
    assert endless.trace_UxCxG.shape == endless.logprob_UxCxG.shape == (9, C, G)
    assert endless.logprob_UxCxG.dtype == np.float32 and (endless.logprob_UxCxG < 0).all()


@pytest.mark.devices8
def test_the_first_stop_id_ends_a_trace_as_its_last_token_with_zeros_behind(endless, sampled, stop_ids):
    expected = truncated(endless, stop_ids)
    assert_same_up_to_rounding(sampled, expected)
    ended_by = sampled.trace_UxCxG[sampled.stop_UxC == Stop.STOP, sampled.trace_len_UxC[sampled.stop_UxC == 0] - 1]
    assert set(stop_ids) == set(ended_by.tolist())  # each of them, the padding id among them, ended some trace
    at_limit = sampled.trace_len_UxC == G
    assert set(sampled.stop_UxC[at_limit].tolist()) == {Stop.STOP, Stop.LENGTH}  # a stop at the last token is a stop
    beyond = ~np.asarray(length_mask(sampled.trace_len_UxC, G))
    assert beyond.any() and not sampled.trace_UxCxG[beyond].any() and not sampled.logprob_UxCxG[beyond].any()


# What a trace depends on


@pytest.mark.devices8
def test_a_second_call_gives_the_same_bits_and_compiles_nothing(sampler, weights, sampled):
    compiled = []
    listener = lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        assert_bit_equal(sampler.sample(weights, mixed_requests()), sampled)
        sampler.sample(weights, requests_of([[1, 2]] * 3 + [np.arange(11)] * 5, cursor=90))
        assert not compiled
        jax.jit(lambda x: 2 * x)(1).block_until_ready()
        assert compiled  # the event has this name
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


@pytest.mark.devices8
def test_another_slot_and_other_neighbours_change_no_bit(sampler, weights, sampled):
    order = np.array([6, 3, 8, 0, 7, 1, 2, 4, 5])
    again = sampler.sample(weights, take_requests(sampled.requests, order))
    assert_bit_equal(again, take_groups(sampled, order))
    strangers = requests_of([[9] * 3, [8] * 6, [7]], cursor=700)
    u = 2
    rows = [*strangers.prompt_UxP[:, :6], sampled.requests.prompt_UxP[u, : sampled.requests.prompt_len_U[u]]]
    mixed = requests_of(rows)
    mixed.id_Ux6[:] = [*strangers.id_Ux6, sampled.requests.id_Ux6[u]]
    found = sampler.sample(weights, mixed)
    assert_bit_equal(take_groups(found, np.array([3])), take_groups(sampled, np.array([u])))


@pytest.mark.devices8
def test_groups_that_fill_up_a_batch_change_no_bit(sampler, weights, sampled):
    for u in range(9):  # alone among three dead groups, where nine requests leave at most two dead
        alone = sampler.sample(weights, take_requests(sampled.requests, [u]))
        assert_bit_equal(alone, take_groups(sampled, np.array([u])))


@pytest.mark.devices8
def test_another_prompt_bucket_gives_the_same_tokens(mesh, stop_ids, weights, sampled):
    wide = make_sampler(mesh, stop_ids, buckets=(16,)).sample(weights, mixed_requests())
    assert_same_up_to_rounding(wide, sampled)


@pytest.mark.devices8
def test_another_number_of_groups_a_call_gives_the_same_tokens(mesh, stop_ids, weights, sampled):
    many = make_sampler(mesh, stop_ids, buckets=(16,), size=8).sample(weights, mixed_requests())
    assert_same_up_to_rounding(many, sampled)


@pytest.mark.devices8
def test_another_device_mesh_gives_the_same_tokens(mesh, stop_ids, sampled):
    if mesh.size == 1:
        pytest.skip("needs more than one device")
    sampler = make_sampler(one_device(), stop_ids, buckets=(16,))
    found = sampler.sample(sampler.prepare(random_variables(MODEL, sampler.mesh)), mixed_requests())
    assert_same_up_to_rounding(found, sampled)


@pytest.mark.devices8
def test_another_step_cursor_or_trace_gives_other_tokens(sampler, weights, sampled):
    for other in (mixed_requests(step=1), mixed_requests(cursor=100)):
        found = sampler.sample(weights, other)
        assert (found.trace_UxCxG != sampled.trace_UxCxG).any(-1).mean() > 0.9  # short ones may coincide
    live = sampled.trace_len_UxC.min(1) > 3
    assert live.any() and (sampled.trace_UxCxG[live, 0] != sampled.trace_UxCxG[live, 1]).any(-1).all()


def test_dead_groups_do_not_keep_the_loop_alive(monkeypatch):
    config = ModelConfig(Architecture(V=4, D=8, F=8, L=1, H=1, J=1, E=8, norm_eps=1e-6, rope_theta=10.0, tied=False))
    draws = []

    def counted(*args):
        jax.debug.callback(lambda: draws.append(1))
        return draw(*args)

    draw = static.inverse_cdf
    monkeypatch.setattr(static, "inverse_cdf", counted)
    # This seed is no other test's, so nobody finds the counting program in the cache.
    sampler = make_sampler(one_device(), (3,), buckets=(4,), config=config, seed=4321)
    weights = sampler.prepare(random_variables(config, sampler.mesh))
    lengths = []
    for cursor in range(1, 11):
        draws.clear()
        lengths.append(sampler.sample(weights, requests_of([[2, 1]], cursor, max_tokens=64)).trace_len_UxC.max())
        jax.effects_barrier()
        assert len(draws) == lengths[-1]
    dead = requests_of([[0]], max_tokens=64)  # the prompt and the ids that fill up a batch
    longer = sampler.sample(weights, dead).trace_len_UxC.max()
    assert min(lengths) < longer  # were they alive, some call would have gone on for longer


# Bad input


def test_a_prompt_longer_than_the_largest_bucket_is_an_error_that_names_the_field(mesh):
    with pytest.raises(ValueError, match=r"17 tokens.*config\.sampling\.prompt_buckets = \[8, 16\]"):
        make_sampler(mesh, ()).sample(None, requests_of([[1], np.arange(17)]))


def test_groups_a_call_that_do_not_divide_over_the_mesh_are_an_error_that_names_the_field():
    mesh = AbstractMesh((2, 3, 5), meshes.AXES)
    make_sampler(mesh, (), size=12)
    with pytest.raises(ConfigError, match=r"config\.sampling\.search_groups = 4: .*data \* fsdp = 6"):
        make_sampler(mesh, (), size=4)


def test_no_requests_give_no_groups(mesh):
    done = make_sampler(mesh, ()).sample(None, take_requests(mixed_requests(), np.array([], np.int64)))
    assert len(done) == 0 and done.trace_UxCxG.shape == (0, C, G)


# The distribution


def every_sequence(stop):
    """All traces of V = 4, G = 2: (sequences [N, 2], lengths [N]); the stop id ends one."""
    pairs = [(a, b) for a in range(4) if a != stop for b in range(4)]
    return np.array([*pairs, (stop, 0)], np.int32), np.array([2] * len(pairs) + [1])


@pytest.mark.devices8
def test_frequencies_of_whole_traces_are_their_exact_probabilities(mesh):
    config = ModelConfig(Architecture(**(vars(ARCH) | {"V": 4})))
    variables, stop, traces = random_variables(config, mesh), 3, 500
    sampler = make_sampler(mesh, (stop,), buckets=(4,), config=config)
    weights, prompts = sampler.prepare(variables), [[0], [1, 3, 2], [2, 2], [3, 1, 0, 3]]
    sequence_Nx2, length_N = every_sequence(stop)
    count_UxN = np.zeros((4, len(length_N)))
    for step in range(10):
        done = sampler.sample(weights, requests_of(prompts, step=step, traces=traces, max_tokens=2))
        same = (done.trace_UxCxG[:, :, None] == sequence_Nx2).all(-1) & (done.trace_len_UxC[..., None] == length_N)
        assert (same.sum(-1) == 1).all()
        count_UxN += same.sum(1)
    prompt_UxP, prompt_len_U = pad_rows([np.array(row) for row in prompts])
    trace = np.broadcast_to(sequence_Nx2, (4, *sequence_Nx2.shape))
    with jax.set_mesh(mesh):
        placed = jax.device_put((prompt_UxP, prompt_len_U, trace), meshes.group_sharding(mesh))
        logprob = np.asarray(teacher_forced(config, variables, *placed, TEMPERATURE), np.float64)
    p_UxN = np.exp(np.where(np.arange(2) < length_N[:, None], logprob, 0).sum(-1))
    np.testing.assert_allclose(p_UxN.sum(1), 1, atol=1e-5)
    assert np.abs(p_UxN - p_UxN[0]).max() > 0.05  # the prompts matter
    cells = []
    for count_N, expected_N in zip(count_UxN, 10 * traces * p_UxN, strict=True):
        order = np.argsort(expected_N)
        rare = np.searchsorted(expected_N[order], 5) + 1  # those below 5 share a cell with the next one
        for cell in [order[:rare], *np.split(order[rare:], len(order) - rare)]:
            cells.append((count_N[cell].sum() - expected_N[cell].sum()) ** 2 / expected_N[cell].sum())
    assert np.sum(cells) < stats.chi2.ppf(0.999, len(cells) - 4)
