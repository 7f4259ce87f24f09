"""What the sampler needs of a device, and what a start says of it; nothing is compiled."""

import pytest
from small_sampler import C, G, make_engine, one_device

from spiral_jax.core.config import ConfigError
from spiral_jax.sampling.memory import check_memory, describe


def test_the_start_report_warns_of_classes_with_one_slot_a_shard(mesh):
    engine = make_engine(mesh, classes=((4, 3, 8, 12), (1, 3, 16, 12)))
    text = describe({}, engine.settings, engine.schedule)
    assert "classes[1] has one slot a shard" in text and "classes[0]" not in text


def test_devices_without_room_are_refused_with_what_is_missing_and_what_to_lower(mesh):
    engine = make_engine(mesh)
    check_memory(engine.settings, engine.schedule, 2**20)
    with pytest.raises(ConfigError) as error:
        check_memory(engine.settings, engine.schedule, 2**10)
    for part in ("config.sampling.classes", "0.00 GiB more", "slots, C, P or G", "int8", "tensor"):
        assert part in str(error.value)


def test_the_check_counts_prefilled_prompts_beside_the_slots():
    """Four prompts of 2^20 tokens, 256 bytes each: 1 GiB, twice.

    A token has 2 layers, keys and values, 2 heads of 8 floats.
    """
    engine = make_engine(one_device(), (), ((4, C, 2**20, G),), prefill_tokens=2**22)
    check_memory(engine.settings, engine.schedule, 2**31 + 2**20)
    with pytest.raises(ConfigError) as error:
        check_memory(engine.settings, engine.schedule, 2**31)
    assert "1.00 GiB of keys and values" in str(error.value)
    assert "1.00 GiB of prefilled prompts" in str(error.value)
