"""transformers and torch on one accelerator: random weights of the same sizes, bfloat16, sdpa.

A prompt is computed once for each of its traces. Where rows do not fit, half of them are tried, and
so on: the result says how many were computed at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from benchmarks.peers.contestant import serve
from benchmarks.peers.step_work import B1, B2, EPS, LEARNING_RATE, LORA_RANK
from benchmarks.peers.transformers_step import PROJECTIONS, LoraLinear

HEAD_CHUNK = 256  # positions whose logits exist at once


class TransformersDevice:
    def load(self, arch: dict[str, Any], small: bool) -> dict[str, Any]:
        """Random weights of the architecture.

        Returns {"skip": why it cannot run here}, or what was loaded.
        """
        if not torch.cuda.is_available() and not small:
            return {"skip": f"transformers: torch {torch.__version__} has no CUDA device here"}
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=arch["V"],
            hidden_size=arch["D"],
            intermediate_size=arch["F"],
            num_hidden_layers=arch["L"],
            num_attention_heads=arch["H"],
            num_key_value_heads=arch["J"],
            head_dim=arch["E"],
            rms_norm_eps=arch["norm_eps"],
            rope_parameters={"rope_type": "default", "rope_theta": arch["rope_theta"]},
            tie_word_embeddings=arch["tied"],
            max_position_embeddings=40960,
            attn_implementation="sdpa",
            dtype=torch.bfloat16,
        )
        torch.set_default_dtype(torch.bfloat16)
        with self.device:
            self.model = Qwen3ForCausalLM(config).eval().requires_grad_(False)
        torch.set_default_dtype(torch.float32)
        self.adapted: list[tuple[torch.nn.Module, str, LoraLinear]] = []
        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        return {"device": str(self.device), "versions": versions}

    def prefill(self, rows: int, P: int) -> dict[str, Any]:
        """Forward pass of all prompts with a cache; logits of the last position alone."""

        @torch.inference_mode()
        def measure(at_once: int) -> dict[str, Any]:
            ids = self._ids(at_once, P)
            seconds = self._second_time(
                lambda: self.model(input_ids=ids, logits_to_keep=1, use_cache=True)
            )
            return {"seconds": seconds * rows / at_once, "tokens_per_s": at_once * P / seconds}

        return self._as_many_as_fit(rows, measure)

    def decode(self, rows: int, P: int, tokens: int) -> dict[str, Any]:
        """One token of every row, from generations of two lengths; transformers' dynamic cache."""

        @torch.inference_mode()
        def measure(at_once: int) -> dict[str, Any]:
            ids = self._ids(at_once, P)
            few = max(1, tokens // 4)
            self._generate(ids, few)
            start = self._timed(lambda: self._generate(ids, few))
            end = self._timed(lambda: self._generate(ids, tokens))
            seconds = (end - start) / (tokens - few)
            return {"seconds": seconds * rows / at_once, "tokens_per_s": at_once / seconds}

        return self._as_many_as_fit(rows, measure)

    def train(self, rows: int, C: int, P: int, G: int) -> dict[str, Any]:
        """A group's step, Adam's update included.

        Adapters in float32, gradient checkpointing, logits of the response alone.
        """
        if not self.adapted:
            self._make_adapters()
        for parent, name, adapted in self.adapted:
            setattr(parent, name, adapted)

        def measure(at_once: int) -> dict[str, Any]:
            seconds = self._second_time(lambda: self._step(at_once, C, P, G))
            return {"seconds": seconds, "tokens_per_s": (P + C * G) / seconds}

        try:
            return self._as_many_as_fit(rows, measure)
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            self.model.eval()
            for parent, name, adapted in self.adapted:  # prefill and decoding are without them
                setattr(parent, name, adapted.base)

    def _as_many_as_fit(
        self, rows: int, measure: Callable[[int], dict[str, Any]]
    ) -> dict[str, Any]:
        while True:
            try:
                return measure(rows) | {"rows_at_once": rows, "peak_gb": self._peak_gb()}
            except torch.OutOfMemoryError:
                if rows == 1:
                    raise
            torch.cuda.empty_cache()
            rows //= 2

    def _ids(self, rows: int, tokens: int) -> torch.Tensor:
        V = self.model.config.vocab_size
        return torch.randint(1, V, (rows, tokens), device=self.device)

    def _generate(self, ids: torch.Tensor, tokens: int) -> None:
        chosen = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=chosen
        )
        if out.shape[1] != ids.shape[1] + tokens:
            raise RuntimeError(f"{out.shape[1] - ids.shape[1]} tokens instead of {tokens}")

    def _make_adapters(self) -> None:
        rng = np.random.default_rng(0)
        for layer in self.model.model.layers:
            for module, (room, _) in PROJECTIONS.items():
                parent = getattr(layer, room)
                base = getattr(parent, module)
                a = rng.normal(0, 0.02, (base.in_features, LORA_RANK)).astype(np.float32)
                b = np.zeros((LORA_RANK, base.out_features), np.float32)
                self.adapted.append((parent, module, LoraLinear(base, a, b).to(self.device)))
        trained = [p for _, _, adapted in self.adapted for p in (adapted.a, adapted.b)]
        self.optimizer = torch.optim.Adam(
            trained, lr=LEARNING_RATE, betas=(B1, B2), eps=EPS, fused=True
        )
        self.model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )

    def _step(self, rows: int, C: int, P: int, G: int) -> None:
        """Adds the gradients of micro-batches of `rows` traces, and updates the adapters."""
        self.model.train()
        head = self.model.lm_head.weight

        def chosen_logprob(hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            logits = (hidden @ head.T).float()
            return torch.log_softmax(logits, dim=-1).gather(-1, ids[..., None]).sum()

        for _ in range(C // rows):
            ids = self._ids(rows, P + G)
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
                hidden = hidden[:, P - 1 : -1]
                loss = torch.zeros((), device=self.device)
                for start in range(0, G, HEAD_CHUNK):
                    part = hidden[:, start : start + HEAD_CHUNK]
                    answer = ids[:, P + start : P + start + HEAD_CHUNK]
                    loss = loss - checkpoint(chosen_logprob, part, answer, use_reentrant=False)
            (loss * 1e-4).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _second_time(self, work: Callable[[], Any]) -> float:
        """Seconds, after a first call that chooses kernels and takes memory."""
        self._timed(work)
        return self._timed(work)

    def _timed(self, work: Callable[[], Any]) -> float:
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _peak_gb(self) -> float | None:
        if self.device.type != "cuda":
            return None
        peak = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
        return peak


if __name__ == "__main__":
    serve(TransformersDevice())
