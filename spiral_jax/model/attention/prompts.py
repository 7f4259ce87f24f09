"""Causal attention of prompts that are computed chunk by chunk: in prefill, without a derivative.

A chunk's queries see all chunks before theirs and their own past. What was seen is stored as the
backend reads it, and is written to the sampler's pages when the prompt is whole.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from spiral_jax.model.attention.caches import prefix_attention
from spiral_jax.model.attention.kernels import Kernels
from spiral_jax.model.attention.part import KeyValue
from spiral_jax.model.cache import Cache, cache_entries, empty_cache, write_entries


class PromptBackend(Protocol):
    """Stores keys and values of U prompts, and attends to them."""

    def empty(self, U: int, P: int, J: int, E: int, dtype: jnp.dtype) -> Any:
        """A store for prompts of up to P tokens."""

    def attend(
        self,
        store: Any,
        q_UxTxHxE: jax.Array,
        new: KeyValue,
        start: jax.Array,
        prompt_len_U: jax.Array,
    ) -> tuple[jax.Array, Any]:
        """Attention [U, T, H, E] of a chunk's queries, and the store with its keys and values.

        Args:
          new: [U, T, J, E].
          start: scalar int32, a multiple of T: the first token's place in the prompt.
        """

    def written(self, store: Any) -> KeyValue:
        """Keys and values [U, P, J, E] of all that it stores."""


@dataclasses.dataclass(frozen=True)
class XlaPrompts:
    """Stored heads first; blocks behind the last query are not read."""

    def empty(self, U: int, P: int, J: int, E: int, dtype: jnp.dtype) -> Cache:
        return empty_cache((U, J), E, P, dtype)

    def attend(
        self,
        store: Cache,
        q_UxTxHxE: jax.Array,
        new: KeyValue,
        start: jax.Array,
        prompt_len_U: jax.Array,
    ) -> tuple[jax.Array, Cache]:
        del prompt_len_U  # causality hides the padding from every real query
        store = write_entries(store, cache_entries(new.k, new.v, store["k"].dtype), start)
        return prefix_attention(q_UxTxHxE, store, start), store

    def written(self, store: Cache) -> KeyValue:
        return KeyValue(jnp.moveaxis(store["k"], -1, 1), jnp.moveaxis(store["v"], -2, 1))


@dataclasses.dataclass(frozen=True)
class KernelPrompts:
    """Keys and values are stored as they are projected: kernels read them without a transpose."""

    kernels: Kernels

    def empty(self, U: int, P: int, J: int, E: int, dtype: jnp.dtype) -> KeyValue:
        zeros = jnp.zeros((U, P, J, E), dtype)
        return KeyValue(zeros, zeros)

    def attend(
        self,
        store: KeyValue,
        q_UxTxHxE: jax.Array,
        new: KeyValue,
        start: jax.Array,
        prompt_len_U: jax.Array,
    ) -> tuple[jax.Array, KeyValue]:
        if new.k.shape == store.k.shape:  # one chunk: nothing comes before it
            return self.kernels.attend_chunk(q_UxTxHxE, new, None, start, prompt_len_U), new
        attended = self.kernels.attend_chunk(q_UxTxHxE, new, store, start, prompt_len_U)
        k = jax.lax.dynamic_update_slice_in_dim(store.k, new.k, start, axis=1)
        v = jax.lax.dynamic_update_slice_in_dim(store.v, new.v, start, axis=1)
        return attended, KeyValue(k, v)

    def written(self, store: KeyValue) -> KeyValue:
        return store
