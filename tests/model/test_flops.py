"""Operations of the ideal train step against arithmetic by hand, term by term."""

import dataclasses

import numpy as np
import pytest

from spiral_jax.core.config import REMAT
from spiral_jax.model.architecture import Architecture
from spiral_jax.model.families import FAMILIES, Routing
from spiral_jax.model.flops import (
    PEAK_FLOPS_PER_S,
    adapter_weights,
    attention_pairs,
    decode_flops,
    ideal_train_flops,
    layer_weights,
    linear_weights,
    prefill_flops,
    train_flops,
)

ARCH = Architecture(V=11, D=6, F=10, L=3, H=4, J=2, E=5, norm_eps=1e-6, rope_theta=1e4, tied=True)
W = 6 * 20 + 2 * 6 * 10 + 20 * 6 + 3 * 6 * 10  # q, k and v, o, gate and up and down
A = 2 * ((6 + 20) * 2 + (6 + 10) * 2 + (6 + 10) * 3)  # rank 2
W_KV, A_KV = 2 * 6 * 10, 2 * (6 + 10) * 2
PROMPT, TRACE = np.array([3, 1]), np.array([[2, 0], [1, 4]])
TOKENS, RESPONSES = 3 + 1 + 7, 7
PAIRS = (1 + 2 + 3) + 1 + (2 * 3 + (1 + 2)) + (1 * 1 + 1) + (4 * 1 + (1 + 2 + 3 + 4))
PAIR = 4 * 4 * 5  # forward: scores and weighted values of 4 heads of 5
# In the last layer prompts have the queries of their last tokens alone.
PAIRS_L = 3 * PAIRS - (1 + 2)


def of_layers(all_parts, keys_values):
    """Operations of all layers, from those of one layer on a token.

    Of prompts the last layer has keys, values and last tokens.
    """
    last_layer = TOKENS * keys_values + (2 + RESPONSES) * (all_parts - keys_values)
    return 2 * TOKENS * all_parts + last_layer


def of_step(linear, pair, response):
    """Operations of a step: `pair` in forwards of attention, `response` in products of the head."""
    return linear + PAIRS_L * pair * PAIR + RESPONSES * response * 66


def test_the_weights_of_a_layer_are_those_of_its_projections():
    assert linear_weights(ARCH) == W and adapter_weights(ARCH, 2) == A
    four_b = Architecture(
        V=151936, D=2560, F=9728, L=36, H=32, J=8, E=128, norm_eps=1e-6, rope_theta=5e6, tied=True
    )
    assert 36 * adapter_weights(four_b, 32) == 66_060_288
    norms = 36 * (2 * 2560 + 2 * 128) + 2560
    assert 36 * linear_weights(four_b) + 151936 * 2560 + norms == four_b.parameters


ROUTED = dataclasses.replace(
    ARCH, family=FAMILIES["qwen3_moe"], routing=Routing(experts=7, chosen=2, normalised=True)
)
W_ATTENTION = 6 * 20 + 2 * 6 * 10 + 20 * 6
W_ROUTED = W_ATTENTION + 6 * 7 + 2 * (3 * 6 * 10)  # the router, two experts
A_ROUTED = 2 * ((6 + 20) * 2 + (6 + 10) * 2)
A_EXPERTS = 2 * (2 * (6 + 10) * 3)  # of two experts


def test_a_token_is_multiplied_with_the_experts_that_are_chosen_for_it_and_all_are_there():
    assert linear_weights(ROUTED) == W_ROUTED and adapter_weights(ROUTED, 2) == A_ROUTED
    assert layer_weights(ROUTED) == W_ATTENTION + 6 * 7 + 7 * (3 * 6 * 10)
    assert layer_weights(ARCH) == W
    norms = 3 * (2 * 6 + 2 * 5) + 6
    assert ROUTED.parameters == 3 * layer_weights(ROUTED) + norms + 11 * 6
    full = of_step(of_layers(6 * W_ROUTED, 6 * W_KV), 3, 6)
    assert train_flops(ROUTED, 0, None, PROMPT, TRACE) == full
    # of experts the last product is computed again too: their shares' gradient needs it
    lora = of_layers(6 * W_ROUTED + 8 * A_ROUTED, 6 * W_KV + 8 * A_KV)
    assert train_flops(ROUTED, 2, "layer", PROMPT, TRACE) == of_step(lora, 4.5, 4)


