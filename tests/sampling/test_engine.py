"""The engine draws what the definition draws, whatever the pages and whoever the neighbours."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_sampler import plain_sample
from scipy import stats
from small_sampler import (
    AMPLE,
    DRAW,
    MODEL,
    OTHER_PROGRAM,
    SCARCE,
    C,
    G,
    ListFeed,
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
    run_to_end,
    sample_with_metrics,
)

from spiral_jax.core import mesh as meshes
from spiral_jax.core.config import ConfigError
from spiral_jax.core.groups import ROLE_OF_ID, Role, Stop, pad_rows
from spiral_jax.learner.logprobs import group_logprobs, length_mask
from spiral_jax.sampling.draw import Draw
from spiral_jax.sampling.protocol import sample


@pytest.fixture(scope="module")
def variables(mesh):
    return random_variables(MODEL, mesh)


@pytest.fixture(scope="module")
def weights(mesh, variables):
    return make_engine(mesh).prepare(variables)


@pytest.fixture(scope="module")
def stop_ids(mesh, variables):
    """The padding id, and two that end some trace early and some trace at its very last token."""
    endless = plain_sample(make_settings(mesh), variables, mixed_requests())
    chosen = [0]
    for at in (4, G - 1):
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
def scarce(mesh, stop_ids):
    """An engine with few and small pages, for which groups wait, and programs of two sizes."""
    return make_engine(mesh, stop_ids, SCARCE)


@pytest.fixture(scope="module")
def sampled(engine, weights):
    return sample(engine, weights, mixed_requests())


@pytest.fixture(scope="module")
def wide(mesh):
    """Rows for four groups; nothing ends a trace but its limit."""
    return make_engine(mesh, (), {"chunk": 4, "prefill_tokens": 16})


@functools.partial(jax.jit, static_argnums=(0, 5))
def teacher_forced(config, variables, prompt, prompt_len, trace, temperature):
    return group_logprobs(config, variables, prompt, prompt_len, trace, temperature, 5)[0]


def teacher_forced_logprobs(mesh, variables, groups, config=MODEL, temperature=DRAW.temperature):
    """Log-probs of nine groups in the training forward pass."""
    index = np.arange(12) % 9  # a multiple of the mesh's groups
    arrays = (groups.requests.prompt_UxP, groups.requests.prompt_len_U, groups.trace_UxCxG)
    with jax.set_mesh(mesh):
        placed = jax.device_put(tuple(a[index] for a in arrays), meshes.group_sharding(mesh))
        forced = teacher_forced(config, variables, *placed, temperature)
    return np.asarray(forced)[:9]


def live_tokens(groups):
    return np.asarray(length_mask(groups.trace_len_UxC, G))


# What is drawn


@pytest.mark.devices8
def test_the_engine_draws_what_the_definition_draws(sampled, expected, stop_ids):
    assert_same_up_to_rounding(sampled, expected)

    stopped = sampled.stop_UxC == Stop.STOP
    last_tokens = sampled.trace_UxCxG[stopped, sampled.trace_len_UxC[stopped] - 1]
    assert set(stop_ids) == set(last_tokens.tolist())  # each, the padding id too, ended some trace

    # a stop at the last token is a stop
    at_limit = sampled.trace_len_UxC == G
    assert set(sampled.stop_UxC[at_limit].tolist()) == {Stop.STOP, Stop.LENGTH}

    beyond = ~live_tokens(sampled)
    assert beyond.any()
    assert not sampled.trace_UxCxG[beyond].any() and not sampled.logprob_UxCxG[beyond].any()


@pytest.mark.devices8
def test_waiting_for_pages_and_other_programs_change_no_token(scarce, weights, expected):
    groups, metrics = sample_with_metrics(scarce, weights, mixed_requests())
    assert_same_up_to_rounding(groups, expected)
    assert metrics["sampling/queue_depth"].total > 0  # groups waited for room
    assert metrics["sampling/page_occupancy"].total > 0


@pytest.mark.devices8
def test_rows_that_pause_go_on_as_if_they_had_not(mesh, weights, stop_ids, expected):
    """Pages for the longest traces of a single row, and twelve rows that want to grow."""
    pages = 1 + 8 + 6 + 8  # the longest prompt, one longest trace, and a few more
    schedule = SCARCE | {"pages": pages, "rows": (12,), "together": 1, "chunk": 2}
    engine = make_engine(mesh, stop_ids, schedule)
    groups, metrics = sample_with_metrics(engine, weights, mixed_requests())
    assert_same_up_to_rounding(groups, expected)
    assert metrics["sampling/paused_rows"].total > 0


@pytest.mark.devices8
def test_recorded_logprobs_are_those_of_teacher_forcing(mesh, variables, sampled):
    forced, live = teacher_forced_logprobs(mesh, variables, sampled), live_tokens(sampled)
    np.testing.assert_allclose(sampled.logprob_UxCxG[live], forced[live], rtol=0, atol=1e-5)
    assert sampled.logprob_UxCxG[live].std() > 1 and len(np.unique(sampled.trace_UxCxG[live])) > 30


@pytest.mark.devices8
@pytest.mark.parametrize("kind", ["engine", "scarce"])
def test_every_trace_ends_at_its_own_limit(request, weights, expected, kind):
    limit_UxC = np.random.default_rng(1).integers(1, G + 1, (9, C)).astype(np.int32)
    requests = mixed_requests(limit_UxC=limit_UxC)
    groups = sample(request.getfixturevalue(kind), weights, requests)

    cut_UxC = limit_UxC < expected.trace_len_UxC
    assert cut_UxC.any() and not cut_UxC.all()
    np.testing.assert_array_equal(
        groups.trace_len_UxC, np.minimum(limit_UxC, expected.trace_len_UxC)
    )
    np.testing.assert_array_equal(
        groups.stop_UxC, np.where(cut_UxC, Stop.LENGTH, expected.stop_UxC)
    )
    inside = np.arange(G) < limit_UxC[..., None]
    np.testing.assert_array_equal(groups.trace_UxCxG, np.where(inside, expected.trace_UxCxG, 0))


def test_greedy_takes_the_most_likely_token_with_log_prob_0(mesh, variables, weights):
    greedy = {"draw": Draw(temperature=0)}
    groups = sample(make_engine(mesh, (), AMPLE, **greedy), weights, mixed_requests())
    settings = make_settings(mesh, (), **greedy)
    assert_same_up_to_rounding(groups, plain_sample(settings, variables, mixed_requests()))
    assert not groups.logprob_UxCxG.any()
    assert (groups.trace_UxCxG == groups.trace_UxCxG[:, :1]).all()


def test_an_int8_cache_moves_log_probs_by_little(mesh, variables, weights, stop_ids):
    engine = make_engine(mesh, stop_ids, AMPLE, cache_dtype=np.dtype("int8"))
    groups = sample(engine, weights, mixed_requests())
    forced, live = teacher_forced_logprobs(mesh, variables, groups), live_tokens(groups)
    difference = np.abs(groups.logprob_UxCxG - forced)[live]
    # One part in 254 of each key's and value's largest entry; logits of order 3 move by a few
    # hundredths.
    assert 1e-4 < difference.mean() < 0.03 and difference.max() < 0.2


def test_a_bfloat16_model_decodes_what_its_trainer_reads(mesh):
    narrow = dataclasses.replace(MODEL, param_dtype=jnp.bfloat16, compute_dtype=jnp.bfloat16)
    engine = make_engine(mesh, (), AMPLE, config=narrow, cache_dtype=jnp.dtype(jnp.bfloat16))
    variables = random_variables(narrow, mesh)
    groups = sample(engine, engine.prepare(variables), mixed_requests())
    forced = teacher_forced_logprobs(mesh, variables, groups, narrow)
    difference = np.abs(groups.logprob_UxCxG - forced)[live_tokens(groups)]
    # 8 bits of logits of order 3, divided by the temperature, are a few hundredths
    assert 0 < difference.mean() < 0.02 and difference.max() < 0.15


# What a trace depends on


@pytest.mark.devices8
def test_a_second_call_gives_the_same_bits_and_compiles_nothing(engine, scarce, weights, sampled):
    first = sample(scarce, weights, mixed_requests())

    def again():
        assert_bit_equal(sample(engine, weights, mixed_requests()), sampled)
        assert_bit_equal(sample(scarce, weights, mixed_requests()), first)
        other_shapes = [[1, 2]] * 3 + [np.arange(11)] * 5
        sample(scarce, weights, requests_of(other_shapes, cursor=90, traces=2))

    assert compilations(again) == 0
    # the event has this name
    assert compilations(lambda: jax.jit(lambda x: 2 * x)(1).block_until_ready()) == 1


@pytest.mark.devices8
def test_other_pages_neighbours_and_order_of_admission_change_no_bit(engine, weights, sampled):
    rng = np.random.default_rng(0)
    orders = [rng.permutation(9) for _ in range(3)]
    alone = [[2], [8]]
    for order in [*orders, *alone]:
        groups = sample(engine, weights, sampled.requests.take(order))
        assert_bit_equal(groups, groups_at(sampled, *order))


@pytest.mark.devices8
@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_admission_gives_the_same_tokens_where_rows_wait(
    scarce, weights, expected, seed
):
    order = np.random.default_rng(seed).permutation(9)[: 9 - seed]
    groups = sample(scarce, weights, expected.requests.take(order))
    assert_same_up_to_rounding(groups, groups_at(expected, *order))


@pytest.mark.cpu_bits("bits of two programs")
@pytest.mark.parametrize("chunk", [1, 12])
def test_how_long_a_chunk_is_changes_no_bit(mesh, stop_ids, weights, sampled, chunk):
    engine = make_engine(mesh, stop_ids, {"chunk": chunk})
    assert_bit_equal(sample(engine, weights, mixed_requests()), sampled)


@pytest.mark.parametrize(
    "schedule",
    [{"page": 16, "trace": 3 * G, "prompts": (40,)}, {"width": 1, "page": 1, "pages": 200}],
    ids=["longer limits", "pages of one token"],
)
def test_other_pages_give_the_same_tokens(mesh, stop_ids, weights, sampled, schedule):
    engine = make_engine(mesh, stop_ids, schedule)
    assert_same_up_to_rounding(sample(engine, weights, mixed_requests()), sampled)


@pytest.mark.devices8
def test_another_device_mesh_gives_the_same_tokens(mesh, stop_ids, sampled):
    if mesh.size == 1:
        pytest.skip("needs more than one device")
    for schedule in (AMPLE, SCARCE):
        engine = make_engine(one_device(), stop_ids, schedule)
        weights = engine.prepare(random_variables(MODEL, engine.settings.mesh))
        assert_same_up_to_rounding(sample(engine, weights, mixed_requests()), sampled)


def test_another_step_cursor_or_trace_gives_other_tokens(engine, weights, sampled):
    for other in (mixed_requests(step=1), mixed_requests(cursor=100)):
        groups = sample(engine, weights, other)
        differs = (groups.trace_UxCxG != sampled.trace_UxCxG).any(-1)
        assert differs.mean() > 0.9  # short ones may coincide

    live = sampled.trace_len_UxC.min(1) > 3
    first, second = sampled.trace_UxCxG[live, 0], sampled.trace_UxCxG[live, 1]
    assert live.any() and (first != second).any(-1).all()


def test_what_an_earlier_group_left_in_pages_is_never_read(engine, weights, sampled):
    before, after = requests_of([np.arange(16)] * 12, cursor=500), sampled.requests
    both = dataclasses.replace(
        before,
        prompt_UxP=np.concatenate([before.prompt_UxP, after.prompt_UxP]),
        prompt_len_U=np.concatenate([before.prompt_len_U, after.prompt_len_U]),
        id_Ux6=np.concatenate([before.id_Ux6, after.id_Ux6]),
    )
    groups = sample(engine, weights, both)  # the pages held long prompts before
    assert_bit_equal(groups_at(groups, *range(12, 21)), sampled)


# Who drives


def test_time_is_counted_in_chunks_and_metrics_may_be_asked_for_at_any_time(engine, weights):
    sampling = engine.stream(weights, ListFeed([mixed_requests().take([u]) for u in range(9)]))
    chunks, tokens = [], []
    for now in sampling:
        chunks.append((now, sampling.metrics()["sampling/chunks"]))
        tokens.append(sampling.metrics()["sampling/generated_tokens"])
    assert chunks == [(n, n) for n in range(len(chunks))] and len(chunks) > 3
    assert tokens[0] == 0 and all(np.diff(tokens) > 0)


def test_a_consumer_may_stop_at_any_time_and_what_runs_is_abandoned(engine, weights, sampled):
    sampling = engine.stream(weights, ListFeed([mixed_requests().take([u]) for u in range(9)]))
    for now in sampling:
        if now == 1:
            break
    assert sampling.metrics()["sampling/abandoned_groups"] > 0
    assert_bit_equal(sample(engine, weights, mixed_requests()), sampled)  # no trace is left of it


def test_what_a_consumer_adds_between_two_chunks_is_admitted_in_the_next(engine, weights, sampled):
    feed = ListFeed([mixed_requests().take([0])])
    for now in engine.stream(weights, feed):
        if now == 1:
            feed.waiting.append(mixed_requests().take([1]))
            feed.asked += 1
    both = {int(group.requests.id_Ux6[0, 2]): group for group in feed.groups}
    assert_bit_equal(both[0], groups_at(sampled, 0))
    assert_bit_equal(both[1], groups_at(sampled, 1))


def test_a_feed_that_wants_nothing_is_asked_for_nothing(engine, weights):
    feed = ListFeed([mixed_requests().take([0])])
    feed.asked = 0
    metrics = run_to_end(engine.stream(weights, feed))
    assert len(feed.waiting) == 1 and metrics["sampling/generated_tokens"] == 0


# What is counted


def test_rows_tokens_and_shared_prompts_are_counted_exactly(wide, weights):
    limit_UxC = np.array([[1, 5, 5], [9, 2, 3]], np.int32)
    requests = requests_of([[1, 2, 3], [4] * 7], limit_UxC=limit_UxC)
    _, metrics = sample_with_metrics(wide, weights, requests)
    assert metrics["sampling/generated_tokens"] == limit_UxC.sum()
    assert metrics["sampling/prefilled_tokens"] == 2 + 6  # the last token is each trace's own
    assert metrics["sampling/shared_prompt_tokens"] == 3 * (3 + 7) - (2 + 6)
    assert metrics["sampling/prefill_padding"].count == 16

    occupancy = metrics["sampling/row_occupancy"]
    assert occupancy.total == limit_UxC.sum()
    assert occupancy.count == 9 * 12  # as many steps as the longest trace has tokens, of all rows


def test_only_rows_that_run_are_computed_where_there_are_programs_for_fewer(mesh, weights):
    """Three traces of one token and one of twelve a group: after the first token a third runs."""
    limit_UxC = np.tile(np.array([12, 1, 1], np.int32), (4, 1))
    requests = requests_of([[1, 2]] * 4, limit_UxC=limit_UxC)
    engine = make_engine(mesh, (), {"rows": (8, 12), "chunk": 12})
    _, metrics = sample_with_metrics(engine, weights, requests)
    occupancy = metrics["sampling/row_occupancy"]
    shards = meshes.group_count_multiple(mesh)
    computed = 12 + 11 * 8 if shards == 1 else 12 * 8  # on several shards three rows are the most
    assert (occupancy.total, occupancy.count) == (4 * 14, shards * computed)


def test_a_wide_groups_prompt_is_computed_and_kept_once(mesh, variables, weights):
    """Five times as many traces as rows: they begin as others end."""
    engine = make_engine(mesh, (), {"rows": (12,), "width": 4})
    limits = np.random.default_rng(0).integers(1, G + 1, (1, 60)).astype(np.int32)
    requests = requests_of([[1, 2, 3, 4, 5]], traces=60, limit_UxC=limits)
    groups, metrics = sample_with_metrics(engine, weights, requests)
    assert metrics["sampling/prefilled_tokens"] == 4
    np.testing.assert_array_equal(groups.trace_len_UxC, limits)
    expected = plain_sample(make_settings(mesh), variables, requests)
    assert_same_up_to_rounding(groups, expected)


# Bad input


@pytest.mark.parametrize(
    "rows, change, message",
    [
        ([[1], np.arange(18)], {}, r"18 tokens.*prompts of up to 17"),
        ([[1]], {"max_tokens": 13}, r"traces of up to 13.*traces of up to 12"),
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
    with pytest.raises(ValueError, match="same id"):
        sample(engine, weights, requests)


def test_a_stop_id_outside_the_vocabulary_is_an_error(mesh):
    with pytest.raises(ConfigError, match=rf"stop ids \[{V}\].*vocabulary of {V}"):
        make_engine(mesh, (3, V))


# The distribution


def every_sequence(stop):
    """All traces of V = 4, G = 2: (sequences [N, 2], lengths [N]); the stop id ends one."""
    pairs = [(a, b) for a in range(4) if a != stop for b in range(4)]
    return np.array([*pairs, (stop, 0)], np.int32), np.array([2] * len(pairs) + [1])


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_frequencies_of_whole_traces_are_their_exact_probabilities(mesh, temperature):
    config = dataclasses.replace(MODEL, arch=dataclasses.replace(MODEL.arch, V=4))
    variables, stop, traces, steps = random_variables(config, mesh), 3, 500, 10
    schedule = {"rows": (500,), "pages": 600, "trace": 4, "width": 4, "prompts": (4,)}
    engine = make_engine(mesh, (stop,), schedule, config=config, draw=Draw(temperature))
    weights, prompts = engine.prepare(variables), [[0], [1, 3, 2], [2, 2], [3, 1, 0, 3]]

    sequence_Nx2, length_N = every_sequence(stop)
    count_UxN = np.zeros((4, len(length_N)))
    for step in range(steps):
        done = sample(engine, weights, requests_of(prompts, step=step, traces=traces, max_tokens=2))
        same_tokens = (done.trace_UxCxG[:, :, None] == sequence_Nx2).all(-1)
        same = same_tokens & (done.trace_len_UxC[..., None] == length_N)
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
    for count_N, expected_N in zip(count_UxN, steps * traces * p_UxN, strict=True):
        order = np.argsort(expected_N)
        # those below 5 share a cell with the next one
        rare = np.searchsorted(expected_N[order], 5) + 1
        for cell in [order[:rare], *np.split(order[rare:], len(order) - rare)]:
            expected = expected_N[cell].sum()
            cells.append((count_N[cell].sum() - expected) ** 2 / expected)
    assert np.sum(cells) < stats.chi2.ppf(0.999, len(cells) - 4)


def test_search_and_aggregation_run_side_by_side_at_their_own_temperatures(
    mesh, variables, weights
):
    temperatures = {Role.SEARCH: 0.7, Role.AGGREGATION: 1.3}
    draw = Draw(0.7, aggregation_temperature=1.3)
    engine = make_engine(mesh, (), {"chunk": 4, "prefill_tokens": 16}, draw=draw)
    requests = mixed_requests()
    requests.id_Ux6[:, ROLE_OF_ID] = role_U = np.arange(9) % 2
    drawn = sample(engine, weights, requests)
    for role, temperature in temperatures.items():
        forced = teacher_forced_logprobs(mesh, variables, drawn, MODEL, temperature)
        off = np.abs(forced - drawn.logprob_UxCxG)
        assert off[role_U == role].max() < OTHER_PROGRAM
        assert off[role_U != role].max() > 0.1  # the other temperature would be seen


# Start-up


def test_the_start_report_names_pages_rows_and_every_program(scarce):
    lines = scarce.start_report().splitlines()
    pages, tokens, rows = "28 pages of 2 tokens", "56 in all", "8 rows"
    assert all(part in lines[0] for part in (pages, tokens, rows, "GiB of keys and values"))
    assert f"{len(scarce.programs)} programs" in lines[0]
    assert len(lines) == 1 + len(scarce.programs)
