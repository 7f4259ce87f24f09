"""What a sampler is: group requests in, completed groups out.

The static sampler (`static.py`) is one implementation, the tests' fake that needs no model is another.
"""

from __future__ import annotations

from typing import Any, Protocol

from spiral_jax.groups import GroupRequests, Groups


class Sampler(Protocol):
    """Turns requests into completed groups; a pure function of (weights, requests)."""

    def prepare(self, variables: dict[str, Any]) -> Any:
        """Lays out the policy's variables for decoding: called once after each update."""

    def sample(self, weights: Any, requests: GroupRequests) -> Groups:
        """Samples `requests.traces` traces for each group, in the order of the requests."""