def test_adapters_of_the_experts_that_are_chosen_count():
    assert adapter_weights(ROUTED, 2, lora_experts=True) == A_ROUTED + A_EXPERTS
    both = A_ROUTED + A_EXPERTS
    kept = of_layers(6 * W_ROUTED + 8 * both, 6 * W_KV + 8 * A_KV)
    found = train_flops(ROUTED, 2, "layer", PROMPT, TRACE, lora_experts=True)
    assert found == of_step(kept, 4.5, 4)
    # kept: first products, of q, k, v, o and of the experts
    first = 2 * (3 * 6 + 20) + 2 * 2 * (6 + 6 + 10)
    kept = of_layers(6 * W_ROUTED + 8 * both - 2 * first, 6 * W_KV + 8 * A_KV - 2 * (2 * 2 * 6))
    found = train_flops(ROUTED, 2, "attention", PROMPT, TRACE, lora_experts=True)
    assert found == of_step(kept, 3.5, 4)
    more = decode_flops(ROUTED, 2, np.array([5]), lora_experts=True)
    assert more - decode_flops(ROUTED, 2, np.array([5])) == 3 * 2 * A_EXPERTS


def test_pairs_are_what_the_mask_shows():
    shown = 0
    for length, traces in zip(PROMPT, TRACE, strict=True):
        shown += sum(q >= k for q in range(length) for k in range(length))
        shown += sum(length + g + 1 for trace in traces for g in range(trace))
    assert attention_pairs(PROMPT, TRACE) == shown == PAIRS


@pytest.mark.parametrize(
    ("rank", "remat", "expected"),
    [
        (0, None, of_step(of_layers(6 * W, 6 * W_KV), 3, 6)),
        (0, "none", of_step(of_layers(6 * W, 6 * W_KV), 3.5, 8)),
        (0, "dots", of_step(of_layers(6 * W, 6 * W_KV), 3.5, 8)),
        (0, "attention", of_step(of_layers(8 * W - 2 * 60, 8 * W_KV), 3.5, 8)),
        (0, "layer", of_step(of_layers(8 * W - 2 * 60, 8 * W_KV), 4.5, 8)),
        (2, None, of_step(of_layers(4 * W + 6 * A, 4 * W_KV + 6 * A_KV), 3, 4)),
        (2, "dots", of_step(of_layers(4 * W + 6 * A, 4 * W_KV + 6 * A_KV), 3.5, 4)),
        (
            2,
            "attention",
            of_step(
                of_layers(6 * W - 120 + 8 * A - 24 - 4 * 60, 6 * W_KV + 8 * A_KV - 4 * 12), 3.5, 4
            ),
        ),
        (
            2,
            "layer",
            of_step(of_layers(6 * W - 120 + 8 * A - 24, 6 * W_KV + 8 * A_KV), 4.5, 4),
        ),
    ],
)
def test_a_step_is_the_sum_of_its_products(rank, remat, expected):
    assert train_flops(ARCH, rank, remat, PROMPT, TRACE) == expected


def test_six_times_parameters_times_tokens_where_attention_is_small():
    wide = dataclasses.replace(ARCH, D=1024, F=4096, V=2, E=8)
    flops = ideal_train_flops(wide, 0, None, U=3, C=1, P=1, G=7)
    assert flops == pytest.approx(6 * wide.L * linear_weights(wide) * 24, rel=1e-3)


@pytest.mark.parametrize("remat", [None, *REMAT])
def test_equal_groups_are_groups_and_every_policy_costs_at_least_the_one_before(remat):

    def of(remat):
        return ideal_train_flops(ARCH, 2, remat, U=2, C=3, P=5, G=4)

    assert of(remat) == train_flops(ARCH, 2, remat, np.full(2, 5), np.full((2, 3), 4))
    order = [None, *REMAT]
    assert all(of(a) <= of(b) for a, b in zip(order, order[1:], strict=False))


def test_a_prompt_counts_once_whatever_number_of_traces_it_has():
    prompt = train_flops(ARCH, 0, None, np.array([7]), np.zeros((1, 3), int))
    # Two whole layers; then keys, values and the last token.
    linear = 2 * 7 * W + 7 * W_KV + (W - W_KV)
    assert train_flops(ARCH, 0, None, np.array([7]), np.zeros((1, 0), int)) == prompt
    assert prompt == 6 * linear + (2 * 28 + 7) * 3 * PAIR


def test_another_policy_is_an_error_and_peaks_are_per_second():
    with pytest.raises(ValueError, match="'everything'.*none, dots, attention, layer"):
        train_flops(ARCH, 0, "everything", PROMPT, TRACE)
    assert all(1e14 < peak < 1e16 for peak in PEAK_FLOPS_PER_S.values())


def test_prefill_runs_every_token_forward_to_the_keys_and_values_of_the_last_layer():
    pairs = (1 + 2 + 3) + 1
    before, last = 4 * 2 * (W + A) + pairs * PAIR, 4 * 2 * (W_KV + A_KV)
    assert prefill_flops(ARCH, 2, PROMPT) == 2 * before + last


def test_a_decoded_token_attends_to_its_keys():
    linear = 2 * 2 * (W + A)
    assert decode_flops(ARCH, 2, np.array([5, 9])) == 3 * (linear + 14 * PAIR) + 2 * 2 * 6 * 11
