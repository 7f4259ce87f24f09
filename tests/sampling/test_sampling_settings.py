"""What may be configured, and which classes groups enter and move to."""

import importlib

import pytest
from small_sampler import MANY_SIZES, requests_of

from spiral_jax.core.config import ConfigError
from spiral_jax.sampling.settings import (
    Schedule,
    SlotClass,
    check_sampling,
    kernel_chunk,
    make_schedule,
)

CONFIGS = ("tiny", "qwen3_4b", "grpo_qwen3_4b", "smollm2_135m", "smollm2_chain_sum", "end_digit")

BAD = {
    "sampling.classes": [
        ((), "rows"),
        (((8, 4, 16),), "(slots, C, P, G)"),
        (((8, 4, 16, 0),), ">= 1"),
        (((8, 4, 16, 8), (8, 4, 16, 8)), "different"),
        (((8, 4, 16, 8), (8, 2, 16, 16)), "C = 4 and G = 16 for P = 16"),
    ],
    "sampling.row_counts": [((8, 4), "ascending"), ((0,), ">= 1"), ((4, 4), "ascending")],
    "sampling.cache_dtype": [("int4", "compute, int8")],
    "sampling.temperature": [(0.0, "> 0")],
    "sampling.chunk": [(0, ">= 1")],
    "sampling.exit_groups": [(0, ">= 1")],
    "sampling.prefill_tokens": [(0, ">= 1")],
    "sampling.prefill_chunk": [(0, ">= 1")],
    "eval.temperature": [(-0.1, ">= 0")],
    "eval.top_k": [(-1, ">= 0")],
    "eval.top_p": [(0.0, "above 0"), (1.5, "at most 1")],
    "eval.min_p": [(-0.1, ">= 0"), (1.0, "below 1")],
}


def config_of(name):
    return importlib.import_module(f"configs.{name}").get_config()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_may_sample(name):
    check_sampling(config_of(name))


@pytest.mark.parametrize("field", BAD)
def test_a_value_that_cannot_be_is_named_with_what_is_allowed(field):
    room, name = field.split(".")
    for value, allowed in BAD[field]:
        c = config_of("tiny")
        c[room][name] = value
        with pytest.raises(ConfigError) as error:
            check_sampling(c)
        for part in (f"config.{field} = ", allowed):
            assert part in str(error.value)


def schedule_of(rows):
    return Schedule(tuple(SlotClass(*row) for row in rows), 8, 1, 64)


def test_groups_begin_in_the_widest_shortest_class_and_move_to_longer_and_narrower_ones():
    schedule = schedule_of(MANY_SIZES)
    assert schedule.entries() == [0, 3]  # one for each prompt length
    assert schedule.moves() == [(0, 1), (0, 2), (1, 2)]  # longer; longer and narrower; narrower
    assert [schedule.leave_at(i) for i in range(4)] == [1, 1, 0, 0]


def test_a_request_may_enter_where_its_prompt_fits_and_its_traces_can_end():
    schedule = schedule_of([(4, 2, 16, 12), (4, 3, 8, 4), (4, 3, 8, 10)])
    assert schedule.entries_for(requests_of([[1] * 8], max_tokens=10)) == [1, 0]
    assert schedule.entries_for(requests_of([[1] * 8], max_tokens=11)) == [0]
    assert schedule.entries_for(requests_of([[1] * 9], max_tokens=4)) == [0]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_class_of_a_config_leads_to_the_longest_of_its_prompt_length(name):
    schedule = make_schedule(config_of(name))
    for i, slots in enumerate(schedule.classes):
        reached = [slots, *(schedule.classes[j] for j in schedule.targets(i))]
        assert max(there.G for there in reached) == schedule.longest_trace(slots.P)


@pytest.mark.parametrize("prompt", [1, 100, 2047, 2048, 4096, 8448, 9216, 17920])
def test_prompts_are_prefilled_in_few_even_chunks_where_kernels_attend(prompt):
    chunk = kernel_chunk(prompt, least=256)
    chunks = -(-prompt // chunk)
    assert chunk >= min(prompt, 2048)
    assert chunks * chunk < prompt + chunks * 128  # all that is computed in vain is rounding
