"""The rollout engine: what it draws is what the definition draws, wherever a group sits and whoever
sits beside it.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from plain_sampler import plain_sample
from scipy import stats
from small_sampler import (
    ARCH,
    DRAW,
    MANY_SIZES,
    MODEL,
    ONE_SIZE,
    C,
    G,
    V,
    assert_bit_equal,
    assert_same_up_to_rounding,
    compilations,
    groups_at,
    make_engine,
    make_settings,
    mixed_requests,
    one_device,
    random_variables,
    requests_of,
)

from spiral_jax.core import mesh as meshes
from spiral_jax.core.config import ConfigError
from spiral_jax.core.groups import Stop, pad_rows
from spiral_jax.learner.logprobs import group_logprobs, length_mask
from spiral_jax.model.architecture import Architecture
from spiral_jax.sampling.draw import Draw
from spiral_jax.sampling.engine import Decoding
from spiral_jax.sampling.programs import check_room, describe
from spiral_jax.sampling.protocol import sample


@pytest.fixture(scope="module")
def variables(mesh):
    return random_variables(MODEL, mesh)


@pytest.fixture(scope="module")
def weights(mesh, variables):
    return make_engine(mesh).prepare(variables)


@pytest.fixture(scope="module")
def endless(mesh, variables):
    """The mixed requests by definition, without stop ids."""
    return plain_sample(make_settings(mesh), variables, mixed_requests())


@pytest.fixture(scope="module")
def stop_ids(endless):
    """The padding id, and two that end some trace early and some trace at its very last token."""
    chosen = [0]
    for at in (G - 1, 4):
        rest = [
            trace
            for trace in endless.trace_UxCxG.reshape(-1, G)
            if not np.isin(trace[: at + 1], chosen).any()
        ]
        chosen.append(next(int(trace[at]) for trace in rest if trace[at] not in trace[:at]))
    return tuple(chosen)


@pytest.fixture(scope="module")
def expected(mesh, variables, stop_ids):
    """The mixed requests by definition."""
    return plain_sample(make_settings(mesh, stop_ids), variables, mixed_requests())


@pytest.fixture(scope="module")
def engine(mesh, stop_ids):
    return make_engine(mesh, stop_ids)


@pytest.fixture(scope="module")
def moving(mesh, stop_ids):
    """An engine of many classes: groups start in a short one, go on in a longer one, and narrow;
    wide ones are cut.

    Its decode programs compute a few packed rows, or all.
    """
    return make_engine(mesh, stop_ids, MANY_SIZES, exit_groups=1, row_counts=(3, 9))


@pytest.fixture(scope="module")
def sampled(engine, weights):
    return sample(engine, weights, mixed_requests())


@functools.partial(jax.jit, static_argnums=(0, 5))
def teacher_forced(config, variables, prompt, prompt_len, trace, temperature):
    return group_logprobs(config, variables, prompt, prompt_len, trace, temperature, 5)[0]


def recording(engine, weights):
    """(sample, metrics) with the metrics of the last stream."""
    kept = {}

    class Counted(Decoding):
        def __iter__(self):
            yield from super().__iter__()
            kept.update(self.metrics())

    class Recording:
        def stream(self, weights, feed):
            return Counted(engine, weights, feed)

    return functools.partial(sample, Recording(), weights), kept


# What is drawn


@pytest.mark.devices8
def test_the_engine_draws_what_the_definition_draws(sampled, expected, stop_ids):
    assert_same_up_to_rounding(sampled, expected)
    ended_by = sampled.trace_UxCxG[
        sampled.stop_UxC == Stop.STOP, sampled.trace_len_UxC[sampled.stop_UxC == 0] - 1
    ]
    assert set(stop_ids) == set(
        ended_by.tolist()
    )  # each of them, the padding id among them, ended some trace
    at_limit = sampled.trace_len_UxC == G
    assert set(sampled.stop_UxC[at_limit].tolist()) == {
        Stop.STOP,
        Stop.LENGTH,
    }  # a stop at the last token is a stop
    beyond = ~np.asarray(length_mask(sampled.trace_len_UxC, G))
    assert (
        beyond.any()
        and not sampled.trace_UxCxG[beyond].any()
        and not sampled.logprob_UxCxG[beyond].any()
    )


@pytest.mark.devices8
def test_moving_being_cut_into_pieces_and_packing_rows_changes_no_token(moving, weights, expected):
    run, metrics = recording(moving, weights)
    assert_same_up_to_rounding(run(mixed_requests()), expected)
    assert metrics["sampling/moves"] > 5  # longer slots, narrower ones


@pytest.mark.devices8
def test_recorded_logprobs_are_those_of_teacher_forcing(mesh, variables, sampled):
    with jax.set_mesh(mesh):
        index = np.arange(12) % 9  # a multiple of the mesh's groups
        arrays = (sampled.requests.prompt_UxP, sampled.requests.prompt_len_U, sampled.trace_UxCxG)
        placed = jax.device_put(tuple(a[index] for a in arrays), meshes.group_sharding(mesh))
        forced = teacher_forced(MODEL, variables, *placed, DRAW.temperature)
    live = np.asarray(length_mask(sampled.trace_len_UxC, G))
    np.testing.assert_allclose(
        sampled.logprob_UxCxG[live], np.asarray(forced)[:9][live], rtol=0, atol=1e-5
    )
    assert sampled.logprob_UxCxG[live].std() > 1 and len(np.unique(sampled.trace_UxCxG[live])) > 30


@pytest.mark.devices8
@pytest.mark.parametrize("classes", [ONE_SIZE, MANY_SIZES], ids=["one size", "many sizes"])
def test_every_trace_ends_at_its_own_limit(mesh, weights, endless, classes):
    limit_UxC = np.random.default_rng(1).integers(1, G + 1, (9, C)).astype(np.int32)
    done = sample(make_engine(mesh, (), classes), weights, mixed_requests(limit_UxC=limit_UxC))
    np.testing.assert_array_equal(done.trace_len_UxC, limit_UxC)
    assert (done.stop_UxC == Stop.LENGTH).all()
    inside = np.arange(G) < limit_UxC[..., None]
    np.testing.assert_array_equal(done.trace_UxCxG, np.where(inside, endless.trace_UxCxG, 0))


def test_greedy_takes_the_most_likely_token_with_log_prob_0(mesh, variables, weights):
    settings = make_settings(mesh, (), draw=Draw(temperature=0))
    found = sample(make_engine(mesh, (), draw=settings.draw), weights, mixed_requests())
    assert_same_up_to_rounding(found, plain_sample(settings, variables, mixed_requests()))
    assert not found.logprob_UxCxG.any() and (found.trace_UxCxG == found.trace_UxCxG[:, :1]).all()


def test_an_int8_cache_moves_log_probs_by_little(mesh, variables, weights, stop_ids):
    engine = make_engine(mesh, stop_ids, ONE_SIZE, cache_dtype=np.dtype("int8"))
    found = sample(engine, weights, mixed_requests())
    with jax.set_mesh(mesh):
        index = np.arange(12) % 9  # a multiple of the mesh's groups
        arrays = (found.requests.prompt_UxP, found.requests.prompt_len_U, found.trace_UxCxG)
        placed = jax.device_put(tuple(a[index] for a in arrays), meshes.group_sharding(mesh))
        forced = np.asarray(teacher_forced(MODEL, variables, *placed, DRAW.temperature))[:9]
    live = np.asarray(length_mask(found.trace_len_UxC, G))
    difference = np.abs(found.logprob_UxCxG - forced)[live]
    # One part in 254 of each key's and value's largest entry; logits of order 3 move by a few
    # hundredths.
    assert 1e-4 < difference.mean() < 0.03 and difference.max() < 0.2


# What a trace depends on


@pytest.mark.devices8
def test_a_second_call_gives_the_same_bits_and_compiles_nothing(engine, moving, weights, sampled):
    first = sample(moving, weights, mixed_requests())

    def again():
        assert_bit_equal(sample(engine, weights, mixed_requests()), sampled)
        assert_bit_equal(sample(moving, weights, mixed_requests()), first)
        sample(
            moving, weights, requests_of([[1, 2]] * 3 + [np.arange(11)] * 5, cursor=90, traces=2)
        )

    assert compilations(again) == 0
    assert (
        compilations(lambda: jax.jit(lambda x: 2 * x)(1).block_until_ready()) == 1
    )  # the event has this name


@pytest.mark.devices8
def test_another_slot_neighbours_and_order_of_admission_change_no_bit(engine, weights, sampled):
    rng = np.random.default_rng(0)
    for _ in range(3):
        order = rng.permutation(9)
        assert_bit_equal(
            sample(engine, weights, sampled.requests.take(order)), groups_at(sampled, *order)
        )
    for u in (2, 8):
        assert_bit_equal(
            sample(engine, weights, sampled.requests.take([u])), groups_at(sampled, u)
        )  # alone


@pytest.mark.devices8
@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_admission_gives_the_same_tokens_where_groups_move(
    moving, weights, expected, seed
):
    order = np.random.default_rng(seed).permutation(9)[: 9 - seed]
    found = sample(moving, weights, expected.requests.take(order))
    assert_same_up_to_rounding(found, groups_at(expected, *order))


@pytest.mark.parametrize("chunk, exit_groups", [(1, 1), (3, 1), (12, 4)])
def test_how_long_a_chunk_is_changes_no_bit(mesh, stop_ids, weights, sampled, chunk, exit_groups):
    engine = make_engine(mesh, stop_ids, chunk=chunk, exit_groups=exit_groups)
    assert_bit_equal(sample(engine, weights, mixed_requests()), sampled)


def test_a_longer_cache_gives_the_same_tokens(mesh, stop_ids, weights, sampled):
    longer = make_engine(mesh, stop_ids, ((4, C, 40, 3 * G),))
    assert_same_up_to_rounding(sample(longer, weights, mixed_requests()), sampled)


@pytest.mark.devices8
def test_another_device_mesh_gives_the_same_tokens(mesh, stop_ids, sampled):
    if mesh.size == 1:
        pytest.skip("needs more than one device")
    for classes in (ONE_SIZE, MANY_SIZES):
        engine = make_engine(one_device(), stop_ids, classes)
        weights = engine.prepare(random_variables(MODEL, engine.settings.mesh))
        assert_same_up_to_rounding(sample(engine, weights, mixed_requests()), sampled)


def test_another_step_cursor_or_trace_gives_other_tokens(engine, weights, sampled):
    for other in (mixed_requests(step=1), mixed_requests(cursor=100)):
        found = sample(engine, weights, other)
        assert (found.trace_UxCxG != sampled.trace_UxCxG).any(
            -1
        ).mean() > 0.9  # short ones may coincide
    live = sampled.trace_len_UxC.min(1) > 3
    assert (
        live.any() and (sampled.trace_UxCxG[live, 0] != sampled.trace_UxCxG[live, 1]).any(-1).all()
    )


def test_stray_state_of_an_earlier_group_in_a_slot_is_never_read(mesh, weights, stop_ids, sampled):
    engine = make_engine(mesh, stop_ids, ((4, C, 16, G),))
    many = requests_of([np.arange(16)] * 12, cursor=500)
    both = dataclasses.replace(
        many,
        prompt_UxP=np.concatenate([many.prompt_UxP, sampled.requests.prompt_UxP]),
        prompt_len_U=np.concatenate([many.prompt_len_U, sampled.requests.prompt_len_U]),
        id_Ux6=np.concatenate([many.id_Ux6, sampled.requests.id_Ux6]),
    )
    found = sample(engine, weights, both)  # every slot held a long prompt before
    assert_bit_equal(groups_at(found, *range(12, 21)), sampled)


# What is counted


def test_rows_tokens_and_shared_prompts_are_counted_exactly(mesh, weights):
    limit_UxC = np.array([[1, 5, 5], [9, 2, 3]], np.int32)
    requests = requests_of([[1, 2, 3], [4] * 7], limit_UxC=limit_UxC)
    run, metrics = recording(
        make_engine(mesh, (), ((4, 3, 8, 12),), chunk=4, exit_groups=9, prefill_tokens=8), weights
    )
    run(requests)
    assert metrics["sampling/generated_tokens"] == limit_UxC.sum()
    assert metrics["sampling/prefilled_tokens"] == 3 + 7
    assert metrics["sampling/shared_prompt_tokens"] == (3 + 7) * 2
    occupancy = metrics[
        "sampling/row_occupancy"
    ]  # the first token of each trace comes from prefill
    assert (occupancy.total, occupancy.count) == (
        limit_UxC.sum() - 6,
        8 * 4 * 3,
    )  # 8 steps of all 12 rows
    assert metrics["sampling/prefill_padding"].count == 16
    assert metrics["sampling/chunks"] == 2


def test_only_rows_that_run_are_computed_where_there_are_programs_for_fewer(mesh, weights):
    limit_UxC = np.tile(np.array([12, 1, 1], np.int32), (4, 1))
    requests = requests_of([[1, 2]] * 4, limit_UxC=limit_UxC)
    run, metrics = recording(make_engine(mesh, (), row_counts=(2, 4), chunk=12), weights)
    run(requests)
    occupancy = metrics["sampling/row_occupancy"]  # one row of each group after its first tokens
    assert (occupancy.total, occupancy.count) == (4 * 11, 4 * 11)


def test_groups_that_wait_for_a_longer_slot_hold_nobody_up(mesh, weights, endless):
    """Their rows do not run, so the program for the one group that does must not be ended by their
    number.
    """
    engine = make_engine(mesh, (), ((4, C, 16, 4), (1, C, 16, G)), row_counts=(C,))
    assert_same_up_to_rounding(sample(engine, weights, mixed_requests()), endless)


def test_narrowing_keeps_rows_busy(mesh, weights):
    """One long trace a group: without narrower classes two thirds of the rows are computed for
    nothing.
    """
    limit_UxC = np.tile(np.array([12, 1, 1], np.int32), (12, 1))
    requests = requests_of([[1, 2]] * 12, limit_UxC=limit_UxC)
    share = {}
    for name, classes in (
        ("wide", ((4, 3, 8, 12),)),
        ("narrowing", ((4, 3, 8, 12), (8, 1, 8, 12))),
    ):
        run, metrics = recording(make_engine(mesh, (), classes, exit_groups=1), weights)
        run(requests)
        share[name] = (
            metrics["sampling/row_occupancy"].total / metrics["sampling/row_occupancy"].count
        )
    assert share["wide"] == pytest.approx(1 / 3)
    assert share["narrowing"] == pytest.approx(
        12 / 20
    )  # eight moved on at once; four found no narrow slot


# Bad input


@pytest.mark.parametrize(
    "rows, change, message",
    [
        ([[1], np.arange(17)], {}, r"17 tokens.*config\.sampling\.classes = \[\(4, 3, 16, 12\)\]"),
        ([[1]], {"max_tokens": 13}, r"traces of up to 13.*config\.sampling\.classes"),
        ([[1], []], {}, r"prompt of 0 tokens.*>= 1"),
        ([[1]], {"traces": 0}, r"0 traces.*>= 1"),
    ],
)
def test_a_request_that_fits_nowhere_is_an_error_that_names_the_field(
    engine, weights, rows, change, message
):
    with pytest.raises(ValueError, match=message):
        sample(engine, weights, requests_of(rows, **change))


def test_two_requests_with_one_id_are_an_error(engine, weights):
    requests = requests_of([[1], [2]])
    requests.id_Ux6[1] = requests.id_Ux6[0]
    with pytest.raises(ValueError, match="two groups have the same id"):
        sample(engine, weights, requests)


def test_slots_that_do_not_divide_over_the_mesh_are_an_error_that_names_the_field():
    mesh = jax.sharding.AbstractMesh((2, 3, 5), meshes.AXES)
    make_engine(mesh, (), ((12, 1, 8, 8),))
    with pytest.raises(
        ConfigError, match=r"config\.sampling\.classes\[1\]: its 4 slots .*data \* fsdp = 6"
    ):
        make_engine(mesh, (), ((12, 1, 8, 8), (4, 1, 16, 8)))


def test_a_stop_id_outside_the_vocabulary_is_an_error(mesh):
    with pytest.raises(ConfigError, match=rf"stop ids \[{V}\] are outside the vocabulary of {V}"):
        make_engine(mesh, (3, V))


# The distribution


def every_sequence(stop):
    """All traces of V = 4, G = 2: (sequences [N, 2], lengths [N]); the stop id ends one."""
    pairs = [(a, b) for a in range(4) if a != stop for b in range(4)]
    return np.array([*pairs, (stop, 0)], np.int32), np.array([2] * len(pairs) + [1])


@pytest.mark.devices8
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_frequencies_of_whole_traces_are_their_exact_probabilities(mesh, temperature):
    config = dataclasses.replace(MODEL, arch=Architecture(**(vars(ARCH) | {"V": 4})))
    variables, stop, traces = random_variables(config, mesh), 3, 500
    engine = make_engine(mesh, (stop,), ((4, traces, 4, 4),), config=config, draw=Draw(temperature))
    weights, prompts = engine.prepare(variables), [[0], [1, 3, 2], [2, 2], [3, 1, 0, 3]]
    sequence_Nx2, length_N = every_sequence(stop)
    count_UxN = np.zeros((4, len(length_N)))
    for step in range(10):
        done = sample(engine, weights, requests_of(prompts, step=step, traces=traces, max_tokens=2))
        same = (done.trace_UxCxG[:, :, None] == sequence_Nx2).all(-1) & (
            done.trace_len_UxC[..., None] == length_N
        )
        assert (same.sum(-1) == 1).all()
        count_UxN += same.sum(1)
    prompt_UxP, prompt_len_U = pad_rows([np.array(row) for row in prompts])
    trace = np.broadcast_to(sequence_Nx2, (4, *sequence_Nx2.shape))
    with jax.set_mesh(mesh):
        placed = jax.device_put((prompt_UxP, prompt_len_U, trace), meshes.group_sharding(mesh))
        logprob = np.asarray(teacher_forced(config, variables, *placed, temperature), np.float64)
    p_UxN = np.exp(np.where(np.arange(2) < length_N[:, None], logprob, 0).sum(-1))
    np.testing.assert_allclose(p_UxN.sum(1), 1, atol=1e-5)
    assert np.abs(p_UxN - p_UxN[0]).max() > 0.05  # the prompts matter
    cells = []
    for count_N, expected_N in zip(count_UxN, 10 * traces * p_UxN, strict=True):
        order = np.argsort(expected_N)
        rare = (
            np.searchsorted(expected_N[order], 5) + 1
        )  # those below 5 share a cell with the next one
        for cell in [order[:rare], *np.split(order[rare:], len(order) - rare)]:
            cells.append(
                (count_N[cell].sum() - expected_N[cell].sum()) ** 2 / expected_N[cell].sum()
            )
    assert np.sum(cells) < stats.chi2.ppf(0.999, len(cells) - 4)


# Start-up


def test_the_start_report_names_every_program_with_its_classes(moving):
    lines = moving.start_report().splitlines()
    assert f"{len(moving.programs)} programs" in lines[0] and "GiB of keys and values" in lines[0]
    assert len(lines) == 1 + len(moving.programs)
    assert any(
        line.startswith("  move") and "(4, 3, 8, 4) -> (4, 3, 8, 12)" in line for line in lines
    )
    for kind in ("prefill", "enter"):
        assert any(
            line.startswith(f"  {kind}") and line.endswith("(4, 2, 16, 12)") for line in lines
        )


def test_the_start_report_warns_of_classes_with_one_slot_a_shard(mesh, moving):
    alone = make_engine(mesh, classes=((4, 3, 8, 12), (1, 3, 16, 12)))
    text = describe({}, alone.settings, alone.schedule)
    assert "classes[1] has one slot a shard" in text and "classes[0]" not in text
    assert "one slot a shard" not in moving.start_report()


def test_devices_without_room_are_refused_with_what_is_missing_and_what_to_lower(mesh):
    engine = make_engine(mesh)
    check_room(engine.settings, engine.schedule, 2**20)
    with pytest.raises(
        ConfigError,
        match=r"classes need .* 0\.00 GiB more than its .*slots, C, P or G.*int8.*tensor",
    ):
        check_room(engine.settings, engine.schedule, 2**10)


def test_the_room_check_counts_prefilled_prompts_beside_the_slots():
    """Four prompts of 2^20 tokens, 256 bytes each (2 layers, keys and values, 2 heads of 8 floats):
    1 GiB, twice.
    """
    engine = make_engine(one_device(), (), ((4, C, 2**20, G),), prefill_tokens=2**22)
    check_room(engine.settings, engine.schedule, 2**31 + 2**20)
    with pytest.raises(
        ConfigError, match=r"1\.00 GiB of keys and values.*1\.00 GiB of prefilled prompts"
    ):
        check_room(engine.settings, engine.schedule, 2**31)
