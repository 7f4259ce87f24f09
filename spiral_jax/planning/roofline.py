"""The least time that a chip needs to compute, read and send, when all three overlap."""

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
    """Seconds of a cost on one of so many chips.

    All that is sent goes over the ring of one mesh axis, or over the slower network where there are
    more chips than are near each other.
    """
    is_far = chip.near and chips > chip.near
    link_bytes_per_s = chip.far_bytes_per_s if is_far else chip.link_bytes_per_s
    return Roofline(
        compute=cost.flops / chip.flops_per_s,
        hbm=cost.hbm_bytes / chip.hbm_bytes_per_s,
        links=cost.all_sent_bytes / link_bytes_per_s,
    )
