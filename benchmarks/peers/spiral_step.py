"""spiral_jax's own train step: fp32, a group's prompt once, one group a micro-batch."""

from __future__ import annotations

import importlib.metadata
import pathlib
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType

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
from spiral_jax.core import mesh as meshes
from spiral_jax.core.config import defaults
from spiral_jax.core.groups import GroupRequests, Groups, Role
from spiral_jax.learner.blocks import make_blocks
from spiral_jax.learner.settings import RoleShapes, learner_settings
from spiral_jax.learner.state import init_state
from spiral_jax.learner.step import make_train_step
from spiral_jax.model import hf
from spiral_jax.model.architecture import read_architecture
from spiral_jax.model.transformer import ModelConfig

REMAT, ATTENTION_BLOCK, LOGPROB_CHUNK = "dots", 256, 32


def split_layers(stacked: dict[str, np.ndarray]) -> dict[str, Any]:
    """The `lora` collection of adapters "layers/q/a" [L, ...] and so on."""
    lora: dict[str, Any] = {"layers": {}, "last_layer": {}}
    for name, array in stacked.items():
        _, projection, part = name.split("/")
        lora["layers"].setdefault(projection, {})[part] = jax.device_put(array[:-1])
        lora["last_layer"].setdefault(projection, {})[part] = jax.device_put(array[-1])
    return lora


def stack_layers(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All layers of each parameter as "layers/..." [L, ...], as the peers name them."""
    stacked = {}
    for name, array in arrays.items():
        room, _, rest = name.partition("/")
        if room == "layers":
            array = np.concatenate([array, arrays[f"last_layer/{rest}"][None]])
        if room != "last_layer":
            stacked[name] = array
    return stacked


class SpiralStep:
    def load(self, model: str, adapters: str | None) -> dict[str, Any]:
        path = pathlib.Path(model)
        rank = LORA_RANK if adapters else 0
        self.config = ModelConfig(
            read_architecture(path),
            lora_rank=rank,
            lora_alpha=LORA_ALPHA,
            attention_block=ATTENTION_BLOCK,
            remat=REMAT,
        )
        c = defaults()
        c.loss.logprob_chunk = LOGPROB_CHUNK
        c.optimizer.update({"lr": LEARNING_RATE, "b1": B1, "b2": B2, "eps": EPS})
        settings = learner_settings(c, {})
        self.mesh = jax.make_mesh((1, 1, 1), meshes.AXES, axis_types=(AxisType.Auto,) * 3)
        base = hf.load_params(path, self.config, self.mesh)
        lora = None
        if adapters:
            with np.load(adapters) as arrays:
                lora = split_layers(dict(arrays))
        self.base, self.state = init_state(settings, self.config, self.mesh, base, lora)
        jax.block_until_ready(self.state)
        self.train_step = make_train_step(settings, self.config)
        return {
            "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax")},
            "settings": f"remat {REMAT}, attention blocks of {ATTENTION_BLOCK}, "
            f"{LOGPROB_CHUNK} positions a head chunk",
            "loaded_bytes": resident_bytes(),
        }

    def _step(self, work: StepWork, micro_groups: int) -> float:
        U, C, G = work.trace_UxCxG.shape
        P = work.prompt_UxP.shape[1]
        requests = GroupRequests(
            work.prompt_UxP, np.full(U, P, np.int32), np.zeros((U, 6), np.int32), C, G
        )
        groups = Groups(
            requests,
            work.trace_UxCxG,
            np.full((U, C), G, np.int32),
            work.recorded_UxCxG,
            np.zeros((U, C), np.int32),
        )
        shapes = RoleShapes(((P, G),), micro_groups, most_groups=U, traces=C)
        blocks = make_blocks({Role.SEARCH: (groups, work.weight_UxC)}, {Role.SEARCH: shapes})
        with jax.set_mesh(self.mesh):
            self.state, metrics = self.train_step(self.state, self.base, blocks)
        jax.block_until_ready(self.state)
        return metrics["loss/search"].total

    def gradient(self, work: str, out: str) -> float:
        """Of a first step, from Adam's first moment."""
        loss = self._step(StepWork.load(work), 1)
        moment = optax.tree_utils.tree_get(self.state.opt, "mu")
        leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(moment))
        gradient = {meshes.path_name(path): leaf / (1 - B1) for path, leaf in leaves}
        np.savez(out, **stack_layers(gradient))
        return float(loss)

    def step(self, work: str, micro_batch: float) -> dict[str, Any]:
        """`micro_batch`: groups."""
        loaded = StepWork.load(work)
        return measured(lambda: self._step(loaded, int(micro_batch)))


if __name__ == "__main__":
    serve(SpiralStep())
