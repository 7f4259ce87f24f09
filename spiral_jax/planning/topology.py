"""What may be rented: TPU slices, which libtpu describes without a TPU, and GPUs, known by the
numbers below alone.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

from jax.experimental import topologies

from spiral_jax.core.config import ConfigError
from spiral_jax.model.flops import PEAK_FLOPS_PER_S

GB, GIB = 1e9, 2**30
INSTALL = "pip install -r requirements-plan.txt"


@dataclasses.dataclass(frozen=True)
class Chip:
    """Numbers of one chip, from its vendor's data sheet.

    Attributes:
      flops_per_s: dense bfloat16.
      hbm_bytes: that programs may use.
      hbm_bytes_per_s: of reading and writing together.
      link_bytes_per_s: that a chip sends on a ring along one axis of the mesh, to both of its
      neighbours together.
      far_bytes_per_s: the same beyond `near` chips; 0 where all links are alike.
      dimensions: of a TPU slice; 0 for GPUs.
    """

    name: str
    flops_per_s: float
    hbm_bytes: int
    hbm_bytes_per_s: float
    link_bytes_per_s: float
    far_bytes_per_s: float = 0.0
    near: int = 0
    dimensions: int = 0


# TPUs: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}. Memory is what the compiler says that it has
# (its error message when a program is too large), a little less than the data sheet's 32, 16, 95
# and 32 GB. Links: the data sheet's bidirectional interconnect bandwidth a chip, 600, 400, 1200 and
# 800 GB/s over 6, 4, 6 and 4 ports; a ring uses two ports, each one way. GPUs: NVIDIA's data sheets
# of H100 SXM, H200 SXM and HGX B200, memory less 5 % for CUDA and NCCL, NVLink one way, and beyond
# 8 GPUs one 400 Gb/s network card for each.
CHIPS = {
    "v4": Chip(
        "TPU v4", PEAK_FLOPS_PER_S["TPU v4"], int(30.75 * GIB), 1228 * GB, 100 * GB, dimensions=3
    ),
    "v5e": Chip(
        "TPU v5e", PEAK_FLOPS_PER_S["TPU v5e"], int(15.75 * GIB), 819 * GB, 100 * GB, dimensions=2
    ),
    "v5p": Chip(
        "TPU v5p", PEAK_FLOPS_PER_S["TPU v5p"], int(95.74 * GIB), 2765 * GB, 200 * GB, dimensions=3
    ),
    "v6e": Chip(
        "TPU v6e", PEAK_FLOPS_PER_S["TPU v6e"], int(31.25 * GIB), 1638 * GB, 200 * GB, dimensions=2
    ),
    "h100": Chip(
        "NVIDIA H100",
        PEAK_FLOPS_PER_S["NVIDIA H100 80GB HBM3"],
        int(76 * GB),
        3350 * GB,
        450 * GB,
        50 * GB,
        8,
    ),
    "h200": Chip(
        "NVIDIA H200",
        PEAK_FLOPS_PER_S["NVIDIA H200"],
        int(134 * GB),
        4800 * GB,
        450 * GB,
        50 * GB,
        8,
    ),
    "b200": Chip(
        "NVIDIA B200",
        PEAK_FLOPS_PER_S["NVIDIA B200"],
        int(171 * GB),
        7700 * GB,
        900 * GB,
        50 * GB,
        8,
    ),
}
KNOWN = (
    "TPU slices v4:AxBxC, v5p:AxBxC, v5e:AxB, v6e:AxB (v5e:8x8 has 64 chips; libtpu knows those that can be rented), "
    "and GPUs h100:N, h200:N, b200:N"
)


@dataclasses.dataclass(frozen=True)
class Topology:
    """`devices`: what programs are compiled for; None for GPUs, which are planned by arithmetic
    alone.
    """

    name: str
    chip: Chip
    chips: int
    devices: list[Any] | None


def find_topology(name: str) -> Topology:
    """The slice or cluster of that name, such as "v5p:4x4x4" or "h100:8".

    Raises:
      ConfigError: it is not known, or libtpu is needed and not installed.
    """
    kind, _, shape = name.partition(":")
    chip = CHIPS.get(kind)
    if chip is None or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise ConfigError(f"--topology={name}: unknown. Known are {KNOWN}.")
    sizes = [int(size) for size in shape.split("x")]
    if len(sizes) != (chip.dimensions or 1):
        raise ConfigError(
            f"--topology={name}: {kind} has {chip.dimensions or 1} dimensions. Known are {KNOWN}."
        )
    if not chip.dimensions:
        return Topology(name, chip, sizes[0], None)
    return Topology(name, chip, math.prod(sizes), _tpu_devices(name))


def _tpu_devices(name: str) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"--topology={name}: programs for TPUs are compiled by libtpu, which needs no TPU: {INSTALL}"
        )
    os.environ.setdefault(
        "TPU_SKIP_MDS_QUERY", "1"
    )  # else it asks a metadata server that is not there
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:  # whatever class the plugin chooses
        reason = str(error).strip().splitlines()[0]
        if "lockfile" in reason or "in use" in reason:
            raise ConfigError(
                f"--topology={name}: one process at a time may use libtpu: {reason}"
            ) from error
        raise ConfigError(
            f"--topology={name}: libtpu does not know it ({reason}). Known are {KNOWN}."
        ) from error
