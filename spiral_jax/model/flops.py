"""How many floating-point operations a train step needs: for MFU, the plan and the benchmarks.

Matrix products alone, two operations a multiply-add. Per token and layer, with W base weights and A
adapter weights that the token is multiplied with (of experts, those of the chosen ones):

    linear, forward      2 (W + A)
    linear, backward     2 (W + A) for activations; for weights 2 W in full fine-tuning, 2 A with
                         adapters
    attention, forward   4 H E a (query, key) pair that the mask shows
    attention, backward  8 H E a pair
    head, forward        2 D V a trace token
    head, backward       2 D V, and 2 D V for its weights in full fine-tuning

A group's prompt counts once, whatever number of traces continues it, and in the last layer with its
keys, its values and its last token alone, since nothing else of it is read there. With the name of
a remat policy (`model.remat`) the count has what this program computes twice under it on purpose:

    any        scores of the attention's backward pass, 2 H E a pair; in full fine-tuning the
               logits, 2 D V a trace token
    attention  each layer but for attention, the first product of each adapter, and the layer's last
               product, whose result nothing needs
    layer      the same with attention and the adapters' first products
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from spiral_jax.core.config import REMAT
from spiral_jax.model.architecture import Architecture

# Dense bfloat16 operations a second of one JAX device, by `device_kind`, from the vendors' data
# sheets.
PEAK_FLOPS_PER_S = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GeForce RTX 4090": 165e12,  # summed in float32
}


class _Product(NamedTuple):
    """A matrix that a layer's tokens are multiplied with.

    Attributes:
      width: of what it reads.
      features: that it writes.
      times: how many such a token is multiplied with.
      of: how many such there are.
      adapted: whether it has an adapter where anything has.
    """

    width: int
    features: int
    times: int = 1
    of: int = 1
    adapted: bool = True

    @property
    def weights(self) -> int:
        """That a token is multiplied with."""
        return self.times * self.width * self.features

    def adapter_a(self, lora_rank: int) -> int:
        """Weights of its adapters' first products that a token is multiplied with."""
        return self.times * lora_rank * self.width if self.adapted else 0

    def adapter_b(self, lora_rank: int) -> int:
        """The same of their second products."""
        return self.times * lora_rank * self.features if self.adapted else 0

    def adapter(self, lora_rank: int) -> int:
        """The same of both."""
        return self.adapter_a(lora_rank) + self.adapter_b(lora_rank)


def linear_weights(arch: Architecture) -> int:
    """W: weights of one layer that a token is multiplied with, each once."""
    return sum(product.weights for product in _products(arch).values())


def layer_weights(arch: Architecture) -> int:
    """Weights of all of a layer's matrices: of experts that a token does not pass, too."""
    return sum(p.of * p.width * p.features for p in _products(arch).values())


def adapter_weights(arch: Architecture, lora_rank: int, lora_experts: bool = False) -> int:
    """A: weights of one layer's adapters that a token is multiplied with.

    Args:
      lora_experts: experts have adapters.
    """
    return sum(product.adapter(lora_rank) for product in _products(arch, lora_experts).values())


def _products(arch: Architecture, lora_experts: bool = False) -> dict[str, _Product]:
    """Those of one layer."""
    heads, kv = arch.H * arch.E, arch.J * arch.E
    products = {
        "q": _Product(arch.D, heads),
        "k": _Product(arch.D, kv),
        "v": _Product(arch.D, kv),
        "o": _Product(heads, arch.D),
    }
    into, out_of = _Product(arch.D, arch.F), _Product(arch.F, arch.D)
    if arch.routing:
        X = arch.routing.experts
        products["router"] = _Product(arch.D, X, adapted=False)
        into, out_of = (
            part._replace(times=arch.routing.chosen, of=X, adapted=lora_experts)
            for part in (into, out_of)
        )
    return products | {"gate": into, "up": into, "down": out_of}


