"""What one stream has counted, and what the log says of it."""

from __future__ import annotations

import dataclasses

from spiral_jax.core.metrics import Mean


@dataclasses.dataclass
class Counts:
    """Counts since the start of a stream.

    Attributes:
      chunks: decode chunks.
      rows_computed: rows of all decode steps.
      rows_live: those that drew a token.
      paused: rows that had no page to go on with, added up over the chunks.
      pages: that were in use, added up over the chunks.
      tokens_read: of prompts, once a bundle, and of rows' own, added up over the decode steps.
      waiting: groups that were asked for and not admitted, added up over the chunks.
      prompt_tokens: of the prompts of all traces that have begun.
      prefilled: of the prompts that were computed for them.
      prefill_computed: the same with padding.
    """

    chunks: int = 0
    rows_computed: int = 0
    rows_live: int = 0
    paused: int = 0
    pages: int = 0
    tokens_read: int = 0
    waiting: int = 0
    prompt_tokens: int = 0
    prefilled: int = 0
    prefill_computed: int = 0
    decode_seconds: float = 0.0
    prefill_seconds: float = 0.0

    def metrics(self, programs: int, pages: int, abandoned: int) -> dict[str, Mean | float]:
        """(sum, count) pairs and counts.

        Args:
          programs: how many are compiled.
          pages: of all shards.
          abandoned: groups that have begun, and have not ended.
        """
        padding = self.prefill_computed - self.prefilled
        return {
            "sampling/generated_tokens": float(self.rows_live),
            "sampling/row_occupancy": _mean(self.rows_live, self.rows_computed),
            "sampling/page_occupancy": _mean(self.pages, self.chunks * pages),
            "sampling/paused_rows": _mean(self.paused, self.chunks),
            "sampling/tokens_read": _mean(self.tokens_read, self.rows_live),
            "sampling/prefill_padding": _mean(padding, self.prefill_computed),
            "tokens_per_s/decode": _mean(self.rows_live, self.decode_seconds),
            "tokens_per_s/prefill": _mean(self.prefilled, self.prefill_seconds),
            "sampling/queue_depth": _mean(self.waiting, self.chunks),
            "sampling/shared_prompt_tokens": float(self.prompt_tokens - self.prefilled),
            "sampling/prefilled_tokens": float(self.prefilled),
            "sampling/chunks": float(self.chunks),
            "sampling/programs": float(programs),
            "sampling/abandoned_groups": float(abandoned),
            "time/decode": self.decode_seconds,
            "time/prefill": self.prefill_seconds,
        }


def _mean(total: float, count: float) -> Mean:
    return Mean(float(total), float(count))
