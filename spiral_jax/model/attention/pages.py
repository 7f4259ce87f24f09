"""Keys and values in pages, and how rows that are decoded read them: the sampler's cache.

A pool is the pages of one layer on one shard. A sequence of tokens is a row of a table of page
numbers, with a length: tables may name any pages, in any order, and what lies in pages or behind
lengths that no sequence names reaches nothing. Page 0 belongs to nobody: what is to be thrown away
is written there.

A row reads two sequences under one softmax: the prompt of its group, which the rows of a bundle
read together, and its own tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from spiral_jax.model.attention.part import KeyValue, Part, join, split_heads

Pages = dict[str, jax.Array]  # `k`, `v`, and the scales of int8; pages, then heads in front

NOWHERE = 0  # the page that belongs to nobody
# By these names a plan finds in a compiled program what reads prompts, what reads rows' own tokens,
# and what writes their newest.
PROMPTS_SCOPE, OWN_SCOPE, WRITE_SCOPE = "read_prompts", "read_own", "write_newest"


class Sequences(NamedTuple):
    """S sequences of tokens.

    Attributes:
      table_SxT: int32 numbers of their pages; what stands behind a length has no meaning.
      length_S: int32 tokens.
    """

    table_SxT: jax.Array
    length_S: jax.Array


class Bundles(NamedTuple):
    """U bundles: each is up to W rows of one group, which read its prompt together.

    Attributes:
      prompts: what each bundle reads; nothing where its length is 0.
      member_UxW: int32, the row at each place; -1 where there is none.
      place_N: int32, each row's place among the U * W.
    """

    prompts: Sequences
    member_UxW: jax.Array
    place_N: jax.Array


class Places(NamedTuple):
    """Where N rows write their newest tokens, and what they read.

    Attributes:
      runs_N: bool. Rows that do not run write nothing that counts, and read as little as there is.
      own: of each row, its newest token included; at least one token.
    """

    runs_N: jax.Array
    own: Sequences
    bundles: Bundles


class PageBackend(Protocol):
    """Owns the layout of a pool; `begin` and `end` stand around the loop over tokens."""

    def empty(self, pages: int, page: int, J: int, E: int, dtype: jnp.dtype) -> Pages:
        """Zeros; int8 comes with a float32 scale for each (token, head)."""

    def write_prompts(self, pages: Pages, new: KeyValue, table_WxT: jax.Array) -> Pages:
        """Writes W prompts [W, S, J, E] whole, in place; the S tokens fill at most T pages."""

    def begin(self, pages: Pages, places: Places) -> Any:
        """What the loop carries in place of the pages; `places` of its first step."""

    def step(self, view: Any, q_NxHxE: jax.Array, new: KeyValue, places: Places) -> Any:
        """Writes the newest tokens [N, J, E] of rows, and attends: ([N, H, E], view)."""

    def end(self, view: Any, own_table_NxT: jax.Array) -> Pages:
        """The pages after the loop."""


def attend_two_parts(
    q_NxHxE: jax.Array,
    J: int,
    bundles: Bundles,
    attend_prompts: Callable[[jax.Array], Part],
    attend_own: Callable[[jax.Array], Part],
) -> jax.Array:
    """One query of each of N rows, over its group's prompt and over its own tokens; [N, H, E].

    Args:
      attend_prompts: scaled queries [U, J, W * H / J, E] of the bundles to their prompts.
      attend_own: scaled queries [N, J, H / J, E] of the rows to their own tokens.
    """
    N, H, E = q_NxHxE.shape
    U, W = bundles.member_UxW.shape
    q_NxJxRxE = split_heads(q_NxHxE, J)

    # Queries of all rows of a bundle are rows of one product with the prompt's keys.
    by_bundle = jnp.swapaxes(q_NxJxRxE[bundles.member_UxW], 1, 2).reshape(U, J, -1, E)

    def of_rows(a_UxJxWRx: jax.Array) -> jax.Array:
        split = a_UxJxWRx.reshape(U, J, W, H // J, *a_UxJxWRx.shape[3:])
        by_place = jnp.swapaxes(split, 1, 2).reshape(U * W, J, H // J, *a_UxJxWRx.shape[3:])
        return by_place[bundles.place_N]

    with jax.named_scope(PROMPTS_SCOPE):
        of_prompt = jax.tree.map(of_rows, attend_prompts(by_bundle))
    with jax.named_scope(OWN_SCOPE):
        of_own = attend_own(q_NxJxRxE)
    return join(of_prompt, of_own).output(q_NxHxE.dtype).reshape(N, H, E)
