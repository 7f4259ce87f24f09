"""A small byte-level tokenizer with a ChatML template, and scaffolds made with it."""

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from spiral_jax.core import config
from spiral_jax.prompts.scaffold import Scaffold, make_scaffold
from spiral_jax.prompts.settings import PromptSettings

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "What is 3 + 4? Reason step by step, and put your final answer within \\boxed{7}.",
    "Below are 4 independent attempts at this problem. Any number of them may be wrong.",
    "Attempt 1:\nFirst audit every attempt: name its errors. Then verify which parts can be used."
    "\n\n",
]


def chatml_tokenizer(think_tokens: bool = False, template: str = CHATML) -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges of its own, pad == eos, and a special token without attribute."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<|unnamed|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator(CORPUS * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=template
    )
    if think_tokens:
        tokenizer.add_tokens(["<think>", "</think>"])  # not special, as in Qwen3
    return tokenizer


def scaffold_of(tokenizer, more_stop_ids=(), **fields) -> Scaffold:
    """The scaffold of the default prompts but for `fields` of config.prompt."""
    prompt = config.defaults().prompt
    for name, value in fields.items():
        prompt[name] = value
    stop_ids = (tokenizer.eos_token_id, *more_stop_ids)
    return make_scaffold(tokenizer, PromptSettings.from_config(prompt), stop_ids)


def encode(tokenizer, text: str) -> np.ndarray:
    return np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)


def decode(tokenizer, ids) -> str:
    return tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=False)
