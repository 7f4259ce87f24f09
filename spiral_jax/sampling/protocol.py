"""What a sampler is: it takes groups from a feed, and returns each when its last trace has ended.

    sampling = sampler.stream(weights, feed)
    for now in sampling:             # once a chunk, before anything is admitted at this time
        ...                          # the feed's state may change here; `break` abandons the rest
    sampling.metrics()

The engine (`engine.py`) is one implementation, the tests' script that needs no model is another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, Protocol

from spiral_jax.core.groups import GroupRequests, Groups, concat_groups
from spiral_jax.core.metrics import Mean


class Feed(Protocol):
    """Where groups come from and where they go to.

    `now` is virtual time: decode chunks since the start, never a clock.
    """

    def next(self, now: int) -> GroupRequests | None:
        """The next group to admit (U = 1), in this order; None if there is none at this time."""

    def done(self, group: Groups, now: int) -> None:
        """Takes a completed group (U = 1)."""

    def finished(self) -> bool:
        """Whether nothing more is wanted; what still runs is then abandoned.

        A pure question, asked once a chunk, after the consumer has had its turn.
        """


class Sampling(Protocol):
    """One call of `Sampler.stream` under way."""

    def __iter__(self) -> Iterator[int]:
        """Yields `now` once a chunk until the feed is finished; the work is done in between."""

    def metrics(self) -> dict[str, Mean | float]:
        """What is counted so far, `sampling/generated_tokens` (abandoned ones too) among it."""


class Sampler(Protocol):
    """Samples groups.

    What comes out, and when in virtual time, is a pure function of the weights and the feed.
    """

    def prepare(self, variables: dict[str, Any]) -> Any:
        """Lays out the policy's variables for decoding: called once after each update."""

    def stream(self, weights: Any, feed: Feed) -> Sampling:
        """Begins to sample what `feed` gives; whoever iterates over the result drives it."""


class _RequestsFeed:
    """A feed of requests that are all there from the start."""

    def __init__(self, requests: GroupRequests):
        self._waiting = deque(range(len(requests)))
        self._requests = requests
        self.groups: dict[tuple[int, ...], Groups] = {}  # by id

    def next(self, now: int) -> GroupRequests | None:
        return self._requests.take([self._waiting.popleft()]) if self._waiting else None

    def done(self, group: Groups, now: int) -> None:
        self.groups[tuple(group.requests.id_Ux6[0].tolist())] = group

    def finished(self) -> bool:
        return len(self.groups) == len(self._requests)


def sample(sampler: Sampler, weights: Any, requests: GroupRequests) -> Groups:
    """Samples all requests and waits for the last; the groups are in the order of the requests.

    Raises:
      ValueError: there are none, or two have the same id, so that they would get the same random
        numbers.
    """
    if len(requests) == 0:
        raise ValueError("requests: none; at least one group must be asked for.")
    ids = [tuple(group_id) for group_id in requests.id_Ux6.tolist()]
    if len(set(ids)) != len(ids):
        raise ValueError(
            "requests.id_Ux6: two groups have the same id, "
            "so they would get the same random numbers."
        )
    feed = _RequestsFeed(requests)
    for _ in sampler.stream(weights, feed):
        pass
    return concat_groups([feed.groups[group_id] for group_id in ids])
