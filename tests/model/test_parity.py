"""The model against transformers on random peaked checkpoints of both families, in many shards."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
from small_model import (
    ARCH,
    C,
    G,
    U,
    forward,
    logprobs,
    on_mesh,
    random_ids,
    rows_of,
)

from spiral_jax.model import hf
from spiral_jax.model.architecture import read_architecture
from spiral_jax.model.families import FAMILIES
from spiral_jax.model.transformer import ModelConfig

PARITY = 1e-4  # float32 against float32 in another order of sums, logits up to about 3
MUTATED = 10 * PARITY  # a wrong constant must stand out from that


def load(directory, mesh, **options):
    config = ModelConfig(read_architecture(directory), **options)
    return config, hf.load_params(directory, config, mesh)


@functools.cache
def their_logits(model):
    """(u, c) -> logits [1 + G, V] from the prompt's last token on.

    Each row, a prompt and a trace, runs alone and unpadded.
    """
    import torch

    ids, logits = random_ids(), {}
    for u, c in np.ndindex(U, C):
        row = np.concatenate([ids.prompt[u, : ids.prompt_len[u]], ids.trace[u, c]])
        with torch.no_grad():
            out = model(torch.tensor(row, dtype=torch.long)[None])
        logits[u, c] = out.logits[0, -1 - G :].numpy()
    return logits


def gap_to_transformers(model, mesh, config, params):
    """Largest difference of logits that predict a trace's token, and of those behind its last."""
    ids = random_ids()
    logits = np.asarray(on_mesh(forward, mesh, config, {"params": params}, ids)[1])
    return max(
        np.abs(theirs - rows_of(logits, ids, *at)).max()
        for at, theirs in their_logits(model).items()
    )


def logprob_gap_to_transformers(model, mesh, config, params):
    """Largest difference of the log-probs of trace tokens."""
    ids = random_ids()
    found = np.asarray(on_mesh(logprobs, mesh, config, {"params": params}, ids))
    gaps = []
    for (u, c), theirs in their_logits(model).items():
        log_softmax = theirs - np.log(np.exp(theirs.astype(np.float64)).sum(-1, keepdims=True))
        expected = log_softmax[np.arange(G), ids.trace[u, c]]
        gaps.append(np.abs(expected - found[u, c]).max())
    return max(gaps)


@pytest.fixture(params=["qwen3", "llama"])
def make_checkpoint(request, qwen3_checkpoint, llama_checkpoint):
    """One of conftest's makers."""
    return {"qwen3": qwen3_checkpoint, "llama": llama_checkpoint}[request.param]


@pytest.mark.devices8
@pytest.mark.parametrize("kv_heads, tied, block", [(6, True, 512), (3, False, 4), (2, True, 2)])
def test_logits_and_logprobs_are_those_of_transformers(
    make_checkpoint, mesh, kv_heads, tied, block
):
    directory, model = make_checkpoint(
        shard="40KB", num_key_value_heads=kv_heads, tie_word_embeddings=tied
    )
    assert len(list(directory.glob("model-*.safetensors"))) > 5
    config, params = load(directory, mesh, attention_block=block)
    family = FAMILIES[model.config.model_type]
    assert config.arch == dataclasses.replace(ARCH, J=kv_heads, tied=tied, family=family)
    assert config.arch.E != config.arch.D / config.arch.H
    assert gap_to_transformers(model, mesh, config, params) <= PARITY
    assert logprob_gap_to_transformers(model, mesh, config, params) <= PARITY


def of_layers(change):
    """A change of the parameters of all layers: the stacked ones [L - 1, ...] and the last."""

    def change_both(params):
        return params | {room: change(params[room]) for room in ("layers", "last_layer")}

    return change_both


def of_leaf(name, change):
    return of_layers(lambda layer: layer | {name: change(layer[name])})


@of_layers
def interleaved_heads(layer):
    """Key/value heads in an order that gives query head h another one than h // (H / J)."""

    def turn(projection):
        kernel = projection["kernel"]
        by_head = kernel.reshape(*kernel.shape[:-1], 3, 16)
        return {"kernel": by_head[..., np.array([1, 2, 0]), :].reshape(kernel.shape)}

    return layer | {name: turn(layer[name]) for name in ("k", "v")}


@of_layers
def eight_wide_heads(layer):
    """Norm scales for heads of half the width: twice as many of them fit the same kernels."""
    return layer | {name: layer[name][..., :8] for name in ("q_norm", "k_norm")}


@of_layers
def norms_of_ones(layer):
    """What a norm of queries and keys has before training."""
    ones = jnp.ones((*layer["mlp_norm"].shape[:-1], 16))
    return layer | {"q_norm": ones, "k_norm": ones}


def final_norm_of_ones(params):
    return params | {"final_norm": jnp.ones_like(params["final_norm"])}


# name -> (other fields of the architecture, change of the parameters); the first apply to both
# families.
MUTATIONS = {
    "norm_eps": ({"norm_eps": 1e-6}, None),
    "rope_theta": ({"rope_theta": 1e4}, None),
    "tied": ({"tied": True}, None),
    "which heads share a key": ({}, interleaved_heads),
    "no attention_norm": ({}, of_leaf("attention_norm", jnp.ones_like)),
    "no mlp_norm": ({}, of_leaf("mlp_norm", jnp.ones_like)),
    "no final_norm": ({}, final_norm_of_ones),
}
QWEN3_MUTATIONS = MUTATIONS | {
    "H, J and E with the same products": ({"H": 12, "J": 6, "E": 8}, eight_wide_heads),
    "no q_norm": ({}, of_leaf("q_norm", jnp.ones_like)),
    "no k_norm": ({}, of_leaf("k_norm", jnp.ones_like)),
    "qk_norm": ({"family": FAMILIES["llama"]}, None),  # Linen ignores the norms' parameters then
}
LLAMA_MUTATIONS = MUTATIONS | {
    "H, J and E with the same products": ({"H": 12, "J": 6, "E": 8}, None),
    "qk_norm": ({"family": FAMILIES["qwen3"]}, norms_of_ones),
}


def assert_parity_fails(maker, mesh, mutation):
    directory, model = maker(num_key_value_heads=3, tie_word_embeddings=False)
    config, params = load(directory, mesh, attention_block=4)
    fields, change = mutation
    mutated = dataclasses.replace(config, arch=dataclasses.replace(config.arch, **fields))
    changed = change(params) if change else params
    assert gap_to_transformers(model, mesh, mutated, changed) > MUTATED


@pytest.mark.parametrize("mutation", QWEN3_MUTATIONS)
def test_parity_of_qwen3_would_fail_with_one_field_changed(qwen3_checkpoint, mesh, mutation):
    assert_parity_fails(qwen3_checkpoint, mesh, QWEN3_MUTATIONS[mutation])


@pytest.mark.parametrize("mutation", LLAMA_MUTATIONS)
def test_parity_of_llama_would_fail_with_one_field_changed(llama_checkpoint, mesh, mutation):
    assert_parity_fails(llama_checkpoint, mesh, LLAMA_MUTATIONS[mutation])
