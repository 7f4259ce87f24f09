"""The least time that a chip needs for what a program computes, reads and sends, when all three
overlap.
"""

from __future__ import annotations

import dataclasses

from spiral_jax.planning.costs import Cost
from spiral_jax.planning.topology import Chip


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of each resource; the largest bounds the program."""

    compute: float
    hbm: float
    links: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.hbm, self.links)

    @property
    def bound(self) -> str:
        return max(("compute", "hbm", "links"), key=lambda name: getattr(self, name))


def roofline(cost: Cost, chip: Chip, chips: int) -> Roofline:
    """Links: all that is sent goes over the ring of one mesh axis; over the slower network if the
    chips are `far`.
    """
    far = chip.near and chips > chip.near
    links = chip.far_bytes_per_s if far else chip.link_bytes_per_s
    return Roofline(
        cost.flops / chip.flops_per_s,
        cost.hbm_bytes / chip.hbm_bytes_per_s,
        cost.all_sent_bytes / links,
    )
