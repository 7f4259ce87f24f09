"""The plain sampler: static batches of groups, prompt keys and values once a group, decoding until the last trace ends.

requests -> batches of one (U, P) shape -> prefill -> first token -> while_loop(decode, draw) -> completed groups
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from spiral_jax import mesh as meshes
from spiral_jax.config import ConfigError
from spiral_jax.groups import GroupRequests, Groups, Role, Stop
from spiral_jax.model.qwen3 import Block, ModelConfig, Transformer, head_kernel, rms_norm
from spiral_jax.sampling.randomness import inverse_cdf, trace_keys, uniforms


@struct.dataclass
class DecodeWeights:
    """The policy as the sampler reads it.

    Attributes:
      stacked: variables with layers [L, ...]: for prefill.
      layers: the same as L separate trees: slicing stacked weights inside the decode loop would copy all of them.
    """

    stacked: dict[str, Any]
    layers: tuple[dict[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class StaticSampler:
    """A `Sampler` that fills fixed shapes.

    Attributes:
      config: the model.
      mesh: groups lie along its data and fsdp axes.
      seed: of the run.
      stop_ids: token ids that end a trace.
      temperature: > 0.
      prompt_buckets: ascending P; a prompt takes the smallest that holds it.
      groups_per_call: U by role.
    """

    config: ModelConfig
    mesh: Mesh
    seed: int
    stop_ids: tuple[int, ...]
    temperature: float
    prompt_buckets: tuple[int, ...]
    groups_per_call: Mapping[Role, int]

    def __post_init__(self) -> None:
        multiple = meshes.group_count_multiple(self.mesh)
        for role, groups in self.groups_per_call.items():
            if groups % multiple:
                raise ConfigError(
                    f"config.sampling.{role.label}_groups = {groups}: must be a multiple of the mesh's data * fsdp = "
                    f"{multiple}."
                )

    def prepare(self, variables: dict[str, Any]) -> DecodeWeights:
        """Separate per-layer weights, replicated over groups and cut along `tensor` only."""
        with jax.set_mesh(self.mesh):
            return _unstack(variables, self.config.arch.L, self.mesh)

    def sample(self, weights: DecodeWeights, requests: GroupRequests) -> Groups:
        """Samples in batches of equal bucket; the result is in the order of the requests.

        Raises:
          ValueError: a prompt is longer than the largest bucket.
        """
        U, C, G = len(requests), requests.traces, requests.max_tokens
        done = Groups(
            requests,
            trace_UxCxG=np.zeros((U, C, G), np.int32),
            trace_len_UxC=np.zeros((U, C), np.int32),
            logprob_UxCxG=np.zeros((U, C, G), np.float32),
            stop_UxC=np.zeros((U, C), np.int32),
        )
        bucket_U = np.searchsorted(self.prompt_buckets, requests.prompt_len_U)
        if (bucket_U == len(self.prompt_buckets)).any():
            raise ValueError(
                f"a prompt of {requests.prompt_len_U.max()} tokens does not fit into the largest of "
                f"config.sampling.prompt_buckets = {list(self.prompt_buckets)}: add a larger one."
            )
        for bucket, P in enumerate(self.prompt_buckets):
            index = np.flatnonzero(bucket_U == bucket)
            size = self.groups_per_call[Role(requests.id_Ux6[0, 4])] if len(index) else 1
            for start in range(0, len(index), size):
                self._sample_batch(weights, requests, index[start : start + size], P, size, done)
        return done

    def _sample_batch(
        self, weights: DecodeWeights, requests: GroupRequests, index: np.ndarray, P: int, size: int, done: Groups
    ) -> None:
        """Samples the groups at `index` into `done`; a batch is `size` groups, padded with dead ones."""
        prompt_UxP = np.zeros((size, P), np.int32)
        width = min(P, requests.prompt_UxP.shape[1])
        prompt_UxP[: len(index), :width] = requests.prompt_UxP[index, :width]
        prompt_len_U = np.ones(size, np.int32)
        prompt_len_U[: len(index)] = requests.prompt_len_U[index]
        id_Ux6 = np.zeros((size, 6), np.int32)
        id_Ux6[: len(index)] = requests.id_Ux6[index]
        live_U = np.arange(size) < len(index)
        place = functools.partial(jax.device_put, device=meshes.group_sharding(self.mesh))
        with jax.set_mesh(self.mesh):
            out = _generate(
                weights, place(prompt_UxP), place(prompt_len_U), place(id_Ux6), place(live_U),
                config=self.config, C=requests.traces, G=requests.max_tokens, seed=self.seed,
                temperature=self.temperature, stop_ids=self.stop_ids,
            )  # fmt: skip
        trace, length, logprob, stopped = jax.device_get(out)
        n = len(index)
        done.trace_UxCxG[index] = trace[:n]
        done.trace_len_UxC[index] = length[:n]
        done.logprob_UxCxG[index] = logprob[:n]
        done.stop_UxC[index] = np.where(stopped[:n], Stop.STOP, Stop.LENGTH)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _unstack(variables: dict[str, Any], L: int, mesh: Mesh) -> DecodeWeights:
    stacked = {name: tree["layers"] for name, tree in variables.items() if "layers" in tree}
    layers = []
    for layer in range(L):
        tree = jax.tree.map(lambda a: a[layer], stacked)  # noqa: B023
        shardings = {name: meshes.weight_shardings({"layers": part}, mesh, decode=True) for name, part in tree.items()}
        layers.append({n: jax.lax.with_sharding_constraint(part, shardings[n]["layers"]) for n, part in tree.items()})
    return DecodeWeights(stacked=variables, layers=tuple(layers))


@functools.partial(jax.jit, static_argnames=("config", "C", "G", "seed", "temperature", "stop_ids"))
def _generate(
    weights: DecodeWeights,
    prompt_UxP: jax.Array,
    prompt_len_U: jax.Array,
    id_Ux6: jax.Array,
    live_U: jax.Array,
    *,
    config: ModelConfig,
    C: int,
    G: int,
    seed: int,
    temperature: float,
    stop_ids: tuple[int, ...],
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Prefill, then decode until every trace of a live group has ended.

    Returns:
      trace [U, C, G] int32, its length [U, C], log-probs [U, C, G] float32, and whether a stop id ended it [U, C].
    """
    U, params = prompt_UxP.shape[0], weights.stacked["params"]
    keys_UxC = trace_keys(seed, id_Ux6, C)
    kernel_DxV = head_kernel(config, params).astype(config.compute_dtype)
    with jax.named_scope("prefill"):
        hidden, prompt_kv = Transformer(config, keep_keys=True).apply(weights.stacked, prompt_UxP, prompt_len_U, None)
        last_UxD = jnp.take_along_axis(hidden, (prompt_len_U - 1)[:, None, None], axis=1)[:, 0]
    prompt_kv = [(prompt_kv[0][layer], prompt_kv[1][layer]) for layer in range(config.arch.L)]

    def draw(hidden_UxCxD: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = jnp.einsum("ucd,dv->ucv", hidden_UxCxD, kernel_DxV, preferred_element_type=jnp.float32)
        return inverse_cdf(logits, uniforms(keys_UxC, g), temperature)

    def record(state: dict[str, Any], token: jax.Array, logprob: jax.Array) -> dict[str, Any]:
        """Appends a token to every trace that has not ended."""
        g, running = state["g"], ~state["ended"]
        stops = functools.reduce(jnp.logical_or, [token == stop for stop in stop_ids], jnp.zeros_like(running))
        return state | {
            "g": g + 1,
            "token": jnp.where(running, token, 0),
            "trace": state["trace"].at[:, :, g].set(jnp.where(running, token, 0)),
            "logprob": state["logprob"].at[:, :, g].set(jnp.where(running, logprob, 0.0)),
            "length": state["length"] + running,
            "ended": state["ended"] | stops,
            "stopped": state["stopped"] | (running & stops),
        }

    def step(state: dict[str, Any]) -> dict[str, Any]:
        x = params["embed"][state["token"]].astype(config.compute_dtype)
        at_U = jnp.broadcast_to(state["g"] - 1, (U,))
        cache = []
        for layer, kv, own in zip(weights.layers, prompt_kv, state["cache"], strict=True):
            x, own = Block(config).apply(layer, x, at_U, prompt_len_U, kv, own, method="decode")
            cache.append(own)
        x = rms_norm(x, params["final_norm"], config.arch.norm_eps)
        return record(state | {"cache": cache}, *draw(x, state["g"]))

    empty = functools.partial(jnp.zeros, (U, C, G, config.arch.J, config.arch.E), config.compute_dtype)
    state = {
        "g": jnp.zeros((), jnp.int32),
        "token": jnp.zeros((U, C), jnp.int32),
        "trace": jnp.zeros((U, C, G), jnp.int32),
        "logprob": jnp.zeros((U, C, G), jnp.float32),
        "length": jnp.zeros((U, C), jnp.int32),
        "ended": jnp.broadcast_to(~live_U[:, None], (U, C)),
        "stopped": jnp.zeros((U, C), bool),
        "cache": [(empty(), empty()) for _ in range(config.arch.L)],
    }
    state = record(state, *draw(jnp.broadcast_to(last_UxD[:, None], (U, C, last_UxD.shape[-1])), state["g"]))
    state = jax.lax.while_loop(lambda s: (s["g"] < G) & ~jnp.all(s["ended"]), step, state)
    return state["trace"], state["length"], state["logprob"], state["stopped"]
