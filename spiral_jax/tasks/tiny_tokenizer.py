"""Tokenizers of the bundled models: SentencePiece BPE over a task's own texts."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Iterable

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

UNKNOWN, END = "<unk>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, out: pathlib.Path
) -> PreTrainedTokenizerFast:
    """Trains on `texts` and writes a Hugging Face directory, tokenizer.model of SentencePiece too.

    Digits are never merged, whitespace may be (so `; left is ` is one piece), and bytes are the
    fallback: any text can be encoded, while most id sequences do not survive decoding and encoding
    again. The pad token is the end token, as in many real models: a mask that looks at ids would be
    wrong here.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_by_whitespace=False,
        split_by_unicode_script=False,
        split_digits=True,
        byte_fallback=True,
        character_coverage=1.0,
        bos_id=-1,
        unk_id=0,
        eos_id=1,
        eos_piece=END,
        pad_id=-1,
        control_symbols=list(ROLES),
        num_threads=1,
        minloglevel=2,
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.model").write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    fast = PreTrainedTokenizerFast(
        tokenizer_object=_as_fast(processor),
        unk_token=UNKNOWN,
        eos_token=END,
        pad_token=END,
        extra_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(out)
    return fast


def _as_fast(processor: sentencepiece.SentencePieceProcessor) -> tokenizers.Tokenizer:
    """The same BPE in the `tokenizers` library: a piece of lower id was merged earlier."""
    vocab = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    merges = []
    for piece, i in vocab.items():
        if processor.is_control(i) or processor.is_byte(i) or processor.is_unknown(i):
            continue
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        splits = [(a, b) for a, b in splits if a in vocab and b in vocab]
        merges += sorted(splits, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([UNKNOWN, END, *ROLES])
    return tokenizer
