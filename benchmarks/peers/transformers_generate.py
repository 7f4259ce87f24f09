"""transformers `generate` on torch's CPU backend: fp32, a batch's prompts repeated for each trace.

The settings are the cheapest found, in CPU seconds on two cores: eager attention took 1.7 times as
many at 1,024-token prompts, a dynamic cache as many within a few percent, and torch.compile of the
static cache's decode step saved none and costs a compilation for every new shape.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from benchmarks.peers.contestant import Work, serve


class RowLimits(StoppingCriteria):
    """Ends each row at its own length."""

    def __init__(self, prompt_tokens: int, limit_R: torch.Tensor) -> None:
        self.length_R = prompt_tokens + limit_R

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        return input_ids.shape[1] >= self.length_R


class TransformersGenerate:
    def load(self, model: str) -> dict[str, Any]:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        return {
            "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
            "settings": f"sdpa, static cache, {torch.get_num_threads()} threads, "
            "num_return_sequences = C",
        }

    @torch.inference_mode()
    def greedy(self, prompt: list[int], tokens: int) -> list[int]:
        ids = torch.tensor([prompt])
        chosen = GenerationConfig(
            do_sample=False, max_new_tokens=tokens, eos_token_id=None, pad_token_id=0
        )
        return self.model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=chosen
        )[0, len(prompt) :].tolist()

    @torch.inference_mode()
    def sample(self, work: dict[str, Any], groups_per_batch: int, seed: int) -> int:
        torch.manual_seed(seed)
        return sum(
            self._sample_batch(batch) for batch in Work.from_json(work).batches(groups_per_batch)
        )

    def _sample_batch(self, batch: Work) -> int:
        ids = torch.from_numpy(batch.prompt_UxP).long()
        limit_R = torch.from_numpy(batch.limit_UxC).reshape(-1)
        chosen = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=batch.longest,
            num_return_sequences=batch.limit_UxC.shape[1],
            cache_implementation="static",
            eos_token_id=None,
            pad_token_id=0,
        )
        limits = StoppingCriteriaList([RowLimits(ids.shape[1], limit_R)])
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=chosen,
            stopping_criteria=limits,
        )
        steps = out.shape[1] - ids.shape[1]
        if steps != batch.longest or len(out) != len(limit_R):
            raise RuntimeError(
                f"{len(out)} rows of {steps} tokens instead of {len(limit_R)} of {batch.longest}"
            )
        return len(out) * steps


if __name__ == "__main__":
    serve(TransformersGenerate())
