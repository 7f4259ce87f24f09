"""A plain policy-gradient step on transformers and torch: fp32, the prompt repeated for each trace.

Without padding sdpa needs no mask, so it takes torch's causal kernel. Adam is torch's fused one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.peers.contestant import serve
from benchmarks.peers.step_work import (
    B1,
    B2,
    EPS,
    LEARNING_RATE,
    LORA_ALPHA,
    LORA_RANK,
    StepWork,
    measured,
    resident_bytes,
)

PROJECTIONS = {
    **{f"{name}_proj": ("self_attn", name) for name in "qkvo"},
    **{f"{name}_proj": ("mlp", name) for name in ("gate", "up", "down")},
}


class LoraLinear(torch.nn.Module):
    """x W + (alpha / rank) x A B with W frozen."""

    def __init__(self, base: torch.nn.Linear, a: np.ndarray, b: np.ndarray) -> None:
        super().__init__()
        self.base = base
        self.a, self.b = (torch.nn.Parameter(torch.from_numpy(array)) for array in (a, b))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + (LORA_ALPHA / LORA_RANK) * ((x @ self.a) @ self.b)


class TransformersStep:
    response_logits = True

    def load(self, model: str, adapters: str | None) -> dict[str, Any]:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="sdpa"
        ).train()
        if adapters:
            self.model.requires_grad_(False)
            with np.load(adapters) as arrays:
                self._add_adapters(dict(arrays))
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.trained, lr=0.0, betas=(B1, B2), eps=EPS, fused=True)
        for p in self.trained:
            p.grad = torch.zeros_like(p)
        self.optimizer.step()  # moments exist before anything is measured
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.param_groups[0]["lr"] = LEARNING_RATE
        kept = "of the response alone" if self.response_logits else "of all positions"
        return {
            "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
            "settings": f"sdpa, fused Adam, {torch.get_num_threads()} threads, logits {kept}",
            "loaded_bytes": resident_bytes(),
        }

    def _add_adapters(self, arrays: dict[str, np.ndarray]) -> None:
        for i, layer in enumerate(self.model.model.layers):
            for module, (room, name) in PROJECTIONS.items():
                parent = getattr(layer, room)
                a, b = (np.ascontiguousarray(arrays[f"layers/{name}/{part}"][i]) for part in "ab")
                setattr(parent, module, LoraLinear(getattr(parent, module), a, b))

    def _backward(self, work: StepWork, rows: int) -> float:
        """Adds the gradients of micro-batches of `rows` traces; the loss."""
        prompt, trace, recorded, weight = (
            torch.from_numpy(np.ascontiguousarray(a)) for a in work.rows()
        )
        G, total = trace.shape[1], 0.0
        for start in range(0, len(prompt), rows):
            part = slice(start, start + rows)
            ids = torch.cat([prompt[part], trace[part]], dim=1).long()
            kept = {"logits_to_keep": G + 1} if self.response_logits else {}
            logits = self.model(input_ids=ids, use_cache=False, **kept).logits[:, -G - 1 : -1]
            logprob = torch.log_softmax(logits, dim=-1).gather(-1, ids[:, -G:, None])[..., 0]
            loss = -(weight[part, None] * torch.exp(logprob - recorded[part])).sum()
            loss.backward()
            total += loss.item()
        return total

    def gradient(self, work: str, out: str) -> float:
        loss = self._backward(StepWork.load(work), 1)
        np.savez(out, **self._gradients())
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def _gradients(self) -> dict[str, np.ndarray]:
        """Under this project's names, layers stacked, kernels [in, out]."""
        layers, found = self.model.model.layers, {}
        for module, (room, name) in PROJECTIONS.items():
            of_layers = [getattr(getattr(layer, room), module) for layer in layers]
            if isinstance(of_layers[0], LoraLinear):
                for part in "ab":
                    found[f"layers/{name}/{part}"] = np.stack(
                        [getattr(m, part).grad.numpy() for m in of_layers]
                    )
            else:
                found[f"layers/{name}/kernel"] = np.stack(
                    [m.weight.grad.numpy().T for m in of_layers]
                )
        if self.model.model.embed_tokens.weight.grad is not None:
            found["embed"] = self.model.model.embed_tokens.weight.grad.numpy()
        return found

    def step(self, work: str, micro_batch: float) -> dict[str, Any]:
        """`micro_batch`: groups; one half is half the traces of a group."""
        loaded = StepWork.load(work)
        rows = int(micro_batch * loaded.trace_UxCxG.shape[1])

        def run() -> float:
            loss = self._backward(loaded, rows)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            return loss

        return measured(run)


if __name__ == "__main__":
    serve(TransformersStep())
