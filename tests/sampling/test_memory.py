"""How many pages and rows follow from a device's memory and the limits; nothing is compiled."""

import dataclasses

import jax.numpy as jnp
import pytest
from small_sampler import make_settings, one_device

from configs import tiny
from spiral_jax.core.config import ConfigError
from spiral_jax.core.mesh import bytes_on_a_device
from spiral_jax.sampling.memory import Room, make_schedule, page_bytes
from spiral_jax.sampling.settings import GroupLimits
from spiral_jax.sampling.shapes import abstract_pool
from spiral_jax.sampling.weights import abstract_weights

LIMITS = [GroupLimits(prompt=33, traces=8, tokens=128), GroupLimits(401, 4, 128)]
TOKEN = 2 * 2 * 8 * 4  # bytes: one layer, keys and values, 2 heads of 8 floats
PAGE = 128 * TOKEN  # as long as the longest trace


def schedule_of(device, resident=0, limits=LIMITS, dtype=jnp.float32, **sampling):
    c = tiny.get_config()
    c.sampling.memory, c.sampling.rows = 0.8, 0
    c.sampling.prefill_tokens, c.sampling.chunk = 500, 8
    for name, value in sampling.items():
        c.sampling[name] = value
    settings = make_settings(one_device(), cache_dtype=jnp.dtype(dtype))
    return make_schedule(c, settings, limits, Room(device, resident)), settings


def test_pages_take_their_share_of_what_weights_state_and_a_prefill_leave_free():
    schedule, settings = schedule_of(device=2**21, resident=10_000)
    weights = bytes_on_a_device(abstract_weights(settings.config, settings.mesh))
    assert schedule.page == 128 and schedule.prompts == (32, 400)
    prefilled = 4 * PAGE  # one prompt of 400 tokens is all that a call of 500 pays for
    budget = 0.8 * (2**21 - 10_000 - weights - prefilled)
    assert schedule.pages == int(budget / PAGE)
    assert bytes_on_a_device(abstract_pool(settings, schedule)) <= budget
    assert page_bytes(settings, 128) == PAGE


def test_memory_above_one_is_bytes_and_no_page_is_there_that_nobody_could_use():
    assert schedule_of(2**40, memory=100 * PAGE + 5)[0].pages == 100
    plenty, _ = schedule_of(2**40, rows=16)
    assert plenty.pages == 1 + 16 + 8 * 4  # of 16 longest traces, of a prompt for each two


def test_rows_are_those_that_the_pages_feed_unless_they_are_given():
    schedule, _ = schedule_of(2**40, memory=60 * PAGE)
    # a third of a trace's page, and half of an eighth of 1 and of a quarter of 4 pages of a prompt
    mean = (2 * 1 / 3 + 1 / 8 / 2 + 4 / 4 / 2) / 2
    assert schedule.rows[-1] == int(60 / mean) // 8 * 8
    assert schedule.rows == (24, 48, 96)  # a quarter, a half and all, in eights
    assert schedule_of(2**40, memory=500 * PAGE)[0].rows[-1] == 128  # on CPUs rows cost
    assert schedule_of(2**40, rows=30)[0].rows == (30,)  # too few for programs of fewer


def test_int8_pages_hold_almost_four_times_the_tokens_of_float32():
    wide, narrow = (
        schedule_of(2**21, dtype=dtype, rows=512)[0].pages for dtype in (jnp.float32, jnp.int8)
    )
    # an entry of 8 numbers takes 8 bytes and a scale of 4, where float32 takes 32
    assert narrow / wide == pytest.approx(32 / 12, rel=0.1)


def test_a_device_without_room_for_one_group_is_refused_with_what_is_missing():
    least = 1 + 4 + 8
    schedule_of(0, memory=least * PAGE)
    with pytest.raises(ConfigError) as error:
        schedule_of(0, memory=(least - 1) * PAGE)
    for part in ("config.sampling.memory", f"{least:,}", "GiB", "int8", "mesh.tensor"):
        assert part in str(error.value)


def test_kernels_read_pages_of_128_tokens_and_bundles_of_the_widest_group():
    model = dataclasses.replace(make_settings(one_device()).config, pages="tpu")
    settings = make_settings(one_device(), config=model)
    c = tiny.get_config()
    schedule = make_schedule(c, settings, LIMITS, Room(2**40, 0))
    assert (schedule.page, schedule.width) == (128, 8)
    assert len(schedule.rows) == 2 and schedule.rows[1] == 4 * schedule.rows[0]
    assert schedule_of(2**30)[0].width == 8  # the narrower ones, if they are most
