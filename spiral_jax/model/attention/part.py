"""What one part of an attention gives, forward and backward; every backend speaks in these."""

from __future__ import annotations

from typing import NamedTuple

import jax


class Attended(NamedTuple):
    """Attention of queries to one part of their keys, or to several parts merged.

    Attributes:
      out_BxTxHxE: in the queries' dtype.
      lse_BxHxT: float32, log-sum-exp of the scaled scores of the visible keys.
    """

    out_BxTxHxE: jax.Array
    lse_BxHxT: jax.Array


class Cotangents(NamedTuple):
    """Cotangents of a part's queries, keys and values, each in its input's shape and dtype."""

    q_BxTxHxE: jax.Array
    k_BxSxJxE: jax.Array
    v_BxSxJxE: jax.Array
