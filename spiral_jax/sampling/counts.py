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
      first_tokens: tokens drawn on admission, one for each trace.
      moves: of groups from slot to slot.
      queue: waiting pieces, added up over the chunks.
      prompt_tokens: of the prompts of all traces that have begun.
      prefilled: of the prompts that were computed for them.
      prefill_computed: the same with padding.
    """

    chunks: int = 0
    rows_computed: int = 0
    rows_live: int = 0
    first_tokens: int = 0
    moves: int = 0
    queue: int = 0
    prompt_tokens: int = 0
    prefilled: int = 0
    prefill_computed: int = 0
    decode_seconds: float = 0.0
    prefill_seconds: float = 0.0

    def metrics(self, programs: int, abandoned: int) -> dict[str, Mean | float]:
        """(sum, count) pairs and counts.

        Args:
          programs: how many are compiled.
          abandoned: groups that have begun, and have not ended.
        """
        padding = self.prefill_computed - self.prefilled
        return {
            "sampling/generated_tokens": float(self.first_tokens + self.rows_live),
            "sampling/row_occupancy": _mean(self.rows_live, self.rows_computed),
            "sampling/prefill_padding": _mean(padding, self.prefill_computed),
            "tokens_per_s/decode": _mean(self.rows_live, self.decode_seconds),
            "tokens_per_s/prefill": _mean(self.prefilled, self.prefill_seconds),
            "sampling/queue_depth": _mean(self.queue, self.chunks),
            "sampling/shared_prompt_tokens": float(self.prompt_tokens - self.prefilled),
            "sampling/prefilled_tokens": float(self.prefilled),
            "sampling/moves": float(self.moves),
            "sampling/chunks": float(self.chunks),
            "sampling/programs": float(programs),
            "sampling/abandoned_groups": float(abandoned),
            "time/decode": self.decode_seconds,
            "time/prefill": self.prefill_seconds,
        }


def _mean(total: float, count: float) -> Mean:
    return Mean(float(total), float(count))
