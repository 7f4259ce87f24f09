"""What may be configured, and how prompts are cut into chunks."""

import importlib

import pytest

from spiral_jax.core.config import ConfigError
from spiral_jax.sampling.settings import check_sampling, kernel_chunk

CONFIGS = ("tiny", "qwen3_4b", "grpo_qwen3_4b", "smollm2_135m", "smollm2_chain_sum", "end_digit")
CONFIGS += ("three_parts",)

BAD = {
    "sampling.memory": [(0.0, "above 0"), (-1.0, "bytes")],
    "sampling.rows": [(-1, ">= 0")],
    "sampling.cache_dtype": [("int4", "compute, int8")],
    "search.temperature": [(0.0, "> 0")],
    "aggregation.temperature": [(0.0, "> 0")],
    "sampling.chunk": [(0, ">= 1")],
    "sampling.prefill_tokens": [(0, ">= 1")],
    "sampling.prefill_chunk": [(0, ">= 1")],
    "eval.search_temperature": [(-0.1, ">= 0")],
    "eval.aggregation_temperature": [(-0.1, ">= 0")],
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


@pytest.mark.parametrize("prompt", [1, 100, 2047, 2048, 4096, 8448, 9216, 17920])
def test_prompts_are_prefilled_in_few_even_chunks_where_kernels_attend(prompt):
    chunk = kernel_chunk(prompt, least=256)
    chunks = -(-prompt // chunk)
    assert chunk >= min(prompt, 2048)
    assert chunks * chunk < prompt + chunks * 128  # all that is computed in vain is rounding
