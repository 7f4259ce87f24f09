"""tunix's vanilla sampler on its own Qwen3: fp32, prompts repeated, caches of exact length.

Its forward pass always rotates with theta 1e6 whatever its config says, so the benchmark's model
uses that.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import jax
import numpy as np
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.qwen3.params import create_model_from_safe_tensors

from benchmarks.peers.contestant import Work, serve
from benchmarks.peers.tunix_model import read_config

# never in a prompt and never sampled: no row ends early, nothing is taken for padding
NO_TOKEN = -1


class Ids:
    """The tokenizer that the sampler insists on; its texts are ids with spaces between them."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return ""

    def bos_id(self) -> int:
        return 0  # the sampler adds none that is 0

    def eos_id(self) -> int:
        return NO_TOKEN

    def pad_id(self) -> int:
        return NO_TOKEN


class TunixSampler:
    def load(self, model: str) -> dict[str, Any]:
        self.config = read_config(model)
        self.model = create_model_from_safe_tensors(model, self.config)
        self.samplers: dict[int, Sampler] = {}
        return {
            "versions": {
                name: importlib.metadata.version(name) for name in ("google-tunix", "jax", "flax")
            },
            "settings": "vanilla sampler, top_p 1 without top-k (no sort), cache = prompt + "
            "longest trace of the batch",
        }

    def _sampler(self, cache_tokens: int) -> Sampler:
        """One for each cache length: every step attends over all of it, so a longer is slower."""
        if cache_tokens not in self.samplers:
            config = self.config
            cache = CacheConfig(
                cache_tokens, config.num_layers, config.num_kv_heads, config.head_dim
            )
            self.samplers[cache_tokens] = Sampler(self.model, Ids(), cache)
        return self.samplers[cache_tokens]

    def _generate(self, prompt_RxP: np.ndarray, tokens: int, **options: Any) -> list[np.ndarray]:
        P = prompt_RxP.shape[1]
        out = self._sampler(P + tokens)(
            [" ".join(map(str, row)) for row in prompt_RxP],
            max_generation_steps=tokens,
            max_prompt_length=P,
            eos_tokens=[NO_TOKEN],
            **options,
        )
        if any(len(row) != tokens for row in out.tokens):
            raise RuntimeError(
                f"traces of {[len(row) for row in out.tokens]} tokens instead of {tokens}"
            )
        return out.tokens

    def greedy(self, prompt: list[int], tokens: int) -> list[int]:
        return np.asarray(self._generate(np.array([prompt]), tokens)[0]).tolist()

    def sample(self, work: dict[str, Any], groups_per_batch: int, seed: int) -> int:
        computed = 0
        for index, batch in enumerate(Work.from_json(work).batches(groups_per_batch)):
            rows = np.repeat(batch.prompt_UxP, batch.limit_UxC.shape[1], axis=0)
            key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), index)
            self._generate(rows, batch.longest, temperature=1.0, top_p=1.0, seed=key)
            # its loop takes one step more than asked for and drops it
            computed += len(rows) * (batch.longest + 1)
        return computed


if __name__ == "__main__":
    serve(TunixSampler())