def attention_pairs(prompt_len_U: np.ndarray, trace_len_UxC: np.ndarray) -> int:
    """(query, key) pairs of one head.

    They are causal in the prompt; a trace sees the whole prompt, and itself causally.
    """
    P, G = np.asarray(prompt_len_U, np.int64), np.asarray(trace_len_UxC, np.int64)
    return int(np.sum(P * (P + 1) // 2) + np.sum(G * P[:, None] + G * (G + 1) // 2))


def train_flops(
    arch: Architecture,
    lora_rank: int,
    remat: str | None,
    prompt_len_U: np.ndarray,
    trace_len_UxC: np.ndarray,
    lora_experts: bool = False,
) -> float:
    """Operations of forward and backward pass over whole groups.

    Args:
      lora_rank: 0 = full fine-tuning.
      remat: policy whose second computations count too, one of `REMAT`; None: nothing twice, the
        count for MFU.
      prompt_len_U, trace_len_UxC: tokens, int: of the groups as they are, or padded ones.
      lora_experts: experts have adapters.

    Raises:
      ValueError: another `remat`.
    """
    if remat is not None and remat not in REMAT:
        raise ValueError(f"remat = {remat!r}: must be None or one of {', '.join(REMAT)}")
    U = len(prompt_len_U)
    responses = int(np.sum(trace_len_UxC, dtype=np.int64))
    tokens = int(np.sum(prompt_len_U, dtype=np.int64)) + responses
    pairs = attention_pairs(prompt_len_U, trace_len_UxC)
    pairs_before_last_token = attention_pairs(np.asarray(prompt_len_U) - 1, np.zeros((U, 0), int))

    linear = {
        name: _linear_flops(product, lora_rank, remat, needed=name != "down" or bool(arch.routing))
        for name, product in _products(arch, lora_experts).items()
    }
    keys_values = linear["k"] + linear["v"]
    rest = sum(linear.values()) - keys_values
    products = {None: 6, "layer": 9}.get(remat, 7)  # of queries or scores with keys or values
    attention = products * 2 * arch.H * arch.E
    head = (4 if lora_rank else 6) * arch.D * arch.V
    if remat is not None and not lora_rank:
        head += 2 * arch.D * arch.V

    layer = tokens * (keys_values + rest) + pairs * attention
    predicting = U + responses  # rows of the last layer
    last_layer = tokens * keys_values + predicting * rest
    last_layer += (pairs - pairs_before_last_token) * attention
    return float((arch.L - 1) * layer + last_layer + responses * head)


def _linear_flops(product: _Product, lora_rank: int, remat: str | None, needed: bool) -> int:
    """Operations of one product and its adapter on one token, forward and backward.

    Args:
      needed: whether the backward pass needs its result.
    """
    W, A = product.weights, product.adapter(lora_rank)
    flops = 4 * (W + A) + 2 * (A if lora_rank else W)
    if remat == "layer":
        flops += 2 * product.adapter_a(lora_rank)
    if remat in ("attention", "layer") and needed:
        flops += 2 * (W + product.adapter_b(lora_rank))
    return flops


def ideal_train_flops(
    arch: Architecture,
    lora_rank: int,
    remat: str | None,
    U: int,
    C: int,
    P: int,
    G: int,
    lora_experts: bool = False,
) -> float:
    """`train_flops` of U equal groups of P prompt tokens and C traces of G tokens."""
    return train_flops(arch, lora_rank, remat, np.full(U, P), np.full((U, C), G), lora_experts)


def prefill_flops(
    arch: Architecture, lora_rank: int, prompt_len_U: np.ndarray, lora_experts: bool = False
) -> float:
    """Operations of the keys and values of prompts: of the last layer nothing else is needed."""
    U, tokens = len(prompt_len_U), int(np.sum(prompt_len_U, dtype=np.int64))
    pairs = attention_pairs(prompt_len_U, np.zeros((U, 0), int))
    before = dataclasses.replace(arch, L=arch.L - 1)
    products = _products(arch)
    last_layer = sum(products[name].weights + products[name].adapter(lora_rank) for name in "kv")
    all_before = _forward_flops(before, lora_rank, lora_experts, tokens, pairs, logits=0)
    return all_before + 2.0 * tokens * last_layer


def decode_flops(
    arch: Architecture, lora_rank: int, keys_N: np.ndarray, lora_experts: bool = False
) -> float:
    """Operations of one more token for N traces.

    Each attends to that many keys, itself included.
    """
    N, pairs = len(keys_N), int(np.sum(keys_N, dtype=np.int64))
    return _forward_flops(arch, lora_rank, lora_experts, N, pairs, logits=N)


def sampling_flops(
    arch: Architecture, lora_rank: int, prefilled: int, drawn: int, lora_experts: bool = False
) -> float:
    """Operations of products with weights, of prompt tokens that are prefilled and tokens drawn.

    Attention itself is left out: how many keys each token saw is not counted while sampling.
    """
    tokens = prefilled + drawn
    return _forward_flops(arch, lora_rank, lora_experts, tokens, pairs=0, logits=drawn)


def _forward_flops(
    arch: Architecture, lora_rank: int, lora_experts: bool, tokens: int, pairs: int, logits: int
) -> float:
    linear = 2 * (linear_weights(arch) + adapter_weights(arch, lora_rank, lora_experts))
    layer = tokens * linear + pairs * 4 * arch.H * arch.E
    return float(arch.L * layer + logits * 2 * arch.D * arch.V)
