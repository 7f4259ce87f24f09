"""A real model of the Llama family against transformers: SmolLM2-135M-Instruct.

launch/fetch_smollm2.sh makes it.
"""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from small_model import Ids, forward, on_mesh, rows_of

from configs import smollm2_135m
from spiral_jax.core.groups import pad_rows
from spiral_jax.model import hf
from spiral_jax.model.architecture import read_architecture
from spiral_jax.model.transformer import ModelConfig
from spiral_jax.prompts import prompts
from spiral_jax.prompts.scaffold import make_scaffold
from spiral_jax.prompts.settings import PromptSettings
from spiral_jax.prompts.tokenizer import load_tokenizer, stop_ids

DIRECTORY = pathlib.Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not DIRECTORY.is_dir(), reason=f"no {DIRECTORY}: bash launch/fetch_smollm2.sh makes it"
    ),
]

# Of the largest logit, about 38: thirty layers of float32 sums in another order move a logit by
# 3e-6 of that.
RELATIVE = 1e-5
TIE = 1e-4  # two best logits nearer than this may change places
G = 24
QUESTIONS = (
    "A baker fills 7 trays with 12 rolls each and sells 59 rolls. How many rolls are left?",
    "Nora reads 18 pages on each of 5 days. The book has 131 pages. How many pages are still "
    "unread?",
)


@pytest.fixture(scope="module")
def greedy():
    """(tokenizer, prompts' ids, greedy tokens [2, G], transformers' logits [n + G, V] a row)."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(DIRECTORY)
    c = smollm2_135m.get_config()
    settings = PromptSettings.from_config(c.prompt)
    scaffold = make_scaffold(tokenizer, settings, stop_ids(tokenizer, DIRECTORY))
    rows = [prompts.search_prompt(scaffold, question) for question in QUESTIONS]
    tokens, logits = [], []
    with torch.no_grad():
        for row in rows:
            prompt = torch.tensor(row, dtype=torch.long)[None]
            out = model.generate(prompt, do_sample=False, min_new_tokens=G, max_new_tokens=G)
            tokens.append(out[0, len(row) :].numpy())
            logits.append(model(out).logits[0, len(row) - 1 :].numpy())
    return tokenizer, rows, np.array(tokens, np.int32), logits


@pytest.fixture(scope="module")
def our_logits(greedy, mesh):
    """Logits of the same rows, as two groups of one trace each."""
    _, rows, tokens, _ = greedy
    config = ModelConfig(read_architecture(DIRECTORY), jnp.float32, jnp.float32, attention_block=64)
    params = hf.load_params(DIRECTORY, config, mesh)
    prompt, prompt_len = pad_rows(rows)
    ids = Ids(prompt, prompt_len, tokens[:, None, :])
    logits = np.asarray(on_mesh(forward, mesh, config, {"params": params}, ids)[1])
    return [rows_of(logits, ids, u, 0) for u in range(len(rows))]


def test_logits_are_those_of_transformers(greedy, our_logits):
    for ours, theirs in zip(our_logits, greedy[3], strict=True):
        assert np.abs(ours - theirs).max() <= RELATIVE * np.abs(theirs).max()


def test_greedy_tokens_are_those_of_transformers(greedy, our_logits):
    for tokens, ours in zip(greedy[2], our_logits, strict=True):
        best, chosen = ours[:G].max(axis=-1), ours[np.arange(G), tokens]
        assert (best - chosen <= TIE).all()


def test_the_pad_token_is_the_stop_token_and_prompts_open_with_the_templates_system_turn(greedy):
    tokenizer, rows, _, _ = greedy
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    assert stop_ids(tokenizer, DIRECTORY) == (2,)
    text = tokenizer.decode(rows[0])
    assert text.startswith("<|im_start|>system\n") and text.endswith(
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (rows[0] == 2).sum() == 2  # the stop id is inside the prompt: no mask may come from it
