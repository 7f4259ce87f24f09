"""What decoding reads at a random moment: tokens that are used, under lengths that are stated.

Lengths of a role's traces are taken as uniform around their mean, as wide as the limit allows: with
a mean of half the limit from 0 to the limit, with a mean at the limit all equal. A running row is
more likely one of the long traces, and somewhere in the middle of it: it holds E[G^2] / (2 E[G])
tokens, a third of the limit in the first case and half of it in the second. Rows of a group begin
together and read its prompt together until they end, the longest last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from spiral_jax.core.groups import Role
from spiral_jax.planning.work import Work
from spiral_jax.sampling.settings import Schedule


@dataclasses.dataclass(frozen=True)
class Usage:
    """Of one shard. Means are over the rows that run.

    Attributes:
      rows: that draw a token at once.
      bound: what bounds them: "rows" or "pages".
      pages_a_row: that a row holds, its share of its group's prompt and of growth among them.
      own: tokens of its own that a row reads.
      prompt: tokens of its group's prompt, to which it attends.
      bundles_a_row: bundles, each of which reads a prompt once.
      prompt_read: tokens of prompts that are read for a row.
      longest_trace, longest_prompt: tokens, of the role that has longer ones.
    """

    rows: float
    bound: str
    pages_a_row: float
    own: float
    prompt: float
    bundles_a_row: float
    prompt_read: float
    longest_trace: int
    longest_prompt: int

    @property
    def tokens_read(self) -> float:
        """Tokens of keys and values that one step reads."""
        return self.rows * (self.own + self.prompt_read)


def usage_of(works: Sequence[Work], schedule: Schedule, row_occupancy: float) -> Usage:
    """How the rows of a shard are used.

    Args:
      works: what a step samples.
      row_occupancy: rows that draw a token, as a share of all, where pages do not bound them.
    """
    tokens = sum(work.sampled_tokens for work in works)
    share = {work.role: work.sampled_tokens / tokens for work in works}

    def mean(values: dict[Role, float]) -> float:
        return sum(share[role] * value for role, value in values.items())

    own = mean({work.role: held_tokens(work) for work in works})
    # prompts that a running row's group, or its bundle, keeps: a share of one
    groups = {work.role: _prompts_a_row(work, work.traces) for work in works}
    bundles = {work.role: _prompts_a_row(work, min(work.traces, schedule.width)) for work in works}
    own_pages = (own + schedule.chunk / 2) / schedule.page + 0.5  # the last one is half full
    prompt_pages = mean(
        {work.role: groups[work.role] * schedule.pages_of(work.prompt) for work in works}
    )
    # what stays free, so that the oldest rows can end
    reserved = schedule.together * max(0.0, schedule.own_pages - own_pages)
    by_rows = row_occupancy * schedule.rows[-1]
    by_pages = (schedule.pages - 1 - reserved) / (own_pages + prompt_pages)
    return Usage(
        rows=max(1.0, min(by_rows, by_pages)),
        bound="rows" if by_rows <= by_pages else "pages",
        pages_a_row=own_pages + prompt_pages,
        own=own,
        prompt=mean({work.role: work.prompt for work in works}),
        bundles_a_row=mean(bundles),
        prompt_read=mean({work.role: bundles[work.role] * work.prompt for work in works}),
        longest_trace=max(work.limit for work in works),
        longest_prompt=max(work.prompt for work in works),
    )


def held_tokens(work: Work) -> float:
    """Mean tokens of its own that a running row holds."""
    width = _width(work)
    return work.response / 2 + width**2 / (24 * work.response)


def _prompts_a_row(work: Work, together: int) -> float:
    """Prompts that are kept for a running row, by so many traces that begin together.

    They are kept until the longest ends.
    """
    longest = work.response + _width(work) * (together / (together + 1) - 0.5)
    return longest / (together * work.response)


def _width(work: Work) -> int:
    """Of the interval of a role's lengths."""
    return max(0, 2 * min(work.response, work.limit - work.response))
