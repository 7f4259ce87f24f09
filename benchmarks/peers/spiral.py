"""spiral_jax's own sampler: fp32, prompt keys and values once a group. It also records log-probs, as training needs."""

from __future__ import annotations

import importlib.metadata
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from spiral_jax.sampling.static import StaticSampler

from benchmarks.peers.contestant import Work, serve
from spiral_jax import mesh as meshes
from spiral_jax.groups import GroupRequests, Groups, Purpose, Role
from spiral_jax.model import hf
from spiral_jax.model.architecture import read_architecture
from spiral_jax.model.qwen3 import ModelConfig
from spiral_jax.sampling import static

NEARLY_GREEDY = 1e-5  # a temperature at which the best candidate has all the mass


def make_sampler(config: ModelConfig, mesh: Mesh, prompt_tokens: int, groups: int, temperature: float) -> StaticSampler:
    """The sampler of work with prompts of `prompt_tokens` tokens, `groups` at a time, without stop ids."""
    return StaticSampler(
        config=config, mesh=mesh, seed=0, stop_ids=(), temperature=temperature, prompt_buckets=(prompt_tokens,),
        groups_per_call={Role.SEARCH: groups},
    )  # fmt: skip


def make_requests(work: Work, seed: int) -> GroupRequests:
    U, P = work.prompt_UxP.shape
    id_Ux6 = np.zeros((U, 6), np.int32)
    id_Ux6[:] = (Purpose.EVALUATION, seed, 0, 0, Role.SEARCH, 0)
    id_Ux6[:, 2] = np.arange(U)
    return GroupRequests(work.prompt_UxP, np.full(U, P, np.int32), id_Ux6, work.limit_UxC.shape[1], work.longest)


class Spiral:
    def load(self, model: str) -> dict[str, Any]:
        path = pathlib.Path(model)
        self.config = ModelConfig(read_architecture(path))
        self.mesh = jax.make_mesh((1, 1, 1), meshes.AXES, axis_types=(AxisType.Auto,) * 3)
        self.params = hf.load_params(path, self.config, self.mesh)
        self.weights = self._sampler(1, 1, 1.0).prepare({"params": self.params})
        return {
            "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax")},
            "settings": "StaticSampler, all groups of a batch in one call",
        }

    def _sampler(self, prompt_tokens: int, groups: int, temperature: float) -> StaticSampler:
        return make_sampler(self.config, self.mesh, prompt_tokens, groups, temperature)

    def _groups(self, work: Work, groups_per_batch: int, seed: int, temperature: float) -> Groups:
        sampler = self._sampler(work.prompt_UxP.shape[1], groups_per_batch, temperature)
        return sampler.sample(self.weights, make_requests(work, seed))

    def greedy(self, prompt: list[int], tokens: int) -> list[int]:
        work = Work(np.array([prompt], np.int32), np.array([[tokens]], np.int32))
        return self._groups(work, 1, 0, NEARLY_GREEDY).trace_ids(0, 0).tolist()

    def sample(self, work: dict[str, Any], groups_per_batch: int, seed: int) -> int:
        work = Work.from_json(work)
        groups = self._groups(work, groups_per_batch, seed, 1.0)
        if (groups.trace_len_UxC < work.limit_UxC).any():
            raise RuntimeError("traces shorter than their limits")
        return groups.trace_len_UxC.size * work.longest

    def peak_bytes(self, work: dict[str, Any], groups_per_batch: int) -> int:
        """Of the compiled program that samples this work, weights included."""
        requests = make_requests(Work.from_json(work), 0)
        sampler = self._sampler(requests.prompt_UxP.shape[1], groups_per_batch, 1.0)
        memory = (
            static._generate.lower(
                self.weights, requests.prompt_UxP, requests.prompt_len_U, requests.id_Ux6,
                jnp.ones(len(requests), bool), config=self.config, C=requests.traces, G=requests.max_tokens,
                seed=sampler.seed, temperature=sampler.temperature, stop_ids=sampler.stop_ids,
            )
            .compile()
            .memory_analysis()
        )  # fmt: skip
        return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


if __name__ == "__main__":
    serve(Spiral())
