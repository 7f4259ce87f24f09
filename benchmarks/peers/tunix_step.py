"""tunix's GRPO step: its Trainer's own train step on its own Qwen3 with `grpo_loss_fn`.

fp32, the prompt repeated for each trace.
`grpo_loss_fn` averages over tokens, so advantages are our weights times the micro-batch's tokens;
KL is off, and the clip range is too wide to clip. Adapters are qwix's, as in tunix's own command.
Gradients come from Adam's first moment.
"""

from __future__ import annotations

import importlib.metadata
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from flax import nnx
from tunix.models.qwen3.params import create_model_from_safe_tensors
from tunix.rl.algo_core import grpo_loss_fn
from tunix.rl.common import TrainExample
from tunix.rl.trainer import Trainer
from tunix.sft.peft_trainer import TrainingConfig

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
from benchmarks.peers.tunix_model import read_config

NO_TOKEN = -1  # never in a prompt: nothing is taken for padding
NO_CLIP = 1e9
# beta 0: no KL
ALGORITHM = types.SimpleNamespace(
    beta=0.0,
    epsilon=NO_CLIP,
    epsilon_high=NO_CLIP,
    loss_algo="grpo",
    loss_agg_mode="token-mean",
    temperature=1.0,
)
PROJECTION = ".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


class TunixStep:
    def load(self, model: str, adapters: str | None) -> dict[str, Any]:
        self.model = create_model_from_safe_tensors(model, read_config(model))
        if adapters:
            provider = qwix.LoraProvider(module_path=PROJECTION, rank=LORA_RANK, alpha=LORA_ALPHA)
            example = self.model.get_model_input()
            self.model = qwix.apply_lora_to_model(self.model, provider, rngs=nnx.Rngs(0), **example)
            with np.load(adapters) as arrays:
                self._set_adapters(dict(arrays))
        self.trainer: Trainer | None = None
        self._prepare(1)
        return {
            "versions": {
                name: importlib.metadata.version(name)
                for name in ("google-tunix", "qwix", "jax", "flax")
            },
            "settings": "Trainer's train step, grpo_loss_fn, no remat (its default), gradients "
            "accumulated by optax",
            "loaded_bytes": resident_bytes(),
        }

    def _set_adapters(self, arrays: dict[str, np.ndarray]) -> None:
        for path, leaf in nnx.iter_graph(self.model):
            if isinstance(leaf, nnx.LoRAParam):
                _, layer, _, projection, name = path
                array = arrays[f"layers/{projection.removesuffix('_proj')}/{name[-1]}"][layer]
                leaf.value = jnp.asarray(array.reshape(leaf.shape))

    def _prepare(self, micro_batches: int) -> None:
        """The trainer that accumulates over so many calls; a new one begins with fresh moments."""
        if self.trainer is not None and self.micro_batches == micro_batches:
            return
        self.trainer, self.micro_batches = None, micro_batches
        config = TrainingConfig(eval_every_n_steps=10**9, gradient_accumulation_steps=micro_batches)
        optimizer = optax.adam(LEARNING_RATE, B1, B2, EPS)
        self.trainer = Trainer(self.model, optimizer, config, lambda: {})

        def loss(model: nnx.Module, example: TrainExample) -> Any:
            return grpo_loss_fn(model, example, ALGORITHM, NO_TOKEN, NO_TOKEN)

        self.trainer = self.trainer.with_loss_fn(loss, has_aux=True)
        self.trainer = self.trainer.with_gen_model_input_fn(lambda example: {"example": example})
        self.train_step, _ = self.trainer.jit_train_and_eval_step()

    def _step(self, work: StepWork, micro_batches: int) -> float:
        self._prepare(micro_batches)
        prompt, trace, recorded, weight = work.rows()
        rows, total = len(prompt) // micro_batches, 0.0
        for start in range(0, len(prompt), rows):
            part = slice(start, start + rows)
            # optax takes the mean over micro-batches, grpo_loss_fn that over their tokens
            scale = trace[part].size * micro_batches
            example = TrainExample(
                prompt_ids=jnp.asarray(prompt[part]),
                prompt_mask=jnp.ones_like(prompt[part]),
                completion_ids=jnp.asarray(trace[part]),
                completion_mask=jnp.ones_like(trace[part]),
                advantages=jnp.asarray(weight[part] * scale),
                ref_per_token_logps=None,
                old_per_token_logps=jnp.asarray(recorded[part]),
            )
            loss, _, norm = self.train_step(example)
            total += float(loss) / micro_batches
        jax.block_until_ready((nnx.state(self.model), norm))
        return total

    def gradient(self, work: str, out: str) -> float:
        loss = self._step(StepWork.load(work), 1)
        optimizer = nnx.to_pure_dict(nnx.state(self.trainer.optimizer))
        moments = optax.tree_utils.tree_get(optimizer, "mu")
        by_name: dict[str, dict[int, np.ndarray]] = {}  # name of the stack -> layer -> moment
        for path, moment in jax.tree_util.tree_leaves_with_path(moments):
            names = [str(getattr(entry, "key", getattr(entry, "name", None))) for entry in path]
            if "input_embedding" in names:
                by_name["embed"] = {0: np.asarray(moment)}
            projection = next((name for name in names if name.endswith("_proj")), None)
            if projection:
                kind = next(name for name in names if name.startswith(("w", "kernel")))
                part = kind[-1] if "lora" in kind else "kernel"
                layer = next(int(name) for name in names if name.isdigit())
                stack = f"layers/{projection.removesuffix('_proj')}/{part}"
                by_name.setdefault(stack, {})[layer] = np.asarray(moment)

        arrays = {}
        for name, layers in by_name.items():
            moment = layers[0]
            if len(layers) > 1:
                moment = np.stack([layers[layer] for layer in sorted(layers)])
            arrays[name] = moment / (1 - B1)
        np.savez(out, **arrays)
        return loss

    def step(self, work: str, micro_batch: float) -> dict[str, Any]:
        """`micro_batch`: groups."""
        loaded = StepWork.load(work)
        micro_batches = int(len(loaded.prompt_UxP) / micro_batch)
        return measured(lambda: self._step(loaded, micro_batches))


if __name__ == "__main__":
    serve(TunixStep())
